"""ATP's loss on rows without pictures: nothing is kept there, nothing is paid."""

from __future__ import annotations

import types

import core_helpers as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample
from small_run import ATP, RECIPE

from vlm_compress.train.steps import _percentiles, accumulate, atp_loss

TEXT = Sample((BOS, 6, 7, 8, 9), 2)
SEEN = ('layer_average_tokens', 'loss_budget_depth', 'loss_budget_target',
        'kept_tokens/module_0', 'kept_tokens_p50/module_0',
        'kept_tokens_p99/module_0', 'threshold_redundancy/module_0',
        'threshold_spatial/module_0')


class Model:
  """Says something of every row, and keeps a share of the tokens of pictures."""
  config = ATP

  def apply(self, variables, batch, prune):
    del prune
    params, valid = variables['params'], batch.image_valid[..., None]
    logits = params['text'] * jnp.sin(batch.input_ids)[..., None]
    keep = jax.nn.sigmoid(params['atp']) * valid * jnp.ones(ATP.num_patches)
    return logits, types.SimpleNamespace(
        entering=jnp.stack([valid * jnp.ones_like(keep), keep]),
        prune=types.SimpleNamespace(
            module_keep=keep[None], thresholds=jnp.full((1, *keep.shape[:2], 2), 0.3)))


def small():
  params = {'text': jnp.linspace(0, 1, ATP.text.vocab_size), 'atp': jnp.float32(0.1)}
  return Model(), params


def taken(model, params, samples, num_parts):
  """(loss, metrics), gradients by path."""
  batch = helpers.batch(samples, model.config, length=12, num_images=1)

  def gradients(params, rows, at):
    return jax.value_and_grad(lambda p: atp_loss(model, p, rows, at, RECIPE),
                              has_aux=True)(params)
  found, grads = jax.jit(lambda p, b: accumulate(
      gradients, p, b, jnp.int32(0), num_parts))(params, batch)
  return jax.device_get(found), helpers.flat(jax.device_get(grads))


@pytest.mark.parametrize('build, num_parts', [
    (small, 1), (small, 2),
    pytest.param(lambda: helpers.build(ATP), 1, marks=pytest.mark.slow)])
def test_a_batch_without_pictures_has_no_budget(build, num_parts):
  (loss, metrics), grads = taken(*build(), [TEXT] * 4, num_parts)
  assert loss == metrics['loss_text'] > 0
  assert {name for name, x in metrics.items() if np.isnan(x)} == set(SEEN)
  for path, x in grads.items():
    assert np.isfinite(x).all(), path
    assert not (path.startswith('atp') and x.any()), path


def test_parts_without_pictures_weigh_nothing():
  """Pictures in one of two parts: what is said of them is as of the whole."""
  samples = [Sample((BOS, IMAGE, 6, 7, 8, 9), 2, seed=i) if i % 2 == 0 else TEXT
             for i in range(4)]
  ((one, metrics), whole), ((two, others), parts) = (
      taken(*small(), samples, n) for n in (1, 2))
  assert metrics['loss_budget_depth'] > 1e-3 and metrics['loss_budget_target'] > 1e-3
  helpers.close(two, one)
  for name in SEEN:
    helpers.close(others[name], metrics[name])
  for path, x in whole.items():
    helpers.close(parts[path], x)
  (_, without), _ = taken(*small(), samples[::2], 1)
  for name in SEEN:  # nor do rows in a part
    helpers.close(metrics[name], without[name])


def test_percentiles_are_of_pictures():
  kept = np.random.default_rng(0).uniform(0, 9, (40, 2)).astype(np.float32)
  valid = np.arange(80).reshape(40, 2) % 3 > 0
  helpers.close(_percentiles(kept, valid), np.percentile(kept[valid], [50, 99]))
  assert not _percentiles(kept, np.zeros_like(valid)).any()
