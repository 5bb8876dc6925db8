"""Choosing the next token."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample(logits: jax.Array, key: jax.Array, temperature: float = 0.0,
           top_p: float = 1.0) -> jax.Array:
  """Greedy, or from the nucleus of the tempered distribution (1904.09751).

  Args:
    logits: float32[B, V].
    key: random key; every row draws its own.
    temperature: 0 takes the largest logit.
    top_p: keep the smallest set of tokens whose probability reaches top_p.

  Returns:
    int32[B].
  """
  if temperature == 0.0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  # the largest is 0, so that no temperature makes infinities of them
  logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / max(
      temperature, 1e-6)
  if top_p < 1.0:
    order = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(order, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    lowest = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1)
    logits = jnp.where(logits >= lowest[:, None], logits, -jnp.inf)
  return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
