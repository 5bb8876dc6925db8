"""Decoding from the cache equals the full forward pass; sampling by hand."""

from __future__ import annotations

import functools

import core_helpers as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample, segment

from vlm_compress.decode.generate import generate
from vlm_compress.decode.sampling import sample
from vlm_compress.models.llava import PruneOptions
from vlm_compress.models.sequence import split_voco
from vlm_compress.nn.kv_cache import grow

STEPS, LENGTH = 6, 60
ANSWERS = np.random.default_rng(0).integers(6, 90, (3, STEPS))
PLAIN = ((BOS, IMAGE, 6, 7, 8), (BOS, 5, IMAGE, 7, IMAGE, 9), (BOS, 6, 7))
COMPRESSED = ((BOS, *segment(2), 6, 7), (BOS, 9, 10),
              (BOS, *segment(2), 8, *segment(2), 9, 12))
CASES = {
    'plain': (helpers.tiny(), PLAIN, {}),
    'voco': (helpers.voco_config(2), COMPRESSED, dict(mask='voco')),
    'voco_prefix': (helpers.voco_config(2, text_sees_prefix=True), COMPRESSED,
                    dict(mask='voco')),
    'atp': (helpers.atp_config(), PLAIN, dict(prune=PruneOptions())),
    'atp_last': (helpers.atp_config(cross_queries='last'), PLAIN,
                 dict(prune=PruneOptions())),
}


@pytest.mark.parametrize('case', ['voco', 'voco_prefix'])
def test_decode_behind_two_passes_is_decode_behind_the_masked_pass(case):
  config, prompts, options = CASES[case]
  model, params = helpers.build(config)
  batch = helpers.batch([Sample(p, seed=i) for i, p in enumerate(prompts)],
                        config, length=LENGTH, num_images=2)
  want, masked, _ = helpers.apply(model, params, batch, method='prefill',
                                  **options)
  got, cache, _ = helpers.apply(model, params,
                                split_voco(batch, config, LENGTH),
                                method='prefill_two_pass')
  # Slots are text and VoCo tokens only, yet nothing is missing.
  kept = 2 * config.voco.num_voco_tokens
  kept += 2 * 2 * config.voco.text_sees_prefix
  assert cache.size == LENGTH + kept
  masked, cache = _grow(masked), _grow(cache)
  for step in range(STEPS):
    helpers.close(got, want)
    want, masked = helpers.apply(model, params, ANSWERS[:, step], masked,
                                 method='extend')
    got, cache = helpers.apply(model, params, ANSWERS[:, step], cache,
                               method='extend')
  helpers.close(got, want)


@jax.jit
def _grow(cache):
  return grow(cache, STEPS)


@pytest.mark.parametrize('case', CASES)
def test_cached_decode_is_the_full_forward(case):
  """Teacher-forced over six tokens, padding on either side."""
  config, prompts, options = CASES[case]
  model, params = helpers.build(config)
  full = helpers.batch(
      [Sample(p + tuple(int(x) for x in a), STEPS, seed=i)
       for i, (p, a) in enumerate(zip(prompts, ANSWERS))],
      config, length=LENGTH, num_images=2)
  logits, out = helpers.apply(model, params, full, **options)
  if case == 'atp':
    keep = np.asarray(out.entering)[-1][full.image_valid]
    assert 0 < keep.mean() < 1
  ends = full.valid.sum(1)
  for pad_left in (False, True):
    batch = helpers.batch(
        [Sample(p, seed=i) for i, p in enumerate(prompts)], config,
        length=LENGTH, num_images=2, pad_left=pad_left)
    got, cache, prefilled = helpers.apply(model, params, batch,
                                          method='prefill', **options)
    if case == 'atp':
      np.testing.assert_array_equal(prefilled.entering, out.entering)
    cache = _grow(cache)
    for step in range(STEPS):
      at = ends - STEPS + step - 1
      helpers.close(got, np.asarray(logits)[np.arange(3), at])
      got, cache = helpers.apply(model, params, ANSWERS[:, step], cache,
                                 method='extend')
    helpers.close(got, np.asarray(logits)[np.arange(3), ends - 1])


@functools.partial(jax.jit, static_argnums=0, static_argnames=(
    'eos_id', 'temperature', 'top_p'))
