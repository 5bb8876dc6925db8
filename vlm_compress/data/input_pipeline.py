"""The input pipeline: shuffles, shards, transforms and batches a source.

Built on grain.  `make_dataset` gives batches of one length; `make_bucketed`
gives batches of several lengths (data/buckets.py).  Three properties the
training loop relies on:

* Everything random follows from (seed, epoch, record index): the order of an
  epoch and the generator a row is made with.  It does not depend on batch
  size, threads or the number of processes.
* Processes take the shuffled records in turn, so one step of n processes
  with batch_size b holds the records of one step of one process with n * b.
* The iterator has get_state() and set_state(); the state is a number of rows,
  counted over all processes, and a pipeline set to it goes on with the very
  next batch, also where there are more or fewer processes than before.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from vlm_compress.config import check
from vlm_compress.data.buckets import Schedule
from vlm_compress.data.errors import DataError

# Row of one example.
Transform = Callable[[int, Any, np.random.Generator], Any]
Collate = Callable[[Sequence[Any]], Any]


def make_dataset(source, transform: Transform, *, batch_size: int, seed: int,
                 collate: Collate, shuffle: bool = True,
                 num_epochs: int | None = None, process_index: int = 0,
                 process_count: int = 1, drop_remainder: bool = True,
                 num_threads: int = 0, prefetch: int = 0,
                 fingerprint: str = '') -> Batches:
  """Makes an iterator over batches.

  Args:
    source: random-access source with len() and source[i] -> Example.
    transform: (record_index, example, rng) -> row.  All its randomness must
      come from rng, a numpy Generator that depends on (seed, epoch,
      record_index) alone.
    batch_size: rows per batch and process.
    seed: of order and rows.
    collate: list of rows -> batch.
    shuffle: a new order every epoch; False keeps the source's order.
    num_epochs: passes over the source; None never ends.
    process_index: which process this is.
    process_count: number of processes that share the source.
    drop_remainder: leave out a last batch that is not full.  Matters only
      with num_epochs, as batches run on across epochs.
    num_threads: threads that read and transform ahead; 0 does it in the
      calling thread, which is right for few cores.
    prefetch: finished batches kept ready by one more thread; 0 for none.
    fingerprint: of the content of the source; a state of other content is
      refused.

  Raises:
    ConfigError: impossible numbers.
  """
  _check(source, batch_size, num_epochs, process_index, process_count,
         drop_remainder)
  length = len(source)

  def make_row(position: int, index: int) -> Any:
    epoch = position // length
    return transform(index, source[index], row_generator(seed, epoch, index))

  def start_at(row: int) -> grain.DatasetIterator:
    dataset = grain.MapDataset.range(length)
    if shuffle:
      dataset = dataset.shuffle(seed=_shuffle_seed(seed))
    dataset = dataset.repeat(num_epochs)
    # The position counts on over epochs and, taken before the records are dealt
    # to the processes, is the same whatever their number.
    dataset = dataset.map_with_index(lambda position, index: (position, index))
    dataset = dataset[row + process_index::process_count]
    dataset = dataset.map(lambda item: make_row(*item))
    return _batched(dataset, batch_size, drop_remainder, collate, num_threads,
                    prefetch)

  plan = json.dumps([fingerprint, length, seed, shuffle])
  return Batches(start_at, batch_size * process_count,
                 hashlib.sha256(plan.encode()).hexdigest()[:16])


def _batched(dataset: grain.MapDataset, batch_size: int, drop_remainder: bool,
             collate: Collate, num_threads: int, prefetch: int
             ) -> grain.DatasetIterator:
  """Reads rows, in threads if there are any, and makes batches of them."""
  dataset = dataset.to_iter_dataset(
      grain.ReadOptions(num_threads=num_threads,
                        prefetch_buffer_size=4 * num_threads))
  dataset = dataset.batch(batch_size, drop_remainder=drop_remainder,
                          batch_fn=collate)
  if prefetch:
    dataset = grain.experimental.ThreadPrefetchIterDataset(
        dataset, prefetch_buffer_size=prefetch)
  return iter(dataset)


def row_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
  """Returns the generator a row is made with."""
  return np.random.default_rng([seed, epoch, index])


def _shuffle_seed(seed: int) -> int:
  """Spreads the seed: grain adds the epoch to it, so that with the bare seed
  epoch 1 of seed 0 would be epoch 0 of seed 1."""
  return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _check(source, batch_size, num_epochs, process_index, process_count,
           drop_remainder):
  check(batch_size > 0, f'batch_size={batch_size}; use 1 or more')
  check(num_epochs is None or num_epochs > 0,
        f'num_epochs={num_epochs}; use 1 or more, or None for no end')
  check(0 <= process_index < process_count,
        f'process_index={process_index} is not in 0..{process_count - 1}')
  check(len(source) > 0, 'the source has no examples; use another split')
  if num_epochs is not None and drop_remainder:
    share = len(source) * num_epochs // process_count
    check(share >= batch_size,
          f'batch_size={batch_size} is more than the {share} rows there are '
          'per process; use a smaller one, or drop_remainder=False')


class Batches:
  """Iterator over batches; see `make_dataset` and `make_bucketed`."""

  def __init__(self, start_at: Callable[[int], grain.DatasetIterator],
               batch_size: int, digest: str):
    """Takes what the state is made of.

    Args:
      start_at: number of a row, counted over all processes -> iterator over
        this process's batches from there on.
      batch_size: rows per batch of all processes.
      digest: of all that decides which row comes when.
    """
    self._start_at, self._batch_size, self._digest = start_at, batch_size, digest
    self._rows, self._inner = 0, None

  def __iter__(self) -> Batches:
    return self

  def __next__(self) -> Any:
    if self._inner is None:
      self._inner = self._start_at(self._rows)
    batch = next(self._inner)
    self._rows += self._batch_size
    return batch

  def get_state(self) -> dict[str, Any]:
    """The position, as JSON types."""
    return {'rows': self._rows, 'plan': self._digest}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on with the very next batch.

    Raises:
      DataError: the state is of other data, another seed or other buckets.
    """
    if state.get('plan') != self._digest or 'rows' not in state:
      raise DataError('the checkpoint was made with other data, tokenizer, seed '
                      'or buckets, or by an older version: which rows it has '
                      'seen is not known; use those it was made with, or another '
                      '--workdir.  --allow-config-change cannot allow it: data, '
                      'train.seed and whether there are rows.bucket_lengths must '
                      'stay; where there are, also their values, '
                      'train.batch_size, tokenizer and template')
    if self._inner is not None:
      self._inner.close()
    self._rows, self._inner = int(state['rows']), None


