"""Batches by length and modality: the plan, the iterator, the padding."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vlm_compress.config import ConfigError
from vlm_compress.data import buckets
from vlm_compress.data.errors import DataError
from vlm_compress.data.input_pipeline import make_bucketed, row_generator

RNG = np.random.default_rng(0)
NUM_ROWS, BATCH = 500, 8
HAS_IMAGE = RNG.random(NUM_ROWS) < 0.8
# Long tails, as of conversations; a few are longer than the longest bucket.
LENGTHS = np.minimum(1 + RNG.geometric(0.01, NUM_ROWS) + 100 * HAS_IMAGE, 900)
BUCKETS = (128, 192, 256, 384, 512)


def plan(epoch=0, seed=3, **changes):
  given = dict(lengths=LENGTHS, has_image=HAS_IMAGE, global_batch_size=BATCH,
               bucket_lengths=BUCKETS)
  return buckets.plan(seed=seed, epoch=epoch, **{**given, **changes})


def same(a, b):
  return (np.array_equal(a.rows, b.rows)
          and np.array_equal(a.lengths, b.lengths))


def test_a_plan_follows_from_seed_and_epoch():
  assert same(plan(), plan())
  assert not same(plan(), plan(epoch=1))
  assert not same(plan(), plan(seed=4))
  assert not same(plan(seed=3, epoch=1), plan(seed=4, epoch=0))


@pytest.mark.parametrize('epoch', [0, 1, 7])
def test_what_a_batch_holds(epoch):
  made = plan(epoch)
  assert made.rows.shape == (buckets.num_batches(HAS_IMAGE, BATCH), BATCH)
  assert (HAS_IMAGE[made.rows].sum(1) % BATCH == 0).all()  # no mixed modality
  fits = LENGTHS[made.rows] <= made.lengths[:, None]
  assert (fits | (made.lengths[:, None] == BUCKETS[-1])).all()
  assert (LENGTHS > BUCKETS[-1]).any() and set(made.lengths) <= set(BUCKETS)
  assert len(set(made.rows.ravel())) == made.rows.size  # nobody twice
  left_out = np.setdiff1d(np.arange(NUM_ROWS), made.rows)
  assert (HAS_IMAGE[left_out].sum() == HAS_IMAGE.sum() % BATCH
          and (~HAS_IMAGE[left_out]).sum() == (~HAS_IMAGE).sum() % BATCH)


def test_most_rows_are_in_the_shortest_bucket_that_holds_them():
  made = plan()
  best = np.searchsorted(BUCKETS[:-1], LENGTHS[made.rows])
  given = np.searchsorted(BUCKETS, made.lengths)
  assert (best == given[:, None]).mean() > 0.85


def test_batches_come_in_no_order_of_length_or_modality():
  made = plan()
  for values in (made.lengths, HAS_IMAGE[made.rows[:, 0]]):
    changes = int((np.diff(values.astype(int)) != 0).sum())
    assert changes > len(set(values.tolist()))


def test_other_rows_are_left_out_in_another_epoch():
  left = [frozenset(np.setdiff1d(np.arange(NUM_ROWS), plan(e).rows).tolist())
          for e in range(4)]
  assert left[0] and len(set(left)) == 4


def test_padding_is_less_than_with_one_length():
  made = plan()
  ours = buckets.padding(LENGTHS, made)
  plain = buckets.plain_padding(LENGTHS, made, BUCKETS[-1])
  assert ours.tokens == plain.tokens == np.minimum(
      LENGTHS, 512)[made.rows].sum()
  assert ours.slots == made.lengths.sum() * BATCH
  assert plain.slots == made.rows.size * 512
  assert ours.waste == 1 - ours.tokens / ours.slots
  assert ours.waste < 0.25 < 0.5 < plain.waste


def test_one_bucket_is_plain():
  made = plan(bucket_lengths=(512,))
  assert buckets.padding(LENGTHS, made) == buckets.plain_padding(
      LENGTHS, made, 512)


@pytest.mark.parametrize('changes, words', [
    ({'bucket_lengths': ()}, 'bucket_lengths'),
    ({'bucket_lengths': (8, 8)}, 'bucket_lengths'),
    ({'bucket_lengths': (0, 8)}, 'bucket_lengths'),
    ({'global_batch_size': 0}, 'batch_size=0'),
    ({'global_batch_size': 450}, 'batch_size=450: there are .* rows with')])
def test_impossible_numbers(changes, words):
  with pytest.raises(ConfigError, match=words):
    plan(**changes)


# The iterator --------------------------------------------------------------


class Source:
  """Numbers in place of examples."""

  def __len__(self):
    return NUM_ROWS

  def __getitem__(self, index):
    return 1000 + index


def schedule(**changes):
  given = dict(lengths=LENGTHS, has_image=HAS_IMAGE, bucket_lengths=BUCKETS,
               batch_size=BATCH, seed=3, fingerprint='data')
  given |= changes
  return buckets.Schedule(given.pop('lengths'), given.pop('has_image'), **given)


def transform(index, example, rng):
  assert example == 1000 + index
  return index, float(rng.random())


def batches(deal=None, **kwargs):
  return make_bucketed(Source(), transform, deal or schedule(),
                       collate=lambda rows, length: (length, rows), **kwargs)


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def test_batches_are_those_of_the_plan():
  deal, count = schedule(), len(plan())
  found = take(batches(deal), count + 5)
  for number, (length, rows) in enumerate(found):
    epoch = number // count
    made = plan(epoch)
    assert length == made.lengths[number % count]
    assert rows == [(i, row_generator(3, epoch, i).random())
                    for i in made.rows[number % count].tolist()]


def test_one_pass_ends():
  assert len(list(batches(num_epochs=2))) == 2 * len(plan())


@pytest.mark.parametrize('count', [2, 4])
def test_processes_have_the_parts_of_the_same_batches(count):
  parts = [batches(process_index=p, process_count=count) for p in range(count)]
  for length, rows in take(batches(), 70):  # more than an epoch
    shares = [next(part) for part in parts]
    assert {share[0] for share in shares} == {length}
    assert [row for share in shares for row in share[1]] == rows


@pytest.mark.parametrize('kwargs', [{}, {'num_threads': 3, 'prefetch': 2}])
@pytest.mark.parametrize('stop', [0, 1, 37, 65])
def test_resumed_equals_uninterrupted(kwargs, stop):
  uninterrupted = take(batches(), 75)
  first = batches(**kwargs)
  found = take(first, stop)
  state = json.loads(json.dumps(first.get_state()))
  second = batches(**kwargs)
  second.set_state(state)
  assert found + take(second, 75 - stop) == uninterrupted
  first.set_state({**state, 'rows': 2 * schedule().batch_size})  # also one that has begun
  assert take(first, 3) == uninterrupted[2:5]


def test_resumed_with_another_number_of_processes():
  first = batches()
  take(first, 21)
  parts = [batches(process_index=p, process_count=2) for p in range(2)]
  for part in parts:
    part.set_state(first.get_state())
  length, rows = next(first)
  shares = [next(part) for part in parts]
  assert [row for share in shares for row in share[1]] == rows


@pytest.mark.parametrize('changes', [
    {'seed': 4}, {'batch_size': 16}, {'bucket_lengths': (512,)},
    {'fingerprint': 'other'}, {'lengths': LENGTHS + 1},
    {'has_image': ~HAS_IMAGE}])
def test_a_state_of_other_batches_is_refused(changes):
  state = batches().get_state()
  with pytest.raises(DataError, match='other data'):
    batches(schedule(**changes)).set_state(state)


def test_some_records_only():
  records = np.flatnonzero(HAS_IMAGE)
  deal = schedule(lengths=LENGTHS[records], has_image=HAS_IMAGE[records],
                  records=records)
  rows = [i for _, batch in take(batches(deal), deal.batches_per_epoch)
          for i, _ in batch]
  assert HAS_IMAGE[rows].all() and len(set(rows)) == len(rows)


def test_batch_that_does_not_divide_over_processes():
  with pytest.raises(ConfigError, match='batch_size=8 .* 3 processes'):
    batches(process_count=3)


def test_error_of_the_source_keeps_its_type():
  def broken(index, example, rng):
    raise DataError('row 3 is damaged')
  iterator = make_bucketed(Source(), broken, schedule(), collate=list)
  with pytest.raises(DataError, match='row 3 is damaged'):
    next(iterator)
