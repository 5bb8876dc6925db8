"""The CLIP vision transformer (arXiv 2103.00020), up to a hidden layer.

LLaVA-1.5 reads the output of the last layer but one, so the tower ends there:
neither the layers behind it nor CLIP's `post_layernorm` take part.

A smaller picture has fewer patches and position embeddings interpolated to
them; with `look`, the tower also says what its class token attends to.

Parameters have the names of Hugging Face's `CLIPVisionModel` with '/', and one
leading axis for the layers, which are scanned.  Matrices are `kernel` (input
first), tables `embedding`; norms and vectors keep their names.  All
`num_hidden_layers` layers have parameters, those that do not run too, so that
a checkpoint converts there and back without loss (13 M of the 300 M
parameters of ViT-L).  `post_layernorm` is not created: no hidden state that
`vision_feature_layer` can name passes through it.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_compress.compress.baselines.downsample import reduced_positions
from vlm_compress.config import VisionConfig, check
from vlm_compress.nn.attention import attention, attention_probs
from vlm_compress.nn.linear import linear
from vlm_compress.sharding import constrain

SELECT_STRATEGIES = ('default', 'full')
INIT_STD = 0.02  # of drawn weights; real towers are loaded, not trained


def num_layers_run(config: VisionConfig, feature_layer: int) -> int:
  """How many layers lie in front of hidden state `feature_layer`.

  Hidden states are numbered as in Hugging Face: 0 is what enters the first
  layer, i is the output of layer i, and -1 is the output of the last one.

  Raises:
    ConfigError: there is no such hidden state.
  """
  count = config.num_hidden_layers + 1
  check(-count <= feature_layer < count,
        f'vision_feature_layer={feature_layer}: a tower of '
        f'{config.num_hidden_layers} layers has the hidden states '
        f'{-count}..{count - 1}')
  return feature_layer % count


def activation(x: jax.Array, name: str) -> jax.Array:
  """'quick_gelu', x * sigmoid(1.702 x), or 'gelu' in its exact erf form."""
  if name == 'quick_gelu':
    return x * jax.nn.sigmoid(1.702 * x)
  return jax.nn.gelu(x, approximate=False)


class LayerNorm(nn.Module):
  """Layer norm (arXiv 1607.06450), computed in float32.

  Attributes:
    epsilon: added to the variance.
    param_dtype: dtype of weight and bias.
  """
  epsilon: float
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float[..., D] -> float[..., D] in x's dtype."""
    def vector(name, init):
      init = nn.with_logical_partitioning(init, ('act_embed',))
      value = self.param(name, init, (x.shape[-1],), self.param_dtype)
      return value.astype(jnp.float32)
    weight = vector('weight', nn.initializers.ones)
    bias = vector('bias', nn.initializers.zeros)
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + self.epsilon)
    return (normed * weight + bias).astype(x.dtype)


