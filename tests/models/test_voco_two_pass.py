"""The masked single pass and the two dense passes of VoCo are the same thing.

Logits and gradients, to 1e-5, in every layout; and what follows from it.
"""

from __future__ import annotations

import functools

import core_helpers as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import BOS, Sample, segment

from vlm_compress.losses import next_token_loss
from vlm_compress.models.sequence import TEXT, split_voco

TEXT_LENGTH = 14
SAMPLES = (
    Sample((BOS, *segment(2), 8, 9, 10, 11), 2, seed=1),
    Sample((BOS, *segment(2), 8, *segment(2), 9, 12), 1, seed=2),
    Sample((BOS, 8, 9, 10), 2),  # text only
    Sample((BOS, *segment(2), 8, 9, 10, 11, 12, 13), 4, seed=3,
           turns=(0,) * 6 + (0,) + (1, 1, 2, 2, 2)),  # packed turns
    Sample((BOS, *segment(2), *segment(2), 9, 12, 13), 2, seed=4))

CONFIGS = {
    'plain': helpers.voco_config(2),
    'text_sees_prefix': helpers.voco_config(2, text_sees_prefix=True),
    # full-head attention, bias, and fewer VoCo tokens than rows (elastic)
    'distinct_rows': helpers.voco_config(
        4, distinct_rows=True,
        text=dict(num_key_value_heads=4, attention_bias=True,
                  tie_word_embeddings=True)),
}


def _batches(config, samples=SAMPLES, pad_left=False):
  batch = helpers.batch(samples, config, length=60, num_images=2,
                        pad_left=pad_left)
  return batch, split_voco(batch, config, TEXT_LENGTH)


def _is_text(batch):
  return (batch.image_ids == 0) & (batch.token_types == TEXT)


