"""Dense grouped-query attention.

The dimension letters of the whole project:

  B batch, T query length, S key length, N query heads, K key/value heads,
  H head size, G = N / K query heads per key/value head, D hidden size,
  M decoder layers, L modules between layers, I images per row,
  P visual tokens per image, C VoCo tokens per image, V vocabulary.

Masks are bool, True = may attend.  Softmax runs in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Finite, so that a row without any allowed key gives a mean and not a NaN.
MASK_VALUE = -1e30


def attention_probs(q: jax.Array, k: jax.Array, mask: jax.Array,
                    bias: jax.Array | None = None) -> jax.Array:
  """Attention probabilities of every head.

  Args:
    q: float[B, T, N, H], rotated.
    k: float[B, S, K, H], rotated.
    mask: bool[B, T, S].
    bias: float32[B, T, S] added to the logits of all heads, or None.

  Returns:
    float32[B, K, G, T, S].
  """
  B, T, N, H = q.shape
  K = k.shape[2]
  q = q.reshape(B, T, K, N // K, H)
  logits = jnp.einsum('BTKGH,BSKH->BKGTS', q, k,
                      preferred_element_type=jnp.float32) * H ** -0.5
  if bias is not None:
    logits = logits + bias[:, None, None]
  logits = jnp.where(mask[:, None, None], logits, MASK_VALUE)
  return jax.nn.softmax(logits, axis=-1)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array,
              bias: jax.Array | None = None) -> jax.Array:
  """Attention output, float[B, T, N, H]; see `attention_probs`."""
  probs = attention_probs(q, k, mask, bias).astype(v.dtype)
  out = jnp.einsum('BKGTS,BSKH->BTKGH', probs, v)
  return out.reshape(q.shape)
