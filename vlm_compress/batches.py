"""Many questions at once: batches, with compressed and fresh pictures mixed.

The same answers as `api.generate` gives one by one, greedily.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from vlm_compress.api import Answer, Turn
from vlm_compress.config import check, check_whole
from vlm_compress.decode import stream
from vlm_compress.decode.identity import pixels_hash
from vlm_compress.decode.prefilled import Prefilled, entering
from vlm_compress.decode.regroup import Done, SlotCount, count_slots, prefill_regrouped
from vlm_compress.models.inputs import CompressedImages
from vlm_compress.vlm import (
  CompressedImage,
  KeptImage,
  Row,
  Vlm,
  compress_image,
  padded,
  prefill,
  prepare,
)


class Request(NamedTuple):
  """A question: prompt and images as in `api.generate`.

  row_id names it for the selector 'random', whose choice depends on that and on
  the seed, and not on the batch.
  """
  prompt: str | Sequence[Turn]
  images: Sequence[Any] = ()
  row_id: int = 0


def answer_all(vlm: Vlm, requests: Sequence[Request], *, progress: bool = True,
               **options: Any) -> list[Answer]:
  """Answers questions greedily, in batches of those with the same shapes.

  Args:
    vlm, requests, options: as for `answer_batches`.
    progress: show a bar if stderr is a terminal.

  Returns:
    Answers in the order of the questions.

  Raises:
    DataError, ConfigError: as `api.generate`, for the first that is wrong.
  """
  _check_requests(requests)
  answers: list[Answer | None] = [None] * len(requests)
  console = Console(stderr=True)
  with Progress(console=console, transient=True,
                disable=not (progress and console.is_terminal)) as bar:
    task = bar.add_task('answering', total=len(requests))
    for ids, some in answer_batches(vlm, requests, **options):
      for i, answer in zip(ids, some):
        answers[i] = answer
      bar.update(task, advance=len(ids))
  return answers


def answer_batches(vlm: Vlm, requests: Sequence[Request], *, method: str = 'auto',
                   batch_size: int = 4, regroup: bool = True, max_new_tokens: int = 32,
                   seed: int = 0, slots: SlotCount | None = None
                   ) -> Iterator[tuple[list[int], list[Answer]]]:
  """`answer_all`, a batch at a time.

  Args:
    vlm: the model.
    requests: the questions; with method voco, some images may be compressed
      already and others not.
    method: as in `api.generate`.
    batch_size: questions at a time.
    regroup: with method atp, make batches anew behind every module, of rows
      that kept about as much (decode/regroup.py).
    max_new_tokens: longest answer.
    seed: of the selector 'random'.
    slots: is added to, what the batches of method atp took.

  Yields:
    Numbers of questions, and their answers, as batches are done.
  """
  check_whole('batch_size', batch_size, 1)
  check_whole('max_new_tokens', max_new_tokens, 1)
  check_whole('seed', seed, 0)
  _check_requests(requests)
  limit = vlm.config.text.max_position_embeddings
  ready: dict[tuple, CompressedImage] = {}
  rows = [_named(prepare(vlm, r.prompt, _compressed(vlm, r.images, method, ready),
                         method, None), r.row_id, seed) for r in requests]
  full = [i for i, row in enumerate(rows) if row.positions >= limit]
  check(not full, f'prompt number {full[:1]} takes all {limit} positions of '
        'text.max_position_embeddings; shorten it')
  for ids, state in _read(vlm, rows, batch_size, regroup, max_new_tokens - 1,
                          SlotCount() if slots is None else slots):
    counts = [min(max_new_tokens, limit - rows[i].positions) for i in ids]
    answers = _decode(vlm, state, counts, max_new_tokens)
    yield ids, [a if rows[i].kept is None else a._replace(
        visual_tokens=rows[i].kept.visual_tokens) for i, a in zip(ids, answers)]


def ready_batch(vlm: Vlm, requests: Sequence[Request], method: str, seed: int = 0
                ) -> Callable[[], Prefilled]:
  """The prefill of one batch, with texts and vision features ready: to be timed.

  Of method voco it compresses the pictures, too, as one batch.

  Args:
    vlm: the model.
    requests: questions whose rows have one shape, each about one picture.
    method: as in `api.generate`.
    seed: of the selector 'random'.

  Returns:
    A function that runs it.

  Raises:
    ConfigError: the rows have several shapes.
  """
  _check_requests(requests)
  rows = [_named(prepare(vlm, r.prompt, r.images, method, None), r.row_id, seed)
          for r in requests]
  check(len({_shape(row, 0) for row in rows}) == 1, 'the questions have rows of several '
        'shapes; give those of equally long prompts')
  row = _together(rows, range(len(rows)), len(rows))
  if row.compressed is None:
    return lambda: prefill(vlm, row, 0)
  some = compress_image(vlm, requests[0].images[0])
  features = np.stack([vlm.features(r.images[0]) for r in requests])[:, None]

  def compress_and_read() -> Prefilled:
    images = vlm.segmented.compress(features, some.segment_ids, some.num_voco_tokens)
    return prefill(vlm, row._replace(compressed=images), 0)
  return compress_and_read


def _named(row: Row, row_id: int, seed: int) -> Row:
  """The row with its name for the random selector."""
  if row.prune is None:
    return row
  return row._replace(prune=row.prune.replace(
      row_ids=np.asarray([row_id], np.int32), seed=seed))


def _check_requests(requests: Any) -> None:
  check(isinstance(requests, Sequence), f'requests is a '
        f'{type(requests).__name__}; give a list of batches.Request')
  for i, request in enumerate(requests):
    check(isinstance(request, Request), f'requests[{i}] is a '
          f'{type(request).__name__}; give a batches.Request')


def _compressed(vlm: Vlm, images: Sequence[Any], method: str,
                ready: dict[tuple, CompressedImage]) -> Sequence[Any]:
  """With method voco, pictures compressed, the same one only once."""
  if vlm.method(method) != 'voco' or not isinstance(images, (list, tuple)):
    return images
  counts = [i.num_voco_tokens for i in images if isinstance(i, CompressedImage)]
  out = []
  for image in images:
    if not isinstance(image, (CompressedImage, KeptImage)):
      key = pixels_hash(vlm.pixels(image)), *counts[:1]
      if key not in ready:
        ready[key] = compress_image(vlm, image, *counts[:1])
      image = ready[key]
    out.append(image)
  return out


def _read(vlm: Vlm, rows: Sequence[Row], batch_size: int, regroup: bool,
          room: int, slots: SlotCount) -> Iterator[Done]:
  """Prefills all rows; batches of one shape."""
  groups = collections.defaultdict(list)
  for i, row in enumerate(rows):
    groups[_shape(row, i)].append(i)
  for group in groups.values():
    parts = [group[at:at + batch_size] for at in range(0, len(group), batch_size)]
    if rows[group[0]].prune is not None and regroup:
      queue = ((ids, _together(rows, ids, batch_size).batch) for ids in parts)
      names = np.zeros(len(rows), np.int32)  # by number of the prompt
      names[group] = [rows[i].prune.row_ids[0] for i in group]
      options = rows[group[0]].prune.replace(row_ids=names)
      yield from prefill_regrouped(vlm.segmented, queue, options, padded(room), slots)
      continue
    for ids in parts:
      row = _together(rows, ids, batch_size if rows[ids[0]].kept is None else 1)
      state = prefill(vlm, row, room)
      if row.prune is not None:
        slots.merge(count_slots(vlm.segmented, state, len(ids)))
      yield Done(ids, state)


def _shape(row: Row, index: int) -> tuple:
  compressed = None if row.compressed is None else row.compressed.keys.shape
  alone = None if row.kept is None else index
  return (row.batch.input_ids.shape, row.batch.features.shape, compressed, alone)


def _together(rows: Sequence[Row], ids: Sequence[int], batch_size: int) -> Row:
  """Rows of one shape as one, filled up with the last."""
  some = [rows[i] for i in [*ids, *[ids[-1]] * (batch_size - len(ids))]]
  join = lambda axis, *y: np.concatenate(y, axis) if isinstance(
      y[0], np.ndarray) else jax.numpy.concatenate(y, axis)
  batch = jax.tree.map(lambda *y: join(0, *y), *[r.batch for r in some])
  compressed = voco_positions = None
  if some[0].compressed is not None:
    states = [r.compressed for r in some]
    compressed = CompressedImages(
        keys=join(1, *[s.keys for s in states]),
        values=join(1, *[s.values for s in states]),
        positions=states[0].positions)
    voco_positions = join(0, *[r.voco_positions for r in some])
  prune = some[0].prune
  if prune is not None:
    prune = prune.replace(row_ids=join(0, *[r.prune.row_ids for r in some]))
  return some[0]._replace(batch=batch, prune=prune, compressed=compressed,
                          voco_positions=voco_positions)


def _decode(vlm: Vlm, state: Prefilled, counts: Sequence[int],
            max_new_tokens: int) -> list[Answer]:
  """Answers of the first rows; counts[i] tokens at most."""
  ids: list[list[int]] = [[] for _ in counts]
  open_rows = set(range(len(counts)))
  for step in stream.tokens(vlm.segmented, state, max_new_tokens=max(counts),
                            end_ids=vlm.end_ids):
    for row in list(open_rows):
      if step[row] is None:
        open_rows.remove(row)
      elif len(ids[row]) < counts[row]:
        ids[row].append(step[row])
    if all(len(ids[row]) == counts[row] for row in open_rows):
      break
  kept = None
  if state.pruning is not None:
    kept = entering(vlm.config, state.pruning).sum(2)
  ended = lambda row: ('eos' if len(ids[row]) < counts[row] else
                       'max_new_tokens' if counts[row] == max_new_tokens
                       else 'context')
  return [Answer(vlm.tokenizer.decode(ids[row]), ids[row], ended(row),
                 None if kept is None else kept[:, row])
          for row in range(len(counts))]
