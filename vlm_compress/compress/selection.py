"""What selectors besides ATP's need: orders, queries, and merging.

Which visual tokens a module leaves is decided in `atp.prune`; here is what
peers know in front of the decoder, and SparseVLM, which also changes hidden
states.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_compress.compress import atp
from vlm_compress.compress.baselines import cdpruner, divprune, sparsevlm
from vlm_compress.compress.importance import cross_queries, received_attention
from vlm_compress.compress.spatial import uniform_order
from vlm_compress.config import AtpConfig
from vlm_compress.nn.masks import Causal


def selection_order(selector: str, shape: tuple[int, int, int], grid_size: int,
                    row_ids: jax.Array, seed: jax.Array | int) -> jax.Array:
  """Ranks of visual tokens for the selectors that do not look at them.

  Args:
    selector: 'random' draws per row; anything else gives the uniform order.
    shape: (B, I, P).
    grid_size: tokens per side.
    row_ids: int32[B], what a random order depends on besides the seed, so
      that an example's tokens do not depend on its batch.
    seed: int or int32[].

  Returns:
    int32[B, I, P].
  """
  B, I, P = shape
  if selector != 'random':
    return jnp.broadcast_to(jnp.asarray(uniform_order(grid_size)), (B, I, P))
  key = jax.random.key(seed)

  def one(row, image):
    folded = jax.random.fold_in(jax.random.fold_in(key, row), image)
    return jax.random.permutation(folded, P).astype(jnp.int32)
  per_row = jax.vmap(one, in_axes=(None, 0))
  return jax.vmap(per_row, in_axes=(0, None))(row_ids, jnp.arange(I))


def embedding_order(config: AtpConfig, x: jax.Array, visual_index: jax.Array,
                    prompt_mask: jax.Array) -> jax.Array:
  """Ranks of visual tokens for the selectors that look at embeddings.

  Args:
    config: selector 'divprune' or 'cdpruner', and counts.
    x: float[B, T, D], embeddings in front of the decoder.
    visual_index: int32[B, I, P], see PruneInputs.
    prompt_mask: bool[B, T], prompt text behind an image.

  Returns:
    int32[B, I, P].
  """
  count = config.fixed_counts[0]

  def one(text, mask, index):
    tokens = text[index]
    if config.selector == 'divprune':
      return divprune.diverse_order(tokens, count)
    relevant = cdpruner.relevance(tokens, text, mask)
    return cdpruner.conditional_order(tokens, relevant, count)
  per_row = jax.vmap(one, in_axes=(None, None, 0))
  return jax.lax.stop_gradient(jax.vmap(per_row)(x, prompt_mask, visual_index))


def prompt_queries(config: AtpConfig, x: jax.Array, is_visual: jax.Array,
                   prompt_mask: jax.Array) -> jax.Array:
  """Weights of the prompt tokens that choose, float32[B, T], 0 or 1.

  Args:
    config: selector and cross_queries.
    x: float[B, T, D], embeddings in front of the decoder.
    is_visual, prompt_mask: bool[B, T].
  """
  if config.selector == 'sparsevlm':
    raters = sparsevlm.text_raters(x, is_visual, prompt_mask)
    return raters.astype(jnp.float32)
  return cross_queries(prompt_mask, config.cross_queries)


def choose(state: atp.PruneState, module: jax.Array, x: jax.Array,
           q: jax.Array, k: jax.Array, lse: jax.Array | None,
           mask: jax.Array | Causal, bias: jax.Array | None,
           inputs: atp.PruneInputs) -> tuple[atp.PruneState, jax.Array]:
  """Runs a module; see `atp.prune`.

  Args:
    x: float[B, T, D], hidden states behind the layer.
    state, module, q, k, lse, mask, bias, inputs: as there.

  Returns:
    The new state, and hidden states, of which SparseVLM has merged some.
  """
  if inputs.config.selector == 'sparsevlm':
    return _sparsify(state, module, x, q, k, lse, mask, inputs)
  return atp.prune(state, module, q, k, lse, mask, bias, inputs), x


def _sparsify(state: atp.PruneState, module: jax.Array, x: jax.Array,
              q: jax.Array, k: jax.Array, lse: jax.Array | None,
              mask: jax.Array | Causal, inputs: atp.PruneInputs
              ) -> tuple[atp.PruneState, jax.Array]:
  """`choose` of SparseVLM; a merged token stands at its cluster's centre."""
  config, keep = inputs.config, state.keep
  weight = inputs.prompt_weight
  _, score = received_attention(q, k, lse, mask, None, inputs.image_ids,
                                jnp.zeros_like(weight), weight)
  score, alive = atp.on_canvas(score, inputs), keep > 0.5
  number = jnp.sum(alive, axis=-1, dtype=jnp.int32)
  if config.fixed_counts:
    deleted, back = sparsevlm.deletions_for(
        number, jnp.asarray(config.fixed_counts)[module], keep.shape[-1])
  else:
    dense = mask.dense(x.shape[1]) if isinstance(mask, Causal) else mask
    rank = sparsevlm.attention_rank(q, k, dense, weight > 0,
                                    inputs.visual_index, keep)
    deleted, back = sparsevlm.deletions_by_rank(number, rank, config.rank_scale)
  left, centre, merged = jax.vmap(jax.vmap(sparsevlm.select_and_merge))(
      score, atp.on_canvas(x, inputs), alive, deleted, back)
  slots = jnp.maximum(inputs.visual_slots, 0)[..., None]
  per_token = lambda y: jnp.take_along_axis(
      y.reshape(x.shape[0], -1, y.shape[-1]), slots, axis=1)
  is_merged = (inputs.visual_slots >= 0)[..., None] & per_token(centre[..., None])
  x = jnp.where(is_merged, per_token(merged).astype(x.dtype), x)
  keep = jax.lax.stop_gradient(left.astype(jnp.float32))
  put = lambda store, value: store.at[module].set(value)
  return state.replace(keep=keep, module_keep=put(state.module_keep, keep),
                       redundancy=put(state.redundancy, score)), x
