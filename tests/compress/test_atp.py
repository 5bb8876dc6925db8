"""Masks, thresholds and selectors of ATP, by hand."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, expit

from vlm_compress.compress import atp, selection
from vlm_compress.compress.spatial import spatial_scores, uniform_order
from vlm_compress.config import AtpConfig
from vlm_compress.nn.attention import attention_probs

GRID, P = 4, 16
CONFIG = AtpConfig(prune_after=(1, 2), threshold_hidden_size=8,
                   init_theta_r=0.4, init_theta_s=0.5)


def _heads(config=CONFIG, seed=0):
  module = atp.ThresholdHeads(len(config.prune_after), P, config)
  heads = nn.unbox(module.init(jax.random.key(seed))['params'])
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32)
  for name in ('redundancy', 'spatial'):
    heads[name] = {**heads[name], 'kernel': draw(heads[name]['kernel'])}
  bias = heads['redundancy']['bias']  # the second module asks for more
  heads['redundancy']['bias'] = bias + jnp.array([[0.0], [0.3]])
  return heads


def _inputs(config=CONFIG, num_images=2, rows=2, hard=True, temperature=1.0,
            shift=0.0, seed=0, text=4):
  """BOS, images, text; the prompt is the text behind the images."""
  T = 1 + num_images * P + text
  slots = np.full((rows, T), -1)
  slots[:, 1:1 + num_images * P] = np.arange(num_images * P)
  index = np.broadcast_to(1 + np.arange(num_images * P), (rows, num_images * P))
  prompt = np.arange(T) > num_images * P
  return atp.PruneInputs(
      heads=_heads(config) if config.selector == 'adaptive' else None,
      visual_index=jnp.asarray(index.reshape(rows, num_images, P)),
      image_valid=jnp.ones((rows, num_images), bool),
      visual_slots=jnp.asarray(slots),
      image_ids=jnp.asarray(np.where(slots >= 0, slots // P + 1, 0)),
      prompt_weight=jnp.broadcast_to(jnp.asarray(prompt, jnp.float32),
                                     (rows, T)),
      order=_order(config.selector, (rows, num_images, P), GRID,
                   jnp.arange(rows), seed),
      temperature=jnp.float32(temperature), threshold_shift=jnp.float32(shift),
      hard=hard, config=config, grid_size=GRID)


@jax.jit
def _run(q, k, mask, inputs):
  """All modules, one after the other, behind the same attention."""
  state = atp.initial_state(inputs)
  for module in range(len(inputs.config.prune_after)):
    module_mask, bias = atp.masked_by_keep(state.keep, inputs, mask)
    state = atp.prune(state, jnp.int32(module), q, k, None, module_mask,
                      bias, inputs)
  return state


def _prune(inputs, seed=0):
  rng = np.random.default_rng(seed)
  B, T = inputs.visual_slots.shape
  q = (1.5 * rng.normal(size=(B, T, 4, 8))).astype(np.float32)
  k = rng.normal(size=(B, T, 2, 8)).astype(np.float32)
  mask = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
  return jax.device_get(_run(q, k, mask, inputs))


_order = jax.jit(selection.selection_order, static_argnums=(0, 1, 2))


def _fixed(selector, counts=(9, 4), **fields):
  return dataclasses.replace(CONFIG, selector=selector, fixed_counts=counts,
                             **fields)


def test_thresholds_by_hand():
  module = jax.tree.map(lambda x: np.asarray(x[1], np.float64), _heads())
  rng = np.random.default_rng(3)
  self_score, cross_score = rng.random((2, 3, 1, P))
  got = atp.thresholds(jax.tree.map(lambda x: x[1], _heads()),
                       jnp.float32(self_score), jnp.float32(cross_score), 0.25)
  x = np.concatenate([self_score, cross_score], -1)
  hidden = x @ module['linear']['kernel'] + module['linear']['bias']
  hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
  for i, name in enumerate(('redundancy', 'spatial')):
    logit = hidden @ module[name]['kernel'] + module[name]['bias']
    np.testing.assert_allclose(got[..., i], expit(logit[..., 0] + 0.25),
                               rtol=1e-5)


def test_heads_start_at_the_configured_thresholds():
  config = dataclasses.replace(CONFIG, init_theta_r=0.2, init_theta_s=0.7)
  heads = nn.unbox(atp.ThresholdHeads(2, P, config).init(
      jax.random.key(0))['params'])
  zeros = jnp.zeros((1, 1, P))
  for module in range(2):
    own = jax.tree.map(lambda x, m=module: x[m], heads)
    np.testing.assert_allclose(atp.thresholds(own, zeros, zeros, 0.0)[0, 0],
                               [0.2, 0.7], atol=1e-6)
  kernel = np.asarray(heads['linear']['kernel'])
  assert kernel.shape == (2, 2 * P, 8)
  assert np.abs(kernel[0] - kernel[1]).max() > 1e-2  # weights of their own


def _mask(margins_r, margins_s, **kwargs):
  """adaptive_mask for given margins (redundancy and spatial)."""
  fields = {k: kwargs.pop(k) for k in ('criteria', 'straight_through')
            if k in kwargs}
  config = dataclasses.replace(CONFIG, **fields)
  inputs = _inputs(config, rows=1, num_images=1, **kwargs)
  theta = jnp.full((1, 1, 2), 0.5)
  return atp.adaptive_mask(0.5 + jnp.asarray([[margins_r]]),
                           0.5 + jnp.asarray(margins_s), theta, inputs)[0, 0]


R, S = np.array([0.2, -0.1, 0.1, -0.3]), np.array([-0.3, 0.2, 0.2, -0.1])


def test_hard_mask_either_criterion_keeps():
  np.testing.assert_array_equal(_mask(R, S), [1, 1, 1, 0])
  np.testing.assert_array_equal(_mask(R, S, criteria='redundant'),
                                [1, 0, 1, 0])
  np.testing.assert_array_equal(_mask(R, S, criteria='spatial'), [0, 1, 1, 0])


def test_equality_does_not_keep():
  np.testing.assert_array_equal(_mask([0.0, 0.25], [0.0, 0.0]), [0, 1])


def test_soft_mask_is_the_maximum_of_two_sigmoids():
  tau = 7.0
  want = np.maximum(expit(R * tau), expit(S * tau))
  np.testing.assert_allclose(_mask(R, S, hard=False, temperature=tau), want,
                             atol=1e-6)
  np.testing.assert_allclose(
      _mask(R, S, hard=False, temperature=tau, criteria='redundant'),
      expit(R * tau), atol=1e-6)
  np.testing.assert_allclose(
      _mask(R, S, hard=False, temperature=tau, criteria='spatial'),
      expit(S * tau), atol=1e-6)


def test_straight_through_is_hard_forward_and_soft_backward():
  def total(r, straight_through):
    weight = jnp.arange(1.0, 5.0)
    return jnp.sum(weight * _mask(r, S, hard=False, temperature=3.0,
                                  straight_through=straight_through))
  value, grad = jax.value_and_grad(total)(jnp.asarray(R), True)
  np.testing.assert_allclose(value, 1 + 2 + 3, rtol=1e-6)
  soft = jax.grad(total)(jnp.asarray(R), False)
  assert np.abs(soft).max() > 0.1
  np.testing.assert_allclose(grad, soft, atol=1e-6)


def test_keep_by_rank():
  got = atp.keep_by_rank(jnp.asarray([[3.0, 1.0, 2.0, 1.0]]), 2)
  np.testing.assert_array_equal(got[0], [0, 1, 0, 1])
  got = atp.keep_by_rank(jnp.asarray([[1.0, 1.0, 1.0, jnp.inf]]), 2)
  np.testing.assert_array_equal(got[0], [1, 1, 0, 0])


def test_token_keep_is_one_for_text_and_follows_slots():
  inputs = _inputs(num_images=1)
  slots = np.array(inputs.visual_slots)
  slots[:, [1, 2]] = slots[:, [2, 1]]  # data decides, not the order
  inputs = inputs.replace(visual_slots=jnp.asarray(slots))
  keep = jnp.arange(2.0 * P).reshape(2, 1, P) / 100
  got = np.asarray(atp.token_keep(keep, inputs))
  assert (got[:, [0]] == 1).all() and (got[:, 1 + P:] == 1).all()
  np.testing.assert_allclose(got[0, 1:4], [0.01, 0.0, 0.02], atol=1e-7)


@pytest.mark.parametrize('hard', [True, False])
def test_mask_enters_on_the_key_side_but_for_the_token_itself(hard):
  inputs = _inputs(hard=hard, rows=1, num_images=1)
  keep = jnp.ones((1, 1, P)).at[0, 0, 2].set(0.0 if hard else 0.25)
  causal = jnp.tril(jnp.ones((1, 21, 21), bool))
  mask, bias = atp.masked_by_keep(keep, inputs, causal)
  want = np.array(causal)
  if hard:
    want[0, :, 3] = False  # slot 2 stands at position 3
    want[0, 3, 3] = True
    assert bias is None
  else:
    expected = np.zeros((1, 21, 21))
    expected[0, :, 3] = np.log(0.25)
    expected[0, 3, 3] = 0.0
    np.testing.assert_allclose(bias, expected, atol=1e-6)
  np.testing.assert_array_equal(mask, want)


def test_no_attention_logit_outweighs_a_token_that_is_gone():
  """A soft mask of nearly 0 and a hard one leave the same attention."""
  causal = jnp.tril(jnp.ones((1, 21, 21), bool))
  q = jnp.full((1, 21, 1, 2), 40.0)
  k = jnp.ones((1, 21, 1, 2)).at[0, 3].set(40.0)  # logits of 2263 and 57
  got = []
  for hard, gone in ((True, 0.0), (False, 0.0), (False, 0.9 * atp.GONE)):
    keep = jnp.ones((1, 1, P)).at[0, 0, 2].set(gone)
    mask, bias = atp.masked_by_keep(
        keep, _inputs(hard=hard, rows=1, num_images=1), causal)
    got.append(np.asarray(attention_probs(q, k, mask, bias))[0, 0, 0])
  assert got[0][20, 3] == 0.0 and got[0][3, 3] == 1.0
  np.testing.assert_array_equal(got[1], got[0])
  np.testing.assert_array_equal(got[2], got[0])
  # and the gradient of a mask that is gone is finite
  slope = jax.grad(lambda x: jnp.sum(attention_probs(q, k, *atp.masked_by_keep(
      jnp.ones((1, 1, P)).at[0, 0, 2].set(x),
      _inputs(hard=False, rows=1, num_images=1), causal))[..., 20, 4]))
  assert float(slope(0.0)) == 0.0 and np.isfinite(float(slope(0.5)))


def test_redundancy_and_masks_of_a_module_follow_the_formulas():
  state = _prune(_inputs())
  theta = np.asarray(state.thresholds[0])
  assert 0.01 < theta.std() and (theta > 0).all() and (theta < 1).all()
  redundancy = np.asarray(state.redundancy[0])
  want = (redundancy > theta[..., :1]) | (
      spatial_scores(GRID) > theta[..., 1:])
  np.put_along_axis(want, redundancy.argmax(-1)[..., None], True, -1)
  kept = state.module_keep[0]
  np.testing.assert_array_equal(kept, want)
  assert 4 < kept.sum() < kept.size
  assert len({int(n) for n in kept.sum(-1).ravel()}) > 1  # instance-wise
  np.testing.assert_array_equal(state.module_keep[1], state.keep)


@pytest.mark.parametrize('hard', [True, False])
def test_masks_multiply_across_modules(hard):
  config = dataclasses.replace(CONFIG, criteria='redundant')
  inputs = _inputs(config, hard=hard, temperature=5.0)
  state = _prune(inputs)
  first, second = np.asarray(state.module_keep)
  theta = np.asarray(state.thresholds[1])
  redundancy = np.asarray(state.redundancy[1])
  margin = redundancy - theta[..., :1]
  own = (margin > 0).astype(float) if hard else expit(margin * 5.0)
  best = redundancy.argmax(-1)
  np.put_along_axis(own, best[..., None], 1.0, -1)
  np.testing.assert_allclose(second, first * own, atol=1e-6)
  assert 0 < second.sum() < first.sum()


@pytest.mark.parametrize('score_norm', ['relative', 'minmax', 'rank'])
def test_the_best_token_always_stays(score_norm):
  """Thresholds that nothing passes, in both modules."""
  config = dataclasses.replace(CONFIG, score_norm=score_norm)
  inputs = _inputs(config, shift=50.0)
  state = _prune(inputs)
  for kept in np.asarray(state.module_keep):
    np.testing.assert_array_equal(kept.sum(-1), np.ones((2, 2)))
  np.testing.assert_array_equal(state.module_keep[0], state.module_keep[1])
  np.testing.assert_array_equal(
      np.asarray(state.keep).argmax(-1),
      np.asarray(state.redundancy[0]).argmax(-1))


def test_no_prompt_and_cross_scores_only_still_keeps_a_token():
  """All scores are zero; a token that is gone must not be chosen as best."""
  config = dataclasses.replace(CONFIG, scores='cross')
  inputs = _inputs(config, num_images=1, shift=50.0)
  inputs = inputs.replace(prompt_weight=0 * inputs.prompt_weight)
  keep = jnp.zeros((2, 1, P)).at[:, 0, 5:7].set(1.0)
  q = jnp.ones((2, 21, 4, 8))
  mask = jnp.tril(jnp.ones((2, 21, 21), bool))
  state = atp.initial_state(inputs).replace(keep=keep)
  mask, bias = atp.masked_by_keep(keep, inputs, mask)
  after = jax.jit(atp.prune)(state, jnp.int32(1), q, q[:, :, :2], None, mask,
                             bias, inputs)
  np.testing.assert_array_equal(np.asarray(after.keep).sum(-1), [[1], [1]])


@pytest.mark.parametrize('selector', ['fixed', 'random', 'uniform'])
def test_counts_are_exact_and_nested(selector):
  state = _prune(_inputs(_fixed(selector)),
                 )
  first, second = np.asarray(state.module_keep)
  assert (first.sum(-1) == 9).all() and (second.sum(-1) == 4).all()
  assert not (second > first).any()


def test_fixed_keeps_the_best_scores():
  state = _prune(_inputs(_fixed('fixed')))
  order = np.argsort(-np.asarray(state.redundancy[0]), -1)
  for b in range(2):
    kept = np.flatnonzero(state.module_keep[0][b, 0])
    assert set(kept) == set(order[b, 0, :9])


def test_fixed_counts_kept_tokens_only_after_the_first_module():
  """The second module's four are the best of the nine that are left."""
  state = _prune(_inputs(_fixed('fixed')))
  scores = np.where(np.asarray(state.module_keep[0]) > 0,
                    np.asarray(state.redundancy[1]), -1.0)
  for b in range(2):
    assert set(np.flatnonzero(state.keep[b, 0])) == set(
        np.argsort(-scores[b, 0])[:4])


