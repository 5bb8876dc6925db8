"""ATP in the whole model: the invariants of pruning."""

from __future__ import annotations

import dataclasses

import core_helpers as helpers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample

from vlm_compress.models.llama import DecoderLayer
from vlm_compress.models.llava import PruneOptions
from vlm_compress.nn.masks import causal_mask
from vlm_compress.nn.norms import RMSNorm

LENGTH, IMAGES = 44, 2
SAMPLES = (Sample((BOS, IMAGE, 6, 7, 8, 9), 1, seed=1),
           Sample((BOS, 5, IMAGE, 7, 8, IMAGE, 6, 9, 10), 2, seed=2),
           Sample((BOS, 6, 7, 8)),
           Sample((BOS, 4, 11, IMAGE, 12), seed=3))
COUNTS = (10, 6, 3)
SELECTORS = {
    'adaptive': helpers.atp_config(),
    'last': helpers.atp_config(cross_queries='last'),
    'fixed': helpers.atp_config(selector='fixed', fixed_counts=COUNTS),
    'random': helpers.atp_config(selector='random', fixed_counts=COUNTS),
    'uniform': helpers.atp_config(selector='uniform', fixed_counts=COUNTS)}
CONFIG = SELECTORS['adaptive']


def _batch(samples=SAMPLES, pad_left=False, length=LENGTH, config=CONFIG):
  return helpers.batch(samples, config, length=length, num_images=IMAGES,
                       pad_left=pad_left)


def _run(config, batch, row_ids=None, **options):
  model, params = helpers.build(config)
  if row_ids is None:
    row_ids = np.arange(len(batch.input_ids))
  options = dict(temperature=jnp.float32(1.0),
                 threshold_shift=jnp.float32(0.0), seed=jnp.int32(0),
                 row_ids=jnp.asarray(row_ids), hard=True) | options
  return helpers.apply(model, params, batch, prune=PruneOptions(**options))


def _valid(logits, batch):
  return np.asarray(logits)[batch.valid]


def test_all_kept_is_the_plain_model():
  batch = _batch()
  model, params = helpers.build(CONFIG)
  plain, none = helpers.apply(model, params, batch)
  kept, out = _run(CONFIG, batch, threshold_shift=jnp.float32(-60.0))
  assert none.entering is None
  np.testing.assert_array_equal(
      np.asarray(out.entering).sum(-1),
      np.broadcast_to(16.0 * batch.image_valid, (4, 4, 2)))
  helpers.close(_valid(kept, batch), _valid(plain, batch))
  pruned, _ = _run(CONFIG, batch)
  assert np.abs(_valid(pruned, batch) - _valid(plain, batch)).max() > 1e-2


def test_soft_mask_at_high_temperature_is_the_hard_mask():
  batch = _batch()
  hard, hard_out = _run(CONFIG, batch)
  soft, soft_out = _run(CONFIG, batch, hard=False,
                        temperature=jnp.float32(1e7))
  keep = np.asarray(hard_out.entering)
  assert 0.2 < keep[-1][batch.image_valid].mean() < 0.8
  helpers.close(soft_out.entering, keep)
  helpers.close(_valid(soft, batch), _valid(hard, batch))
  cool, _ = _run(CONFIG, batch, hard=False, temperature=jnp.float32(5.0))
  assert np.abs(_valid(cool, batch) - _valid(hard, batch)).max() > 1e-3


def test_kept_tokens_differ_between_instances_and_modules():
  batch = _batch()
  _, out = _run(CONFIG, batch)
  counts = np.asarray(out.entering).sum(-1)[:, batch.image_valid]
  assert (counts[0] == 16).all() and (np.diff(counts, axis=0) <= 0).all()
  assert len(set(counts[-1])) > 1 and len(set(counts[:, 0])) >= 3
  # `entering` a layer is what the module before it left
  np.testing.assert_array_equal(out.entering[1:], out.prune.module_keep)
  theta = np.asarray(out.prune.thresholds)[:, batch.image_valid]
  assert theta.std(1).min() > 1e-4


def _drop_for_real(sample, config, keep):
  """The expanded row without the visual tokens that are not kept."""
  row = helpers.row(sample, config)
  gone = (row['visual_slots'] >= 0) & ~keep[np.maximum(row['visual_slots'], 0)]
  return {name: values[~gone] for name, values in row.items()}


@pytest.mark.parametrize('sample', [SAMPLES[0], SAMPLES[1]])
def test_dropping_tokens_for_real_is_the_hard_mask(sample):
  """Keys, values and hidden states of a shorter row, original positions.

  One module after layer 1: layers 2 to 4 run on what is left.  Their input is
  taken from a one-layer model, whose hidden state is the same.
  """
  config = helpers.atp_config(prune_after=(1,))
  batch = _batch([sample])
  logits, out = _run(config, batch)
  keep = np.asarray(out.prune.keep[0]).reshape(-1) > 0.5
  model, params = helpers.build(config)
  short = _drop_for_real(sample, config, keep)
  size = len(short['input_ids'])
  assert size < batch.valid.sum() - 3

  @jax.jit
  def shorter(params, batch, stays):
    x = model.apply({'params': params}, batch, method='embed')
    language = params['language_model']
    layer = DecoderLayer(config.text, jnp.float32, jnp.float32)
    run = lambda i, x, positions, mask: layer.apply(
        {'params': jax.tree.map(lambda p: p[i], language['layers'])}, x,
        positions, mask)[0]
    x = run(0, x, batch.positions, causal_mask(batch.valid, batch.turn_ids))
    x, positions = x[:, stays], batch.positions[:, stays]
    ones = jnp.ones((1, len(stays)), bool)
    mask = causal_mask(ones, jnp.zeros((1, len(stays)), jnp.int32))
    for i in (1, 2, 3):
      x = run(i, x, positions, mask)
    x = RMSNorm(config.text.rms_norm_eps).apply(
        {'params': language['norm']}, x)
    return nn.Dense(config.text.vocab_size, use_bias=False).apply(
        {'params': language['lm_head']}, x)

  row = helpers.row(sample, config)
  stays = np.flatnonzero((row['visual_slots'] < 0) |
                         keep[np.maximum(row['visual_slots'], 0)])
  got = np.asarray(shorter(params, batch, stays))[0]
  helpers.close(got, np.asarray(logits)[0, stays])
  np.testing.assert_array_equal(batch.positions[0, stays], short['positions'])
  # renumbered positions would be something else
  renumbered = batch.replace(positions=np.array(batch.positions))
  renumbered.positions[0, stays] = np.arange(size)
  other = np.asarray(shorter(params, renumbered, stays))[0]
  assert np.abs(other - got)[-2:].max() > 1e-3


