"""Throughput: a queue of prompts whose batches are made anew between segments.

In a batch the fullest row decides how many slots all of them take.  Where many
prompts wait, rows that kept about as much can go on together: behind every
module a row waits in the bin of its rung until there are enough for a batch.
At the end of the queue what is left goes together from the fullest down.

A row's result does not depend on its batch, so this changes no answer.  Rows
that wait hold on to the states of the batches that they come from.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from vlm_compress.config import check
from vlm_compress.decode.prefilled import Prefilled, text_slots
from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.models import segments as seg
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
  """A prompt between two segments, as row `index` of what a batch left."""
  id: int
  index: int
  tokens: Tokens
  pruning: Pruning
  count: int
  behind: tuple[_Passed, ...]


class _Passed(NamedTuple):
  """A segment that a prompt has passed, as row `index` of a batch."""
  cache: SegmentCache
  index: int
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
    ConfigError: batches of several shapes.
  """
  line = _Line(model, room, SlotCount() if count is None else count)
  shape = None
  for ids, batch in queue:
    seen = (batch.input_ids.shape, batch.features.shape)
    check(shape in (None, seen), f'a queue has batches of shapes {shape} and '
          f'{seen}; pad them to one')
    shape = seen
    fillers = [ids[-1]] * (len(batch.input_ids) - len(ids))
    some = options if options.row_ids is None else options.replace(
        row_ids=np.asarray(options.row_ids)[ids + fillers])
    tokens, pruning, counts = model.start(batch, some)
    line.shape(batch)
    if counts is not None:
      line.arrive(0, ids, tokens, pruning, counts, [()] * len(ids))
    else:
      yield from line.run(0, tokens, pruning, ids, [()] * len(ids), np.sum(
          batch.valid, axis=1))
    yield from line.full_bins()
  yield from line.rest()


class _Line:
  """The rows that wait, and the segments that they wait for."""

  def __init__(self, model: SegmentedModel, room: int, count: SlotCount):
    self.model, self.room, self.count = model, room, count
    self.bounds = model.bounds(True)
    self.bins: list[dict[int, list[_Row]]] = [
        collections.defaultdict(list) for _ in self.bounds]
    self.batch_size = self.text = self.num_images = 0

  def shape(self, batch: Batch) -> None:
    """Takes the shape of the queue's batches, and rungs from the first."""
    self.batch_size = len(batch.input_ids)
    self.num_images = batch.features.shape[1]
    self.text = self.text or text_slots(batch)

  def arrive(self, index: int, ids: list[int], tokens: Tokens,
             pruning: Pruning, counts: Any, behind: list[tuple]) -> None:
    """Rows of a batch go to the bins in front of segment `index`."""
    sizes = self.model.sizes(tokens.valid.shape[1], self.text, self.num_images)
    for i, (name, count) in enumerate(zip(ids, np.asarray(counts).tolist())):
      size = next(s for s in sizes if s >= count)
      self.bins[index][size].append(
          _Row(name, i, tokens, pruning, count, behind[i]))

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
      for first in range(0, len(left), self.batch_size):
        part = left[first:first + self.batch_size]
        yield from self.go(index, part[0][0], [row for _, row in part])

  def go(self, index: int, slots: int, rows: list[_Row]) -> Iterator[Done]:
    """Makes a batch of rows and runs segment `index` on it."""
    filled = rows + [rows[-1]] * (self.batch_size - len(rows))
    call = self.model.programs.call
    taken = [call(('take', slots), lambda t, p, i: seg.take_row(t, p, i, slots),
                  (), row.tokens, row.pruning, np.int32(row.index))
             for row in filled]
    tokens, pruning = call(('stack',), seg.stack_rows, (), taken)
    yield from self.run(index, tokens, pruning, [row.id for row in rows],
                        [row.behind for row in rows],
                        np.asarray([row.count for row in rows]))

  def run(self, index: int, tokens: Tokens, pruning: Pruning, ids: list[int],
          behind: list[tuple], counts: np.ndarray) -> Iterator[Done]:
    """Runs segment `index`; its rows go to the next bins, or are done."""
    first, last = self.bounds[index]
    slots = tokens.valid.shape[1]
    self.count.add(last - first, slots, self.batch_size,
                   int(counts[:len(ids)].sum()))
    ran = self.model.run(index, tokens, pruning, self.room)
    behind = [before + (_Passed(ran.cache, i, slots, int(counts[i])),)
              for i, before in enumerate(behind)]
    if ran.tokens is not None:
      self.arrive(index + 1, ids, ran.tokens, ran.pruning, ran.counts, behind)
    else:
      yield Done(ids, self._together(ran, pruning, behind))

  def _together(self, ran: Ran, pruning: Pruning, behind: list[tuple]
                ) -> Prefilled:
    """Brings a batch's rows of all segments together."""
    behind = behind + [behind[-1]] * (self.batch_size - len(behind))
    call, caches, slots = self.model.programs.call, [], []
    for passed in list(zip(*behind))[:-1]:
      slots.append(max(p.slots for p in passed))
      size = slots[-1] + self.room
      rows = [call(('take cache', size),
                   lambda cache, i, size=size: seg.take_cache(cache, i, size),
                   (), p.cache, np.int32(p.index)) for p in passed]
      caches.append(call(('stack cache',), seg.stack, (), rows))
    slots.append(ran.cache.readable.shape[1] - self.room)
    counts = [np.asarray([p.count for p in passed]) for passed in zip(*behind)]
    return Prefilled(ran.logits, ran.positions, [*caches, ran.cache], slots,
                     counts, self.room, pruning=pruning)


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