def test_uniform_is_the_uniform_order_and_looks_at_nothing():
  a, b = (_prune(_inputs(_fixed('uniform')), seed=s) for s in (0, 1))
  np.testing.assert_array_equal(a.keep, b.keep)
  for module, count in enumerate((9, 4)):
    np.testing.assert_array_equal(a.module_keep[module, 0, 0] > 0,
                                  uniform_order(GRID) < count)


def test_random_depends_on_seed_row_and_image_only():
  order = functools.partial(_order, 'random')
  full = order((3, 2, P), GRID, jnp.array([4, 7, 9]), 5)
  alone = order((1, 2, P), GRID, jnp.array([7]), 5)
  np.testing.assert_array_equal(full[1], alone[0])
  fewer = order((3, 1, P), GRID, jnp.array([4, 7, 9]), 5)
  np.testing.assert_array_equal(full[:, :1], fewer)
  for ranks in np.asarray(full).reshape(-1, P):
    assert sorted(ranks) == list(range(P))
  different = [full[0, 0], full[0, 1], full[1, 0],
               order((3, 2, P), GRID, jnp.array([4, 7, 9]), 6)[0, 0]]
  assert len({tuple(np.asarray(x)) for x in different}) == 4


def test_invalid_images_keep_nothing():
  inputs = _inputs()
  inputs = inputs.replace(image_valid=jnp.array([[True, False]] * 2))
  state = _prune(inputs)
  assert not np.asarray(state.module_keep[:, :, 1]).any()
  assert np.asarray(state.module_keep[:, :, 0]).any()


