"""Average pooling of the grid of visual tokens to fewer tokens.

The floor that needs no parameters, and with a linear layer behind it the
"average pooling + linear" baseline of VoCo-LLaMA's Table 1.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def pooled_grid(num_tokens: int) -> tuple[int, int]:
  """Rows and columns, as square as num_tokens allows: 8 -> (2, 4)."""
  rows = max(r for r in range(1, math.isqrt(num_tokens) + 1)
             if num_tokens % r == 0)
  return rows, num_tokens // rows


def pooling_matrix(size: int, num_cells: int) -> np.ndarray:
  """float32[num_cells, size]: exact area averages of a line of tokens.

  A token that straddles two cells counts in both by its share, so every
  token has the same total weight whatever the sizes.
  """
  edges = np.arange(num_cells + 1) * size / num_cells
  left, right = edges[:-1, None], edges[1:, None]
  cell = np.arange(size)[None, :]
  overlap = np.clip(np.minimum(right, cell + 1) - np.maximum(left, cell), 0, 1)
  return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)


def average_pool(tokens: jax.Array, num_tokens: int) -> jax.Array:
  """Averages a square grid over num_tokens rectangles.

  Args:
    tokens: float[..., P, D], P a square number, row-major.
    num_tokens: tokens afterwards.

  Returns:
    float[..., num_tokens, D].
  """
  *lead, P, D = tokens.shape
  side = math.isqrt(P)
  rows, cols = pooled_grid(num_tokens)
  grid = tokens.reshape(*lead, side, side, D)
  pooled = jnp.einsum('rh,cw,...hwd->...rcd', pooling_matrix(side, rows),
                      pooling_matrix(side, cols), grid.astype(jnp.float32))
  return pooled.reshape(*lead, num_tokens, D).astype(tokens.dtype)
