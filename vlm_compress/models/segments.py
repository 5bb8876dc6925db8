"""The decoder in segments between pruning modules, over rows that get shorter.

Masking a token saves nothing.  Here a module's keep mask moves the kept tokens
of every row to its front, in order, and the next segment runs on as many slots
as the fullest row needs, rounded up to a rung of a fixed ladder.  Tokens take
their positions along, so what is computed is what the mask would have given.

Pure functions of parameters and arrays; decode/segmented.py compiles and calls
them.  Layers are separate parameter trees here, not one stack: a slice of a
stack is a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from vlm_compress.compress import atp, selection
from vlm_compress.config import LlavaConfig
from vlm_compress.models.inputs import Prefix, PruneOptions
from vlm_compress.models.llama import DecoderLayer, LayerState
from vlm_compress.models.llava import Llava
from vlm_compress.models.sequence import Batch
from vlm_compress.nn.masks import Causal


@flax.struct.dataclass
class Tokens:
  """Rows as they enter a segment; S slots.

  Attributes:
    x: float[B, S, D].
    positions: int32[B, S], those of the uncut row.
    valid: bool[B, S], False for unused slots.
    visual_slots, image_ids: int32[B, S], see Batch.
    prompt_weight: float32[B, S], see PruneInputs.
  """
  x: jax.Array
  positions: jax.Array
  valid: jax.Array
  visual_slots: jax.Array
  image_ids: jax.Array
  prompt_weight: jax.Array


UNUSED = Tokens(x=0.0, positions=0, valid=False, visual_slots=-1, image_ids=0,
                prompt_weight=0.0)


@flax.struct.dataclass
class Pruning:
  """What the modules of a batch share, and what they have decided.

  Attributes:
    inputs: constant over segments; None in its fields per token, which come
      from `Tokens`.
    state: masks, thresholds and scores so far.
  """
  inputs: atp.PruneInputs
  state: atp.PruneState


@flax.struct.dataclass
class SegmentCache:
  """Keys and values of one segment, with room for new tokens.

  Attributes:
    keys, values: of each layer, float[B, S, K, H]; keys rotated.
    readable: bool[B, S].
  """
  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  readable: jax.Array


def segment_bounds(config: LlavaConfig, pruned: bool) -> list[tuple[int, int]]:
  """Layers [first, last) of each segment; one segment without pruning."""
  cuts = config.atp.prune_after if pruned else ()
  ends = [*(c for c in cuts if c > 0), config.text.num_hidden_layers]
  return list(zip([0, *ends], ends))


def capacity_ladder(config: LlavaConfig) -> tuple[int, ...]:
  """Visual tokens per image that segments are compiled for, increasing.

  The last rung is always P: nothing may be pruned.  By default rungs are about
  a quarter apart, 576: 4, 12, 24, 36, 48, 64, 80, 96, 120, 144, 192, 240, 288,
  360, 432, 576, so that few programs serve and few slots are empty (ours).
  """
  P = config.num_visual_tokens
  rungs = config.atp.capacities or [
      -(-P * n // 144) for n in (1, 3, 6, 9, 12, 16, 20, 24, 30, 36, 48, 60, 72,
                              90, 108)]
  return tuple(sorted({r for r in rungs if r < P} | {P}))


def start(config: LlavaConfig, params: Any, batch: Batch,
          options: PruneOptions | None) -> tuple[Tokens, Pruning | None]:
  """Embeds a batch.

  Args:
    config: of the model.
    params: all but the decoder's layers.
    batch: prompts without turns.
    options: how the modules run, hard; None for the plain model.

  Returns:
    Tokens, and Pruning in its initial state (None for the plain model).
  """
  model, variables = Llava(config), {'params': params}
  x = model.apply(variables, batch, method='embed')
  pruning = None
  prompt_weight = jnp.zeros(batch.positions.shape, jnp.float32)
  if options is not None:
    inputs = model.apply(variables, batch, options, x, method='prune_inputs')
    prompt_weight = inputs.prompt_weight
    pruning = Pruning(
        inputs.replace(heads=None, visual_index=None, visual_slots=None,
                       image_ids=None, prompt_weight=None),
        atp.initial_state(inputs))
  return Tokens(x, batch.positions, batch.valid, batch.visual_slots,
                batch.image_ids, prompt_weight), pruning


def start_segments(config: LlavaConfig, params: Any, features: jax.Array,
                   segment_ids: tuple[int, ...], num_voco_tokens: int
                   ) -> Tokens:
  """Embeds VoCo's compression segments, each a row; see Llava.compress_images."""
  x = Llava(config).apply({'params': params}, features, segment_ids,
                          num_voco_tokens, method='segment_input')
  zeros = jnp.zeros(x.shape[:2], jnp.int32)
  return Tokens(x, zeros + jnp.arange(x.shape[1]), zeros == 0, zeros - 1, zeros,
                zeros.astype(jnp.float32))


