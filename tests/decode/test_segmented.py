"""Rows that get shorter give what masks give: prefill, decode, any batch."""

from __future__ import annotations

import dataclasses

import core_helpers as helpers
import jax
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample, segment

from vlm_compress import sharding
from vlm_compress.config import ConfigError
from vlm_compress.decode.prefilled import entering, text_slots
from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.models.llava import PruneOptions
from vlm_compress.models.segments import capacity_ladder
from vlm_compress.models.sequence import split_voco
from vlm_compress.nn.kv_cache import grow

LENGTH, IMAGES, STEPS = 44, 2, 20
PROMPTS = ((BOS, IMAGE, 6, 7, 8, 9), (BOS, 5, IMAGE, 7, 8, IMAGE, 6, 9, 10),
           (BOS, 6, 7, 8), (BOS, 4, 11, IMAGE, 12))
ANSWERS = np.random.default_rng(0).integers(6, 90, (4, STEPS), np.int32)
COUNTS = (10, 6, 3)
CONFIGS = {
    'adaptive': helpers.atp_config(),
    'last': helpers.atp_config(cross_queries='last', score_norm='rank'),
    'fixed': helpers.atp_config(selector='fixed', fixed_counts=COUNTS),
    'random': helpers.atp_config(selector='random', fixed_counts=COUNTS),
    'uniform': helpers.atp_config(selector='uniform', fixed_counts=COUNTS),
    'first': helpers.atp_config(selector='random', prune_after=(0, 2),
                                fixed_counts=(10, 3)),
    'placed': helpers.atp_config(prune_after=(2,), target_tokens=10.0)}
