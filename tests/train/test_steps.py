"""Train steps: what gradients reach, what stays, annealing, distillation."""

from __future__ import annotations

import dataclasses

import core_helpers as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample, segment

from vlm_compress import losses, sharding
from vlm_compress.config import ConfigError
from vlm_compress.data.images import clip_normalize
from vlm_compress.models.inputs import PruneOptions
from vlm_compress.models.sequence import split_voco
from vlm_compress.train.optimizer import make_optimizer, schedule, split
from vlm_compress.train.recipe import Recipe
from vlm_compress.train.state import TrainState, make_state
from vlm_compress.train.steps import (
  LOSSES,
  At,
  _text_only,
  accumulate,
  make_step,
  temperature,
  voco_loss,
)

RECIPE = Recipe(steps=30, learning_rate=1e-2, warmup_steps=2,
                weight_decay=0.0, batch_size=3)
START = At(jnp.int32(0), jnp.int32(0))
PLAIN = (Sample((BOS, IMAGE, 6, 7, 8, 9), 2, seed=1),
         Sample((BOS, IMAGE, 5, 7, 10, 11), 2, seed=2), Sample((BOS, 6, 7), 1))
COMPRESSED = (Sample((BOS, *segment(2), 6, 7, 8, 9), 2, seed=1),
              Sample((BOS, *segment(2), 5, 7, 10, 11), 2, seed=2),
              Sample((BOS, 6, 7), 1))


def _plain(config, samples=PLAIN):
  return helpers.batch(samples, config, length=24, num_images=1)


def _compressed(config, teacher=False):
  batch = helpers.batch(COMPRESSED, config, length=32, num_images=1)
  return (split_voco(batch, config, 8),
          _plain(config) if teacher else None)


def _state(params, recipe):
  trainable, frozen = split(params, recipe.trainable)
  return TrainState(step=jnp.int32(0), trainable=trainable, frozen=frozen,
                    opt_state=make_optimizer(recipe).init(trainable))


def _train(config, recipe, batch, steps=3, teacher=None):
  model, params = helpers.build(config)
  step = jax.jit(make_step(model, recipe))
  state, history = _state(params, recipe), []
  for _ in range(steps):
    state, metrics = step(state, batch, teacher)
    history.append(jax.device_get(metrics))
  assert step._cache_size() == 1  # nothing recompiles
  return params, state, history


def _changed(before, after):
  return {p for p, x in helpers.flat(before).items()
          if np.abs(np.asarray(x - helpers.flat(after)[p])).max() > 0}


def test_instruct_overfits_and_changes_everything():
  config = helpers.tiny()
  params, state, history = _train(config, RECIPE, _plain(config), 12)
  assert history[-1]['loss'] < 0.5 * history[0]['loss']
  assert int(state.step) == 12
  assert _changed(params, state.params) == set(helpers.flat(params))
  rate = schedule(RECIPE)
  np.testing.assert_allclose([m['learning_rate'] for m in history],
                             [rate(i) for i in range(12)], rtol=1e-6)
  # mean over all targets of the batch, not over rows
  model, _ = helpers.build(config)
  batch = _plain(config)
  logits, _ = helpers.apply(model, params, batch)
  total, count = losses.next_token_loss(logits, batch.input_ids,
                                        batch.loss_mask)
  helpers.close(history[0]['loss'], total.sum() / count.sum())


@pytest.mark.parametrize('config,recipe', [
    (helpers.tiny(), dataclasses.replace(RECIPE, stage='align',
                                         trainable=('multi_modal_projector/',))),
    (helpers.atp_config(), dataclasses.replace(RECIPE, stage='atp',
                                               trainable=('atp/',)))])
def test_nothing_frozen_changes_or_has_optimiser_state(config, recipe):
  params, state, _ = _train(config, recipe, _plain(config))
  learns = {p for p in helpers.flat(params)
            if p.startswith(recipe.trainable)}
  assert set(state.trainable) == learns and learns
  assert _changed(params, state.params) == learns
  num_trainable = sum(x.size for x in state.trainable.values())
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
  assert moments == 2 * num_trainable


