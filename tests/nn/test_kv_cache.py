"""The cache: what grows, what is written, what may be read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vlm_compress.nn.kv_cache import KVCache, append, grow

M, B, S, K, H = 2, 3, 4, 1, 2


def _cache():
  rng = np.random.default_rng(0)
  draw = lambda: jnp.asarray(rng.normal(size=(M, B, S, K, H)), jnp.float32)
  readable = jnp.asarray(rng.random((M, B, S)) < 0.5)
  return KVCache(keys=draw(), values=draw(), readable=readable,
                 length=jnp.int32(S), positions=jnp.array([4, 2, 9]))


def test_new_slots_are_not_readable():
  old = _cache()
  new = grow(old, 3)
  assert new.size == S + 3 and int(new.length) == S
  np.testing.assert_array_equal(new.keys[:, :, :S], old.keys)
  np.testing.assert_array_equal(new.values[:, :, :S], old.values)
  np.testing.assert_array_equal(new.readable[:, :, :S], old.readable)
  assert not new.readable[:, :, S:].any()
  np.testing.assert_array_equal(new.positions, old.positions)


def test_append_writes_one_slot_and_nothing_else():
  old = grow(_cache(), 2)
  keys = jnp.full((M, B, 1, K, H), 7.0)
  new = jax.jit(append)(old, keys, -keys)
  np.testing.assert_array_equal(new.keys[:, :, S], keys[:, :, 0])
  np.testing.assert_array_equal(new.values[:, :, S], -keys[:, :, 0])
  assert new.readable[:, :, S].all() and not new.readable[:, :, S + 1].any()
  np.testing.assert_array_equal(new.keys[:, :, :S], old.keys[:, :, :S])
  np.testing.assert_array_equal(new.readable[:, :, :S],
                                old.readable[:, :, :S])
  assert int(new.length) == S + 1
  np.testing.assert_array_equal(new.positions, [5, 3, 10])


def test_appended_twice_goes_to_the_next_slot():
  cache = grow(_cache(), 2)
  for value in (1.0, 2.0):
    cache = append(cache, jnp.full((M, B, 1, K, H), value),
                   jnp.zeros((M, B, 1, K, H)))
  np.testing.assert_array_equal(cache.keys[0, 0, S:, 0, 0], [1.0, 2.0])


def test_the_cache_keeps_its_dtype():
  cache = grow(_cache(), 1)
  cache = cache.replace(keys=cache.keys.astype(jnp.bfloat16))
  new = append(cache, jnp.ones((M, B, 1, K, H)), jnp.ones((M, B, 1, K, H)))
  assert new.keys.dtype == jnp.bfloat16
  assert new.values.dtype == jnp.float32