ROW_IDS = np.array([3, 1, 4, 8], np.int32)
# Many programs: most selectors differ in a few lines of compress/atp.py only.
SOME = [name if name in ('adaptive', 'first') else
        pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
_MODELS = {}


def batch_of(config, rows=range(4), pad_left=False, length=LENGTH):
  return helpers.batch([Sample(PROMPTS[i], seed=i) for i in rows], config,
                       length=length, num_images=IMAGES, pad_left=pad_left)


def segmented(config) -> SegmentedModel:
  """One per config: its programs are what takes the time."""
  if config not in _MODELS:
    _MODELS[config] = SegmentedModel(config, helpers.build(config)[1])
  return _MODELS[config]


def masked(config, batch, answers, **options):
  """Logits of the prompt's and of every later token by Llava's own methods."""
  model, params = helpers.build(config)
  logits, cache, out = helpers.apply(model, params, batch, method='prefill',
                                     **options)
  cache, all_logits = grow(cache, STEPS), [logits]
  for step in range(answers.shape[1]):
    logits, cache = helpers.apply(model, params, answers[:, step], cache,
                                  method='extend')
    all_logits.append(logits)
  return np.stack(all_logits), out


def in_segments(config, batch, answers, options):
  model = segmented(config)
  state = model.prefill(batch, options, room=STEPS)
  logits = [state.logits]
  for step in range(answers.shape[1]):
    logits.append(model.extend(answers[:, step], state))
  return np.stack(logits), state


@pytest.mark.parametrize('pad_left', [False, True])
@pytest.mark.parametrize('name', SOME)
def test_shorter_rows_are_the_hard_mask(name, pad_left):
  config = CONFIGS[name]
  options = PruneOptions(row_ids=ROW_IDS)
  batch = batch_of(config, pad_left=pad_left)
  want, out = masked(config, batch, ANSWERS, prune=options)
  got, state = in_segments(config, batch, ANSWERS, options)
  helpers.close(got, want)
  np.testing.assert_array_equal(entering(config, state.pruning),
                                np.asarray(out.entering).sum(-1))
  np.testing.assert_array_equal(state.pruning.state.module_keep,
                                out.prune.module_keep)
  # It really got shorter, later more than sooner, and so did the caches.
  text = text_slots(batch)
  assert list(state.slots) == sorted(state.slots, reverse=True)
  assert state.slots[-1] < state.slots[0] or name == 'first'
  assert state.slots[-1] - text <= 16 and state.slots[-1] < LENGTH
  for slots, cache in zip(state.slots, state.caches):
    assert {k.shape[1] for k in cache.keys} == {slots + STEPS}
  plain, _ = masked(dataclasses.replace(config, atp=None), batch, ANSWERS)
  assert np.abs(got - plain).max() > 1e-2


@pytest.mark.parametrize('kernel', ['jax', pytest.param(
    'splash', marks=pytest.mark.slow)])
def test_other_kernels_give_the_same(kernel):
  config = CONFIGS['adaptive']
  options, answers = PruneOptions(row_ids=ROW_IDS), ANSWERS[:, :3]
  want, out = masked(config, batch_of(config), answers, prune=options)
  other = dataclasses.replace(config, attention_implementation=kernel)
  got, state = in_segments(other, batch_of(other), answers, options)
  helpers.close(got, want)
  np.testing.assert_array_equal(state.pruning.state.module_keep,
                                out.prune.module_keep)


def test_in_bfloat16_it_is_the_hard_mask():
  """To what bfloat16 rounds; float32 tolerances are for float32."""
  config = dataclasses.replace(CONFIGS['random'], dtype='bfloat16')
  options, answers = PruneOptions(row_ids=ROW_IDS), ANSWERS[:, :3]
  want, out = masked(config, batch_of(config), answers, prune=options)
  got, state = in_segments(config, batch_of(config), answers, options)
  assert state.caches[0].keys[0].dtype == jax.numpy.bfloat16
  np.testing.assert_array_equal(state.pruning.state.module_keep,
                                out.prune.module_keep)
  assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


def test_all_kept_is_the_plain_model():
  config = CONFIGS['adaptive']
  batch = batch_of(config)
  want, _ = masked(dataclasses.replace(config, atp=None), batch, ANSWERS)
  kept, state = in_segments(config, batch, ANSWERS,
                            PruneOptions(threshold_shift=-60.0))
  helpers.close(kept, want)
  assert entering(config, state.pruning)[:, batch.image_valid].min() == 16
  plain, state = in_segments(config, batch, ANSWERS, None)
  helpers.close(plain, want)
  assert len(state.caches) == 1 and state.pruning is None


def test_a_soft_mask_at_high_temperature_is_the_shorter_row():
  config = CONFIGS['adaptive']
  batch = batch_of(config)
  soft, _ = masked(config, batch, ANSWERS,
                   prune=PruneOptions(temperature=1e7, hard=False))
  got, _ = in_segments(config, batch, ANSWERS, PruneOptions(row_ids=ROW_IDS))
  helpers.close(got, soft)


def test_an_empty_keep_set_is_impossible():
  config = CONFIGS['adaptive']
  batch = batch_of(config)
  got, state = in_segments(config, batch, ANSWERS,
                           PruneOptions(threshold_shift=60.0))
  counts = entering(config, state.pruning)[1:, batch.image_valid]
  assert (counts == 1).all() and np.isfinite(got).all()
  assert state.slots[1:] == [2 * capacity_ladder(config)[0] + 8] * 3


@pytest.mark.parametrize('name', ['adaptive', 'first'])
def test_a_row_does_not_depend_on_batch_capacity_or_place(name):
  config = CONFIGS[name]
  together, state = in_segments(config, batch_of(config), ANSWERS,
                                PruneOptions(row_ids=ROW_IDS))
  kept = entering(config, state.pruning)
  coarse = dataclasses.replace(config, atp=dataclasses.replace(
      config.atp, capacities=(12,)))
  for rows, model in (([1], config), ([3], config), ([3, 2, 0, 1], coarse)):
    got, other = in_segments(
        model, batch_of(config, rows, pad_left=len(rows) > 1), ANSWERS[rows],
        PruneOptions(row_ids=ROW_IDS[rows]))
    helpers.close(got, together[:, rows])
    np.testing.assert_array_equal(entering(model, other.pruning), kept[:, rows])
  assert other.slots != state.slots  # of the coarse ladder
  alone = segmented(config).prefill(batch_of(config, [3]), PruneOptions(
      row_ids=ROW_IDS[3:]))
  assert alone.slots[-1] < state.slots[-1]  # the fullest row decides


def test_ladders_of_the_config():
  plain = CONFIGS['adaptive']
  assert capacity_ladder(plain) == (1, 2, 3, 4, 6, 7, 8, 10, 12, 16)
  large = dataclasses.replace(
      plain, vision=dataclasses.replace(plain.vision, image_size=144),
      atp=dataclasses.replace(plain.atp, target_tokens=200.0))
  assert capacity_ladder(large) == (4, 12, 24, 36, 48, 64, 80, 96, 120, 144,
                                    192, 240, 288, 360, 432, 576)
  given = dataclasses.replace(plain, atp=dataclasses.replace(
      plain.atp, capacities=(2, 9)))
  assert capacity_ladder(given) == (2, 9, 16)
  with pytest.raises(ConfigError, match=r'atp.capacities=\(9, 40\) exceed the 16'):
    dataclasses.replace(plain, atp=dataclasses.replace(
        plain.atp, capacities=(9, 40)))


@pytest.mark.parametrize('sees_prefix', [False, True])
def test_compressing_and_reading_are_the_two_passes(sees_prefix):
  config = helpers.voco_config(2, text_sees_prefix=sees_prefix)
  prompts = ((BOS, *segment(2), 6, 7), (BOS, 9, 10),
             (BOS, *segment(2), 8, *segment(2), 9, 12))
  batch = split_voco(helpers.batch(
      [Sample(p, seed=i) for i, p in enumerate(prompts)], config,
      length=60, num_images=IMAGES), config, 12)
  model, params = helpers.build(config)
  logits, cache, _ = helpers.apply(model, params, batch,
                                   method='prefill_two_pass')
  cache, serving = grow(cache, STEPS), segmented(config)
  images = serving.compress(batch.text.features, batch.segment_ids, 2)
  state = serving.read(batch.text, images, batch.voco_positions, STEPS)
  assert state.slots == [cache.size - STEPS]
  for step in range(STEPS):
    helpers.close(state.logits, logits)
    logits, cache = helpers.apply(model, params, ANSWERS[:3, step], cache,
                                  method='extend')
    serving.extend(ANSWERS[:3, step], state)
  helpers.close(state.logits, logits)


def stream(config, count):
  """Batches of two different pictures each, with questions of any length."""
  rng = np.random.default_rng(5)
  for i in range(0, count, 2):
    ids = [(BOS, IMAGE, *rng.integers(6, 90, rng.integers(1, 14)).tolist())
           for _ in range(2)]
    yield helpers.batch([Sample(x, seed=10 * i + j) for j, x in enumerate(ids)],
                        config, length=32, num_images=1)


def test_nothing_is_compiled_for_200_different_images():
  config = helpers.atp_config(capacities=(2, 4, 8))
  model = SegmentedModel(config, helpers.build(config)[1])
  count = model.compile_ahead(batch_size=2, length=32, text=16, room=4)
  assert count == len(model.programs) > 20
  slots = set()
  with helpers.Compilations() as compilations:
    for shift, batch in zip(np.linspace(-1.0, 1.0, 100), stream(config, 200)):
      options = PruneOptions() if shift > 0.5 else PruneOptions(
          threshold_shift=shift, row_ids=np.int32([1, 2]))
      state = model.prefill(batch, options, room=4)
      for token in ANSWERS[:2, :3].T:
        model.extend(token, state)
      slots |= set(enumerate(state.slots))
  assert compilations.count == 0 and len(model.programs) == count
  assert len(slots) >= 10  # many rungs were met
  with helpers.Compilations() as compilations:
    model.prefill(next(stream(config, 2)), None)
  assert compilations.count > 0  # the counter counts


@pytest.mark.slow
@pytest.mark.parametrize('text', [5, 13])
def test_compiling_ahead_on_a_mesh(text):
  """Any number of text tokens; what is computed on a mesh lies there."""
  config = helpers.atp_config(capacities=(4,))
  mesh = sharding.make_mesh(2, 2, 2)
  params = jax.device_put(helpers.build(config)[1], sharding.replicated(mesh))
  model = SegmentedModel(config, params)
  length = 16 + text
  count = model.compile_ahead(batch_size=2, length=length, text=text, room=2)
  row = Sample((BOS, IMAGE, *range(6, 6 + text - 1)))
  batch = helpers.batch([row, row], config, length=length, num_images=1)
  state = model.prefill(batch, PruneOptions(), 2)
  got = model.extend(ANSWERS[:2, 0], state)
  assert len(model.programs) == count
  alone = segmented(config)
  state = alone.prefill(batch, PruneOptions(), 2)
  helpers.close(got, alone.extend(ANSWERS[:2, 0], state))


def test_what_cannot_be_is_refused():
  config = CONFIGS['adaptive']
  model, batch = segmented(config), batch_of(config)
  with pytest.raises(ConfigError, match='hard=False'):
    model.prefill(batch, PruneOptions(hard=False))
  with pytest.raises(ConfigError, match='config.atp is None'):
    segmented(helpers.tiny()).prefill(batch, PruneOptions())
  with pytest.raises(ConfigError, match='pruned=True'):
    segmented(helpers.tiny()).compile_ahead(1, 32, 8, 0)
  fits = {'batch_size': 1, 'length': 24, 'text': 8, 'room': 0}
  for name, value, words in (
      ('batch_size', 0, 'batch_size=0: at least 1'), ('text', 0, 'text=0: at'),
      ('text', -5, 'text=-5: at least 1'), ('room', -1, 'room=-1: at least 0'),
      ('room', 1.5, 'room=1.5: must be'), ('length', 23, 'length=23: .* 24 slots'),
      ('num_images', 0, 'num_images=0: at least 1'), ('num_images', 2, '40 slots'),
      ('shortest', 9, 'shortest=9 is above text=8'), ('shortest', 0, 'shortest=0')):
    with pytest.raises(ConfigError, match=words):
      model.compile_ahead(**{**fits, name: value})
  for run in (model.prefill, lambda some, *args: model.read_behind(some, [], *args[1:])):
    with pytest.raises(ConfigError, match='room=-1: at least 0'):
      run(batch, None, -1)
  for ids in ([5], np.zeros((4, 1)), 3):
    with pytest.raises(ConfigError, match=r'row_ids: shape .* for 4 row\(s\)'):
      model.prefill(batch, PruneOptions(row_ids=ids))
  for count in (0, 2, 5):
    with pytest.raises(ConfigError, match=f'there are {count} prefixes'):
      model.read_behind(batch, [None] * count)
  with pytest.raises(ConfigError, match='there are 4 prefixes'):
    segmented(helpers.tiny()).read_behind(batch, [None] * 4)
  ends = helpers.batch([Sample((BOS, 6, IMAGE))], config, length=24, num_images=1)
  with pytest.raises(ConfigError, match='ends in an image'):
    model.prefill(ends, PruneOptions())
  turns = batch.replace(turn_ids=batch.turn_ids + 1)
  for run in (lambda: model.prefill(turns, None),
              lambda: model.read_behind(turns, [])):
    with pytest.raises(ConfigError, match='turn_ids'):
      run()
  state = model.prefill(batch, None)
  with pytest.raises(ConfigError, match='room for 0 new tokens'):
    model.extend(ANSWERS[:, 0], state)