@pytest.mark.parametrize('stage', ['instruct', 'voco', 'atp'])
def test_a_batch_in_parts_is_the_batch(stage):
  """Rows with one, two and many targets: parts weigh by what they hold."""
  config = {'instruct': helpers.tiny(), 'voco': helpers.voco_config(2),
            'atp': helpers.atp_config(lambda_target=0.0, lambda_atp=0.0)}[stage]
  image = segment(2) if stage == 'voco' else (IMAGE,)
  samples = [Sample((BOS, *image, 6, 7, 8, 9, 10, 11), 1 + i % 4, seed=i)
             for i in range(6)]
  batch = helpers.batch(samples, config, length=32, num_images=1)
  batch = (split_voco(batch, config, 8), None) if stage == 'voco' else batch
  recipe = dataclasses.replace(RECIPE, stage=stage, batch_size=6)
  model, params = helpers.build(config)

  def gradients(params, rows, at):
    return jax.value_and_grad(lambda p: LOSSES[stage](model, p, rows, at, recipe),
                              has_aux=True)(params)
  ((loss, metrics), whole), ((parts_loss, others), parts) = (
      jax.jit(lambda p, b, n=n: accumulate(gradients, p, b, jnp.int32(0), n))(
          params, batch) for n in (1, 3))
  helpers.close(parts_loss, loss, 1e-6)
  helpers.close(others['loss_text'], metrics['loss_text'], 1e-6)
  assert set(metrics) == set(others)
  for path, x in helpers.flat(whole).items():
    helpers.close(helpers.flat(parts)[path], x, 1e-5)
  # and a step takes them
  _, _, history = _train(config, dataclasses.replace(recipe, accumulate_steps=3),
                         batch, steps=1)
  helpers.close(history[0]['loss'], loss, 1e-6)


def test_random_tokens_differ_from_part_to_part():
  config = helpers.atp_config(selector='random', fixed_counts=(4, 2, 1))
  seen = []

  def look(trainable, rows, at):
    jax.debug.callback(lambda d: seen.append(int(d)), at.draw)
    return (jnp.float32(0), {}), trainable
  batch = _plain(config)
  accumulate(look, {'w': jnp.zeros(2)}, batch, jnp.int32(5), 3)
  jax.effects_barrier()
  assert sorted(set(seen)) == [15, 16, 17]


def test_pixels_are_encoded_in_the_step():
  """With a frozen tower; the same loss as from features made before."""
  config = helpers.tiny()
  model = helpers.build(config)[0]
  recipe = dataclasses.replace(RECIPE, batch_size=2, trainable=(
      'multi_modal_projector/', 'language_model/'))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  state = make_state(model, recipe, mesh, with_vision=True)
  frozen = {p for p in state.frozen if p.startswith('vision_tower/')}
  assert frozen and not any(p.startswith('vision_tower/') for p in state.trainable)
  batch = helpers.batch([Sample((BOS, IMAGE, 6, 7, 8), 2, seed=i) for i in (1, 2)],
                        config, length=24, num_images=1)
  size = config.vision.image_size
  pixels = np.random.default_rng(0).integers(0, 255, (2, 1, size, size, 3), np.uint8)
  made = helpers.apply(model, state.params, clip_normalize(pixels),
                       method='vision_features')
  step = jax.jit(make_step(model, recipe))
  before = after = state
  for _ in range(2):  # the rate of the first step is 0
    before, want = step(before, batch.replace(features=np.asarray(made)))
    after, got = step(after, batch.replace(features=pixels))
    for name in ('loss', 'grad_norm'):
      helpers.close(got[name], want[name], 1e-5)
  changed = _changed(state.params, after.params)
  assert changed and not any(p.startswith('vision_tower/') for p in changed)
  # and where the tower learns, it changes
  recipe = dataclasses.replace(recipe, trainable=())
  state = make_state(model, recipe, mesh, with_vision=True)
  after, step = state, jax.jit(make_step(model, recipe))
  for _ in range(2):
    after, _ = step(after, batch.replace(features=pixels))
  assert any(p.startswith('vision_tower/layers')
             for p in _changed(state.params, after.params))


def test_prefix_that_matches_nothing_is_refused():
  with pytest.raises(ConfigError, match="trainable='visual/'"):
    split(helpers.build(helpers.tiny())[1], ('visual/',))


def test_atp_gradients_reach_both_thresholds_of_every_module():
  config = helpers.atp_config(lambda_atp=0.0, lambda_target=0.0)
  model, params = helpers.build(config)
  recipe = dataclasses.replace(RECIPE, stage='atp')

  @jax.jit
  def grads(params, batch):
    loss = lambda p: LOSSES['atp'](model, p, batch, START, recipe)[0]
    return jax.grad(loss)(params)
  got = helpers.flat(grads(params, _plain(config)))
  for path, grad in got.items():
    per_layer = np.asarray(grad)
    if path.startswith('atp/'):  # by next-token loss alone, in every module
      assert (np.abs(per_layer).reshape(3, -1).max(1) > 1e-8).all(), path
    else:
      assert np.abs(per_layer).max() > 1e-6, path


