"""Frames of a video, spread uniformly over its time.

The rule (ours; LLaVA-1.5 has none, and papers on videos differ): the video's time, from
its first frame's to the end of its last one's, is cut into F equal spans, and the frame
that is shown in the middle of each is taken.  A video of fewer than F frames gives some
of them several times, as often as they are shown in such a middle, so that every
question has F pictures.  A rotation or a pixel shape that the file notes is not applied,
as with pictures.

Memory does not grow with the length of a video, but for a few numbers per frame: its
packets are read twice, first for their times only; then the chosen frames are decoded,
each from the key frame in front of it, and one at a time becomes a picture.  Why packets
and no seeking: containers without an index seek to wrong places, and what a header says
about the number of frames is often wrong.

Videos come from outside, as pictures do (images.py): only common containers, since some
of FFmpeg's readers open other files and addresses that the file names; limits on width
and height; and one `DataError` with the file's name for whatever a damaged file provokes.
"""

from __future__ import annotations

import bisect
import importlib
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image

from vlm_compress.config import ConfigError, check_whole
from vlm_compress.data import images
from vlm_compress.data.errors import DataError

NUM_FRAMES = 8
# FFmpeg's names of containers: mp4 and mov, mkv and webm, avi, flv, wmv, mpg, ts.
FORMATS = ('mov', 'mp4', 'matroska', 'webm', 'avi', 'flv', 'asf', 'mpeg', 'mpegts')
# A file that ends this much before its header says, and by more than a second, is cut
# off.  Sound may be a little longer than the picture.
_LACKING = 0.1
_MICROSECONDS = 1_000_000  # unit of a container's duration


class _Packet(NamedTuple):
  """Of an encoded frame: when it is shown and for how long, in the stream's units of
  time; whether decoding can start here; whether it is shown at all.
  """
  time: int
  duration: int
  key: bool
  shown: bool


class _Span(NamedTuple):
  """Packets first..last, in the file's order, that the frames at `times` need."""
  first: int
  last: int
  times: list[int]


def check_installed(what: str | os.PathLike = 'videos') -> Any:
  """PyAV's module.

  Args:
    what: needs it, for the error.

  Raises:
    ConfigError: it is not installed.
  """
  try:
    return importlib.import_module('av')
  except ImportError as error:
    raise ConfigError(f"{what}: reading videos needs the package av: pip install "
                      f"'vlm_compress[video]' ({error})") from error


def read_frames(path: str | os.PathLike, count: int = NUM_FRAMES) -> Iterator[Image.Image]:
  """Frames of a video in the order of time, as RGB pictures of its size.

  Args:
    path: of the file.
    count: F, how many; a short video repeats some.

  Yields:
    F pictures.

  Raises:
    ConfigError: the package av is not installed.
    DataError: no file or an empty one, no video in one of FORMATS, without a video
      stream, cut off, damaged, or larger than pictures may be.
  """
  check_whole('frames', count, 1)
  av = check_installed(path)
  path = pathlib.Path(os.path.abspath(path))  # never an address
  if images.file_size(path, 'video') == 0:
    raise DataError(f'{path}: the file is empty; fetch the video again or remove it')
  try:
    with _opened(av, path) as container:
      packets = _packets(container, _stream(av, container, path), path)
    shown = sorted(p for p in packets if p.shown)
    times = [p.time for p in shown]
    chosen = middles(times, _end(shown), count)
    with _opened(av, path) as container:
      yield from _pictures(container, _stream(av, container, path),
                           spans_of(packets, chosen), path)
  except av.FFmpegError as error:
    raise _damaged(path, error.strerror or error) from error


