"""A regrouped queue gives what its prompts give one by one, with less waste."""

from __future__ import annotations

import functools

import core_helpers as helpers
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample

from vlm_compress.config import ConfigError
from vlm_compress.decode import regroup
from vlm_compress.decode.prefilled import entering
from vlm_compress.decode.regroup import SlotCount, count_slots, prefill_regrouped
from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.models.llava import PruneOptions

LENGTH, ROOM, STEPS, NUM = 24, 4, 3, 14
CONFIGS = {
    'adaptive': helpers.atp_config(capacities=(1, 2, 4, 6, 9, 12)),
    'first': helpers.atp_config(selector='random', prune_after=(0, 2),
                                fixed_counts=(10, 3))}
ANSWERS = np.random.default_rng(0).integers(6, 90, (NUM, STEPS), np.int32)


def prompts(config):
  """One image each, questions of one to seven words."""
  rng = np.random.default_rng(3)
  ids = [(BOS, IMAGE, *rng.integers(6, 90, 1 + i % 7).tolist())
         for i in range(NUM)]
  return [Sample(x, seed=i) for i, x in enumerate(ids)]


def batch_of(samples, config):
  return helpers.batch(samples, config, length=LENGTH, num_images=1)


def queue(config, size):
  samples = prompts(config)
  for first in range(0, NUM, size):
    ids = list(range(first, min(first + size, NUM)))
    filled = ids + [ids[-1]] * (size - len(ids))
    yield ids, batch_of([samples[i] for i in filled], config)


def decode(model, state, answers):
  logits = [state.logits]
  for token in answers.T:
    logits.append(model.extend(token, state))
  return np.stack(logits, axis=1)


@pytest.mark.parametrize('name', [
    'adaptive', pytest.param('first', marks=pytest.mark.slow)])
def test_a_regrouped_queue_is_its_prompts_one_by_one(name):
  config = CONFIGS[name]
  model = SegmentedModel(config, helpers.build(config)[1])
  options = PruneOptions(row_ids=np.arange(NUM, dtype=np.int32)[::-1])
  count = SlotCount()
  got, kept, sizes = {}, {}, set()
  for ids, state in prefill_regrouped(model, queue(config, 3), options, ROOM,
                                      count):
    rows = entering(config, state.pruning)
    filled = ids + [ids[-1]] * (3 - len(ids))
    logits = decode(model, state, ANSWERS[filled])
    sizes.add(tuple(state.slots))
    for row, i in enumerate(ids):
      assert i not in got
      got[i], kept[i] = logits[row], rows[:, row, 0]
  assert sorted(got) == list(range(NUM))
  for i, sample in enumerate(prompts(config)):
    state = model.prefill(batch_of([sample], config), options.replace(
        row_ids=options.row_ids[i:i + 1]), ROOM)
    np.testing.assert_array_equal(kept[i], entering(config, state.pruning)[:, 0, 0])
    helpers.close(got[i], decode(model, state, ANSWERS[i:i + 1])[0])
  if name == 'first':
    return
  assert len({tuple(k) for k in kept.values()}) >= 6 and len(sizes) > 1
  in_order = [count_slots(model, model.prefill(
      batch, options.replace(row_ids=None), ROOM), len(ids))
              for ids, batch in queue(config, 3)]
  plain = SlotCount(sum(c.slots for c in in_order),
                    sum(c.tokens for c in in_order))
  assert count.tokens == plain.tokens
  assert 1.0 < count.waste < plain.waste


