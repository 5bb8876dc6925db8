"""The input pipeline: order, randomness, shards and exact resume."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vlm_compress.config import ConfigError
from vlm_compress.data import input_pipeline
from vlm_compress.data.errors import DataError

_LENGTH = 23


class _Source:
  """Numbers in place of examples."""

  def __len__(self):
    return _LENGTH

  def __getitem__(self, index):
    assert 0 <= index < _LENGTH
    return 100 + index


def _transform(index, example, rng):
  assert example == 100 + index
  return index, float(rng.random())


def _pipeline(**kwargs):
  kwargs = dict(batch_size=4, seed=3, collate=list) | kwargs
  transform = kwargs.pop('transform', _transform)
  return input_pipeline.make_dataset(_Source(), transform, **kwargs)


def _rows(iterator, num_batches=None):
  batches = iterator if num_batches is None else (
      next(iterator) for _ in range(num_batches))
  return [row for batch in batches for row in batch]


def test_same_seed_same_rows_other_seed_other_rows():
  rows = _rows(_pipeline(), 12)
  assert rows == _rows(_pipeline(), 12)
  assert rows != _rows(_pipeline(seed=4), 12)


def test_an_epoch_has_every_record_once_and_epochs_differ():
  rows = _rows(_pipeline(num_epochs=2, drop_remainder=False))
  first, second = rows[:_LENGTH], rows[_LENGTH:]
  for epoch in (first, second):
    assert sorted(index for index, _ in epoch) == list(range(_LENGTH))
  assert [i for i, _ in first] != [i for i, _ in second]
  assert [i for i, _ in first] != list(range(_LENGTH))
  # The same record draws other numbers in the next epoch.
  assert all(dict(first)[i] != dict(second)[i] for i in range(_LENGTH))


def test_seeds_do_not_share_epochs():
  second_of_0 = _rows(_pipeline(seed=0, num_epochs=2, drop_remainder=False))
  first_of_1 = _rows(_pipeline(seed=1, num_epochs=1, drop_remainder=False))
  assert [i for i, _ in second_of_0[_LENGTH:]] != [i for i, _ in first_of_1]


def test_row_depends_on_seed_epoch_and_index_only():
  shuffled = dict(_rows(_pipeline(num_epochs=1, drop_remainder=False)))
  in_order = dict(_rows(_pipeline(num_epochs=1, drop_remainder=False,
                                  shuffle=False, batch_size=7)))
  assert shuffled == in_order
  assert list(in_order) == list(range(_LENGTH))


@pytest.mark.parametrize('count', [2, 3])
def test_processes_share_the_batches_of_one(count):
  whole = _pipeline(batch_size=6 * count)
  parts = [_pipeline(batch_size=6, process_index=i, process_count=count)
           for i in range(count)]
  for _ in range(9):
    rows = [row for part in parts for row in next(part)]
    assert sorted(rows) == sorted(next(whole))


def test_processes_partition_an_epoch():
  parts = [_rows(_pipeline(num_epochs=1, drop_remainder=False,
                           process_index=i, process_count=3))
           for i in range(3)]
  indices = [index for part in parts for index, _ in part]
  assert sorted(indices) == list(range(_LENGTH))


@pytest.mark.parametrize('kwargs', [{}, {'num_threads': 2}, {'prefetch': 3}])
@pytest.mark.parametrize('stop', [0, 1, 7])
def test_resumed_equals_uninterrupted(kwargs, stop):
  uninterrupted = _rows(_pipeline(), 16)
  first = _pipeline(**kwargs)
  rows = _rows(first, stop)
  state = json.loads(json.dumps(first.get_state()))
  second = _pipeline(**kwargs)
  second.set_state(state)
  assert rows + _rows(second, 16 - stop) == uninterrupted


@pytest.mark.parametrize('before, after', [(1, 3), (3, 1), (2, 3)])
@pytest.mark.parametrize('shuffle', [True, False])
def test_resumed_by_another_number_of_processes(before, after, shuffle):
  parts = lambda count: [
      _pipeline(batch_size=12 // count, process_index=i, process_count=count,
                shuffle=shuffle) for i in range(count)]
  step = lambda pipelines: sorted(row for p in pipelines for row in next(p))
  whole, first, second = parts(1), parts(before), parts(after)
  for _ in range(5):  # into the third epoch
    assert step(first) == step(whole)
  for part in second:
    part.set_state(first[-1].get_state())
  for _ in range(5):
    assert step(second) == step(whole)


@pytest.mark.parametrize('other', [{'seed': 4}, {'shuffle': False},
                                   {'fingerprint': 'b2'}])
def test_state_of_another_order_is_refused(other):
  first = _pipeline()
  next(first)
  with pytest.raises(DataError, match='other data, tokenizer, seed or buckets'):
    _pipeline(**other).set_state(first.get_state())
  with pytest.raises(DataError, match='--allow-config-change cannot.*train.seed'):
    _pipeline(**other).set_state(first.get_state())
  with pytest.raises(DataError, match='by an older version'):
    _pipeline().set_state({'next_index': 4})


def test_goes_on_with_batches_of_another_size():
  rows = _rows(_pipeline(), 8)
  first = _pipeline()
  assert _rows(first, 3) == rows[:12]
  second = _pipeline(batch_size=5)
  second.set_state(first.get_state())
  assert _rows(second, 4) == rows[12:]


def test_remainder_is_dropped_or_kept():
  assert len(_rows(_pipeline(num_epochs=1))) == 20
  assert len(_rows(_pipeline(num_epochs=1, drop_remainder=False))) == 23


def test_error_of_the_source_keeps_its_type():
  class Broken(_Source):
    def __getitem__(self, index):
      raise ConfigError('shard 3 is damaged')
  iterator = input_pipeline.make_dataset(
      Broken(), _transform, batch_size=2, seed=0, collate=list)
  with pytest.raises(ConfigError, match='shard 3 is damaged'):
    next(iterator)


@pytest.mark.parametrize('kwargs', [
    {'batch_size': 0}, {'num_epochs': 0}, {'process_index': 2},
    {'batch_size': 24, 'num_epochs': 1}])
def test_impossible_numbers(kwargs):
  with pytest.raises(ConfigError, match=next(iter(kwargs))):
    _pipeline(**kwargs)


def test_generator_is_numpy():
  generator = input_pipeline.row_generator(1, 2, 3)
  assert isinstance(generator, np.random.Generator)
  assert generator.random() == np.random.default_rng([1, 2, 3]).random()
