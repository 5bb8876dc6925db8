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
MAX_EXPONENT = 30.0


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
  return jax.nn.softmax(_logits(q, k, mask, bias), axis=-1)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array,
              bias: jax.Array | None = None, keep: jax.Array | None = None
              ) -> jax.Array:
  """Attention output, float[B, T, N, H]; see `attention_probs`.

  Divides by the softmax's denominator after the weighted sum of the values:
  H numbers per query and head instead of S.

  Args:
    q, k, v, mask, bias: as there.
    keep: float32[B, T, S], 0 or 1, or None.  Keys with 0 take no part, but
      unlike masked ones they have a gradient: what attending would change.
  """
  logits = _logits(q, k, mask, bias)
  taking_part = logits
  if keep is not None:
    keep = keep[:, None, None]
    taking_part = jnp.where(keep > 0.5, logits, MASK_VALUE)
  peak = jax.lax.stop_gradient(
      jnp.max(taking_part, axis=-1, keepdims=True))
  if keep is None:
    weights = jnp.exp(logits - peak)
  else:  # a key without a part may lie far above the peak
    weights = keep * jnp.exp(jnp.minimum(logits - peak, MAX_EXPONENT))
  out = jnp.einsum('BKGTS,BSKH->BKGTH', weights.astype(v.dtype), v,
                   preferred_element_type=jnp.float32)
  out = out / jnp.sum(weights, axis=-1, keepdims=True)
  return jnp.moveaxis(out, 3, 1).reshape(q.shape).astype(v.dtype)


def _logits(q: jax.Array, k: jax.Array, mask: jax.Array,
            bias: jax.Array | None) -> jax.Array:
  """float32[B, K, G, T, S], MASK_VALUE and without gradient where masked."""
  B, T, N, H = q.shape
  K = k.shape[2]
  logits = jnp.einsum('BTKGH,BSKH->BKGTS', q.reshape(B, T, K, N // K, H), k,
                      preferred_element_type=jnp.float32) * H ** -0.5
  if bias is not None:
    logits = logits + bias[:, None, None]
  return jnp.where(mask[:, None, None], logits, MASK_VALUE)