def test_voco_gradients_reach_the_row_and_loss_falls():
  config = helpers.voco_config(2)
  recipe = dataclasses.replace(RECIPE, stage='voco')
  params, state, history = _train(config, recipe, _compressed(config), 12)
  assert 'voco_embedding' in _changed(params, state.params)
  assert _changed(params, state.params) == set(helpers.flat(params))
  assert history[-1]['loss'] < 0.5 * history[0]['loss']
  assert 'loss_distill' not in history[0]


def test_the_largest_seed_fits_the_selectors_number():
  config = helpers.atp_config()
  model, params = helpers.build(config)
  recipe = dataclasses.replace(RECIPE, stage='atp', seed=2 ** 31 - 1)
  jax.eval_shape(make_step(model, recipe), _state(params, recipe),
                 _plain(config))


def test_straight_through_lets_the_loss_bring_tokens_back():
  """Hard masks forward; thresholds feel the tokens that are gone."""
  config = helpers.atp_config(straight_through=True, lambda_atp=0.0,
                              lambda_target=0.0)
  model, params = helpers.build(config)
  recipe = dataclasses.replace(RECIPE, stage='atp')
  batch = _plain(config)

  def loss(params, model):
    return LOSSES['atp'](model, params, batch, START, recipe)
  value, slope = jax.jit(jax.value_and_grad(
      lambda p: loss(p, model)[0]))(params)
  hard, _ = model.apply(
      {'params': params}, batch, prune=PruneOptions(hard=True))
  want = losses.next_token_loss(hard, batch.input_ids, batch.loss_mask)
  helpers.close(value, np.sum(want[0]) / np.sum(want[1]), 1e-5)
  bias = slope['atp']['redundancy']['bias']
  assert (np.abs(np.asarray(bias)) > 0).all()


def test_budget_pulls_the_average_to_the_target():
  recipe = dataclasses.replace(RECIPE, stage='atp', trainable=('atp/',),
                               steps=30)
  config = helpers.atp_config(target_tokens=5.0, lambda_target=20.0,
                              lambda_atp=0.0)
  _, _, history = _train(config, recipe, _plain(config), 25)
  average = [m['layer_average_tokens'] for m in history]
  assert average[0] > 5.5 and abs(average[-1] - 5.0) < 0.3 * (average[0] - 5.0)
  first = history[0]
  helpers.close(first['loss'], first['loss_text'] + first['loss_budget_depth']
                + first['loss_budget_target'])
  assert {f'{name}/module_{i}' for i in range(3) for name in (
      'kept_tokens', 'threshold_redundancy', 'threshold_spatial')} <= set(first)


def test_temperature_is_geometric_between_its_ends():
  config = helpers.atp_config(temperature_start=10.0, temperature_end=1000.0)
  tau = lambda step: float(temperature(config, RECIPE, jnp.int32(step)))
  np.testing.assert_allclose(tau(0), 10.0, rtol=1e-5)
  np.testing.assert_allclose(tau(29), 1000.0, rtol=1e-5)
  np.testing.assert_allclose(tau(50), 1000.0, rtol=1e-5)
  np.testing.assert_allclose(tau(10) / tau(9), 100.0 ** (1 / 29), rtol=1e-4)


def test_fixed_counts_have_no_budget_terms(selector='random'):
  config = helpers.atp_config(selector=selector, fixed_counts=(9, 5, 2))
  recipe = dataclasses.replace(RECIPE, stage='atp')
  _, _, history = _train(config, recipe, _plain(config), 2)
  for metrics in history:
    helpers.close(metrics['loss'], metrics['loss_text'])
    np.testing.assert_allclose(metrics['layer_average_tokens'],
                               (16 + 9 + 5 + 2) / 4)
    np.testing.assert_allclose(
        [metrics[f'kept_tokens/module_{i}'] for i in range(3)], [9, 5, 2])


def _voco_value(config, params, recipe, batch, teacher=None):
  model, _ = helpers.build(config)
  run = jax.jit(lambda p, t, b: jax.value_and_grad(
      lambda p: voco_loss(model, p, b, START, recipe, t),
      has_aux=True)(p))
  (loss, metrics), grads = run(params, teacher, batch)
  return float(loss), jax.device_get(metrics), grads


