"""LLaVA: visual features, projector, decoder; full, VoCo and ATP forms.

Every method is a pure function of (params, arrays).  Which form runs is an
argument: the same parameters serve the plain model, the VoCo mask in one pass
or two, and soft or hard pruning.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_compress.compress import atp
from vlm_compress.compress.baselines.downsample import reduced_pixels, reduced_size
from vlm_compress.compress.baselines.pooling import average_pool
from vlm_compress.compress.baselines.qformer import QFormer
from vlm_compress.compress.baselines.visionzip import zip_tokens
from vlm_compress.compress.voco import hidden_from_text, voco_mask
from vlm_compress.config import LlavaConfig, check
from vlm_compress.models import pruning
from vlm_compress.models.clip_vit import ClipVisionTower
from vlm_compress.models.inputs import (
  CompressedImages,
  Prefix,
  PruneOptions,
  place,
  voco_states,
)
from vlm_compress.models.language_model import LanguageModel
from vlm_compress.models.layer_stack import StackInputs, StackOutputs
from vlm_compress.models.projector import Projector
from vlm_compress.models.sequence import TEXT, VISUAL, VOCO, Batch, VocoBatch
from vlm_compress.nn.kv_cache import KVCache, append
from vlm_compress.nn.linear import linear
from vlm_compress.nn.masks import Causal, causal_mask
from vlm_compress.nn.rope import rope
from vlm_compress.sharding import constrain


class Llava(nn.Module):
  """LLaVA over frozen vision features.

  Attributes:
    config: the model.
    unroll: see LayerStack.
  """
  config: LlavaConfig
  unroll: int = 1

  def setup(self):
    cfg = self.config
    dtype, param_dtype = jnp.dtype(cfg.dtype), jnp.dtype(cfg.param_dtype)
    std, hidden_size = cfg.text.initializer_range, cfg.text.hidden_size
    self.multi_modal_projector = Projector(
        hidden_size, cfg.projector_hidden_act, std, dtype, param_dtype)
    self.language_model = LanguageModel(cfg, self.unroll)
    if cfg.vision.model_type == 'clip_vision_model':
      self.vision_tower = ClipVisionTower(
          cfg.vision, cfg.vision_feature_layer,
          cfg.vision_feature_select_strategy, dtype, param_dtype,
          look=cfg.resampler == 'visionzip')
    if cfg.resampler == 'qformer':
      self.resampler = QFormer(cfg.num_query_tokens,
                               cfg.text.num_attention_heads, std, dtype,
                               param_dtype)
    elif cfg.resampler == 'avg_pool_linear':
      self.resampler = linear(hidden_size, ('embed', None), name=None,
                              std=std, use_bias=True, dtype=dtype,
                              param_dtype=param_dtype)
    if cfg.voco is not None:
      rows = cfg.voco.num_voco_tokens if cfg.voco.distinct_rows else 1
      # N(0, 0.02) in the released code; ours follows initializer_range, whose
      # default is the same.
      self.voco_embedding = self.param(
          'voco_embedding', nn.with_logical_partitioning(
              nn.initializers.normal(std), (None, 'embed')),
          (rows, hidden_size), param_dtype)
    if cfg.atp is not None and cfg.atp.selector == 'adaptive':
      self.atp = atp.ThresholdHeads(len(cfg.atp.prune_after),
                                    cfg.num_visual_tokens, cfg.atp)

  def vision_features(self, pixels: jax.Array) -> jax.Array:
    """float[B, I, S, S, 3] normalised pixels -> float[B, I, P', Dv] (CLIP)."""
    check(self.config.vision.model_type == 'clip_vision_model',
          'the EfficientNet-Lite0 tower is frozen and has no parameters here; '
          'use models.efficientnet.extract_features')
    cfg, (B, I) = self.config, pixels.shape[:2]
    pixels = pixels.reshape(B * I, *pixels.shape[2:])
    if cfg.resampler == 'downsample':
      pixels = reduced_pixels(pixels, reduced_size(cfg))
    features = self.vision_tower(pixels)
    if cfg.resampler == 'visionzip':
      hidden, look = features
      features = zip_tokens(hidden, look.class_attention, look.keys,
                            cfg.num_query_tokens)
    return features.reshape(B, I, *features.shape[1:])

  def visual_tokens(self, features: jax.Array) -> jax.Array:
    """float[B, I, P', Dv] vision features -> float[B, I, P, D]."""
    cfg = self.config
    check(cfg.resampler not in ('downsample', 'visionzip') or
          features.shape[2] == cfg.num_patches, f'{features.shape[2]} features '
          f'per image for resampler={cfg.resampler!r} to {cfg.num_patches}: '
          'encode pictures with this config, by `vision_features`')
    if cfg.resampler == 'avg_pool_linear':
      features = average_pool(features, cfg.num_query_tokens)
    tokens = self.multi_modal_projector(features)
    if cfg.resampler == 'avg_pool_linear':
      tokens = self.resampler(tokens)
    elif cfg.resampler == 'avg_pool':
      tokens = average_pool(tokens, cfg.num_query_tokens)
    elif cfg.resampler == 'qformer':
      B, I = tokens.shape[:2]
      tokens = self.resampler(tokens.reshape(B * I, *tokens.shape[2:]))
      tokens = tokens.reshape(B, I, *tokens.shape[1:])
    return tokens

  def embed(self, batch: Batch) -> jax.Array:
    """Embeddings of all tokens of a batch, float[B, T, D]."""
    x = self.language_model.embed(batch.input_ids)
    B, _, D = x.shape
    if batch.features.shape[1] > 0:
      visual = self.visual_tokens(batch.features).reshape(B, -1, D)
      index = jnp.maximum(batch.visual_slots, 0)[..., None]
      picked = jnp.take_along_axis(visual, index, axis=1)
      x = jnp.where((batch.token_types == VISUAL)[..., None], picked, x)
    if self.config.voco is not None:
      x = jnp.where((batch.token_types == VOCO)[..., None],
                    self._voco_rows(batch.voco_slots).astype(x.dtype), x)
    return constrain(x, 'batch', 'length', 'act_embed')

  def _voco_rows(self, slots: jax.Array) -> jax.Array:
    rows = self.voco_embedding.shape[0]
    return self.voco_embedding[jnp.clip(slots, 0, rows - 1)]

  def _mask(self, batch: Batch, mask: str, stored: bool) -> jax.Array | Causal:
    """The mask of a row; without turns a causal one need not be stored."""
    if mask == 'causal' and batch.turn_ids is None:
      causal = Causal(batch.valid)
      return causal.dense(batch.valid.shape[1]) if stored else causal
    if batch.turn_ids is None:
      batch = batch.replace(turn_ids=jnp.zeros_like(batch.token_types))
    if mask == 'causal':
      return causal_mask(batch.valid, batch.turn_ids)
    check(mask == 'voco' and self.config.voco is not None,
          f'mask={mask!r}: use causal, or voco with a config that has voco')
    return voco_mask(batch.valid, batch.token_types == VOCO,
                     batch.token_types == VISUAL, batch.image_ids,
                     batch.turn_ids, self.config.voco.text_sees_prefix)

  def prune_inputs(self, batch: Batch, options: PruneOptions, x: jax.Array
                   ) -> atp.PruneInputs:
    """What the pruning modules need to know; x as from `embed`."""
    heads = self.atp() if self.config.atp.selector == 'adaptive' else None
    return pruning.prune_inputs(self.config, batch, options, x, heads)

  def hidden(self, batch: Batch, *, mask: str = 'causal',
             prune: PruneOptions | None = None, collect: bool = False
             ) -> tuple[jax.Array, StackOutputs]:
    """Hidden states of all tokens.

    Args:
      batch: T tokens per row.
      mask: 'causal', or 'voco' for the masked single pass.
      prune: how ATP's modules run; None runs the plain model.
      collect: also return attention maps.

    Returns:
      float[B, T, D] after the final norm, and StackOutputs.
    """
    x = self.embed(batch)
    if self.is_initializing() and hasattr(self, 'atp'):
      self.atp()
    several = mask == 'voco' and batch.features.shape[1] > 1
    shift = batch.read_positions - batch.positions if several else None
    shared = StackInputs(
        positions=batch.positions,
        mask=self._mask(batch, mask, collect or prune is not None),
        read_shift=shift,
        reads=batch.image_ids == 0 if several else None,
        prune=None if prune is None else self.prune_inputs(batch, prune, x),
        collect=collect)
    return self.language_model(x, shared)

  def __call__(self, batch: Batch, *, mask: str = 'causal',
               prune: PruneOptions | None = None, collect: bool = False
               ) -> tuple[jax.Array, StackOutputs]:
    """Logits of all tokens, float32[B, T, V], and StackOutputs."""
    hidden, outputs = self.hidden(batch, mask=mask, prune=prune,
                                  collect=collect)
    return self.language_model.logits(hidden), outputs

  def compress_images(self, features: jax.Array, segment_ids: tuple[int, ...],
                      num_voco_tokens: int) -> CompressedImages:
    """First pass of VoCo: every image alone, plain causal (exact, ours).

    Args:
      features: float[B, I, P', Dv].
      segment_ids: S1 token ids of BOS, P visual, newline, C VoCo.
      num_voco_tokens: C.

    Returns:
      The keys and values of the VoCo tokens (with text_sees_prefix also of
      BOS and the newline) where they stand in the segment.
    """
    B, I = features.shape[:2]
    x = self.segment_input(features, segment_ids, num_voco_tokens)
    ones = jnp.ones(x.shape[:2], bool)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    _, out = self.language_model(x, StackInputs(
        positions=positions, mask=Causal(ones)))
    return voco_states(self.config, (B, I), out.keys, out.values,
                       num_voco_tokens)

  def segment_input(self, features: jax.Array, segment_ids: tuple[int, ...],
                    num_voco_tokens: int) -> jax.Array:
    """Embeddings of compression segments, float[B * I, S1, D]."""
    B, I = features.shape[:2]
    C, P, S1 = num_voco_tokens, self.config.num_visual_tokens, len(segment_ids)
    visual = self.visual_tokens(features).reshape(B * I, P, -1)
    x = self.language_model.embed(jnp.asarray(segment_ids))
    x = jnp.broadcast_to(x, (B * I, *x.shape))
    x = x.at[:, 1:1 + P].set(visual.astype(x.dtype))
    return x.at[:, S1 - C:].set(self._voco_rows(jnp.arange(C)).astype(x.dtype))

  def compress(self, features: jax.Array, image_valid: jax.Array,
               segment_ids: tuple[int, ...], voco_positions: jax.Array
               ) -> Prefix:
    """`compress_images`, placed where text reads them.

    Args:
      features, segment_ids: as there.
      image_valid: bool[B, I].
      voco_positions: int32[B, I, C], where text reads the VoCo tokens.

    Returns:
      S = I * C per row, or more with text_sees_prefix.
    """
    compressed = self.compress_images(features, segment_ids,
                                      voco_positions.shape[2])
    return place(compressed, image_valid, voco_positions,
                 self.config.text.rope_theta)

  def read(self, text: Batch, prefix: Prefix) -> tuple[jax.Array, StackOutputs]:
    """Second pass of VoCo: text with the prefix in front; logits and outputs."""
    later = text.positions[:, :, None] > prefix.order[:, None, :]
    shared = StackInputs(
        positions=text.positions,
        mask=self._mask(text, 'causal', True),
        earlier_mask=later & prefix.valid[:, None, :])
    M = prefix.keys.shape[0]
    keep = jnp.broadcast_to(prefix.valid, (M, *prefix.valid.shape))
    hidden, out = self.language_model(
        self.language_model.embed(text.input_ids), shared,
        (prefix.keys, prefix.values), keep)
    return self.language_model.logits(hidden), out

  def two_pass(self, batch: VocoBatch) -> jax.Array:
    """VoCo as two dense causal passes; logits of the text, [B, Tt, V]."""
    prefix = self.compress(batch.text.features, batch.text.image_valid,
                           batch.segment_ids, batch.voco_positions)
    return self.read(batch.text, prefix)[0]

  def embed_text(self, input_ids: jax.Array) -> jax.Array:
    """int32[B, T] -> float[B, T, D]."""
    return self.language_model.embed(input_ids)

  def head(self, x: jax.Array) -> jax.Array:
    """Final norm and logits, float[..., D] -> float32[..., V]."""
    return self.language_model.logits(self.language_model.norm(x))

  def prefill(self, batch: Batch, *, mask: str = 'causal',
              prune: PruneOptions | None = None
              ) -> tuple[jax.Array, KVCache, StackOutputs]:
    """Runs prompts and keeps what later tokens may read.

    Args:
      batch: prompts without turns; mask, prune: as in `hidden`.

    Returns:
      float32[B, V] logits of the next token, the cache, StackOutputs.
    """
    hidden, out = self.hidden(batch, mask=mask, prune=prune)
    valid = batch.valid
    T = valid.shape[1]
    last = jnp.argmax(jnp.where(valid, jnp.arange(T), -1), axis=1)
    pick = lambda x: jnp.take_along_axis(x, last[:, None], axis=1)[:, 0]
    at_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    readable, keys = valid, out.keys
    if mask == 'voco':
      readable = valid & ~hidden_from_text(
          batch.token_types == VOCO, batch.token_types == VISUAL,
          batch.image_ids, self.config.voco.text_sees_prefix)
      shift = batch.read_positions - batch.positions
      keys = jax.vmap(
          lambda k: rope(k, shift, self.config.text.rope_theta))(keys)
    readable = jnp.broadcast_to(readable, (keys.shape[0], *readable.shape))
    if out.entering is not None:
      flat = out.entering.reshape(*out.entering.shape[:2], -1)
      slots = jnp.broadcast_to(batch.visual_slots, readable.shape)
      kept = jnp.take_along_axis(flat, jnp.maximum(slots, 0), axis=2) > 0.5
      readable = readable & (kept | (slots < 0))
    cache = KVCache(keys=keys, values=out.values, readable=readable,
                    length=jnp.int32(T),
                    positions=pick(batch.read_positions) + 1)
    return self.language_model.logits(at_last), cache, out

  def prefill_two_pass(self, batch: VocoBatch
                       ) -> tuple[jax.Array, KVCache, StackOutputs]:
    """`prefill` of VoCo prompts in two dense passes.

    The cache holds keys and values of the VoCo tokens and of the text only.
    """
    prefix = self.compress(batch.text.features, batch.text.image_valid,
                           batch.segment_ids, batch.voco_positions)
    return self.prefill_compressed(batch.text, prefix)

  def prefill_compressed(self, text: Batch, prefix: Prefix
                         ) -> tuple[jax.Array, KVCache, StackOutputs]:
    """`prefill` of text behind images that were compressed before."""
    logits, out = self.read(text, prefix)
    valid = text.valid
    last = jnp.argmax(jnp.where(valid, jnp.arange(valid.shape[1]), -1), axis=1)
    at_last = lambda x: jnp.take_along_axis(
        x, last.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]
    join = lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=2)
    readable = jnp.concatenate([prefix.valid, valid], axis=1)
    cache = KVCache(
        keys=join(prefix.keys, out.keys),
        values=join(prefix.values, out.values),
        readable=jnp.broadcast_to(
            readable, (out.keys.shape[0], *readable.shape)),
        length=jnp.int32(readable.shape[1]),
        positions=at_last(text.positions) + 1)
    return at_last(logits), cache, out

  def extend(self, tokens: jax.Array, cache: KVCache
             ) -> tuple[jax.Array, KVCache]:
    """One more token per row.

    Args:
      tokens: int32[B].
      cache: with at least one free slot.

    Returns:
      float32[B, V] logits of the token after it, and the longer cache.
    """
    B = tokens.shape[0]
    shared = StackInputs(
        positions=cache.positions[:, None],
        mask=jnp.ones((B, 1, 1), bool),
        earlier_mask=jnp.ones((B, 1, cache.size), bool))
    hidden, out = self.language_model(
        self.language_model.embed(tokens[:, None]), shared,
        (cache.keys, cache.values), cache.readable)
    cache = append(cache, out.keys, out.values)
    return self.language_model.logits(hidden[:, 0]), cache