def _generate(model, params, batch, **kwargs):
  return generate(model, params, batch, max_new_tokens=STEPS, **kwargs).tokens


def test_greedy_generation_follows_the_argmax_and_stops_at_eos():
  config = helpers.tiny()
  model, params = helpers.build(config)
  prompts = [Sample(p, seed=i) for i, p in enumerate(PLAIN)]
  batch = helpers.batch(prompts, config, length=LENGTH, num_images=2)
  free = np.asarray(_generate(model, params, batch, eos_id=-1))
  np.testing.assert_array_equal(
      free, _generate(model, params, batch, eos_id=-1))
  # the full forward would have chosen the same
  full = helpers.batch(
      [Sample(p + tuple(int(x) for x in a), STEPS, seed=i)
       for i, (p, a) in enumerate(zip(PLAIN, free))],
      config, length=LENGTH, num_images=2)
  logits, _ = helpers.apply(model, params, full)
  ends = full.valid.sum(1)
  for step in range(STEPS):
    best = np.asarray(logits)[np.arange(3), ends - STEPS + step - 1].argmax(-1)
    np.testing.assert_array_equal(free[:, step], best)
  # a limit cuts, and changes nothing before it
  eos_elsewhere = int(free.max()) + 1
  for limit in (1, 2, STEPS + 1):
    cut = np.asarray(_generate(model, params, batch, eos_id=eos_elsewhere,
                               limit=jnp.int32(limit)))
    np.testing.assert_array_equal(cut[:, :limit], free[:, :limit])
    assert (cut[:, limit:] == eos_elsewhere).all()
  # a row ends alone, and only behind its first eos
  eos = int(free[0, 2])
  stopped = np.asarray(_generate(model, params, batch, eos_id=eos))
  for row, want in zip(stopped, free):
    first = list(want).index(eos) if eos in want else STEPS
    np.testing.assert_array_equal(row[:first], want[:first])
    assert (row[first:] == eos).all()


def test_sampled_generation_follows_its_seed():
  config = helpers.tiny()
  model, params = helpers.build(config)
  batch = helpers.batch([Sample(p, seed=i) for i, p in enumerate(PLAIN)],
                        config, length=LENGTH, num_images=2)
  draw = lambda seed: np.asarray(_generate(
      model, params, batch, eos_id=-1, temperature=1.0, top_p=0.9,
      seed=jnp.int32(seed)))
  np.testing.assert_array_equal(draw(1), draw(1))
  assert (draw(1) != draw(2)).any()


PROBS = np.array([0.4, 0.3, 0.2, 0.1])


def _frequencies(temperature, top_p, count=4000):
  logits = jnp.broadcast_to(jnp.log(jnp.asarray(PROBS[[2, 0, 3, 1]])),
                            (count, 4))
  tokens = sample(logits, jax.random.key(0), temperature, top_p)
  assert tokens.dtype == jnp.int32
  counts = np.bincount(np.asarray(tokens), minlength=4) / count
  return counts[[1, 3, 0, 2]]  # most probable first


@pytest.mark.parametrize('temperature,top_p,want', [
    (0.0, 1.0, [1, 0, 0, 0]),
    (1e-45, 1.0, [1, 0, 0, 0]),  # too small for float32
    (1.0, 1.0, PROBS),
    (0.5, 1.0, PROBS ** 2 / (PROBS ** 2).sum()),
    (2.0, 1.0, PROBS ** 0.5 / (PROBS ** 0.5).sum()),
    (1.0, 0.39, [1, 0, 0, 0]),  # the first one reaches it
    (1.0, 0.41, [4 / 7, 3 / 7, 0, 0]),
    (1.0, 0.69, [4 / 7, 3 / 7, 0, 0]),
    (1.0, 0.71, [4 / 9, 3 / 9, 2 / 9, 0]),
    # the nucleus is of the tempered distribution: .16 .09 .04 .01 of .30
    (0.5, 0.6, np.array([16, 9, 0, 0]) / 25)])
def test_sampling_by_hand(temperature, top_p, want):
  got = _frequencies(temperature, top_p)
  np.testing.assert_allclose(got, want, atol=0.03)  # 3.8 sigma of 4000 draws
  np.testing.assert_array_equal(got == 0, np.asarray(want) == 0)
