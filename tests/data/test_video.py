"""Which frames of a video are taken, from any container, and what is said of bad files."""

from __future__ import annotations

import sys

import numpy as np
import pytest

av = pytest.importorskip('av', reason='needs the extra [video]')
video_files = pytest.importorskip('video_files')

from vlm_compress.config import ConfigError  # noqa: E402
from vlm_compress.data import images, video  # noqa: E402
from vlm_compress.data.errors import DataError  # noqa: E402
from vlm_compress.data.video import _Packet, _Span, middles, read_frames, spans_of  # noqa: E402


def numbers(path, count):
  """Which frames were taken, by their colours, which must be near."""
  found = []
  for picture in read_frames(path, count):
    assert picture.mode == 'RGB' and picture.size == (64, 64)
    mean = np.asarray(picture, np.float64).mean((0, 1))
    away = [np.abs(mean - video_files.colour(i)).max() for i in range(32)]
    assert min(away) < 4, mean  # colours are 8 apart
    found.append(int(np.argmin(away)))
  return found


@pytest.mark.parametrize('name, options', [
    ('a.mp4', {'b_frames': 2}), ('b.avi', {}), ('c.mkv', {'b_frames': 2, 'gop': 5}),
    ('d.flv', {'codec': 'flv'}),
    ('e.ts', {'codec': 'mpeg2video', 'b_frames': 2, 'rate': 25}),
    ('f.mkv', {'codec': 'ffv1', 'pix_fmt': 'bgr0'}), ('g.mp4', {'gop': 300, 'b_frames': 2})])
def test_middles_of_equal_spans_from_any_container(tmp_path, name, options):
  path = video_files.write_video(tmp_path / name, 30, **options)
  assert numbers(path, 5) == [3, 9, 15, 21, 27]
  assert numbers(path, 3) == [5, 15, 25]
  assert numbers(path, 1) == [15]
  assert numbers(path, 30) == list(range(30))


def test_without_losses_the_pictures_are_the_frames(tmp_path):
  frames = video_files.noise(3, 6)
  path = video_files.write_video(tmp_path / 'a.mkv', frames, codec='ffv1', pix_fmt='bgr0')
  for found, index in zip(read_frames(path, 3), (1, 3, 5), strict=True):
    np.testing.assert_array_equal(np.asarray(found), frames[index])


def test_short_videos_repeat_what_is_shown(tmp_path):
  # Middles at 0.1, 0.3, ... of the time; the second frame begins at 0.5.
  assert numbers(video_files.write_video(tmp_path / 'a.mp4', 2), 5) == [0, 0, 1, 1, 1]
  assert numbers(video_files.write_video(tmp_path / 'b.mp4', 1), 3) == [0, 0, 0]


def test_time_counts_and_not_the_number_of_a_frame(tmp_path):
  # Shown at 0, 1, 2 and 10 of 11: middles at 1.4, 4.1, 6.9, 9.6.
  path = video_files.write_video(tmp_path / 'a.mkv', 4, codec='ffv1', pix_fmt='bgr0',
                                 times=(0, 1, 2, 10))
  assert numbers(path, 4) == [1, 2, 2, 2]


def test_middles_by_hand():
  assert middles([0, 1, 2, 10], 20, 4) == [2, 2, 10, 10]  # 2.5, 7.5, 12.5, 17.5
  assert middles([100, 101, 102], 103, 2) == [100, 102]  # 100.75, 102.25
  assert middles([5], 5, 2) == [5, 5]


def test_what_has_to_be_decoded_by_hand():
  # Two key frames; packet 5 is shown before the key frame in front of it.
  times, keys = [0, 2, 1, 3, 6, 5, 4, 7], {0, 4}
  packets = [_Packet(t, 1, i in keys, True) for i, t in enumerate(times)]
  assert spans_of(packets, [1, 7]) == [_Span(0, 2, [1]), _Span(4, 7, [7])]
  assert spans_of(packets, [5, 7]) == [_Span(0, 7, [5, 7])]
  assert spans_of(packets, [0, 0, 6]) == [_Span(0, 0, [0, 0]), _Span(4, 4, [6])]
  # A first packet that is no key frame is begun with all the same.
  assert spans_of(packets[1:4], [3]) == [_Span(0, 2, [3])]


