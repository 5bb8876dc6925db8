"""Frozen configurations of models and compression methods.

Field names are Hugging Face's where a field exists there.  Every field is
read by the code, and every constructor checks what it is given, so that an
impossible setting fails here, with the field and the remedy in the message,
and not inside a compiled program.
"""

from __future__ import annotations

import dataclasses
import math

from vlm_compress.config_atp import AtpConfig as AtpConfig
from vlm_compress.config_checks import ConfigError as ConfigError
from vlm_compress.config_checks import check as check
from vlm_compress.config_checks import check_positive
from vlm_compress.config_checks import check_whole as check_whole

VISION_TYPES = ('clip_vision_model', 'efficientnet_lite0')
RESAMPLERS = ('none', 'avg_pool', 'avg_pool_linear', 'qformer', 'downsample',
              'visionzip')
IMPLEMENTATIONS = ('auto', 'dense', 'jax', 'splash')  # of attention
DTYPES = ('float32', 'bfloat16')
PARAM_DTYPES = (*DTYPES, 'float16')
PROJECTIONS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj',
               'down_proj')  # of a decoder layer
REMAT_POLICIES = ('nothing_saveable', 'dots_saveable', 'dots_with_no_batch_dims_saveable')


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """A vision tower: CLIP ViT, or the EfficientNet-Lite0 stand-in.

  Attributes:
    model_type: 'clip_vision_model' or 'efficientnet_lite0'.
    image_size: side of the square input, in pixels.
    patch_size: pixels per visual token and side.
    hidden_size: feature size of a visual token.
    intermediate_size, num_hidden_layers, num_attention_heads,
      layer_norm_eps, hidden_act: of the ViT.  EfficientNet-Lite0 has a fixed
      architecture (patch_size 16, hidden_size 112) and does not have them.
  """
  model_type: str = 'clip_vision_model'
  image_size: int = 336
  patch_size: int = 14
  hidden_size: int = 1024
  intermediate_size: int = 4096
  num_hidden_layers: int = 24
  num_attention_heads: int = 16
  layer_norm_eps: float = 1e-5
  hidden_act: str = 'quick_gelu'

  def __post_init__(self):
    check(self.model_type in VISION_TYPES,
          f'vision.model_type={self.model_type!r} is unknown; '
          f'use one of {VISION_TYPES}')
    check_positive('vision', self, 'image_size', 'patch_size', 'hidden_size',
              'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
    check(self.image_size % self.patch_size == 0,
          f'vision.image_size={self.image_size} is no multiple of '
          f'vision.patch_size={self.patch_size}')
    check(self.hidden_act in ('quick_gelu', 'gelu'),
          f'vision.hidden_act={self.hidden_act!r}: use quick_gelu or gelu')
    if self.model_type == 'efficientnet_lite0':
      check((self.patch_size, self.hidden_size) == (16, 112),
            'efficientnet_lite0 gives 112 features per 16 px: set '
            'vision.patch_size=16 and vision.hidden_size=112')
    else:
      check(self.hidden_size % self.num_attention_heads == 0,
            f'vision.hidden_size={self.hidden_size} is no multiple of '
            f'vision.num_attention_heads={self.num_attention_heads}')

  @property
  def grid_size(self) -> int:
    """Visual tokens per side of the grid."""
    return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """A LLaMA-architecture decoder.

  Attributes:
    head_dim: size of a head; 0 means hidden_size // num_attention_heads, and
      so does that very number.  Code reads size_per_head.
    attention_bias: q, k, v projections carry a bias.
    initializer_range: std of freshly drawn weights.
    max_position_embeddings: longest row in tokens, visual tokens included.
  """
  vocab_size: int = 32000
  hidden_size: int = 4096
  intermediate_size: int = 11008
  num_hidden_layers: int = 32
  num_attention_heads: int = 32
  num_key_value_heads: int = 32
  head_dim: int = 0
  rms_norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  attention_bias: bool = False
  tie_word_embeddings: bool = False
  max_position_embeddings: int = 4096
  initializer_range: float = 0.02

  def __post_init__(self):
    check_positive('text', self, 'vocab_size', 'hidden_size', 'intermediate_size',
              'num_hidden_layers', 'num_attention_heads',
              'num_key_value_heads', 'rope_theta', 'max_position_embeddings')
    derived, rest = divmod(self.hidden_size, self.num_attention_heads)
    check(self.head_dim != 0 or rest == 0,
          f'text.hidden_size={self.hidden_size} is no multiple of '
          f'text.num_attention_heads={self.num_attention_heads}; '
          'set text.head_dim')
    if self.head_dim == derived and rest == 0:  # follows a new hidden_size
      object.__setattr__(self, 'head_dim', 0)
    check(self.size_per_head > 0 and self.size_per_head % 2 == 0,
          f'text.head_dim={self.size_per_head}: RoPE rotates pairs, so it must '
          'be even and positive')
    check(self.num_attention_heads % self.num_key_value_heads == 0,
          f'text.num_attention_heads={self.num_attention_heads} is no multiple '
          f'of text.num_key_value_heads={self.num_key_value_heads}')

  @property
  def size_per_head(self) -> int:
    """H: numbers per head of queries, keys and values."""
    return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True)
