"""What a method costs: prefill FLOPs and KV-cache bytes, by formula.

A compiler counts the body of a scan once and a kernel hides what it skips, so
the costs in reports come from these formulas.  A multiply-add is 2 FLOPs.
Matrix products and the query-key products are counted; norms, activations,
softmax, RoPE, biases and the embedding look-up are not (below 1 % together at
7B).  LoRA adapters count as merged, as an export has them; run beside their
kernels they add 2 R (in + out) per token and adapted projection of rank R.
Counted per image or row; averages over instances are the caller's, who
passes kept tokens of every instance as the leading axes: attention grows with
the square of the length, so the cost of the mean is not the mean cost.

Letters: n tokens of a layer, M decoder layers, D hidden size, N query heads,
K key/value heads, H head size, F intermediate size, V vocabulary, P visual
tokens of an image, C VoCo tokens of an image, T text tokens.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from vlm_compress.compress.baselines.downsample import reduced_size
from vlm_compress.compress.baselines.qformer import NUM_LAYERS as NUM_QFORMER_LAYERS
from vlm_compress.config import ConfigError, LlavaConfig, TextConfig, VisionConfig, check
from vlm_compress.eval.peer_cost import peer_flops

BYTES_PER_VALUE = {'float32': 4, 'bfloat16': 2}

# EfficientNet-Lite0: (expansion, kernel, stride, channels, blocks) per stage;
# the stem is a 3 x 3 convolution of stride 2 to 32 channels.
_LITE0_STAGES = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2),
                 (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
                 (6, 3, 1, 320, 1))
_LITE0_FEATURE_STAGES = 5  # Up to the last map of stride 16, 112 channels.


@dataclasses.dataclass(frozen=True)
class PrefillCost:
  """FLOPs of one prefill, a column per part; floats or float[...] arrays.

  Attributes:
    vision: vision tower, of all images.
    projector: projector, of all images.
    resampler: pooling or Q-Former of a baseline, as given by the caller.
    decoder: all decoder layers, query-key pairs that are needed.
    decoder_dense: the same with every attention computed as a full rectangle
      and masked afterwards, as an implementation without a flash-type kernel
      does.
    selector: what choosing the tokens costs (modules, or in front of all).
    lm_head: logits of one position.
  """
  vision: float
  projector: float
  resampler: float
  decoder: np.ndarray | float
  decoder_dense: np.ndarray | float
  selector: np.ndarray | float
  lm_head: float

  @property
  def prefill(self) -> np.ndarray | float:
    """Language model alone: decoder, selector and LM head."""
    return self.decoder + self.selector + self.lm_head

  @property
  def total(self) -> np.ndarray | float:
    """Picture to first logits."""
    return self.vision + self.projector + self.resampler + self.prefill

  @property
  def total_dense(self) -> np.ndarray | float:
    """`total` with dense attention."""
    return self.total - self.decoder + self.decoder_dense


# ---------------------------------------------------------------- decoder


def causal_pairs(num_queries: np.ndarray, num_cached: np.ndarray = 0
                 ) -> np.ndarray:
  """Query-key pairs of causal queries behind keys that all of them see."""
  num_queries = np.asarray(num_queries, np.float64)
  return num_queries * (num_queries + 1) / 2 + num_queries * num_cached


def dense_pairs(num_queries: np.ndarray, num_cached: np.ndarray = 0
                ) -> np.ndarray:
  """Query-key pairs of the full rectangle."""
  num_queries = np.asarray(num_queries, np.float64)
  return num_queries * (num_queries + num_cached)


def layer_flops(text: TextConfig, num_tokens: np.ndarray,
                num_pairs: np.ndarray) -> np.ndarray:
  """One decoder layer: 2nD(NH + 2KH) + 2nNHD + 6nDF + 4NH pairs.

  Args:
    text: decoder sizes.
    num_tokens: float[...], n.
    num_pairs: float[...], query-key pairs.

  Returns:
    float[...] FLOPs.
  """
  query_size = text.num_attention_heads * text.size_per_head
  kv_size = text.num_key_value_heads * text.size_per_head
  per_token = (2 * text.hidden_size * (query_size + 2 * kv_size) +
               2 * query_size * text.hidden_size +
               6 * text.hidden_size * text.intermediate_size)
  return np.asarray(num_tokens, np.float64) * per_token + (
      4.0 * query_size * np.asarray(num_pairs, np.float64))


def decoder_flops(text: TextConfig, visual_tokens: np.ndarray,
                  text_tokens: np.ndarray, *, dense: bool = False
                  ) -> np.ndarray:
  """All decoder layers of a causal prefill.

  Args:
    text: decoder sizes.
    visual_tokens: float[..., M], visual tokens that ENTER each layer.
    text_tokens: float[...] or a number, text tokens; they pass every layer.
    dense: count the full n x n square instead of n (n + 1) / 2.

  Returns:
    float[...] FLOPs.
  """
  tokens = _per_layer(text, visual_tokens) + np.asarray(text_tokens)[..., None]
  pairs = dense_pairs(tokens) if dense else causal_pairs(tokens)
  return layer_flops(text, tokens, pairs).sum(-1)


def lm_head_flops(text: TextConfig, num_positions: int = 1) -> float:
  """2DV per position whose logits are needed: one at prefill."""
  return 2.0 * text.hidden_size * text.vocab_size * num_positions


def paper_multiply_adds(text: TextConfig,
                        tokens_per_layer: np.ndarray) -> np.ndarray:
  """The papers' count: multiply-adds, 4nD^2 + 2n^2D + 3nDF per layer.

  Only beside a figure of a paper.  Assumes K = N and NH = D, dense attention,
  no LM head.

  Args:
    text: decoder sizes.
    tokens_per_layer: float[..., M], tokens that enter each layer.  The papers
      count visual tokens only when they state a reduction.
  """
  n = _per_layer(text, tokens_per_layer)
  size, inner = text.hidden_size, text.intermediate_size
  return (4 * n * size ** 2 + 2 * n ** 2 * size + 3 * n * size * inner).sum(-1)


def kv_bytes(text: TextConfig, tokens_per_layer: np.ndarray,
             dtype: str = 'bfloat16') -> np.ndarray:
  """Bytes of the KV cache: sum over layers of 2KH x bytes x cached tokens.

  Args:
    text: decoder sizes.
    tokens_per_layer: float[..., M] cached tokens of each layer, or a number
      for all layers.
    dtype: of the cache.
  """
  check(dtype in BYTES_PER_VALUE,
        f'kv cache dtype={dtype!r}: use one of {sorted(BYTES_PER_VALUE)}')
  per_token = (2 * text.num_key_value_heads * text.size_per_head *
               BYTES_PER_VALUE[dtype])
  return _per_layer(text, tokens_per_layer).sum(-1) * per_token


# ------------------------------------------- vision, projector, selector


def clip_vit_flops(vision: VisionConfig, num_layers: int | None = None
                   ) -> float:
  """CLIP ViT on one image: patch embedding and layers of full attention.

  Args:
    vision: tower sizes.
    num_layers: layers that run; None for all.
  """
  layers = vision.num_hidden_layers if num_layers is None else num_layers
  size, patches = vision.hidden_size, vision.grid_size ** 2
  n = patches + 1  # Class token.
  layer = (8 * n * size ** 2 + 4 * n ** 2 * size +
           4 * n * size * vision.intermediate_size)
  return float(2 * patches * 3 * vision.patch_size ** 2 * size +
               layers * layer)


def efficientnet_lite0_flops(image_size: int,
                             num_stages: int = _LITE0_FEATURE_STAGES) -> float:
  """Convolutions of EfficientNet-Lite0 up to the stride-16 features.

  Args:
    image_size: side of the input in pixels.
    num_stages: stages that run, of 7.
  """
  side = -(-image_size // 2)
  madds = side ** 2 * 9 * 3 * 32
  channels = 32
  for expansion, kernel, stride, out, blocks in _LITE0_STAGES[:num_stages]:
    for block in range(blocks):
      inner = channels * expansion
      if expansion > 1:
        madds += side ** 2 * channels * inner
      if block == 0:
        side = -(-side // stride)
      madds += side ** 2 * inner * (kernel ** 2 + out)
      channels = out
  return 2.0 * madds


def vision_flops(config: LlavaConfig) -> float:
  """The vision tower on one image, up to the layer whose features are used."""
  vision, layer = config.vision, config.vision_feature_layer
  size = reduced_size(config)  # smaller with image downsampling
  if vision.model_type == 'efficientnet_lite0':
    return efficientnet_lite0_flops(size)
  vision = dataclasses.replace(vision, image_size=size)
  layers = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
  return clip_vit_flops(vision, layers)


def projector_flops(config: LlavaConfig) -> float:
  """Two-layer MLP, Dv -> D -> D, on all patches of one image.

  The baseline 'avg_pool_linear' pools before it, so it maps C tokens only.
  """
  pooled = config.resampler == 'avg_pool_linear'
  tokens = config.num_query_tokens if pooled else config.num_patches
  size = config.text.hidden_size
  return 2.0 * tokens * size * (config.vision.hidden_size + size)


def resampler_flops(config: LlavaConfig) -> float:
  """What a baseline adds to shorten one image's tokens; 0 without one.

  The linear layer behind average pooling is D x D on C tokens.  A Q-Former
  layer is self-attention among C queries, cross-attention to P tokens and an
  MLP of width 4D.  Averaging itself is not counted, nor are VisionZip's
  ranking and merging, nor resizing a picture.
  """
  size, tokens = config.text.hidden_size, config.num_query_tokens
  if config.resampler == 'avg_pool_linear':
    return 2.0 * tokens * size ** 2
  if config.resampler != 'qformer':
    return 0.0
  patches = config.num_patches
  own = 8 * tokens * size ** 2 + 4 * tokens ** 2 * size
  cross = (4 * tokens + 4 * patches) * size ** 2 + 4 * tokens * patches * size
  return float(NUM_QFORMER_LAYERS * (own + cross + 16 * tokens * size ** 2))


def selector_flops(config: LlavaConfig, visual_tokens: np.ndarray,
                   prompt_tokens: np.ndarray, num_images: int = 1) -> np.ndarray:
  """What the modules between the layers add, summed over modules.

  Scores: the query-key products of the layer just run, computed anew and
  reduced to column sums: 2NH (n (n + 1) / 2 + n T) for n visual keys, visual
  queries and T prompt queries; with several images also between them, as it
  is computed.  Thresholds, for each image: Linear(2P, h) and two
  Linear(h, 1).  A 'fixed' selector has no thresholds; 'random' and 'uniform'
  look at nothing.  Peers: `peer_cost.peer_flops`.

  Args:
    config: with or without `atp`.
    visual_tokens: float[..., M], visual tokens of all images that enter each
      layer.
    prompt_tokens: float[...] or a number, prompt text after the image; only
      one of them is a query where atp.cross_queries='last'.
    num_images: images of the row.

  Returns:
    float[...] FLOPs; zeros without atp.
  """
  visual = _per_layer(config.text, visual_tokens)
  atp = config.atp
  if atp is None or atp.selector in ('random', 'uniform'):
    return np.zeros(visual.shape[:-1])
  if atp.selector not in ('adaptive', 'fixed'):
    return peer_flops(config, visual, prompt_tokens)
  if atp.cross_queries == 'last':
    prompt_tokens = np.minimum(prompt_tokens, 1)
  n = visual[..., np.array(atp.prune_after) - 1]
  pairs = causal_pairs(n, np.asarray(prompt_tokens)[..., None])
  text = config.text
  scores = 2.0 * text.num_attention_heads * text.size_per_head * pairs.sum(-1)
  if atp.selector == 'fixed':
    return scores
  width = atp.threshold_hidden_size
  thresholds = 2 * width * (2 * config.num_visual_tokens + 2)
  return scores + num_images * thresholds * len(atp.prune_after)


# ------------------------------------------------------------ whole models


def prefill_cost(config: LlavaConfig, visual_tokens: np.ndarray,
                 text_tokens: np.ndarray, *,
                 prompt_tokens: np.ndarray | None = None, num_images: int = 1,
                 resampler_flops: float = 0.0) -> PrefillCost:
  """A plain, ATP or resampled model reading pictures and prompt.

  Args:
    config: the model.
    visual_tokens: float[..., M], visual tokens of all images that enter each
      layer.
    text_tokens: float[...] or a number, text tokens, BOS included.
    prompt_tokens: of them, after the image (cross-modality score); None takes
      all.
    num_images: images of the row.
    resampler_flops: of one image, as given.
  """
  prompt = text_tokens if prompt_tokens is None else prompt_tokens
  text = config.text
  return PrefillCost(
      vision=num_images * vision_flops(config),
      projector=num_images * projector_flops(config),
      resampler=num_images * resampler_flops,
      decoder=decoder_flops(text, visual_tokens, text_tokens),
      decoder_dense=decoder_flops(text, visual_tokens, text_tokens,
                                  dense=True),
      selector=selector_flops(config, visual_tokens, prompt, num_images),
      lm_head=lm_head_flops(text))


def voco_cost(config: LlavaConfig, text_tokens: np.ndarray, *,
              num_voco_tokens: int | None = None, prefix_tokens: int = 2,
              num_images: int = 1, cached: bool = False,
              keys_only: bool = False) -> PrefillCost:
  """VoCo-LLaMA in two passes: compress every image, then read.

  Compress: a causal pass over prefix, P visual and C VoCo tokens, per image.
  Read: the text, causal, behind the keys and values of the VoCo tokens (and
  of the prefix under `text_sees_prefix`).  With a cache of VoCo keys and
  values only the read remains.

  Args:
    config: a model with `voco`.
    text_tokens: float[...] or a number, text after the VoCo tokens.
    num_voco_tokens: C of this row; None takes the trained one.
    prefix_tokens: BOS and newline that are compressed with each image.
    num_images: images of the row, all in front of the text.
    cached: the images were compressed earlier.
    keys_only: the last layer of compressing is its key and value projections,
      as in serving: nobody reads what else it computes.
  """
  if config.voco is None:
    raise ConfigError('voco_cost needs a config with voco; it is None')
  voco = num_voco_tokens or config.voco.num_voco_tokens
  text, layers = config.text, config.text.num_hidden_layers
  seen = voco + (prefix_tokens if config.voco.text_sees_prefix else 0)
  compress = prefix_tokens + config.num_visual_tokens + voco
  images = 0 if cached else num_images

  def passes(pairs):
    read = layer_flops(text, text_tokens,
                       pairs(text_tokens, seen * num_images))
    one = layer_flops(text, compress, pairs(compress))
    last = one if not keys_only else 4.0 * compress * (
        text.hidden_size * text.num_key_value_heads * text.size_per_head)
    return layers * read + images * ((layers - 1) * one + last)

  return PrefillCost(
      vision=images * vision_flops(config),
      projector=images * projector_flops(config), resampler=0.0,
      decoder=passes(causal_pairs), decoder_dense=passes(dense_pairs),
      selector=0.0, lm_head=lm_head_flops(text))


def _per_layer(text: TextConfig, tokens: np.ndarray) -> np.ndarray:
  """tokens as float[..., M]; a number counts for every layer."""
  tokens = np.asarray(tokens, np.float64)
  if tokens.ndim == 0:
    return np.full(text.num_hidden_layers, tokens)
  if tokens.shape[-1] != text.num_hidden_layers:
    raise ValueError(
        f'tokens per layer have {tokens.shape[-1]} entries in the last axis; '
        f'text.num_hidden_layers={text.num_hidden_layers} are needed')
  return tokens