def test_only_what_is_needed_is_decoded(tmp_path):
  path = video_files.write_video(tmp_path / 'a.mp4', [np.full((16, 16, 3), i % 7 * 30, np.uint8)
                                                      for i in range(300)], gop=10)
  with av.open(str(path)) as file:
    packets = video._packets(file, file.streams.video[0], path)
  assert len(packets) == 300
  spans = spans_of(packets, middles([p.time for p in packets], packets[-1].time, 4))
  assert len(spans) == 4 and sum(s.last + 1 - s.first for s in spans) <= 40


def refused(path, message, count=4):
  with pytest.raises(DataError, match=message) as error:
    list(read_frames(path, count))
  assert str(path) in str(error.value)


def test_what_is_no_video(tmp_path):
  def file(name, content):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name
  refused(file('text.mp4', b'no video at all\n' * 99), 'not a video in one of the formats')
  refused(file('empty.mp4', b''), 'empty.mp4: the file is empty')
  refused(tmp_path / 'gone.mp4', 'no such file.*fetch the videos again')
  refused(tmp_path, 'is a directory; name a video in it')
  from PIL import Image
  Image.new('RGB', (8, 8)).save(tmp_path / 'p.png')
  refused(tmp_path / 'p.png', 'not a video')
  # Lists of other files and addresses are not followed.
  video_files.write_video(tmp_path / 'a.ts', 12, codec='mpeg2video', rate=25)
  refused(file('list.mp4', b'#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\na.ts\n'
               b'#EXT-X-ENDLIST\n'), 'not a video')
  refused(file('concat.mp4', b"ffconcat version 1.0\nfile 'a.ts'\n"), 'not a video')


def test_sound_alone(tmp_path):
  path = tmp_path / 'sound.avi'
  with av.open(str(path), 'w') as file:
    stream = file.add_stream('pcm_s16le', rate=8000, layout='mono')
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format='s16', layout='mono')
    frame.sample_rate = 8000
    file.mux(stream.encode(frame))
    file.mux(stream.encode())
  refused(path, 'sound.avi: has no video stream')


@pytest.mark.parametrize('name, share, options', [
    ('a.mp4', 0.5, {}), ('b.mp4', 0.6, {'container': {'movflags': 'faststart'}}),
    ('c.avi', 0.5, {}), ('d.mkv', 0.5, {}), ('d.mkv', 0.7, {'frames': 60}),
    ('e.flv', 0.5, {'codec': 'flv'})])
def test_cut_off(tmp_path, name, share, options):
  options = dict(options)
  frames = video_files.noise(1, options.pop('frames', 30))
  path = video_files.write_video(tmp_path / name, frames, **options)
  assert len(list(read_frames(path, 3))) == 3
  content = path.read_bytes()
  path.write_bytes(content[:int(share * len(content))])
  refused(path, 'cut off|no video stream')


@pytest.mark.parametrize('codec, pix_fmt', [('mpeg4', 'yuv420p'), ('ffv1', 'bgr0')])
def test_frames_that_cannot_be_decoded(tmp_path, codec, pix_fmt):
  path = video_files.write_video(tmp_path / 'a.mkv', video_files.noise(2, 12), codec=codec,
                                 pix_fmt=pix_fmt)
  content = bytearray(path.read_bytes())
  with av.open(str(path)) as file:
    for packet in file.demux(video=0):
      if packet.size:
        at = content.find(bytes(packet))
        content[at:at + packet.size] = bytes(packet.size)
  path.write_bytes(content)
  refused(path, 'the video is damaged or cut off')


def test_frames_without_a_time(tmp_path, monkeypatch):
  path = video_files.write_video(tmp_path / 'a.mp4', 3)
  monkeypatch.setattr(video, '_time', lambda frame: None)  # as a decoder may leave it
  refused(path, 'a frame is without a time')


def test_too_large(tmp_path, monkeypatch):
  wide = video_files.write_video(tmp_path / 'wide.avi', [np.zeros((16, 16_016, 3), np.uint8)] * 2,
                                 codec='mjpeg', pix_fmt='yuvj420p')
  refused(wide, 'a side of 16016 pixels, more than the limit of 16000')
  path = video_files.write_video(tmp_path / 'a.mp4', 3)
  monkeypatch.setattr(images, 'MAX_PIXELS', 4000)
  refused(path, '64 x 64 pixels, more than the limit of 4000')


def test_without_the_package(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'av', None)
  with pytest.raises(ConfigError, match=r"a\.mp4: reading videos needs.*'vlm_compress\[video\]'"):
    next(read_frames(tmp_path / 'a.mp4'))
  with pytest.raises(ConfigError, match='frames=0: at least 1'):
    next(read_frames(tmp_path / 'a.mp4', 0))