def middles(times: Sequence[int], end: int, count: int) -> list[int]:
  """Times of the frames that are shown in the middles of equal spans.

  Args:
    times: when frames begin to be shown, increasing.
    end: when the last one ends.
    count: of spans.
  """
  start, whole = times[0], end - times[0]
  return [times[bisect.bisect_right(times, start + (2 * i + 1) * whole // (2 * count)) - 1]
          for i in range(count)]


def spans_of(packets: Sequence[_Packet], times: Sequence[int]) -> list[_Span]:
  """What has to be decoded for the frames at these times, not decreasing.

  Every frame needs its packet and those behind the last key frame that comes before it
  in the file and is not shown later: a frame that is shown before the key frame in
  front of it needs the one before that, too.
  """
  place = {p.time: i for i, p in enumerate(packets) if p.shown}
  keys = [i for i, p in enumerate(packets) if p.key]
  spans: list[_Span] = []
  for time in times:
    last = place[time]
    first = max((k for k in keys if k <= last and packets[k].time <= time), default=0)
    if spans and first <= spans[-1].last:
      before = spans.pop()
      spans.append(_Span(min(before.first, first), max(before.last, last),
                         [*before.times, time]))
    else:
      spans.append(_Span(first, last, [time]))
  return spans


def _opened(av: Any, path: pathlib.Path) -> Any:
  """The container; FFmpeg opens this file and nothing that it names."""
  try:
    return av.open(str(path), metadata_errors='replace', options={
        'format_whitelist': ','.join(FORMATS), 'protocol_whitelist': 'file'})
  except (av.FFmpegError, ValueError) as error:
    raise DataError(
        f'{path}: not a video in one of the formats {", ".join(FORMATS)}, or cut off or '
        f'damaged ({getattr(error, "strerror", None) or error}); fetch it again or remove '
        'it') from error


def _stream(av: Any, container: Any, path: pathlib.Path) -> Any:
  """The first video stream that is none of a cover, ready to decode."""
  cover = av.stream.Disposition.attached_pic
  stream = next((s for s in container.streams.video if not s.disposition & cover), None)
  if stream is None or stream.codec_context is None:
    raise DataError(f'{path}: has no video stream that can be decoded; fetch the video '
                    'again or remove it')
  images.check_size(stream.codec_context.width, stream.codec_context.height, str(path),
                    images.MAX_PIXELS)
  stream.codec_context.options = {'max_pixels': str(images.MAX_PIXELS)}
  stream.thread_type = 'AUTO'
  return stream


def _packets(container: Any, stream: Any, path: pathlib.Path) -> list[_Packet]:
  """All packets of the stream, none decoded.

  Raises:
    DataError: there are none, or not as many as the header says.
  """
  packets = []
  for packet in container.demux(stream):
    if not packet.size:
      continue  # the end
    time = packet.pts if packet.pts is not None else packet.dts
    if packet.is_corrupt or time is None:
      raise _damaged(path, f'frame {len(packets)} is ' + (
          'incomplete' if packet.is_corrupt else 'without a time'))
    packets.append(_Packet(time, packet.duration or 0, packet.is_keyframe,
                           not packet.is_discard))
  shown = sorted(p for p in packets if p.shown)
  if not shown:
    raise DataError(f'{path}: the video has no frame; fetch it again or remove it')
  second = 1 / stream.time_base
  found = (_end(shown) - shown[0].time) / second
  said = 0
  if stream.duration:
    said = stream.duration / second
  elif len(container.streams) == 1:  # else it may be that of sound or subtitles
    said = (container.duration or 0) / _MICROSECONDS
  if said - found > max(1, _LACKING * said):
    raise _damaged(path, f'it should last {float(said):.1f} s and ends after '
                   f'{float(found):.1f} s')
  return packets


def _end(shown: Sequence[_Packet]) -> int:
  """When the last frame ends; if its file does not say, it lasts as others do."""
  mean = (shown[-1].time - shown[0].time) // max(1, len(shown) - 1)
  return shown[-1].time + (shown[-1].duration or mean)


def _pictures(container: Any, stream: Any, spans: Sequence[_Span], path: pathlib.Path
              ) -> Iterator[Image.Image]:
  """The frames at the spans' times, or what was last shown before them."""
  packets, at = (p for p in container.demux(stream) if p.size), 0
  decoder = stream.codec_context
  for span in spans:
    first = max(span.first, at)
    for _ in itertools.islice(packets, first - at):
      pass
    needed = itertools.islice(packets, max(0, span.last + 1 - first))
    frames: list[Any] = [None] * len(span.times)
    for packet in itertools.chain(needed, [None]):  # None: what the decoder holds back
      for frame in decoder.decode(packet):
        if _time(frame) is None:
          raise _damaged(path, 'a frame is without a time')
        for i, time in enumerate(span.times):
          if _time(frame) <= time and (
              frames[i] is None or _time(frame) >= _time(frames[i])):
            frames[i] = frame
    decoder.flush_buffers()
    at = max(at, span.last + 1)
    for time, frame in zip(span.times, frames):
      if frame is None:
        raise _damaged(path, f'no frame at {float(time * stream.time_base):.2f} s can be '
                       'decoded')
      images.check_size(frame.width, frame.height, str(path), images.MAX_PIXELS)
      yield frame.to_image()


def _time(frame: Any) -> int | None:
  """When it is shown."""
  return frame.pts if frame.pts is not None else frame.dts


def _damaged(path: pathlib.Path, why: Any) -> DataError:
  return DataError(f'{path}: the video is damaged or cut off ({why}); fetch it again or '
                   'remove it')
