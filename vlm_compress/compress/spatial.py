"""Spatial scores and uniform orders on the grid of visual tokens.

Spatial augmented pruning (ATP-LLaVA): a position's score says how sparse
a uniform sampling grid may be and still contain it, so cutting the scores at
a threshold chooses a uniform sampling rate.
"""

from __future__ import annotations

import functools

import numpy as np

from vlm_compress.config import check


def default_strides(grid_size: int) -> tuple[int, ...]:
  """A chain of nested strides: 24 -> (2, 4, 8, 24), 9 -> (3, 9)."""
  strides, stride, factor = [], 1, 2
  while stride < grid_size:
    rest = grid_size // stride
    while rest % factor:
      factor += 1
    stride *= factor
    strides.append(stride)
  return tuple(strides)


def grid_offsets(strides: tuple[int, ...]) -> tuple[int, ...]:
  """Offsets that nest the grids and centre them as well as nesting allows.

  A grid of stride s has rows offset, offset + s, ...; centred means offset
  (s - 1) / 2.  Every grid contains the next coarser one, so all offsets
  follow from the coarsest, which is chosen to make the sum of relative
  distances from the centre smallest (ours; odd ratios are exact).
  """
  def off_centre(coarsest):
    return sum(abs(coarsest % s - (s - 1) / 2) / s for s in strides)
  best = min(range(strides[-1]), key=lambda o: (off_centre(o), o))
  return tuple(best % s for s in strides)


@functools.cache
def spatial_scores(grid_size: int, strides: tuple[int, ...] = (),
                   sap_lambda: float = 3.0) -> np.ndarray:
  """Spatial score of every grid position (ATP-LLaVA).

  S_s(j) = max over grids g that contain j of 1 - lambda R_g, where R_g is the
  share of tokens in g; positions in no strided grid get 1 - lambda.

  Args:
    grid_size: tokens per side.
    strides: nested strides, each a divisor of the next; () for the default.
    sap_lambda: lambda; the default 3 is as others report it, not from the
      paper itself.

  Returns:
    float32[grid_size ** 2], row-major; not writable, shared between calls.

  Raises:
    ConfigError: strides that do not nest or do not divide the grid.
  """
  strides = strides or default_strides(grid_size)
  check(all(b % a == 0 and a < b for a, b in zip(strides, strides[1:])),
        f'atp.sap_strides={strides} do not nest: each must divide the next, '
        'or the kept count is not monotone in the threshold')
  check(all(1 < s <= grid_size and grid_size % s == 0 for s in strides),
        f'atp.sap_strides={strides} must divide the grid size {grid_size}')
  scores = np.full((grid_size, grid_size), 1.0 - sap_lambda, np.float32)
  for stride, offset in zip(strides, grid_offsets(strides)):
    rate = 1.0 / stride ** 2
    level = scores[offset::stride, offset::stride]
    np.maximum(level, np.float32(1.0 - sap_lambda * rate), out=level)
  scores.flags.writeable = False
  return scores.reshape(-1)


@functools.cache
def uniform_order(grid_size: int) -> np.ndarray:
  """Ranks such that any first n positions cover the grid evenly (ours).

  The nested sampling grids come first, from the sparsest to the densest, so
  that their sizes (16 of 64, 144 of 576) are exact uniform grids.  Inside a
  grid, and for the rest, farthest-point order: the position farthest from all
  earlier ones, ties to the one nearest the centre, then row-major.  The sets
  are nested, as cumulative pruning needs.

  Returns:
    int32[grid_size ** 2], rank of each position, 0 first.
  """
  rows, cols = np.divmod(np.arange(grid_size ** 2), grid_size)
  centre = (grid_size - 1) / 2
  to_centre = (rows - centre) ** 2 + (cols - centre) ** 2
  level = (np.zeros(1) if grid_size == 1
           else np.array(spatial_scores(grid_size), np.float64))
  nearest = np.full(grid_size ** 2, np.inf)
  ranks = np.zeros(grid_size ** 2, np.int32)
  for rank in range(grid_size ** 2):
    pick = np.lexsort((to_centre, -nearest, -level))[0]
    ranks[pick] = rank
    distance = (rows - rows[pick]) ** 2 + (cols - cols[pick]) ** 2
    nearest = np.minimum(nearest, distance)
    level[pick] = -np.inf
  ranks.flags.writeable = False
  return ranks