def run_layers(config: LlavaConfig, layers: Sequence[Any], tokens: Tokens,
               num_slots: int, prefix: Prefix | None = None
               ) -> tuple[Tokens, SegmentCache, LayerState]:
  """Runs the layers of a segment.

  Args:
    config: of the model.
    layers: parameters of each.
    tokens: S slots.
    num_slots: room for so many new tokens in the cache.
    prefix: keys and values that stand in front, of these layers; or None.

  Returns:
    Tokens with new x; the cache; what attention of the last layer left.
  """
  mask, readable = Causal(tokens.valid), tokens.valid
  if prefix is not None:
    later = tokens.positions[:, :, None] > prefix.order[:, None, :]
    own = mask.dense(tokens.valid.shape[1])
    mask = jnp.concatenate([later & prefix.valid[:, None, :], own], axis=2)
    readable = jnp.concatenate([prefix.valid, readable], axis=1)
  room = lambda y: jnp.pad(y, ((0, 0), (0, num_slots)) + ((0, 0),) * (y.ndim - 2))
  x, keys, values, state = tokens.x, [], [], None
  for index, layer in enumerate(layers):
    earlier = (None if prefix is None else
               (prefix.keys[index], prefix.values[index]))
    x, state = _layer(config, layer, x, tokens.positions, mask, earlier)
    k, v = state.k, state.v
    if earlier is not None:
      k, v = (jnp.concatenate([a.astype(b.dtype), b], axis=1)
              for a, b in zip(earlier, (k, v)))
    keys.append(room(k))
    values.append(room(v))
  cache = SegmentCache(tuple(keys), tuple(values), room(readable))
  return tokens.replace(x=x), cache, state


def _layer(config: LlavaConfig, params: Any, x, positions, mask, earlier=None,
           write_at=None):
  layer = DecoderLayer(config.text, jnp.dtype(config.dtype),
                       jnp.dtype(config.param_dtype),
                       config.attention_implementation, config.lora)
  return layer.apply({'params': params}, x, positions, mask, None, earlier,
                     write_at=write_at)


def run_module(heads: Any, module: int, tokens: Tokens, last: LayerState,
               pruning: Pruning) -> tuple[Tokens, Pruning]:
  """Runs the module behind a segment.

  Args:
    heads: parameters of all modules; None for selectors without any.
    module: its index.
    tokens: rows of the segment.
    last: what attention of the segment's last layer left, or of the layer
      behind it where the selector looks ahead.
    pruning: before it.

  Returns:
    Tokens, of which some may be merged ones, and Pruning after it.
  """
  shape = pruning.inputs.order.shape
  inputs = pruning.inputs.replace(
      heads=heads, visual_slots=tokens.visual_slots, image_ids=tokens.image_ids,
      prompt_weight=tokens.prompt_weight,
      visual_index=atp.canvas_index(tokens.visual_slots, shape))
  state, x = selection.choose(
      pruning.state, jnp.int32(module), tokens.x, last.q, last.k, last.lse,
      Causal(tokens.valid), None, inputs)
  return tokens.replace(x=x), pruning.replace(state=state)


def to_front(tokens: Tokens, pruning: Pruning | None
             ) -> tuple[Tokens, jax.Array]:
  """Moves the tokens that stay to the front of their rows, in order.

  Returns:
    Tokens, where the others are not valid, and int32[B], how many stay.
  """
  stay = tokens.valid
  if pruning is not None:
    inputs = pruning.inputs.replace(visual_slots=tokens.visual_slots)
    stay = stay & (atp.token_keep(pruning.state.keep, inputs) > 0.5)
  order = jnp.argsort(~stay, axis=1, stable=True)
  take = lambda y: jnp.take_along_axis(
      y, order.reshape(order.shape + (1,) * (y.ndim - 2)), axis=1)
  moved = jax.tree.map(take, tokens.replace(valid=stay))
  # A slot that is not used must not look like a visual token.
  moved = moved.replace(visual_slots=jnp.where(
      moved.valid, moved.visual_slots, UNUSED.visual_slots))
  return moved, jnp.sum(stay, axis=1, dtype=jnp.int32)


def cut(tokens: Tokens, num_slots: int) -> Tokens:
  """The first slots of every row."""
  return jax.tree.map(lambda y: y[:, :num_slots], tokens)


def finish(config: LlavaConfig, params: Any, tokens: Tokens
           ) -> tuple[jax.Array, jax.Array]:
  """Logits of the next token, float32[B, V], and its position, int32[B]."""
  last = jnp.argmax(jnp.where(tokens.valid, jnp.arange(tokens.valid.shape[1]),
                              -1), axis=1)[:, None]
  x = jnp.take_along_axis(tokens.x, last[..., None], axis=1)[:, 0]
  position = jnp.take_along_axis(tokens.positions, last, axis=1)[:, 0]
  return head(config, params, x), position + 1