def test_distillation_from_a_frozen_teacher_by_hand():
  config = helpers.voco_config(2, distill_weight=0.5)
  model, params = helpers.build(config)
  _, other = helpers.build(config, seed=3)
  recipe = dataclasses.replace(RECIPE, stage='voco', teacher='frozen')
  compressed, plain = _compressed(config, teacher=True)
  loss, metrics, _ = _voco_value(config, params, recipe, (compressed, plain),
                                 other)
  student = jax.nn.log_softmax(helpers.apply(model, params, compressed,
                                             method='two_pass'))
  teacher = jax.nn.log_softmax(helpers.apply(model, other, plain)[0])
  total = count = 0.0
  for b in range(3):
    at_student = np.flatnonzero(compressed.text.loss_mask[b]) - 1
    at_teacher = np.flatnonzero(plain.loss_mask[b]) - 1
    s, t = np.asarray(student)[b, at_student], np.asarray(teacher)[b, at_teacher]
    total += (np.exp(t) * (t - s)).sum()
    count += len(s)
  helpers.close(metrics['loss_distill'], total / count)
  assert metrics['loss_distill'] > 1e-2
  helpers.close(loss, metrics['loss_text'] + 0.5 * metrics['loss_distill'])


def test_distillation_is_nothing_where_teacher_and_student_agree():
  """Text-only rows: compressed or not, the model is the same."""
  config = helpers.voco_config(2, distill_weight=1.0)
  _, params = helpers.build(config)
  recipe = dataclasses.replace(RECIPE, stage='voco', teacher='self')
  compressed, plain = _compressed(config, teacher=True)
  only = np.array([[False], [False], [True]])
  text = compressed.text
  compressed = compressed.replace(
      text=text.replace(loss_mask=text.loss_mask & only))
  plain = plain.replace(loss_mask=plain.loss_mask & only)
  loss, metrics, _ = _voco_value(config, params, recipe, (compressed, plain))
  np.testing.assert_allclose(metrics['loss_distill'], 0.0, atol=1e-6)
  assert metrics['loss_text'] > 0.1


def test_text_only_aligns_supervised_tokens():
  config = helpers.voco_config(2)
  compressed, plain = _compressed(config, teacher=True)
  text = compressed.text
  # logits that say which token they predict
  ids = np.zeros(plain.input_ids.shape + (1,), np.float32)
  ids[:, :-1, 0] = plain.input_ids[:, 1:]
  got = np.asarray(_text_only(jnp.asarray(ids), plain, text))[..., 0]
  for b in range(3):
    at = np.flatnonzero(text.loss_mask[b])
    np.testing.assert_array_equal(got[b, at - 1], text.input_ids[b, at])


def test_text_only_with_a_text_part_longer_than_the_row():
  """text_length is a setting of its own and may exceed length."""
  config = helpers.voco_config(2)
  batch = helpers.batch(COMPRESSED, config, length=32, num_images=1)
  text = split_voco(batch, config, 40).text
  plain = _plain(config)
  logits = jnp.zeros((*plain.input_ids.shape, 1))
  assert _text_only(logits, plain, text).shape == (3, 40, 1)


@pytest.mark.parametrize('config,stage,teacher,part', [
    (helpers.tiny(), 'voco', 'none', 'needs a model config with voco'),
    (helpers.tiny(), 'atp', 'none', 'needs a model config with atp'),
    (helpers.voco_config(1), 'voco', 'self', 'go together'),
    (helpers.voco_config(1, distill_weight=1.0), 'voco', 'none',
     'go together')])
def test_stage_and_config_must_fit(config, stage, teacher, part):
  recipe = dataclasses.replace(RECIPE, stage=stage, teacher=teacher)
  from vlm_compress.models.llava import Llava
  with pytest.raises(ConfigError, match=part):
    make_step(Llava(config), recipe)


def test_config_threshold_shift_is_for_inference_only():
  batch = _plain(helpers.atp_config())
  recipe = dataclasses.replace(RECIPE, stage='atp')
  averages = []
  for shift in (0.0, 2.0):
    model, params = helpers.build(helpers.atp_config(threshold_shift=shift))
    loss = jax.jit(lambda p, b, m=model: LOSSES['atp'](
        m, p, b, START, recipe))
    averages.append(loss(params, batch)[1]['layer_average_tokens'])
  helpers.close(averages[0], averages[1])