class Embeddings(nn.Module):
  """Patches, a class token in front of them, and learned positions."""
  config: VisionConfig
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """float[B, S, S, 3] -> float[B, 1 + (S / patch_size)**2, D], row-major."""
    config = self.config
    patch, grid, width = config.patch_size, config.grid_size, config.hidden_size
    class_embedding = self.param(
        'class_embedding',
        nn.with_logical_partitioning(nn.initializers.normal(INIT_STD),
                                     ('act_embed',)),
        (width,), self.param_dtype)
    batch = pixels.shape[0]
    patches = PatchEmbedding(patch, width, self.dtype, self.param_dtype,
                             name='patch_embedding')(pixels)
    first = jnp.broadcast_to(class_embedding.astype(self.dtype),
                             (batch, 1, width))
    positions = nn.Embed(
        grid ** 2 + 1, width, dtype=self.dtype, param_dtype=self.param_dtype,
        embedding_init=nn.with_logical_partitioning(
            nn.initializers.normal(INIT_STD), (None, 'act_embed')),
        name='position_embedding')(jnp.arange(grid ** 2 + 1))
    if pixels.shape[1] < config.image_size:
      positions = reduced_positions(positions, pixels.shape[1] // patch)
    return jnp.concatenate([first, patches], axis=1) + positions


class PatchEmbedding(nn.Module):
  """A linear map of each square of pixels, a convolution without overlap."""
  patch_size: int
  features: int
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """float[B, S, S, 3] -> float[B, (S / patch_size)**2, features]."""
    size, (batch, side) = self.patch_size, pixels.shape[:2]
    kernel = self.param(
        'kernel',
        nn.with_logical_partitioning(nn.initializers.normal(INIT_STD),
                                     (None, None, None, 'embed')),
        (size, size, 3, self.features), self.param_dtype)
    grid = side // size
    squares = pixels.astype(self.dtype)
    squares = squares.reshape(batch, grid, size, grid, size, 3)
    x = jnp.einsum('brxcyk,xykd->brcd', squares, kernel.astype(self.dtype))
    return x.reshape(batch, grid * grid, self.features)


class Look(NamedTuple):
  """What attention of a layer shows.

  Attributes:
    class_attention: float32[B, P], from the class token to each patch, mean
      over heads.
    keys: float32[B, P, H], of the patches, mean over heads.
  """
  class_attention: jax.Array
  keys: jax.Array


class SelfAttention(nn.Module):
  """Multi-head attention of every token to every token, with biases."""
  config: VisionConfig
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, Look]:
    """float[B, T, D] -> float[B, T, D], and what there is to see."""
    batch, length, width = x.shape
    num_heads = self.config.num_attention_heads
    def project(name, axes, inputs):
      return linear(width, axes, name=name, std=INIT_STD, use_bias=True,
                    dtype=self.dtype, param_dtype=self.param_dtype)(inputs)
    q, k, v = (
        project(name, ('embed', 'heads'), x).reshape(
            batch, length, num_heads, width // num_heads)
        for name in ('q_proj', 'k_proj', 'v_proj'))
    mask = jnp.ones((batch, length, length), bool)
    out = attention(q, k, v, mask).reshape(batch, length, width)
    look = Look(jnp.mean(attention_probs(q[:, :1], k, mask[:, :1]),
                         axis=(1, 2))[:, 0, 1:],
                jnp.mean(k[:, 1:].astype(jnp.float32), axis=2))
    return project('out_proj', ('heads', 'embed'), out), look


class Mlp(nn.Module):
  """Two linear maps with the activation of the config between them."""
  config: VisionConfig
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float[B, T, D] -> float[B, T, D]."""
    def project(name, features, axes, inputs):
      return linear(features, axes, name=name, std=INIT_STD, use_bias=True,
                    dtype=self.dtype, param_dtype=self.param_dtype)(inputs)
    hidden = project('fc1', self.config.intermediate_size, ('embed', 'mlp'), x)
    hidden = activation(hidden, self.config.hidden_act)
    return project('fc2', x.shape[-1], ('mlp', 'embed'), hidden)


class EncoderLayer(nn.Module):
  """A pre-norm transformer layer that can be passed by.

  Attributes:
    config: sizes.
    dtype, param_dtype: of activations and of parameters.
    look: also return what its attention shows.
  """
  config: VisionConfig
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  look: bool = False

  def setup(self):
    epsilon = self.config.layer_norm_eps
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    self.layer_norm1 = LayerNorm(epsilon, self.param_dtype)
    self.self_attn = SelfAttention(self.config, **types)
    self.layer_norm2 = LayerNorm(epsilon, self.param_dtype)
    self.mlp = Mlp(self.config, **types)

  def block(self, x: jax.Array) -> tuple[jax.Array, Look | None]:
    """float[B, T, D] -> float[B, T, D], and a Look if asked for."""
    attended, look = self.self_attn(self.layer_norm1(x))
    x = x + attended
    x = x + self.mlp(self.layer_norm2(x))
    x = constrain(x, 'batch', 'length', 'act_embed')
    return x, look if self.look else None

  def passed(self, x: jax.Array) -> tuple[jax.Array, Look | None]:
    """x, and zeros for a Look."""
    batch, length, width = x.shape
    head = width // self.config.num_attention_heads
    look = Look(jnp.zeros((batch, length - 1)), jnp.zeros((batch, length - 1, head)))
    return x, look if self.look else None

  def __call__(self, x: jax.Array, run: jax.Array
               ) -> tuple[jax.Array, Look | None]:
    """The layer's output where bool[] `run` holds, else x; and its Look.

    A layer that does not run costs no arithmetic: the branch is taken at run
    time, and the stacked parameters need not be copied to leave it out.
    """
    if self.is_initializing():  # branches may not create parameters
      done, look = self.block(x)
      return jnp.where(run, done, x), look
    return nn.cond(run, EncoderLayer.block, EncoderLayer.passed, self, x)


class ClipVisionTower(nn.Module):
  """Pixels to visual features.

  Attributes:
    config: sizes of the tower.
    feature_layer: hidden state to return, see `num_layers_run`.
    select_strategy: 'default' drops the class token, 'full' keeps it in front.
    dtype: of activations; norms and softmax compute in float32 regardless.
    param_dtype: of parameters as stored.
    look: return the class token in front and what the last layer shows, see
      `Look`, whatever the strategy.
  """
  config: VisionConfig
  feature_layer: int = -2
  select_strategy: str = 'default'
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32
  look: bool = False

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array | tuple[jax.Array, Look]:
    """Runs the tower.

    Args:
      pixels: float[B, S, S, 3], S the image size or a smaller multiple of the
        patch size, from `data.images.clip_normalize`.

    Returns:
      float[B, P, D], row-major over the grid; with `look` float[B, 1 + P, D]
      and the Look.

    Raises:
      ConfigError: pixels of another shape, or an unknown layer or strategy.
    """
    config, size = self.config, self.config.image_size
    side = pixels.shape[1] if pixels.ndim == 4 else 0
    check(0 < side <= size and side % config.patch_size == 0 and
          pixels.shape[2:] == (side, 3),
          f'pixels of shape {pixels.shape}: vision.image_size={size} needs '
          f'[B, {size}, {size}, 3], or fewer times vision.patch_size='
          f'{config.patch_size}')
    check(self.select_strategy in SELECT_STRATEGIES,
          f'vision_feature_select_strategy={self.select_strategy!r}: use one '
          f'of {SELECT_STRATEGIES}')
    num_run = num_layers_run(config, self.feature_layer)
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    x = Embeddings(config, **types, name='embeddings')(pixels)
    x = LayerNorm(config.layer_norm_eps, self.param_dtype,
                  name='pre_layrnorm')(x)
    x = constrain(x, 'batch', 'length', 'act_embed')
    layers = nn.scan(EncoderLayer, variable_axes={'params': 0},
                     split_rngs={'params': True},
                     length=config.num_hidden_layers,
                     metadata_params={nn.PARTITION_NAME: 'layers'})
    run = jnp.arange(config.num_hidden_layers) < num_run
    x, looks = layers(config, **types, look=self.look, name='layers')(x, run)
    if self.look:
      check(num_run > 0, f'vision_feature_layer={self.feature_layer}: in front '
            'of all layers there is no attention to look at')
      return x, jax.tree.map(lambda y: y[num_run - 1], looks)
    return x[:, 1:] if self.select_strategy == 'default' else x
