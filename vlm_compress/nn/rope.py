"""Rotary position embedding, half-split as in LLaMA (RoFormer, 2104.09864)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
  """Rotates heads by their positions.

  Rotations add up: rope(rope(x, a), b) == rope(x, a + b), which is how cached
  keys are moved to another position.

  Args:
    x: float[B, T, N, H], H even.
    positions: int32[B, T], absolute positions (or a shift of positions).
    theta: base of the frequencies.

  Returns:
    float[B, T, N, H] in x's dtype; angles are float32.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[..., None, None].astype(jnp.float32) * frequency
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  out = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
  return out.astype(x.dtype)
