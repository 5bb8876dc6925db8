"""Keys and values of earlier tokens, as an argument and a result.

Keys are stored rotated.  `readable` says, per layer, which slots a later
token may attend to, so that pruning and compression need no rule at decode
time: padding, pruned tokens and hidden tokens are simply not readable.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class KVCache:
  """Cached keys and values of M layers.

  Attributes:
    keys, values: float[M, B, S, K, H].
    readable: bool[M, B, S].
    length: int32[], slots in use; the next token is written there.
    positions: int32[B], position of the next token of each row.
  """
  keys: jax.Array
  values: jax.Array
  readable: jax.Array
  length: jax.Array
  positions: jax.Array

  @property
  def size(self) -> int:
    """Slots per row."""
    return self.keys.shape[2]


def grow(cache: KVCache, num_slots: int) -> KVCache:
  """The cache with `num_slots` empty slots at its end."""
  def pad(x):
    return jnp.pad(x, [(0, 0), (0, 0), (0, num_slots)] +
                   [(0, 0)] * (x.ndim - 3))
  return cache.replace(keys=pad(cache.keys), values=pad(cache.values),
                       readable=pad(cache.readable))


def append(cache: KVCache, keys: jax.Array, values: jax.Array) -> KVCache:
  """Writes one token per row, float[M, B, 1, K, H], readable by all layers."""
  start = (0, 0, cache.length, 0, 0)
  ones = jnp.ones(cache.readable.shape[:2] + (1,), bool)
  return cache.replace(
      keys=jax.lax.dynamic_update_slice(
          cache.keys, keys.astype(cache.keys.dtype), start),
      values=jax.lax.dynamic_update_slice(
          cache.values, values.astype(cache.values.dtype), start),
      readable=jax.lax.dynamic_update_slice(cache.readable, ones, start[:3]),
      length=cache.length + 1, positions=cache.positions + 1)
