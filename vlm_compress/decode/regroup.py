"""Throughput: a queue of prompts whose batches are made anew between segments.

In a batch the fullest row decides how many slots all of them take.  Where many
prompts wait, rows that kept about as much can go on together: behind every
module a row waits in the bin of its rung until there are enough for a batch.
At the end of the queue what is left goes together from the fullest down.

A row's result does not depend on its batch, so this changes no answer.  A row
that waits is a copy of its own: the batch that it comes from is let go.

What can wait is bounded, however long the queue is.  A bin that fills up runs
at once, so between two batches of the queue at most

  (batch_size - 1) x modules x (rungs x text lengths + 1)

rows wait, where text lengths are those in the queue, in steps of TEXT_STEP.  A
row holds slots x D values that enter the next segment and, of every layer that
it has passed, keys and values: 2 K H x (slots of that segment + room), which is
never more than the cache of the same prompt without pruning.  (D hidden size,
K key/value heads, H head size.)
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from vlm_compress.config import check, check_whole
from vlm_compress.decode.prefilled import Prefilled, row_text_slots
from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.models import segment_rows as rows_lib
from vlm_compress.models.inputs import PruneOptions
from vlm_compress.models.segments import Pruning, Ran, SegmentCache, Tokens
from vlm_compress.models.sequence import Batch


class Done(NamedTuple):
  """Prompts that have been read together.

  Attributes:
    ids: their numbers, one per row; rows behind them are fillers.
    state: of batch_size rows.
  """
  ids: list[int]
  state: Prefilled


@dataclasses.dataclass
class SlotCount:
  """Slots that were computed and tokens that were in them, times layers."""
  slots: int = 0
  tokens: int = 0

  def add(self, num_layers: int, num_slots: int, num_rows: int, tokens: int
          ) -> None:
    """Counts one segment of one batch."""
    self.slots += num_layers * num_slots * num_rows
    self.tokens += num_layers * tokens

  def merge(self, other: SlotCount) -> None:
    """Adds another count to this one."""
    self.slots += other.slots
    self.tokens += other.tokens

  @property
  def waste(self) -> float:
    """Slots per token; 1 is none."""
    return self.slots / max(self.tokens, 1)


class _Row(NamedTuple):
  """A prompt between two segments, a batch of one: `count` of its slots hold a
  token, `text` are set aside for what is not visual.
  """
  id: int
  text: int
  tokens: Tokens
  pruning: Pruning
  count: int
  behind: tuple[_Passed, ...]


class _Passed(NamedTuple):
  """What a segment that a prompt has passed leaves of it."""
  cache: SegmentCache
  slots: int
  count: int


def prefill_regrouped(model: SegmentedModel,
                      queue: Iterable[tuple[list[int], Batch]],
                      options: PruneOptions, room: int = 0,
                      count: SlotCount | None = None) -> Iterator[Done]:
  """Runs prompts of a queue in batches of their own making.

  Args:
    model: with ATP modules.
    queue: batches of one shape, each with the numbers of its first rows; the
      rows behind those are fillers.
    options: how the modules run; row_ids, if given, are by prompt number.
    room: tokens that can be added later.
    count: is added to.

  Yields:
    Prompts as they are done, not in the order of the queue.

  Raises:
    ConfigError: a model or options without pruning, batches of several shapes,
      numbers that are missing or come twice, or prompts that
      SegmentedModel.prefill refuses.
  """
  check(model.config.atp is not None and options is not None, 'without ATP '
        'modules (config.atp) and options for them all rows stay as long as '
        'they are; read them with SegmentedModel.prefill')
  check_whole('room', room, 0)
  line = _Line(model, room, SlotCount() if count is None else count)
  shape, known = None, set()
  for ids, batch in queue:
    seen = (batch.input_ids.shape, batch.features.shape)
    check(shape in (None, seen), f'a queue has batches of shapes {shape} and '
          f'{seen}; pad them to one')
    check(0 < len(ids) <= len(batch.input_ids), f'a batch of '
          f'{len(batch.input_ids)} rows has {len(ids)} numbers; give one for '
          'each row, fillers behind them apart')
    _check_numbers(ids, known, options)
    shape = seen
    fillers = [ids[-1]] * (len(batch.input_ids) - len(ids))
    some = options if options.row_ids is None else options.replace(
        row_ids=np.asarray(options.row_ids)[ids + fillers])
    yield from line.enter(ids, batch, some)
  yield from line.rest()


def _check_numbers(ids: list[int], known: set[int], options: PruneOptions
                   ) -> None:
  """Checks the numbers of a batch, and adds them to those that are known."""
  for i in ids:
    check_whole('the number of a prompt', i)
    check(i not in known, f'the queue has number {i} twice; give every prompt '
          'its own')
    known.add(i)
    check(options.row_ids is None or 0 <= i < np.size(options.row_ids),
          f'PruneOptions.row_ids has {np.size(options.row_ids)} id(s) and none '
          f'for prompt number {i}')


class _Line:
  """The rows that wait, and the segments that they wait for."""

  def __init__(self, model: SegmentedModel, room: int, count: SlotCount):
    self.model, self.room, self.count = model, room, count
    self.bounds = model.bounds(True)
    self.bins: list[dict[int, list[_Row]]] = [
        collections.defaultdict(list) for _ in self.bounds]
    self.batch_size = self.num_images = 0

  def enter(self, ids: list[int], batch: Batch, options: PruneOptions
            ) -> Iterator[Done]:
    """Takes a batch of the queue as far as there are enough rows."""
    self.batch_size, self.num_images = len(batch.input_ids), batch.features.shape[1]
    tokens, pruning, counts = self.model.start(batch, options)
    texts = row_text_slots(batch)[:len(ids)].tolist()
    if counts is not None:
      self.arrive(0, ids, texts, tokens, pruning, counts, [()] * len(ids))
    else:
      yield from self.run(0, tokens, pruning, ids, texts, [()] * len(ids),
                          np.sum(batch.valid, axis=1))
    yield from self.full_bins()

  def arrive(self, index: int, ids: list[int], texts: list[int],
             tokens: Tokens, pruning: Pruning, counts: Any,
             behind: list[tuple]) -> None:
    """Rows of a batch go to the bins in front of segment `index`."""
    for i, (name, text, count) in enumerate(zip(
        ids, texts, np.asarray(counts).tolist())):
      sizes = self.model.sizes(tokens.valid.shape[1], text, self.num_images)
      size = next(s for s in sizes if s >= count)
      taken = self.take(tokens, pruning, i, size)
      self.bins[index][size].append(_Row(name, text, *taken, count, behind[i]))

  def take(self, tokens: Tokens, pruning: Pruning, index: int, slots: int
           ) -> tuple[Tokens, Pruning]:
    """A row of a batch, with so many slots."""
    return self.model.programs.call(
        ('take', slots), lambda t, p, i: rows_lib.take_row(t, p, i, slots), (),
        tokens, pruning, np.int32(index))

  def full_bins(self) -> Iterator[Done]:
    """Runs every bin that has enough rows for a batch."""
    for index, bins in enumerate(self.bins):
      for size in list(bins):
        while len(bins[size]) >= self.batch_size:
          rows = bins[size][:self.batch_size]
          del bins[size][:self.batch_size]
          yield from self.go(index, size, rows)

  def rest(self) -> Iterator[Done]:
    """Runs all rows that are left."""
    for index, bins in enumerate(self.bins):
      left = [(size, row) for size in sorted(bins, reverse=True)
              for row in bins[size]]
      bins.clear()
      while left:
        part, left = left[:self.batch_size], left[self.batch_size:]
        yield from self.go(index, part[0][0], [row for _, row in part])

  def go(self, index: int, slots: int, rows: list[_Row]) -> Iterator[Done]:
    """Makes a batch of rows and runs segment `index` on it."""
    filled = rows + [rows[-1]] * (self.batch_size - len(rows))
    same = [(row.tokens, row.pruning) if row.tokens.valid.shape[1] == slots else
            self.take(row.tokens, row.pruning, 0, slots) for row in filled]
    tokens, pruning = self.model.programs.call(('stack',), rows_lib.stack_rows, (),
                                               same)
    yield from self.run(index, tokens, pruning, [row.id for row in rows],
                        [row.text for row in rows], [row.behind for row in rows],
                        np.asarray([row.count for row in rows]))

  def run(self, index: int, tokens: Tokens, pruning: Pruning, ids: list[int],
          texts: list[int], behind: list[tuple], counts: np.ndarray
          ) -> Iterator[Done]:
    """Runs segment `index`; its rows go to the next bins, or are done."""
    first, last = self.bounds[index]
    slots = tokens.valid.shape[1]
    self.count.add(last - first, slots, self.batch_size,
                   int(counts[:len(ids)].sum()))
    ran = self.model.run(index, tokens, pruning, self.room)
    if ran.tokens is None:
      yield Done(ids, self._together(ran, pruning, behind, counts))
      return
    behind = [before + (_Passed(self._row_cache(ran.cache, i, slots), slots,
                                int(counts[i])),)
              for i, before in enumerate(behind)]
    self.arrive(index + 1, ids, texts, ran.tokens, ran.pruning, ran.counts, behind)

  def _row_cache(self, cache: SegmentCache, index: int, slots: int
                 ) -> SegmentCache:
    size = slots + self.room
    return self.model.programs.call(
        ('take cache', size), lambda c, i: rows_lib.take_cache(c, i, size), (), cache,
        np.int32(index))

  def _together(self, ran: Ran, pruning: Pruning, behind: list[tuple],
                counts: np.ndarray) -> Prefilled:
    """Brings a batch's rows of all segments together."""
    behind = behind + [behind[-1]] * (self.batch_size - len(behind))
    caches, slots, all_counts = [], [], []
    for passed in zip(*behind):
      slots.append(max(p.slots for p in passed))
      rows = [p.cache if p.slots == slots[-1] else
              self._row_cache(p.cache, 0, slots[-1]) for p in passed]
      caches.append(self.model.programs.call(('stack cache',), rows_lib.stack, (), rows))
      all_counts.append(np.asarray([p.count for p in passed]))
    slots.append(ran.cache.readable.shape[1] - self.room)
    # fillers are the last row once more
    all_counts.append(np.pad(counts, (0, self.batch_size - len(counts)), 'edge'))
    return Prefilled(ran.logits, ran.positions, [*caches, ran.cache], slots,
                     all_counts, self.room, pruning=pruning)


def count_slots(model: SegmentedModel, state: Prefilled,
                num_rows: int | None = None) -> SlotCount:
  """Slots and tokens of prompts that were read in one batch.

  Args:
    model, state: as they are.
    num_rows: rows that are no fillers; None for all.
  """
  total = SlotCount()
  bounds = model.bounds(len(state.caches) > 1)
  for (first, last), slots, counts in zip(bounds, state.slots, state.counts):
    total.add(last - first, slots, len(counts),
              int(counts[:num_rows].sum()))
  return total
