"""Spatial scores: published values, the 9 x 9 figure, nesting, errors."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_compress.compress.spatial import (
    default_strides,
    grid_offsets,
    spatial_scores,
    uniform_order,
)
from vlm_compress.config import ConfigError

# Score 1 - 3 / s^2 and number of tokens at stride s of 24.
SCORE = {2: 0.25, 3: 0.6667, 4: 0.8125, 6: 0.9167, 8: 0.9531, 12: 0.9792,
         24: 0.9948}


@pytest.mark.parametrize('strides', [(2, 4, 8, 24), (3, 6, 12, 24)])
def test_values_on_24_x_24(strides):
  scores = spatial_scores(24, strides)
  assert scores.shape == (576,) and scores.dtype == np.float32
  counts = {}
  for stride in strides:
    kept = int((scores > SCORE[stride] - 2e-3).sum())
    assert kept == (24 // stride) ** 2, stride
    counts[stride] = kept
  values, found = np.unique(scores, return_counts=True)
  sizes = [576] + [counts[s] for s in strides] + [0]
  np.testing.assert_allclose(values, [-2.0] + [SCORE[s] for s in strides],
                             atol=1e-4)
  np.testing.assert_array_equal(found, -np.diff(sizes))


def test_24_default_chain():
  assert default_strides(24) == (2, 4, 8, 24)
  np.testing.assert_array_equal(spatial_scores(24),
                                spatial_scores(24, (2, 4, 8, 24)))


def test_9_x_9_figure():
  """Centre high, centred stride-3 lattice in the middle, the rest low."""
  scores = spatial_scores(9).reshape(9, 9)
  lattice = np.zeros((9, 9), bool)
  lattice[1::3, 1::3] = True
  centre = np.zeros((9, 9), bool)
  centre[4, 4] = True
  np.testing.assert_allclose(scores[centre], 1 - 3 / 81)
  np.testing.assert_allclose(scores[lattice & ~centre], 1 - 3 / 9)
  np.testing.assert_allclose(scores[~lattice], 1 - 3)
  np.testing.assert_array_equal(scores > 0.5, lattice)
  np.testing.assert_array_equal(scores > 0.9, centre)


def test_lambda_scales_the_rates():
  np.testing.assert_allclose(np.unique(spatial_scores(4, (2, 4), 2.0)),
                             [1 - 2.0, 1 - 2.0 / 4, 1 - 2.0 / 16])


@pytest.mark.parametrize('grid_size', [2, 3, 4, 6, 7, 8, 9, 12, 16, 24])
def test_kept_count_is_monotone_and_every_set_is_a_uniform_grid(grid_size):
  scores = spatial_scores(grid_size).reshape(grid_size, grid_size)
  strides = default_strides(grid_size)
  assert strides[-1] == grid_size
  assert all(b % a == 0 for a, b in zip(strides, strides[1:]))
  kept = [scores > theta for theta in np.linspace(0.0, 0.999, 200)]
  for more, less in zip(kept, kept[1:]):
    assert not (less & ~more).any()
  sizes = {(grid_size // s) ** 2 for s in strides} | {0}
  for mask in kept:
    assert int(mask.sum()) in sizes
    rows, cols = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    assert mask.sum() == len(rows) * len(cols)
    for line in (rows, cols):
      assert len(set(np.diff(line))) <= 1


def test_offsets_are_exactly_centred_for_odd_ratios():
  assert grid_offsets((3, 9, 27)) == (1, 4, 13)
  for strides in ((2, 4, 8, 24), (3, 6, 12, 24)):
    offsets = grid_offsets(strides)
    for stride, offset in zip(strides, offsets):
      assert 0 <= offset < stride
      assert offset % strides[0] == offsets[0]
      # off centre by at most half a stride of the finest grids
      assert abs(offset - (stride - 1) / 2) <= stride / 4


@pytest.mark.parametrize('strides,part', [
    ((2, 3), 'do not nest'), ((4, 2), 'do not nest'), ((2, 2), 'do not nest'),
    ((5,), 'must divide the grid size 24'), ((1, 2), 'must divide'),
    ((48,), 'must divide')])
def test_strides_that_cannot_work(strides, part):
  with pytest.raises(ConfigError, match=part):
    spatial_scores(24, strides)


def test_shared_array_is_not_writable():
  with pytest.raises(ValueError):
    spatial_scores(4)[0] = 1.0
  with pytest.raises(ValueError):
    uniform_order(4)[0] = 1


@pytest.mark.parametrize('grid_size', [3, 4, 8, 9, 24])
def test_uniform_order_holds_the_sampling_grids_and_spreads(grid_size):
  ranks = uniform_order(grid_size)
  assert sorted(ranks) == list(range(grid_size ** 2))
  scores = spatial_scores(grid_size)
  for stride in default_strides(grid_size):
    count = (grid_size // stride) ** 2
    lattice = scores >= np.float32(1 - 3 / stride ** 2)
    assert lattice.sum() == count
    np.testing.assert_array_equal(ranks < count, lattice)
    rows, cols = np.divmod(np.flatnonzero(ranks < count), grid_size)
    if count > 1:  # equal steps both ways
      assert set(np.diff(np.unique(rows))) == {stride}
      assert set(np.diff(np.unique(cols))) == {stride}
  half = grid_size / 2
  for count in range(4 if grid_size % 2 == 0 else 9, grid_size ** 2):
    points = np.stack(np.divmod(np.flatnonzero(ranks < count), grid_size), 1)
    assert len({(r < half, c < half) for r, c in points}) == 4, count


def test_uniform_order_is_farthest_point_inside_a_grid():
  # 2 x 2 lattice of stride 2 at offset 0 first, then the farthest corner
  order = np.argsort(uniform_order(4))
  assert set(order[:4]) == set(np.flatnonzero(
      spatial_scores(4) >= np.float32(0.25)))
  points = np.stack(np.divmod(order, 4), 1).astype(float)
  for count in range(4, 15):
    gap = np.linalg.norm(points[count:, None] - points[None, :count],
                         axis=-1).min(1)
    assert gap[0] == gap.max()


def test_uniform_order_of_one_position():
  assert uniform_order(1).tolist() == [0]

