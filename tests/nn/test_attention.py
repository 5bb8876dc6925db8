"""Grouped-query attention against a loop over heads in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_compress.nn.attention import attention, attention_probs

B, T, S, N, K, H = 2, 3, 5, 6, 2, 4


def _inputs(seed=0):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(B, T, N, H)).astype(np.float32)
  k = rng.normal(size=(B, S, K, H)).astype(np.float32)
  v = rng.normal(size=(B, S, K, H)).astype(np.float32)
  mask = rng.random((B, T, S)) < 0.7
  mask[..., 0] = True
  bias = rng.normal(size=(B, T, S)).astype(np.float32)
  return q, k, v, mask, bias


def _by_hand(q, k, v, mask, bias):
  """Head n reads key/value head n // (N / K), in float64."""
  probs = np.zeros((B, N, T, S))
  out = np.zeros((B, T, N, H))
  for b in range(B):
    for n in range(N):
      kv = n // (N // K)
      logits = q[b, :, n].astype(np.float64) @ k[b, :, kv].T / np.sqrt(H)
      weights = np.exp(logits + bias[b]) * mask[b]
      probs[b, n] = weights / weights.sum(-1, keepdims=True)
      out[b, :, n] = probs[b, n] @ v[b, :, kv]
  return probs, out


@pytest.mark.parametrize('with_bias', [False, True])
def test_grouped_query_attention_by_hand(with_bias):
  q, k, v, mask, bias = _inputs()
  given = bias if with_bias else None
  probs, out = _by_hand(q, k, v, mask, bias if with_bias else 0 * bias)
  got = attention_probs(q, k, mask, given)
  assert got.shape == (B, K, N // K, T, S) and got.dtype == jnp.float32
  np.testing.assert_allclose(got.reshape(B, N, T, S), probs, atol=1e-6)
  np.testing.assert_allclose(attention(q, k, v, mask, given), out, atol=1e-6)


def test_masked_keys_have_no_influence_at_all():
  q, k, v, mask, _ = _inputs()
  before = attention(q, k, v, mask)
  mask[..., 3] = False
  k2, v2 = k.copy(), v.copy()
  k2[:, 3], v2[:, 3] = 1e4, -1e4
  np.testing.assert_array_equal(attention(q, k, v, mask),
                                attention(q, k2, v2, mask))
  assert np.abs(attention(q, k, v, mask) - before).max() > 1e-3


def test_row_without_keys_gives_a_mean_and_no_nan():
  q, k, v, mask, bias = _inputs()
  mask[0, 1] = False
  out = np.asarray(attention(q, k, v, mask, bias))
  assert np.isfinite(out).all()
  np.testing.assert_allclose(out[0, 1].reshape(K, N // K, H)[:, 0],
                             v[0].mean(0), atol=1e-6)


def test_softmax_is_float32_and_output_keeps_the_dtype():
  q, k, v, mask, _ = _inputs()
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  assert attention_probs(half[0], half[1], mask).dtype == jnp.float32
  out = attention(*half, mask)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(
      np.asarray(out, np.float32),
      attention(*(np.asarray(x, np.float32) for x in half), mask), atol=3e-2)


def test_keep_is_a_mask_whose_missing_keys_have_a_gradient():
  q, k, v, mask, _ = _inputs(3)
  k[0, 3] *= 40.0  # far above the others, and out
  mask[:, :, 4] = True
  keep = jnp.ones((B, T, S)).at[:, :, 3].set(0.0).at[1, :, 4].set(0.0)
  got = attention(q, k, v, mask, keep=keep)
  np.testing.assert_allclose(got, attention(q, k, v, mask & (keep > 0)),
                             rtol=1e-5, atol=1e-6)
  # what letting key 4 in by a little would do
  total = lambda keep: jnp.sum(jnp.sin(attention(q, k, v, mask, keep=keep)))
  slope = jax.grad(total)(keep)
  step = jnp.zeros_like(keep).at[1, :, 4].set(1e-2)
  want = (total(keep + step) - total(keep)) / 1e-2
  assert abs(want) > 0.01
  np.testing.assert_allclose(jnp.sum(slope[1, :, 4]), want, rtol=0.05)
  assert bool(jnp.isfinite(slope).all())
  assert (np.asarray(slope)[~mask] == 0).all()


def test_a_query_that_sees_nothing_moves_nothing():
  q, k, v, mask, _ = _inputs(4)
  mask[0, 2] = False
  one = lambda q, k: jnp.sum(attention(q, k, v, mask)[0, 2] ** 2)
  for slope in jax.grad(one, argnums=(0, 1))(q, k):
    assert (np.asarray(slope) == 0).all()
