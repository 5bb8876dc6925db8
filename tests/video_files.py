"""Small videos whose frames say by their colour which they are, and the three sets of
questions about videos in their official shapes.
"""

from __future__ import annotations

import fractions
import json
import pathlib
from collections.abc import Sequence

import av
import numpy as np
from small_benchmark import ASKED


def colour(index: int) -> tuple[int, int, int]:
  """Of frame number `index`, below 32."""
  return 8 * index, 40, 255 - 8 * index


def write_video(path: pathlib.Path, frames: int | Sequence[np.ndarray], *, codec: str = 'mpeg4',
                rate: int = 10, gop: int = 12, b_frames: int = 0, pix_fmt: str = 'yuv420p',
                times: Sequence[int] = (), container: dict | None = None) -> pathlib.Path:
  """Writes a video.

  Args:
    path: its ending is the container.
    frames: so many of 64 x 64 pixels and of one colour each; or uint8[H, W, 3] each.
    codec, pix_fmt, gop, b_frames: how it is encoded; b_frames at most in a row.
    rate: frames per second, and the unit of `times`.
    times: when each frame is shown; one after another without.
    container: options of its writer.
  """
  if isinstance(frames, int):
    frames = [np.full((64, 64, 3), colour(i), np.uint8) for i in range(frames)]
  path.parent.mkdir(parents=True, exist_ok=True)
  with av.open(str(path), 'w', options=container or {}) as file:
    stream = file.add_stream(codec, rate=rate)
    stream.height, stream.width = frames[0].shape[:2]
    stream.pix_fmt, stream.gop_size = pix_fmt, gop
    stream.codec_context.max_b_frames = b_frames
    stream.bit_rate = 4_000_000
    for i, pixels in enumerate(frames):
      frame = av.VideoFrame.from_ndarray(pixels, format='rgb24')
      frame.pts = times[i] if times else i
      frame.time_base = fractions.Fraction(1, rate)
      file.mux(stream.encode(frame))
    file.mux(stream.encode())
  return path


def noise(seed: int, count: int = 10) -> list[np.ndarray]:
  """Frames of coarse noise, which differ a lot."""
  rng = np.random.default_rng(seed)
  return [np.kron(rng.integers(0, 255, (4, 4, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
          for _ in range(count)]


def write_questions(root: pathlib.Path, key: str, per_video: int = 3) -> pathlib.Path:
  """Two videos and questions about them below root/key; returns root."""
  home = root / key
  (home / 'videos').mkdir(parents=True)
  rows, names = [], {'msvd_qa': ('clip_a_1_9.avi', 'clip_b_0_5.avi'),
                     'msrvtt_qa': ('video7010.mp4', 'video7011.mp4'),
                     'activitynet_qa': ('v_a-_1.mp4', 'v_b-_2.mkv')}[key]
  for number, name in enumerate(names):
    write_video(home / 'videos' / name, noise(number), gop=4)
    for i in range(per_video):
      rows.append({'question': ASKED[(i + number) % len(ASKED)], 'answer': 'red',
                   'id': len(rows), 'video_id': {'msvd_qa': 1300}.get(key, 7010) + number})
  if key == 'msvd_qa':
    (home / 'youtube_mapping.txt').write_text('clip_a_1_9 vid1300\nclip_b_0_5 vid1301\n')
  if key == 'msrvtt_qa':
    rows = [{**row, 'category_id': 1} for row in rows]
  if key == 'activitynet_qa':
    stems = [pathlib.Path(name).stem.removeprefix('v_') for name in names]
    (home / 'test_q.json').write_text(json.dumps([
        {'video_name': stems[row['video_id'] - 7010], 'question': row['question'],
         'question_id': f'q{row["id"]}'} for row in rows]))
    (home / 'test_a.json').write_text(json.dumps([
        {'answer': 'red', 'type': 4, 'question_id': f'q{row["id"]}'} for row in rows]))
  else:
    (home / 'test_qa.json').write_text(json.dumps(rows))
  return root