@pytest.mark.parametrize('selector', SELECTORS)
def test_a_row_does_not_depend_on_its_batch(selector):
  config = SELECTORS[selector]
  row_ids = np.array([3, 1, 4, 8])
  together = _batch(config=config)
  logits, out = _run(config, together, row_ids)
  order = [2, 3, 0, 1]  # other rows, other order, other side of padding
  others = [dataclasses.replace(SAMPLES[i], seed=SAMPLES[i].seed)
            for i in order]
  others[0] = Sample((BOS, IMAGE, 30, 31), seed=77)
  batch = _batch(others, pad_left=True, config=config)
  other, other_out = _run(config, batch, row_ids[order])
  for place, b in enumerate(order):
    if place == 0:
      continue
    helpers.close(np.asarray(other)[place][batch.valid[place]],
                  np.asarray(logits)[b][together.valid[b]])
    np.testing.assert_array_equal(other_out.entering[:, place],
                                  out.entering[:, b])
  keep = np.asarray(out.entering)[:, together.image_valid]
  if config.atp.fixed_counts:
    np.testing.assert_array_equal(
        keep.sum(-1), np.array([[16], *([c] for c in COUNTS)]) *
        np.ones((1, 4)))
  if selector == 'random':  # two images of a row draw for themselves
    assert (np.asarray(out.entering)[1, 1, 0] !=
            np.asarray(out.entering)[1, 1, 1]).any()


def test_example_alone_is_example_in_a_batch():
  batch = _batch()
  logits, out = _run(CONFIG, batch)
  for b in (0, 1):
    alone = _batch([SAMPLES[b]])
    single, single_out = _run(CONFIG, alone)
    helpers.close(_valid(single, alone),
                  np.asarray(logits)[b][batch.valid[b]])
    np.testing.assert_array_equal(single_out.entering[:, 0],
                                  out.entering[:, b])


def test_soft_masks_do_not_depend_on_the_batch_or_the_padding_side():
  right, left = _batch(), _batch(SAMPLES[::-1], pad_left=True)
  options = dict(hard=False, temperature=jnp.float32(5.0))
  a, a_out = _run(CONFIG, right, **options)
  b, b_out = _run(CONFIG, left, **options)
  helpers.close(b_out.entering[:, ::-1], a_out.entering)
  for i in range(4):
    helpers.close(np.asarray(b)[3 - i][left.valid[3 - i]],
                  np.asarray(a)[i][right.valid[i]])


@pytest.mark.parametrize('prune_after', [(1,), (3,), (2, 3)])
def test_any_placement(prune_after):
  config = helpers.atp_config(prune_after=prune_after, target_tokens=16.0)
  batch = _batch()
  _, out = _run(config, batch)
  counts = np.asarray(out.entering).sum(-1)[:, batch.image_valid]
  for layer in range(1, 4):
    change = counts[layer] - counts[layer - 1]
    assert (change < 0).any() if layer in prune_after else (change == 0).all()
  model, _ = helpers.build(config)
  assert out.prune.module_keep.shape[0] == len(prune_after)


@pytest.mark.parametrize('name', ['adaptive', 'last'])
def test_answers_do_not_influence_what_is_kept(name):
  """They are there in training and not at prefill."""
  config = SELECTORS[name]
  batch = _batch()
  other = [dataclasses.replace(s, ids=s.ids[:-s.answer] + (40,) * s.answer)
           if s.answer else s for s in SAMPLES]
  _, a = _run(config, batch)
  _, b = _run(config, _batch(other))
  np.testing.assert_array_equal(a.prune.redundancy, b.prune.redundancy)
  question = [dataclasses.replace(s, ids=s.ids[:-s.answer - 1] + (40,) +
                                  s.ids[len(s.ids) - s.answer:])
              if s.answer else s for s in SAMPLES]
  _, c = _run(config, _batch(question))
  assert np.abs(np.asarray(a.prune.redundancy - c.prune.redundancy)[0, 0]
                ).max() > 1e-4


def test_threshold_shift_of_the_config_is_the_default():
  shifted = helpers.atp_config(threshold_shift=0.3)
  batch = _batch()
  _, out = _run(shifted, batch, threshold_shift=None)
  _, same = _run(CONFIG, batch, threshold_shift=jnp.float32(0.3))
  np.testing.assert_array_equal(out.entering, same.entering)
  _, base = _run(CONFIG, batch)
  assert np.asarray(out.entering).sum() < np.asarray(base.entering).sum()