def as_prefix(keys: jax.Array, values: jax.Array, slots: int) -> Prefix:
  """One segment of KeptTokens in front of a row, padded to `slots`."""
  size = keys.shape[1]
  room = lambda y: jnp.pad(y, ((0, 0), (0, slots - size), (0, 0), (0, 0)))[:, None]
  valid = jnp.arange(slots)[None] < size
  return Prefix(room(keys), room(values), valid, jnp.full((1, slots), -1))


def head(config: LlavaConfig, params: Any, x: jax.Array) -> jax.Array:
  """Final norm and logits, float[B, D] -> float32[B, V]."""
  return Llava(config).apply({'params': params}, x, method='head')


class Ran(NamedTuple):
  """What a segment leaves: `logits` and `positions` of the next token if it
  was the last one, else `tokens`; behind a module also `counts` int32[B], how
  many of them stay, and `pruning`.
  """
  cache: SegmentCache
  tokens: Tokens | None = None
  counts: jax.Array | None = None
  pruning: Pruning | None = None
  logits: jax.Array | None = None
  positions: jax.Array | None = None


def num_ahead(config: LlavaConfig, is_last: bool) -> int:
  """Layers behind a segment whose parameters its module needs."""
  looks = config.atp is not None and config.atp.selector == 'pyramiddrop'
  return int(looks and not is_last)


def run_segment(config: LlavaConfig, index: int, room: int, is_last: bool,
                layers: Sequence[Any], rest: Any, tokens: Tokens,
                pruning: Pruning | None) -> Ran:
  """A segment and the module behind it.

  Args:
    config: of the model.
    index: number of the segment.
    room: slots for new tokens.
    is_last: no layers follow.
    layers: parameters of its layers, and of as many behind it as
      `num_ahead` says; rest: of all but the decoder's layers.
    tokens: S slots.
    pruning: before it; None for the plain model.
  """
  ahead = num_ahead(config, is_last)
  own = layers[:len(layers) - ahead]
  tokens, cache, state = run_layers(config, own, tokens, room)
  if is_last:
    return Ran(cache, None, None, None, *finish(config, rest, tokens))
  if ahead:  # of that layer, only what makes q and k remains in the program
    _, state = _layer(config, layers[-1], tokens.x, tokens.positions,
                      Causal(tokens.valid))
    state = state._replace(lse=None)
  module = index + (config.atp.prune_after[0] == 0)
  tokens, pruning = run_module(rest.get('atp'), module, tokens, state, pruning)
  tokens, counts = to_front(tokens, pruning)
  return Ran(cache, tokens, counts, pruning)


def read_segment(config: LlavaConfig, room: int, is_last: bool,
                 layers: Sequence[Any], rest: Any, tokens: Tokens,
                 prefix: Prefix) -> Ran:
  """A segment behind keys and values, without a module; see `run_segment`."""
  tokens, cache, _ = run_layers(config, layers, tokens, room, prefix)
  if is_last:
    return Ran(cache, None, None, None, *finish(config, rest, tokens))
  return Ran(cache, tokens)


def extend_segment(config: LlavaConfig, ends: tuple[bool, bool],
                   layers: Sequence[Any], rest: Any, x: jax.Array,
                   cache: SegmentCache, positions: jax.Array,
                   write_at: jax.Array
                   ) -> tuple[jax.Array, SegmentCache, jax.Array]:
  """One more token per row through a segment.

  Args:
    config, layers, rest: as in `run_segment`.
    ends: whether it is the first segment, and whether the last.
    x: int32[B], tokens, for the first segment; else float[B, 1, D].
    cache: with a free slot at `write_at`.
    positions: int32[B].
    write_at: int32[].

  Returns:
    float[B, 1, D], or float32[B, V] logits of the last segment; the cache; the
    next positions.
  """
  if ends[0]:
    x = Llava(config).apply({'params': rest}, x[:, None], method='embed_text')
  x, cache = _extend_layers(config, layers, x, cache, positions, write_at)
  x = head(config, rest, x[:, 0]) if ends[1] else x
  return x, cache, positions + 1


def _extend_layers(config: LlavaConfig, layers: Sequence[Any], x: jax.Array,
                   cache: SegmentCache, positions: jax.Array,
                   write_at: jax.Array) -> tuple[jax.Array, SegmentCache]:
  B = x.shape[0]
  readable = jax.lax.dynamic_update_slice(
      cache.readable, jnp.ones((B, 1), bool), (0, write_at))
  keys, values = [], []
  for layer, k, v in zip(layers, cache.keys, cache.values):
    x, state = _layer(config, layer, x, positions[:, None],
                      readable[:, None, :], (k, v), write_at)
    keys.append(state.k)
    values.append(state.v)
  return x, SegmentCache(tuple(keys), tuple(values), readable)