@functools.partial(jax.jit, static_argnums=0)
def _masked(model, params, batch):
  def loss(params):
    logits, _ = model.apply({'params': params}, batch, mask='voco')
    total, _ = next_token_loss(logits, batch.input_ids, batch.loss_mask)
    return jnp.sum(total), logits
  (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return logits, grads


@functools.partial(jax.jit, static_argnums=0)
def _two_pass(model, params, batch):
  def loss(params):
    logits = model.apply({'params': params}, batch, method='two_pass')
    text = batch.text
    total, _ = next_token_loss(logits, text.input_ids, text.loss_mask)
    return jnp.sum(total), logits
  (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return logits, grads


def _compare(batch, masked, two_pass):
  """Logits of every text token, and gradients of every parameter."""
  for b, is_text in enumerate(_is_text(batch)):
    index = np.flatnonzero(is_text)
    helpers.close(two_pass[0][b, :len(index)], masked[0][b, index])
  want = helpers.flat(masked[1])
  for path, grad in helpers.flat(two_pass[1]).items():
    helpers.close(grad, want[path])
  return want


@pytest.mark.parametrize('name', CONFIGS)
def test_masked_pass_equals_two_passes(name):
  config = CONFIGS[name]
  model, params = helpers.build(config)
  batch, split = _batches(config)
  masked = _masked(model, params, batch)
  grads = _compare(batch, masked, _two_pass(model, params, split))
  for path, grad in grads.items():  # not equal by being nothing
    assert np.abs(grad).max() > 1e-4, path
  assert np.abs(masked[0]).max() > 0.5
  if name == 'distinct_rows':  # rows used by C = 2 only
    rows = np.abs(grads['voco_embedding']).max(1)
    assert (rows[:2] > 1e-4).all() and not rows[2:].any()


def test_padding_side_does_not_matter():
  model, params = helpers.build(CONFIGS['plain'])
  right, _ = _batches(CONFIGS['plain'])
  left, _ = _batches(CONFIGS['plain'], pad_left=True)
  a, b = _masked(model, params, right), _masked(model, params, left)
  helpers.close(b[0][left.valid], a[0][right.valid])
  for path, grad in helpers.flat(a[1]).items():
    helpers.close(helpers.flat(b[1])[path], grad)


def test_packed_turns_are_independent_of_each_other():
  config = CONFIGS['plain']
  model, params = helpers.build(config)
  batch, split = _batches(config)
  changed = list(SAMPLES)
  changed[3] = Sample((BOS, *segment(2), 8, 30, 31, 11, 12, 13), 4, seed=3,
                      turns=SAMPLES[3].turns)
  _, other = _batches(config, changed)
  a = _two_pass(model, params, split)[0]
  b = _two_pass(model, params, other)[0]
  np.testing.assert_array_equal(a[3, 4:7], b[3, 4:7])  # turn 2
  assert np.abs(a[3, 2:4] - b[3, 2:4]).max() > 1e-3  # turn 1


def test_pictures_matter_through_the_prefix_alone():
  config = CONFIGS['plain']
  model, params = helpers.build(config)
  _, split = _batches(config)
  text = split.text
  compress = lambda features: helpers.apply(
      model, params, features, text.image_valid,
      voco_positions=split.voco_positions, segment_ids=split.segment_ids,
      method='compress')
  prefix = compress(text.features)
  read = lambda text, prefix: helpers.apply(model, params, text, prefix,
                                            method='read')[0]
  logits = read(text, prefix)
  other = np.random.default_rng(9).normal(size=text.features.shape)
  changed = compress(other.astype(np.float32))
  with_image = text.image_valid.any(1)
  difference = np.abs(np.asarray(read(text, changed) - logits))
  difference = difference * text.valid[..., None]
  assert (difference.max((1, 2))[with_image] > 1e-4).all()
  assert (difference[~with_image] == 0).all()


def test_a_compressed_image_is_independent_of_its_neighbours():
  """Same keys (but for the rotation to where they are read) and values."""
  config = CONFIGS['plain']
  model, params = helpers.build(config)
  _, split = _batches(config)
  features = np.array(split.text.features)
  features[4] = features[1, ::-1]  # the same two pictures, swapped
  positions = np.array(split.voco_positions)
  positions[4] = positions[1]
  compress = lambda features: helpers.apply(
      model, params, features, split.text.image_valid,
      voco_positions=positions, segment_ids=split.segment_ids,
      method='compress')
  values = np.asarray(compress(features).values)
  helpers.close(values[:, 4, :2], values[:, 1, 2:], 1e-6)
  helpers.close(values[:, 4, 2:], values[:, 1, :2], 1e-6)
  assert np.abs(values[:, 1, 2:] - values[:, 1, :2]).max() > 1e-2
  features[1, 0] += 1.0
  after = compress(features)
  before = compress(np.concatenate([features[:1], features[1:2] -
                                    np.array([1.0, 0.0])[:, None, None],
                                    features[2:]]).astype(np.float32))
  np.testing.assert_array_equal(after.keys[:, 1, 2:], before.keys[:, 1, 2:])
  np.testing.assert_array_equal(after.values[:, 1, 2:],
                                before.values[:, 1, 2:])
  assert np.abs(after.values[:, 1, :2] - before.values[:, 1, :2]).max() > 1e-3


def test_in_a_mixed_batch_rows_without_voco_tokens_are_causal():
  """Also those with an image."""
  config = CONFIGS['plain']
  samples = (SAMPLES[0], Sample((BOS, helpers.IMAGE, 8, 9, 10), 4, seed=5),
             SAMPLES[2])
  batch = helpers.batch(samples, config, length=60, num_images=2)
  model, params = helpers.build(config)
  run = jax.jit(lambda mask: model.apply({'params': params}, batch, mask=mask)[0],
                static_argnums=0)
  masked, causal = run('voco'), run('causal')
  valid = np.asarray(batch.valid)
  for row, same in ((0, False), (1, True), (2, True)):
    gap = np.abs(masked[row] - causal[row])[valid[row]].max()
    assert (gap < 1e-5) == same, (row, gap)