@pytest.mark.parametrize('seed', [
    0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_what_is_left_comes_from_batches_of_any_size(seed, monkeypatch):
  """Few rows, a rung for every count: the last batches mix short and long."""
  waiting, full_bins = [], regroup._Line.full_bins

  def watched(self):
    yield from full_bins(self)
    waiting.extend(len(rows) for bins in self.bins for rows in bins.values())
  monkeypatch.setattr(regroup._Line, 'full_bins', watched)
  config = helpers.atp_config(capacities=tuple(range(1, 16)))
  model = _model(config)
  rng = np.random.default_rng(seed)
  ids = [(BOS, IMAGE, *rng.integers(6, 90, rng.integers(1, 7)).tolist())
         for _ in range(8)]
  samples = [Sample(x, seed=100 * seed + i) for i, x in enumerate(ids)]
  batches = [([i, i + 1], helpers.batch(samples[i:i + 2], config, length=40,
                                        num_images=1)) for i in range(0, 8, 2)]
  count, done = SlotCount(), {}
  for names, state in prefill_regrouped(model, batches, PruneOptions(), 0, count):
    done.update(zip(names, np.asarray(state.logits)))
  assert sorted(done) == list(range(8))
  assert max(waiting) == 1  # batch_size - 1, whatever comes
  plain = SlotCount()
  for names, batch in batches:
    state = model.prefill(batch, PruneOptions())
    helpers.close([done[i] for i in names], state.logits)
    one = count_slots(model, state)
    plain.add(1, one.slots, 1, one.tokens)
  # padded rows: what is padding is no text that every rung must hold
  assert count.tokens == plain.tokens and count.slots <= 1.05 * plain.slots


@functools.cache
def _model(config):
  return SegmentedModel(config, helpers.build(config)[1])


def test_slots_are_counted():
  count = SlotCount()
  count.add(num_layers=2, num_slots=10, num_rows=3, tokens=15)
  count.add(num_layers=1, num_slots=4, num_rows=3, tokens=9)
  assert (count.slots, count.tokens) == (72, 39)
  assert count.waste == pytest.approx(72 / 39)


def test_rows_of_every_kind():
  """Two images, one, none; padded in front; one long question among short."""
  config = helpers.atp_config(capacities=(1, 2, 4, 8))
  model = _model(config)
  rng = np.random.default_rng(5)
  words = lambda count: rng.integers(6, 90, count).tolist()
  ids = [(BOS, 7, IMAGE, *words(30)), (BOS, IMAGE, 6, IMAGE, *words(4)),
         (BOS, *words(5)), (BOS, IMAGE, *words(3)), (BOS, IMAGE, *words(2)),
         (BOS, *words(3), IMAGE, IMAGE, 6), (BOS, IMAGE, *words(1)), (BOS, 9)]
  samples = [Sample(x, seed=i) for i, x in enumerate(ids)]
  queue = [([i, i + 1], helpers.batch(samples[i:i + 2], config, length=56,
                                      num_images=2, pad_left=i % 4 == 2))
           for i in range(0, 8, 2)]
  got, count = {}, SlotCount()
  for names, state in prefill_regrouped(model, queue, PruneOptions(), STEPS, count):
    got.update(zip(names, decode(model, state, ANSWERS[names])))
  assert sorted(got) == list(range(8))
  alone = SlotCount()
  for i, sample in enumerate(samples):
    state = model.prefill(helpers.batch([sample], config, length=56, num_images=2),
                          PruneOptions(), STEPS)
    alone.merge(count_slots(model, state))
    helpers.close(got[i], decode(model, state, ANSWERS[i:i + 1])[0])
  # the long question is nobody else's burden, but for the batch it is in
  assert count.tokens == alone.tokens and count.slots < 1.25 * alone.slots


def test_bad_queues_are_refused():
  config = CONFIGS['adaptive']
  model = _model(config)
  run = lambda *queue, **options: list(prefill_regrouped(
      model, queue, PruneOptions(**options)))
  batch = batch_of(prompts(config)[:2], config)
  assert run() == []
  ids = np.arange(2, dtype=np.int32)
  for numbers, row_ids, words in (
      ([1, 1], None, 'number 1 twice'), ([0, 2], ids, 'none for prompt number 2'),
      ([0, -1], ids, 'none for prompt number -1'), ([0, 1.5], None, '=1.5: must be')):
    with pytest.raises(ConfigError, match=words):
      run((numbers, batch), row_ids=row_ids)
  plain = SegmentedModel(helpers.tiny(), helpers.build(helpers.tiny())[1])
  for other, options, room, words in (
      (plain, PruneOptions(), 0, 'without ATP'), (model, None, 0, 'without ATP'),
      (model, PruneOptions(), -1, 'room=-1: at least 0')):
    with pytest.raises(ConfigError, match=words):
      list(prefill_regrouped(other, [([0, 1], batch)], options, room))
  for ids in ([], [1, 2, 3]):
    with pytest.raises(ConfigError, match='2 rows has . numbers'):
      run((ids, batch))
  # what `prefill` refuses
  ends = batch_of([Sample((BOS, 6, IMAGE))], config)
  with pytest.raises(ConfigError, match='ends in an image'):
    run(([0], ends))
  with pytest.raises(ConfigError, match='hard=False'):
    run(([0, 1], batch), hard=False)
  with pytest.raises(ConfigError, match='turn_ids'):
    run(([0, 1], batch.replace(turn_ids=batch.turn_ids + 1)))


def test_one_shape_per_queue():
  config = CONFIGS['first']
  model = SegmentedModel(config, helpers.build(config)[1])
  samples = prompts(config)[:2]
  batches = [([i], helpers.batch([s], config, length=LENGTH + i, num_images=1))
             for i, s in enumerate(samples)]
  with pytest.raises(ConfigError, match='pad them to one'):
    list(prefill_regrouped(model, batches, PruneOptions()))
