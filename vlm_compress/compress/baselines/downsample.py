"""Image downsampling: a smaller picture has fewer patches.

The floor that saves everywhere, in the tower too (ours).  The picture is
reduced to g x g patches in front of the tower, which then gives g^2 visual
tokens.  CLIP has learned position embeddings of its full grid: they are
interpolated to the smaller one, the class token's stays.  EfficientNet is a
convolution and reads any size.

Pixels and position embeddings are resized linearly with antialiasing.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from vlm_compress.config import LlavaConfig


def reduced_size(config: LlavaConfig) -> int:
  """Side of the picture, in pixels, that the tower of a config reads."""
  if config.resampler != 'downsample':
    return config.vision.image_size
  return math.isqrt(config.num_query_tokens) * config.vision.patch_size


def reduced_pixels(pixels: jax.Array, size: int) -> jax.Array:
  """Pictures with another side.

  Args:
    pixels: [..., S, S, 3], uint8 or float.
    size: side afterwards, at most S.

  Returns:
    [..., size, size, 3] of the same type; uint8 is rounded.
  """
  if size == pixels.shape[-3]:
    return pixels
  out = jax.image.resize(jnp.asarray(pixels, jnp.float32),
                         (*pixels.shape[:-3], size, size, 3), 'linear')
  if pixels.dtype == jnp.uint8:
    out = jnp.clip(jnp.round(out), 0, 255)
  return out.astype(pixels.dtype)


def reduced_positions(table: jax.Array, side: int) -> jax.Array:
  """Position embeddings of a smaller grid.

  Args:
    table: float[1 + g * g, D], class token first.
    side: of the smaller grid.

  Returns:
    float[1 + side * side, D].
  """
  full, width = round((table.shape[0] - 1) ** 0.5), table.shape[1]
  grid = table[1:].astype(jnp.float32).reshape(full, full, width)
  grid = jax.image.resize(grid, (side, side, width), 'linear')
  return jnp.concatenate([table[:1], grid.reshape(-1, width).astype(table.dtype)])
