"""ATP-LLaVA (arXiv 2412.00447): the module between two decoder layers.

One module looks at the attention of the layer just run and decides which
visual tokens stay: a token stays if its redundancy score or its spatial score
exceeds a learned, instance-wise threshold (Eqs. 5-11).  Masks multiply across
modules.  While training the mask is soft and enters the softmax; at inference
it is hard.  The same code also runs the selectors that keep a fixed number of
tokens: the floors (by score, at random, on a uniform grid) and the peers that
rank tokens; see `compress/selection.py` for what else these need.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vlm_compress.compress.baselines.fastv import last_token_attention
from vlm_compress.compress.importance import normalise, received_attention
from vlm_compress.compress.spatial import spatial_scores
from vlm_compress.config import AtpConfig
from vlm_compress.config_atp import ORDERED
from vlm_compress.nn.masks import Causal

# A key whose soft mask is below this is not attended to at all.  With a bias of
# log(M + eps) alone, training learns attention logits that outweigh log(eps),
# and answers rest on tokens that hard masks then take away.
GONE = 1e-4


@flax.struct.dataclass
class PruneInputs:
  """What the modules need to know about a batch; constant over layers.

  Attributes:
    heads: parameters of all modules, leading axis L; None for selectors that
      keep a fixed number.
    visual_index: int32[B, I, P], where a visual token stands in the row.
    image_valid: bool[B, I].
    visual_slots: int32[B, T], inverse of visual_index, -1 for other tokens.
    image_ids: int32[B, T], >= 1 for visual tokens.
    prompt_weight: float32[B, T], 1 for queries of the cross score, of
      SparseVLM's raters, or prompt text whose last token FastV asks.
    order: int32[B, I, P], ranks for the selectors of ORDERED.
    temperature: float32[], tau of the soft masks.
    threshold_shift: float32[], added to the logits of both thresholds.
    hard: masks are 0 or 1.
  """
  heads: Any
  visual_index: jax.Array
  image_valid: jax.Array
  visual_slots: jax.Array
  image_ids: jax.Array
  prompt_weight: jax.Array
  order: jax.Array
  temperature: jax.Array
  threshold_shift: jax.Array
  hard: bool = flax.struct.field(pytree_node=False)
  config: AtpConfig = flax.struct.field(pytree_node=False)
  grid_size: int = flax.struct.field(pytree_node=False)

  @property
  def looks_ahead(self) -> bool:
    """Modules use queries and keys of the layer behind them."""
    return self.config.selector == 'pyramiddrop'

  @property
  def straight_through(self) -> bool:
    """Masks are hard forward and soft backward."""
    return (self.config.straight_through and not self.hard
            and self.config.selector == 'adaptive')


@flax.struct.dataclass
class PruneState:
  """Masks so far, carried through the layers.

  Attributes:
    keep: float32[B, I, P], product of the masks of the modules passed.
    module_keep: float32[L, B, I, P], `keep` after each module.
    thresholds: float32[L, B, I, 2], theta_r and theta_s.
    redundancy: float32[L, B, I, P], redundancy scores S_r, or what a peer ranks
      by.
  """
  keep: jax.Array
  module_keep: jax.Array
  thresholds: jax.Array
  redundancy: jax.Array


class ThresholdHeads(nn.Module):
  """Parameters of all modules: Linear(2P, hidden) and two Linear(hidden, 1).

  Attributes:
    num_modules: L.
    num_visual_tokens: P.
    config: hidden size and initial thresholds.
  """
  num_modules: int
  num_visual_tokens: int
  config: AtpConfig

  @nn.compact
  def __call__(self) -> dict[str, Any]:
    """The parameters, float32, each with leading axis L."""
    L, hidden = self.num_modules, self.config.threshold_hidden_size
    logit = lambda p: math.log(p / (1.0 - p))

    def layer(name, size_in, size_out, bias, std):
      def init(rng):
        box = nn.with_logical_partitioning
        kernel = box(nn.initializers.normal(std), ('modules', None, None))
        offset = box(nn.initializers.constant(bias), ('modules', None))
        return {'kernel': kernel(rng, (L, size_in, size_out), jnp.float32),
                'bias': offset(rng, (L, size_out), jnp.float32)}
      return self.param(name, init)

    inputs = 2 * self.num_visual_tokens
    return {
        'linear': layer('linear', inputs, hidden, 0.0, inputs ** -0.5),
        'redundancy': layer('redundancy', hidden, 1,
                            logit(self.config.init_theta_r), 0.02),
        'spatial': layer('spatial', hidden, 1,
                         logit(self.config.init_theta_s), 0.02)}


def thresholds(heads: Any, self_score: jax.Array, cross_score: jax.Array,
               shift: jax.Array) -> jax.Array:
  """Instance-wise thresholds (Eqs. 7-8).

  Args:
    heads: parameters of one module.
    self_score, cross_score: float32[B, I, P] on the canvas of all P grid
      positions, 0 where a token is gone.
    shift: float32[], added to both logits.

  Returns:
    float32[B, I, 2], theta_r and theta_s in (0, 1).
  """
  dense = lambda p, x: jnp.dot(x, p['kernel']) + p['bias']
  both = jnp.concatenate([self_score, cross_score], axis=-1)
  hidden = jax.nn.gelu(dense(heads['linear'], both), approximate=False)
  logits = jnp.concatenate([dense(heads['redundancy'], hidden),
                            dense(heads['spatial'], hidden)], axis=-1)
  return jax.nn.sigmoid(logits + shift)


def adaptive_mask(redundancy: jax.Array, spatial: jax.Array, theta: jax.Array,
                  inputs: PruneInputs) -> jax.Array:
  """Mask of one module (Eqs. 9-11): either criterion keeps a token.

  Args:
    redundancy: float32[B, I, P]; spatial: float32[P].
    theta: float32[B, I, 2].
    inputs: temperature, hardness and the ablation switch `criteria`.

  Returns:
    float32[B, I, P] in [0, 1].
  """
  config = inputs.config
  margins = []
  if config.criteria in ('both', 'redundant'):
    margins.append(redundancy - theta[..., :1])
  if config.criteria in ('both', 'spatial'):
    margins.append(spatial - theta[..., 1:])
  margin = margins[0] if len(margins) == 1 else jnp.maximum(*margins)
  hard = (margin > 0.0).astype(jnp.float32)
  if inputs.hard:
    return hard
  # sigmoid is monotone: the maximum of masks is the mask of the maximum.
  soft = jax.nn.sigmoid(margin * inputs.temperature)
  if config.straight_through:
    return soft + jax.lax.stop_gradient(hard - soft)
  return soft


def keep_by_rank(priority: jax.Array, count: jax.Array | int) -> jax.Array:
  """1.0 for the `count` smallest priorities of the last axis, ties by index."""
  ranks = jnp.argsort(jnp.argsort(priority, axis=-1, stable=True), axis=-1)
  return (ranks < count).astype(jnp.float32)


def initial_state(inputs: PruneInputs) -> PruneState:
  """All visual tokens are kept, but for a module in front of all layers."""
  B, I, P = inputs.visual_index.shape
  L = len(inputs.config.prune_after)
  keep = jnp.broadcast_to(inputs.image_valid[..., None],
                          (B, I, P)).astype(jnp.float32)
  module_keep = jnp.zeros((L, B, I, P))
  if inputs.config.prune_after[0] == 0:
    keep = keep * keep_by_rank(inputs.order, inputs.config.fixed_counts[0])
    module_keep = module_keep.at[0].set(keep)
  return PruneState(keep=keep, module_keep=module_keep,
                    thresholds=jnp.zeros((L, B, I, 2)),
                    redundancy=jnp.zeros((L, B, I, P)))


def canvas_index(visual_slots: jax.Array, shape: tuple[int, int, int]
                 ) -> jax.Array:
  """Where each visual token stands in its row; 0 for those that do not.

  Args:
    visual_slots: int32[B, T].
    shape: (B, I, P).

  Returns:
    int32[B, I, P].
  """
  B, I, P = shape
  # Tokens without a slot fall off the canvas' end.
  target = jnp.where(visual_slots >= 0, visual_slots, I * P)
  index = jnp.zeros((B, I * P + 1), jnp.int32)
  index = index.at[jnp.arange(B)[:, None], target].set(
      jnp.arange(visual_slots.shape[1], dtype=jnp.int32))
  return index[:, :-1].reshape(shape)


def token_keep(keep: jax.Array, inputs: PruneInputs) -> jax.Array:
  """Keep mask of all tokens, float32[B, T]; 1 for everything but visual."""
  B = keep.shape[0]
  flat = keep.reshape(B, -1)
  slots = inputs.visual_slots
  picked = jnp.take_along_axis(flat, jnp.maximum(slots, 0), axis=1)
  return jnp.where(slots >= 0, picked, 1.0)


def masked_by_keep(keep: jax.Array, inputs: PruneInputs, mask: jax.Array
                   ) -> tuple[jax.Array, jax.Array | None]:
  """How a keep mask enters attention (DynamicViT style, ours).

  Every query but the token itself sees a key's mask: as log M while soft, by
  not being allowed to attend when hard, or when M is below GONE.

  Args:
    keep: float32[B, I, P].
    inputs: hardness and slots.
    mask: bool[B, T, T], the mask without pruning.

  Returns:
    mask bool[B, T, T] and bias float32[B, T, T] or None.
  """
  keys = token_keep(keep, inputs)[:, None, :]
  itself = jnp.eye(mask.shape[1], dtype=bool)
  if inputs.hard or inputs.straight_through:
    return mask & ((keys > 0.5) | itself), None
  bias = jnp.where(itself, 0.0, jnp.log(jnp.maximum(keys, GONE)))
  return mask & ((keys > GONE) | itself), bias


def straight_through_keep(keep: jax.Array, inputs: PruneInputs) -> jax.Array:
  """The same mask for attention itself: hard forward, with a gradient.

  Returns:
    float32[B, T, T], 1 where a query may see the key.
  """
  keys = token_keep(keep, inputs)[:, None, :]
  return jnp.where(jnp.eye(keys.shape[-1], dtype=bool), 1.0, keys)


def on_canvas(x: jax.Array, inputs: PruneInputs) -> jax.Array:
  """What stands where the visual tokens do, [B, T, ...] -> [B, I, P, ...]."""
  index = inputs.visual_index
  flat = index.reshape(index.shape[0], -1, *[1] * (x.ndim - 2))
  return jnp.take_along_axis(x, flat, axis=1).reshape(*index.shape, *x.shape[2:])


def prune(state: PruneState, module: jax.Array, q: jax.Array, k: jax.Array,
          lse: jax.Array | None, mask: jax.Array | Causal,
          bias: jax.Array | None, inputs: PruneInputs) -> PruneState:
  """Runs module number `module` after a layer.

  Args:
    state: masks so far.
    module: int32[], index of the module.
    q: float[B, T, N, H], k: float[B, T, K, H], rotated, of that layer.
    lse: float32[B, T, N] of its attention, or None.
    mask, bias: as that layer used them.
    inputs: everything else.

  Returns:
    The new state.
  """
  config, keep = inputs.config, state.keep
  is_visual = inputs.visual_slots >= 0
  if config.selector in ORDERED:  # which look at no attention
    self_score = cross_score = jnp.zeros_like(keep)
  elif config.selector in ('fastv', 'pyramiddrop'):
    self_score = cross_score = on_canvas(
        last_token_attention(q, k, mask, inputs.prompt_weight), inputs)
  else:
    raw = received_attention(
        q, k, lse, mask, bias, inputs.image_ids,
        token_keep(keep, inputs) * is_visual, inputs.prompt_weight)
    self_score, cross_score = (
        normalise(on_canvas(x, inputs), keep, config.score_norm) for x in raw)
  redundancy = {'both': (self_score + cross_score) / 2, 'self': self_score,
                'cross': cross_score}[config.scores]
  alive = keep > 0.5 if inputs.hard else keep > 0.0
  if config.selector == 'adaptive':
    heads = jax.tree.map(lambda x: x[module], inputs.heads)
    theta = thresholds(heads, self_score, cross_score, inputs.threshold_shift)
    spatial = jnp.asarray(spatial_scores(
        inputs.grid_size, config.sap_strides, config.sap_lambda))
    kept = adaptive_mask(redundancy, spatial, theta, inputs)
    # An empty keep set is impossible: the best token always stays.  It is one
    # that is still there, even where all scores are 0.
    best = jnp.argmax(jnp.where(alive, redundancy, -1.0), axis=-1)
    best = jax.nn.one_hot(best, kept.shape[-1])
    kept = jnp.maximum(kept, best)
  else:
    theta = jnp.zeros(keep.shape[:2] + (2,))
    order = inputs.order if config.selector in ORDERED else -redundancy
    priority = jnp.where(alive, order.astype(jnp.float32), jnp.inf)
    count = jnp.asarray(config.fixed_counts)[module]
    kept = keep_by_rank(jax.lax.stop_gradient(priority), count)
  keep = keep * kept
  put = lambda store, value: store.at[module].set(value)
  return PruneState(keep=keep, module_keep=put(state.module_keep, keep),
                    thresholds=put(state.thresholds, theta),
                    redundancy=put(state.redundancy, redundancy))
