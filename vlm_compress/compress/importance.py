"""Importance of a visual token: the attention it receives (ATP-LLaVA, Eqs. 3-4).

Self-modality score (Eq. 3): attention received from visual tokens of its own
image.  Cross-modality score (Eq. 4): attention received from prompt text.
Both are post-softmax probabilities averaged over heads (ours).  Early tokens
are seen by more queries than late ones, so scores are means over the queries
that can see the token (ours).  Some of the bias stays, because early queries
have fewer keys to share their attention among: with flat attention over 64
tokens, the first scores 4.7 times the last.  Dividing by what flat attention
would give removes it, but then late tokens win, which few see besides
themselves.

No B x N x T x S map is stored: queries are taken in blocks, their
probabilities are computed again from the log-sum-exp that attention saved, and
reduced to column sums, so memory is O(block * S).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_compress.nn.attention import attention_probs, block_groups
from vlm_compress.nn.masks import Causal

_EPS = 1e-9


def received_attention(q: jax.Array, k: jax.Array, lse: jax.Array | None,
                       mask: jax.Array | Causal, bias: jax.Array | None,
                       image_ids: jax.Array, visual_weight: jax.Array,
                       prompt_weight: jax.Array, block_size: int = 128
                       ) -> tuple[jax.Array, jax.Array]:
  """Mean attention that every token receives from image and from prompt.

  Args:
    q: float[B, T, N, H], rotated queries of the layer just run.
    k: float[B, T, K, H], rotated keys.
    lse: float32[B, T, N] that the layer's attention left; None computes it.
    mask: bool[B, T, T] or Causal; bias: float32[B, T, T] or None; as the
      layer used.
    image_ids: int32[B, T], >= 1 for tokens of an image.
    visual_weight: float32[B, T], 1 for kept visual queries, 0 for the rest
      (in between while masks are soft).
    prompt_weight: float32[B, T], 1 for prompt queries, see `cross_queries`.
    block_size: queries per block.

  Returns:
    self and cross scores, float32[B, T] each; 0 where nobody looks.
  """
  T = q.shape[1]
  block_size = min(block_size, T)
  num_blocks = -(-T // block_size)
  causal = isinstance(mask, Causal) and bias is None
  if isinstance(mask, Causal) and not causal:
    mask = mask.dense(T)

  def block(index, keys):
    # The last block is moved back to fit; its double rows weigh nothing.
    start = jnp.minimum(index * block_size, T - block_size)
    fresh = start + jnp.arange(block_size) >= index * block_size
    take = lambda x: None if x is None else jax.lax.dynamic_slice_in_dim(
        x, start, block_size, 1)
    block_mask = (take(mask) if not causal else mask.valid[:, None, :keys] & (
        jnp.arange(keys) <= start + jnp.arange(block_size)[:, None]))
    # Recomputed for gradients: a block's probabilities are not kept, least of
    # all by layers without a module, whose branch would fill them with zeros.
    return jax.checkpoint(_column_sums)(
        take(q), k[:, :keys], take(lse), block_mask, take(bias),
        take(image_ids)[:, :, None] == image_ids[:, None, :keys],
        take(visual_weight) * fresh, take(prompt_weight) * fresh)

  # Keys behind the queries of a group of blocks are left out where that is
  # known; inside a group blocks follow one another, so only one is in memory.
  sums = jnp.zeros((4, q.shape[0], T))
  for first, last in block_groups(num_blocks) if causal else [(0, num_blocks)]:
    keys = min(last * block_size, T) if causal else T
    add = lambda sums, index, keys=keys: (
        sums.at[..., :keys].add(block(index, keys)), None)
    sums = (add(sums, first)[0] if last - first == 1 else
            jax.lax.scan(add, sums, jnp.arange(first, last))[0])
  self_score = sums[0] / jnp.maximum(sums[1], _EPS)
  cross_score = sums[2] / jnp.maximum(sums[3], _EPS)
  return self_score, cross_score


def _column_sums(q, k, lse, mask, bias, same_image, visual_weight,
                 prompt_weight) -> jax.Array:
  """float32[4, B, S]: attention to each key and number of queries that see
  it, weighted as visual queries of its image and as prompt queries.
  """
  probs = jnp.mean(attention_probs(q, k, mask, bias, lse), axis=(1, 2)) * mask
  visual = visual_weight[:, :, None] * same_image
  prompt = prompt_weight[:, :, None]
  return jnp.stack([
      jnp.sum(probs * visual, axis=1), jnp.sum(mask * visual, axis=1),
      jnp.sum(probs * prompt, axis=1), jnp.sum(mask * prompt, axis=1)])


def cross_queries(prompt_mask: jax.Array, which: str) -> jax.Array:
  """Weights of the queries that make the cross score.

  Args:
    prompt_mask: bool[B, T], prompt text behind an image.
    which: 'all' of it, or the 'last' of each row.

  Returns:
    float32[B, T], 0 or 1.
  """
  if which == 'last':
    later = jnp.cumsum(prompt_mask[:, ::-1], axis=1)[:, ::-1]
    prompt_mask = prompt_mask & (later == 1)
  return prompt_mask.astype(jnp.float32)


def normalise(score: jax.Array, keep: jax.Array, how: str) -> jax.Array:
  """Brings raw scores of one image to [0, 1] (ours).

  Raw means are about 1 / P and useless against thresholds in (0, 1).

  Args:
    score: float32[..., P], not negative.
    keep: float32[..., P], 1 for tokens still there (soft while training).
    how: 'relative': x = score / mean over kept tokens, then x / (1 + x), so
      that 0.5 is average attention; 'minmax': linear between the smallest and
      the largest kept score; 'rank': rank among the kept tokens / their
      number (no gradient).

  Returns:
    float32[..., P]; 0 where a token is gone.
  """
  if how == 'relative':
    mean = jnp.sum(score * keep, axis=-1, keepdims=True) / jnp.maximum(
        jnp.sum(keep, axis=-1, keepdims=True), _EPS)
    relative = score / jnp.maximum(mean, _EPS)
    return relative / (1.0 + relative) * keep
  alive = keep > 0.5
  if how == 'minmax':
    low = jnp.min(jnp.where(alive, score, jnp.inf), axis=-1, keepdims=True)
    high = jnp.max(jnp.where(alive, score, -jnp.inf), axis=-1, keepdims=True)
    low = jnp.where(jnp.isfinite(low), low, 0.0)
    high = jnp.where(jnp.isfinite(high), high, 0.0)
    spread = jnp.maximum(high - low, _EPS)
    return jnp.clip((score - low) / spread, 0.0, 1.0) * keep
  assert how == 'rank', how
  below = (score[..., None, :] < score[..., :, None]) & alive[..., None, :]
  ranks = jnp.sum(below, axis=-1, dtype=jnp.float32) + 1.0
  total = jnp.maximum(jnp.sum(alive, axis=-1, keepdims=True), 1)
  return ranks / total * keep