class VocoConfig:
  """VoCo-LLaMA (arXiv 2406.12275).

  Attributes:
    num_voco_tokens: C, VoCo tokens per image that the model is trained with.
      A row may carry fewer (elastic inference).
    distinct_rows: one embedding row per VoCo token (ours) instead of one row
      shared by all (the released code).
    text_sees_prefix: text may also attend to BOS and the newline in front of
      the VoCo tokens (the paper's Eq. 3); the released code hides them.
    distill_weight: weight of the KL to the teacher; 0 is plain CE.
  """
  num_voco_tokens: int = 1
  distinct_rows: bool = False
  text_sees_prefix: bool = False
  distill_weight: float = 0.0

  def __post_init__(self):
    check(self.num_voco_tokens >= 1, f'voco.num_voco_tokens={self.num_voco_tokens}: at least 1')
    check(self.distill_weight >= 0.0,
          f'voco.distill_weight={self.distill_weight}: not negative')


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters on projections of the decoder (arXiv 2106.09685).

  y = x W + alpha / rank (x A) B, with A of in x rank, B of rank x out.  The
  paper's dropout in front of A is left out: training is a pure function of
  parameters and batch.  Defaults are those of LLaVA-1.5's LoRA recipe.

  Attributes:
    rank: of the update; alpha: its scale is alpha / rank.
    targets: projections that have adapters, in every layer.
  """
  rank: int = 128
  alpha: float = 256.0
  targets: tuple[str, ...] = PROJECTIONS

  def __post_init__(self):
    check_positive('lora', self, 'rank', 'alpha')
    unknown = [name for name in self.targets if name not in PROJECTIONS]
    check(len(self.targets) > 0 and not unknown, f'lora.targets={self.targets}: '
          f'one or more of {PROJECTIONS}')

  @property
  def scale(self) -> float:
    """What (x A) B is multiplied with."""
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
  """A LLaVA-1.5-family model, with at most one compression method.

  Attributes:
    vision_feature_layer: which hidden state of the ViT feeds the projector.
    vision_feature_select_strategy: 'default' drops the class token, 'full'
      keeps it.
    projector_hidden_act: 'gelu' is the exact erf form.
    image_token_index, voco_token_index: placeholder ids in token ids.
    voco, atp: the compression method, or None.
    lora: adapters of the decoder, or None; beside any method.
    resampler: baselines that shorten the visual sequence before the decoder,
      to num_query_tokens: 'avg_pool', 'avg_pool_linear' or 'qformer' behind
      the tower; 'downsample' in front of it; 'visionzip' at its end.
    num_query_tokens: visual tokens after the resampler; 0 without one.
    dtype: of activations; param_dtype: of parameters as stored.
    remat: recompute each decoder layer in the backward pass, but for what
      remat_policy keeps; a name of jax.checkpoint_policies.
    attention_implementation: 'auto' picks by backend; or 'dense', 'jax' or
      'splash' wherever it can do what is asked, see nn/kernels.py.
  """
  vision: VisionConfig = VisionConfig()
  text: TextConfig = TextConfig()
  vision_feature_layer: int = -2
  vision_feature_select_strategy: str = 'default'
  projector_hidden_act: str = 'gelu'
  image_token_index: int = -200
  voco_token_index: int = 32000
  voco: VocoConfig | None = None
  atp: AtpConfig | None = None
  lora: LoraConfig | None = None
  resampler: str = 'none'
  num_query_tokens: int = 0
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  remat: bool = False
  remat_policy: str = 'nothing_saveable'
  attention_implementation: str = 'auto'

  def __post_init__(self):
    check(self.attention_implementation in IMPLEMENTATIONS,
          f'attention_implementation: use one of {IMPLEMENTATIONS}')
    check(self.resampler in RESAMPLERS, f'resampler={self.resampler!r}: use one of {RESAMPLERS}')
    check((self.num_query_tokens > 0) if self.resampler != 'none' else
          (self.num_query_tokens == 0),
          'num_query_tokens must be positive with a resampler and 0 without')
    if self.resampler in ('downsample', 'visionzip'):
      _check_short_tower(self)
    check(self.voco is None or self.atp is None,
          'voco and atp are both set: a model has one compression method')
    check(self.resampler == 'none' or self.atp is None,
          'atp needs the full grid of visual tokens: set resampler="none"')
    strategy = self.vision_feature_select_strategy
    check(strategy in ('default', 'full'), 'vision_feature_select_strategy: use default or full')
    check(strategy == 'default' or
          (self.vision.model_type == 'clip_vision_model' and
           self.atp is None and self.resampler == 'none'),
          'vision_feature_select_strategy="full" keeps the class token, which '
          'has no place on the grid: only for CLIP without atp or resampler')
    check(self.projector_hidden_act in ('gelu', 'gelu_tanh'), 'projector_hidden_act='
          f'{self.projector_hidden_act!r}: use gelu (exact) or gelu_tanh')
    voco = self.voco_token_index
    check(self.voco is None or voco != self.image_token_index and
          not 0 <= voco < self.text.vocab_size, f'voco_token_index={voco} is '
          'the id of a word or of an image; use one behind the vocabulary')
    check(self.remat_policy in REMAT_POLICIES, f'remat_policy: use one of {REMAT_POLICIES}')
    check(self.dtype in DTYPES, f'dtype: use one of {DTYPES}')
    check(self.param_dtype in PARAM_DTYPES, f'param_dtype: use one of {PARAM_DTYPES}')
    if self.atp is not None:
      check_atp(self)

  @property
  def num_patches(self) -> int:
    """Visual tokens that leave the vision tower for one image."""
    if self.resampler in ('downsample', 'visionzip'):
      return self.num_query_tokens
    extra = int(self.vision_feature_select_strategy == 'full')
    return self.vision.grid_size ** 2 + extra

  @property
  def num_visual_tokens(self) -> int:
    """P: visual tokens of one image that enter the decoder."""
    return self.num_query_tokens or self.num_patches


def _check_short_tower(config: LlavaConfig) -> None:
  """Raises ConfigError where a tower cannot give so few visual tokens."""
  count, side = config.num_query_tokens, config.vision.grid_size
  check(count <= side ** 2, f'num_query_tokens={count} exceed the {side ** 2} '
        'patches of a picture')
  if config.resampler == 'downsample':
    check(math.isqrt(count) ** 2 == count, f'num_query_tokens={count}: a smaller '
          'picture has a square grid of patches; use 1, 4, 9, 16, ...')
  else:
    check(config.vision.model_type == 'clip_vision_model', 'resampler="visionzip"'
          ' ranks by the attention of a class token: vision.model_type='
          f'{config.vision.model_type!r} has none; use a CLIP tower')
    check(count >= 2, f'num_query_tokens={count}: VisionZip keeps the class token '
          'and at least one patch; use 2 or more')


def token_floor(config: LlavaConfig) -> float:
  """Lowest layer-average of visual tokens that a placement can reach.

  All P tokens enter every layer up to the first module, and at least one
  token enters every later layer (ATP-LLaVA averages over all layers).
  """
  num_layers = config.text.num_hidden_layers
  first = config.atp.prune_after[0]
  return (first * config.num_visual_tokens + (num_layers - first)) / num_layers


def check_atp(config: LlavaConfig) -> None:
  """Raises ConfigError for an ATP placement or budget that cannot work."""
  atp, num_layers = config.atp, config.text.num_hidden_layers
  check(atp.prune_after[-1] < num_layers,
        f'atp.prune_after={atp.prune_after}: the model has {num_layers} '
        f'layers, so the last module can sit after layer {num_layers - 1}')
  for name in ('fixed_counts', 'capacities'):
    counts = getattr(atp, name)
    check(all(c <= config.num_visual_tokens for c in counts), f'atp.{name}='
          f'{counts} exceed the {config.num_visual_tokens} visual tokens of an image')
  if atp.selector == 'adaptive':
    floor = token_floor(config)
    check(floor <= atp.target_tokens <= config.num_visual_tokens,
          f'atp.target_tokens={atp.target_tokens:g} cannot be reached: with '
          f'atp.prune_after={atp.prune_after} of {num_layers} layers the '
          f'layer average lies between the floor {floor:g} and '
          f'{config.num_visual_tokens}; raise the target or prune earlier')
