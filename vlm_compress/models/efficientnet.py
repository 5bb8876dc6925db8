"""EfficientNet-Lite0 as a frozen vision tower: 112 features per 16 x 16 pixels.

Why it is here: it is the only image encoder with real pretrained weights that
comes inside a Python package, so a laptop can train a VLM on top of real
visual features without any download from a model hub.  At 384 pixels it gives
24 x 24 visual tokens, the grid of LLaVA-1.5; at 128 pixels 8 x 8.

Architecture: EfficientNet (Tan and Le, arXiv 1905.11946) in its Lite form: no
squeeze-and-excitation, ReLU6, stem and head not scaled.  Weights are never
trained here, so batch norm is in inference mode and folded into the kernels.

A depthwise convolution is written as k * k shifted multiply-adds, because
XLA's grouped convolution on CPU is an order of magnitude slower.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlm_compress.config import ConfigError

# (kernel_size, stride, expand_ratio, features) of the 16 blocks.
BLOCKS: tuple[tuple[int, int, int, int], ...] = (
    (3, 1, 1, 16),
    (3, 2, 6, 24), (3, 1, 6, 24),
    (5, 2, 6, 40), (5, 1, 6, 40),
    (3, 2, 6, 80), (3, 1, 6, 80), (3, 1, 6, 80),
    (5, 1, 6, 112), (5, 1, 6, 112), (5, 1, 6, 112),
    (5, 2, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192),
    (3, 1, 6, 320),
)
STEM_FEATURES = 32
HEAD_FEATURES = 1280
NUM_CLASSES = 1000
FEATURE_BLOCK = 10  # the last block of stride 16
FEATURE_STRIDE = 16  # pixels per visual token and side
NORM_EPS = 1e-3


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
  """Zeros before and after one axis so that the output has ceil(size/stride).

  The surplus zero goes to the end, as the weights were trained.
  """
  out = -(-size // stride)
  total = max((out - 1) * stride + kernel_size - size, 0)
  return total // 2, total - total // 2


def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Depthwise convolution as k * k shifted multiply-adds, 'same' padding.

  Args:
    x: float[B, H, W, C].
    kernel: float[k, k, C].
    stride: of both axes, in pixels.

  Returns:
    float[B, ceil(H / stride), ceil(W / stride), C].
  """
  size = kernel.shape[0]
  _, height, width, _ = x.shape
  out_height, out_width = -(-height // stride), -(-width // stride)
  x = jnp.pad(x, ((0, 0), same_padding(height, size, stride),
                  same_padding(width, size, stride), (0, 0)))
  total = 0.0
  for row in range(size):
    for column in range(size):
      shifted = x[:, row:row + (out_height - 1) * stride + 1:stride,
                  column:column + (out_width - 1) * stride + 1:stride]
      total = total + shifted * kernel[row, column]
  return total


class ConvNorm(nn.Module):
  """Convolution without bias, batch norm with fixed statistics, ReLU6.

  Attributes:
    kind: 'dense', 'pointwise' (1 x 1) or 'depthwise'.
    features: channels that leave; a depthwise layer keeps those it gets.
    kernel_size: side of the kernel in pixels.
    stride: in pixels.
    relu6: apply ReLU6; the last convolution of a block is linear.
  """
  kind: str
  features: int
  kernel_size: int = 1
  stride: int = 1
  relu6: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float[B, H, W, C] -> float[B, H', W', features]."""
    size, channels = self.kernel_size, x.shape[-1]
    shape = {'dense': (size, size, channels, self.features),
             'pointwise': (channels, self.features),
             'depthwise': (size, size, channels)}[self.kind]
    # Variance-preserving for the ReLU-like layers; only tests draw weights.
    fan_in = int(np.prod(shape[:-1]))
    kernel = self.param('kernel', nn.initializers.normal((2 / fan_in) ** 0.5),
                        shape)
    vector = (self.features,)
    scale = self.param('scale', nn.initializers.ones, vector)
    bias = self.param('bias', nn.initializers.zeros, vector)
    mean = self.param('mean', nn.initializers.zeros, vector)
    var = self.param('var', nn.initializers.ones, vector)
    factor = scale * jax.lax.rsqrt(var + NORM_EPS)
    kernel = kernel * factor  # the last axis is the output channel throughout
    if self.kind == 'dense':
      padding = [same_padding(s, size, self.stride) for s in x.shape[1:3]]
      x = jax.lax.conv_general_dilated(
          x, kernel, (self.stride, self.stride), padding,
          dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    elif self.kind == 'pointwise':
      x = x @ kernel
    else:
      x = depthwise_conv(x, kernel, self.stride)
    x = x + (bias - mean * factor)
    return jnp.clip(x, 0.0, 6.0) if self.relu6 else x


class InvertedBottleneck(nn.Module):
  """Expand 1 x 1, depthwise, project 1 x 1; residual where shapes agree.

  Attributes: the entries of `BLOCKS`.
  """
  kernel_size: int
  stride: int
  expand_ratio: int
  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float[B, H, W, C] -> float[B, H', W', features]."""
    inputs, expanded = x, x.shape[-1] * self.expand_ratio
    if self.expand_ratio > 1:
      x = ConvNorm('pointwise', expanded, name='expand')(x)
    x = ConvNorm('depthwise', expanded, self.kernel_size, self.stride,
                 name='depthwise')(x)
    x = ConvNorm('pointwise', self.features, relu6=False, name='project')(x)
    return x + inputs if x.shape == inputs.shape else x


class EfficientNetLite0(nn.Module):
  """The feature extractor, or with `with_head` the whole ImageNet classifier.

  Attributes:
    with_head: run all 16 blocks and the classifier.  Used to measure parity
      with the reference network; the visual tokens do not need it.  The
      parameter tree of the classifier contains that of the extractor.
  """
  with_head: bool = False

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Runs the network.

    Args:
      pixels: float[B, S, S, 3], already normalised to (x - 127) / 128.

    Returns:
      float[B, (S/16)**2, 112], row-major over the grid, or with the head the
      logits float[B, 1000].
    """
    x = ConvNorm('dense', STEM_FEATURES, 3, 2, name='stem')(pixels)
    last = len(BLOCKS) - 1 if self.with_head else FEATURE_BLOCK
    for index, arguments in enumerate(BLOCKS[:last + 1]):
      x = InvertedBottleneck(*arguments, name=f'blocks_{index}')(x)
    if not self.with_head:
      return x.reshape(x.shape[0], -1, x.shape[-1])
    x = ConvNorm('pointwise', HEAD_FEATURES, name='head')(x)
    return nn.Dense(NUM_CLASSES, name='classifier')(x.mean(axis=(1, 2)))


def normalize(pixels: jax.Array) -> jax.Array:
  """uint8[...] -> float32[...] in the range the weights were trained with."""
  return (jnp.asarray(pixels, jnp.float32) - 127.0) / 128.0


@jax.jit
def _features(params: Any, pixels: jax.Array) -> jax.Array:
  return EfficientNetLite0().apply({'params': params}, normalize(pixels))


def extract_features(params: Any, pixels: jax.Array) -> jax.Array:
  """Visual tokens of a batch of pictures.

  Compiled once per (B, S); keep both constant over a data set.

  Args:
    params: tree of `EfficientNetLite0`, from
      `convert.efficientnet.load_efficientnet_lite0()`.
    pixels: uint8[B, S, S, 3], S a multiple of 16.

  Returns:
    float32[B, (S/16)**2, 112], row-major over the grid.

  Raises:
    ConfigError: for any other shape or type of `pixels`.
  """
  shape = tuple(pixels.shape)
  if (len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or
      shape[1] == 0 or shape[1] % FEATURE_STRIDE):
    raise ConfigError(
        f'pixels of shape {shape}: efficientnet_lite0 reads uint8[B, S, S, 3] '
        'with S a multiple of 16; set vision.image_size to one')
  if pixels.dtype != jnp.uint8:
    raise ConfigError(
        f'pixels of type {pixels.dtype}: efficientnet_lite0 reads uint8 and '
        'normalises by itself; pass data.images.efficientnet_pixels')
  return _features(params, pixels)
