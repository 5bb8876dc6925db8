"""Which rows make a batch, and how long it is: length and modality together.

Padding every row to the longest one wastes most of a step on nothing.  Here a
batch has one of a few static lengths (buckets) and only rows that fit it, and
no batch mixes rows with pictures and rows without, as in LLaVA's
group_by_modality_length: a device that has no pictures to encode would wait
for the others.

A plan is a pure function of the lengths, the seed and the epoch.  It is made
for the global batch, so it is the same for any number of processes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from vlm_compress.config import check


@dataclasses.dataclass(frozen=True)
class Plan:
  """The batches of an epoch.

  Attributes:
    lengths: int32[S], static length of every batch, in tokens.
    rows: int64[S, B], places of its rows in the lengths it was made from.
  """
  lengths: np.ndarray
  rows: np.ndarray

  def __len__(self) -> int:
    return len(self.rows)


@dataclasses.dataclass(frozen=True)
class Padding:
  """What batches hold.

  Attributes:
    tokens: of rows, as far as they fit.
    slots: tokens that the batches have place for.
  """
  tokens: int
  slots: int

  @property
  def waste(self) -> float:
    """Share of the slots that hold nothing."""
    return 1.0 - self.tokens / self.slots


def num_batches(has_image: np.ndarray, global_batch_size: int) -> int:
  """Batches of an epoch, the same in every epoch.

  Args:
    has_image: bool[N].
    global_batch_size: B.
  """
  with_images = int(np.count_nonzero(has_image))
  return (with_images // global_batch_size
          + (len(has_image) - with_images) // global_batch_size)


def plan(lengths: np.ndarray, has_image: np.ndarray, seed: int, epoch: int,
         global_batch_size: int, bucket_lengths: Sequence[int]) -> Plan:
  """Deals the rows of an epoch to batches.

  Rows are shuffled, put to the shortest bucket that holds them (the longest
  one also takes rows that have to be cut), and cut into batches per bucket and
  modality.  What is left of a bucket goes on to the next longer one of its
  modality; what is left in the longest, fewer than B rows of each modality,
  is left out in this epoch, and others in the next.  At last the batches are
  shuffled, so that lengths come in no order.

  Args:
    lengths: int[N], tokens of every row.
    has_image: bool[N].
    seed, epoch: the plan is a function of them.
    global_batch_size: B, rows of all processes together.
    bucket_lengths: increasing static lengths.

  Returns:
    The plan, `num_batches(has_image, B)` batches.

  Raises:
    ConfigError: no batch can be made, or the buckets are in no order.
  """
  check_buckets(bucket_lengths)
  check(global_batch_size >= 1 and num_batches(has_image, global_batch_size) > 0,
        f'batch_size={global_batch_size}: there are '
        f'{int(np.count_nonzero(has_image))} rows with pictures and '
        f'{int(np.count_nonzero(~has_image))} without, too few for one batch '
        'of one kind; use a smaller one')
  # Not the generator of row 0, which also begins with (seed, epoch).
  rng = np.random.default_rng(
      np.random.SeedSequence([seed, epoch], spawn_key=(1,)))
  order = rng.permutation(len(lengths))
  bucket = np.minimum(np.searchsorted(bucket_lengths, lengths[order]),
                      len(bucket_lengths) - 1)
  rows, sizes = [], []
  for image in (True, False):
    rest = np.zeros(0, np.int64)
    for b, length in enumerate(bucket_lengths):
      found = order[(bucket == b) & (has_image[order] == image)]
      found = np.concatenate([rest, found])
      count = len(found) // global_batch_size
      rows.append(found[:count * global_batch_size].reshape(
          count, global_batch_size))
      sizes += [length] * count
      rest = found[count * global_batch_size:]
  shuffled = rng.permutation(len(sizes))
  return Plan(np.asarray(sizes, np.int32)[shuffled],
              np.concatenate(rows)[shuffled])


class Schedule:
  """The batches of all epochs, one after the other.

  Attributes:
    batch_size: rows of a batch, of all processes together.
    seed: of order and rows.
    batches_per_epoch: the same in every epoch.
    plan: epoch -> Plan.
    digest: of all that decides which batch has which rows.
  """

  def __init__(self, lengths: np.ndarray, has_image: np.ndarray, *,
               bucket_lengths: Sequence[int], batch_size: int, seed: int,
               fingerprint: str, records: np.ndarray | None = None):
    """Makes the plan of the first epoch.

    Args:
      lengths, has_image, bucket_lengths, batch_size, seed: see `plan`.
      fingerprint: of the content of the source.
      records: int[N], places in the source that the lengths are of; None is
        0 .. N - 1.

    Raises:
      ConfigError: impossible numbers.
    """
    self.batch_size, self.seed = batch_size, seed
    self._records = np.arange(len(lengths)) if records is None else records
    check(len(self._records) == len(lengths) == len(has_image),
          f'{len(lengths)} lengths for {len(self._records)} records')
    # Two, as batches of two epochs may be under way.
    self.plan = functools.lru_cache(maxsize=2)(lambda epoch: plan(
        lengths, has_image, seed, epoch, batch_size, bucket_lengths))
    self.batches_per_epoch = len(self.plan(0))
    digest = hashlib.sha256(json.dumps(
        [fingerprint, seed, batch_size, list(bucket_lengths)]).encode())
    for array in (lengths, has_image, self._records):
      digest.update(np.ascontiguousarray(array, np.int64).tobytes())
    self.digest = digest.hexdigest()[:16]

  def batch(self, number: int) -> tuple[int, int, np.ndarray]:
    """(epoch, length in tokens, int64[B] places in the source) of a batch."""
    epoch, place = divmod(number, self.batches_per_epoch)
    made = self.plan(epoch)
    return epoch, int(made.lengths[place]), self._records[made.rows[place]]


def check_buckets(bucket_lengths: Sequence[int]) -> None:
  """Raises ConfigError unless the lengths are positive and increase."""
  check(len(bucket_lengths) > 0 and all(
      a < b for a, b in zip((0, *bucket_lengths), bucket_lengths)),
        f'rows.bucket_lengths={tuple(bucket_lengths)}: increasing lengths, at '
        'least 1')


def padding(lengths: np.ndarray, made: Plan) -> Padding:
  """What the batches of a plan hold.

  Args:
    lengths: int[N] that the plan was made from.
    made: the plan.
  """
  cut = np.minimum(lengths[made.rows], made.lengths[:, None])
  return Padding(int(cut.sum()), int(made.lengths.sum()) * made.rows.shape[1])


def plain_padding(lengths: np.ndarray, made: Plan, length: int) -> Padding:
  """What batches of one static length would hold, for the rows of a plan.

  Args:
    lengths: int[N] that the plan was made from.
    made: the plan.
    length: of all batches, in tokens.
  """
  cut = np.minimum(lengths[made.rows], length)
  return Padding(int(cut.sum()), length * made.rows.size)