def make_bucketed(source, transform: Transform, schedule: Schedule, *,
                  collate: Callable[[Sequence[Any], int], Any],
                  num_epochs: int | None = None, process_index: int = 0,
                  process_count: int = 1, num_threads: int = 0,
                  prefetch: int = 0) -> Batches:
  """Makes an iterator over batches of rows of one modality and similar length.

  Args:
    source, num_epochs, process_index, process_count, num_threads, prefetch:
      as of `make_dataset`.
    transform: as there; it leaves nothing out.
    schedule: which batch has which rows.  Its batches are of all processes
      together, each of which takes its consecutive part of them.
    collate: (rows, length) -> batch.

  Raises:
    ConfigError: impossible numbers.
  """
  batch_size = schedule.batch_size
  _check(source, batch_size, num_epochs, process_index, process_count, False)
  check(batch_size % process_count == 0,
        f'batch_size={batch_size} does not divide over {process_count} '
        'processes')
  share = batch_size // process_count
  end = (sys.maxsize // 2 if num_epochs is None
         else num_epochs * schedule.batches_per_epoch * share)

  def make_row(position: int) -> tuple[int, Any]:
    batch, slot = divmod(position, share)
    epoch, length, rows = schedule.batch(batch)
    index = int(rows[process_index * share + slot])
    generator = row_generator(schedule.seed, epoch, index)
    return length, transform(index, source[index], generator)

  def start_at(row: int) -> grain.DatasetIterator:
    dataset = grain.MapDataset.range(row // process_count, end).map(make_row)
    return _batched(
        dataset, share, True,
        lambda rows: collate([row for _, row in rows], rows[0][0]), num_threads,
        prefetch)

  return Batches(start_at, batch_size, schedule.digest)