def example_batch(config: LlavaConfig, num_rows: int = 1, num_images: int = 1,
                  num_text: int = 4) -> Batch:
  """A batch of the right shapes and zero content, to initialise with."""
  P = config.num_visual_tokens
  T = num_images * P + num_text
  types = jnp.full((num_rows, T), TEXT).at[:, :num_images * P].set(VISUAL)
  zeros = jnp.zeros((num_rows, T), jnp.int32)
  slots = jnp.where(types == VISUAL, jnp.arange(T), -1)
  return Batch(
      input_ids=zeros, token_types=types,
      positions=jnp.broadcast_to(jnp.arange(T), (num_rows, T)),
      read_positions=jnp.broadcast_to(jnp.arange(T), (num_rows, T)),
      image_ids=jnp.where(slots >= 0, slots // P + 1, 0), visual_slots=slots,
      voco_slots=zeros - 1, turn_ids=zeros, prompt_mask=types == TEXT,
      loss_mask=types == TEXT,
      features=jnp.zeros((num_rows, num_images, config.num_patches,
                          config.vision.hidden_size)),
      image_valid=jnp.ones((num_rows, num_images), bool))


def init_params(model: Llava, rng: jax.Array, with_vision: bool = False):
  """Fresh parameters (boxed with logical axis names).

  Args:
    model: the model.
    rng: random key.
    with_vision: also those of the CLIP tower, which training on frozen
      features does not need.
  """
  batch, size = example_batch(model.config), model.config.vision.image_size
  model = model.clone(unroll=1)  # the same numbers, compiled faster

  def everything(model):
    if with_vision:
      model.vision_features(jnp.zeros((1, 1, size, size, 3)))
    return model(batch)
  return nn.init(everything, model)(rng)['params']
