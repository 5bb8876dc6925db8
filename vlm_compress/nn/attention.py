"""Grouped-query attention.

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

from vlm_compress.nn import kernels
from vlm_compress.nn.kernels import BLOCK, MASK_VALUE, choose
from vlm_compress.nn.masks import Causal

MAX_EXPONENT = 30.0
MAX_GROUPS = 8  # of blocks of queries


def attention_probs(q: jax.Array, k: jax.Array, mask: jax.Array,
                    bias: jax.Array | None = None,
                    lse: jax.Array | None = None) -> jax.Array:
  """Attention probabilities of every head.

  Args:
    q: float[B, T, N, H], rotated.
    k: float[B, S, K, H], rotated.
    mask: bool[B, T, S].
    bias: float32[B, T, S] added to the logits of all heads, or None.
    lse: float32[B, T, N] of all keys (`attention_and_lse`), which saves the
      maximum and the sum and lets k be a part of the keys; or None.

  Returns:
    float32[B, K, G, T, S].
  """
  logits = _logits(q, k, mask, bias)
  if lse is None:
    return jax.nn.softmax(logits, axis=-1)
  B, T, N = lse.shape
  lse = jnp.moveaxis(lse.reshape(B, T, k.shape[2], -1), 1, 3)
  return jnp.exp(logits - lse[..., None])


def attention(q: jax.Array, k: jax.Array, v: jax.Array,
              mask: jax.Array | Causal, bias: jax.Array | None = None,
              keep: jax.Array | None = None, implementation: str = 'auto'
              ) -> jax.Array:
  """Attention output, float[B, T, N, H]; see `attention_and_lse`."""
  return attention_and_lse(q, k, v, mask, bias, keep, implementation)[0]


def attention_and_lse(q: jax.Array, k: jax.Array, v: jax.Array,
                      mask: jax.Array | Causal, bias: jax.Array | None = None,
                      keep: jax.Array | None = None,
                      implementation: str = 'auto'
                      ) -> tuple[jax.Array, jax.Array]:
  """Attention output, and the log of the softmax's denominators.

  With the second, any probability can be computed again without the others:
  exp(logit - lse).

  Args:
    q, k, bias: as in `attention_probs`.
    v: float[B, S, K, H].
    mask: bool[B, T, S], or Causal, which needs no T x S array.
    keep: float32[B, T, S], 0 or 1, or None.  Keys with 0 take no part, but
      unlike masked ones they have a gradient: what attending would change.
    implementation: one of IMPLEMENTATIONS; see `choose`.

  Returns:
    float[B, T, N, H] and float32[B, T, N].
  """
  causal = isinstance(mask, Causal)
  chosen = choose(implementation, q.shape[1], k.shape[1], causal, bias is None
                  and keep is None, q.dtype)
  if chosen == 'splash':
    return kernels.splash(q, k, v, mask.valid)
  if chosen == 'jax':
    return kernels.fused(q, k, v, mask.dense(q.shape[1]) if causal else mask)
  if causal and bias is None and keep is None:
    return _causal_blocks(q, k, v, mask.valid)
  if causal:
    mask = mask.dense(q.shape[1])
  return _dense(q, k, v, mask, bias, keep)


def block_groups(num_blocks: int) -> list[tuple[int, int]]:
  """Splits blocks of queries into at most MAX_GROUPS groups, (first, last + 1).

  Shapes are static, so a group has one number of keys, that of its last block:
  eight groups cost 9 / 16 of the full rectangle, blocks alone nearly half.
  """
  size = -(-num_blocks // MAX_GROUPS)
  return [(first, min(first + size, num_blocks))
          for first in range(0, num_blocks, size)]


def _causal_blocks(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array
                   ) -> tuple[jax.Array, jax.Array]:
  """Causal attention, a block of queries at a time, up to its last key.

  About half the work of the full rectangle, and O(T) memory: the compiler
  would hold all of many independent blocks at once, hence the loop.
  """
  T, S = q.shape[1], k.shape[1]
  parts = []
  for first, last in block_groups(-(-T // BLOCK)):
    start, stop = first * BLOCK, min(last * BLOCK, T)
    keys = S - T + stop
    parts.append(_queries_in_blocks(
        q[:, start:stop], k[:, :keys], v[:, :keys], valid[:, :keys]))
  return tuple(jnp.concatenate(x, axis=1) for x in zip(*parts))


def _queries_in_blocks(q: jax.Array, k: jax.Array, v: jax.Array,
                       valid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Causal `_dense`, one block of queries after the other; the last queries
  are those of the last keys.
  """
  B, T = q.shape[:2]
  S = k.shape[1]
  if T <= BLOCK:
    return _dense(q, k, v, Causal(valid).dense(T))
  padded = jnp.pad(q, ((0, 0), (0, -T % BLOCK), (0, 0), (0, 0)))
  blocks = jnp.moveaxis(padded.reshape(B, -1, BLOCK, *q.shape[2:]), 1, 0)

  def block(start, queries):
    last = S - T + start + jnp.arange(BLOCK)[:, None]
    return _dense(queries, k, v, (jnp.arange(S) <= last) & valid[:, None, :])
  out = jax.lax.map(lambda x: block(*x), (
      BLOCK * jnp.arange(len(blocks)), blocks))
  joined = lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T]
  return tuple(map(joined, out))


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array,
           bias: jax.Array | None = None, keep: jax.Array | None = None
           ) -> tuple[jax.Array, jax.Array]:
  """`attention_and_lse` with logits as an array.

  Divides by the softmax's denominator after the weighted sum of the values:
  H numbers per query and head instead of S.
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
  total = jnp.sum(weights, axis=-1, keepdims=True)
  per_query = lambda x: jnp.moveaxis(x, 3, 1).reshape(*q.shape[:3], -1)
  lse = per_query(peak + jnp.log(total))[..., 0]
  return per_query(out / total).astype(v.dtype), lse


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