@pytest.mark.parametrize('change', [
    {'scores': 'self'}, {'scores': 'cross'}, {'score_norm': 'minmax'},
    {'score_norm': 'rank'}])
def test_score_switches_change_the_scores(change):
  base = _prune(_inputs())
  other = _prune(_inputs(dataclasses.replace(CONFIG, **change)))
  assert np.abs(base.redundancy[0] - other.redundancy[0]).max() > 1e-2


def test_both_scores_are_the_mean_of_self_and_cross():
  parts = [_prune(_inputs(dataclasses.replace(CONFIG, scores=s))).redundancy[0]
           for s in ('self', 'cross', 'both')]
  np.testing.assert_allclose(parts[2], (parts[0] + parts[1]) / 2, atol=1e-6)


@pytest.mark.parametrize('change', [
    {'sap_strides': (2,)}, {'sap_lambda': 1.0}])
def test_spatial_switches_change_the_mask(change):
  run = lambda config: _prune(_inputs(config, hard=False,
                                      temperature=5.0)).module_keep[0]
  assert np.abs(run(CONFIG) - run(dataclasses.replace(CONFIG, **change))
                ).max() > 1e-2


def test_threshold_shift_is_monotone_from_all_to_one():
  shifts = (-30.0, -1.0, -0.5, 0.0, 0.2, 0.5, 2.0, 30.0)
  kept = [_prune(_inputs(shift=s)).module_keep[0] for s in shifts]
  sums = [k.sum() for k in kept]
  for more, less in zip(kept, kept[1:]):
    assert not (less > more).any()
  assert sums[0] == 4 * P and sums[-1] == 4 and len(set(sums)) >= 4
