"""Half-split rotary embedding: by hand, and what follows from rotation."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_compress.nn.rope import rope

THETA = 10000.0


def _heads(seed=0, shape=(2, 3, 2, 8)):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_by_hand():
  """Component i turns with component i + H/2 at theta^(-2i/H)."""
  x = _heads()
  positions = np.array([[0, 1, 7], [3, 2, 90]])
  want = np.zeros(x.shape)
  for index in np.ndindex(2, 3, 2):
    for i in range(4):
      angle = positions[index[:2]] * THETA ** (-2 * i / 8)
      a, b = x[index][i], x[index][i + 4]
      want[index][i] = a * np.cos(angle) - b * np.sin(angle)
      want[index][i + 4] = b * np.cos(angle) + a * np.sin(angle)
  np.testing.assert_allclose(rope(x, positions, THETA), want, atol=1e-5)


def test_position_zero_is_the_identity():
  x = _heads()
  np.testing.assert_array_equal(rope(x, np.zeros((2, 3), int), THETA), x)


def test_rotations_add_up_also_backwards():
  x = _heads()
  a = np.array([[1, 5, 40], [0, 2, 3]])
  shift = np.array([[7, -3, 11], [2, 0, -1]])
  np.testing.assert_allclose(rope(rope(x, a, THETA), shift, THETA),
                             rope(x, a + shift, THETA), atol=1e-5)


@pytest.mark.parametrize('offset', [1, 50, 3000])
def test_scores_depend_on_distances_only(offset):
  q, k = _heads(1), _heads(2)
  positions = np.array([[0, 4, 9], [1, 2, 3]])
  score = lambda p: np.einsum('btnh,bsnh->bnts', rope(q, p, THETA),
                              rope(k, p, THETA))
  np.testing.assert_allclose(score(positions + offset), score(positions),
                             atol=2e-5 if offset < 1000 else 2e-3)
  # ... and they do depend on those
  assert np.abs(score(positions * 2) - score(positions)).max() > 0.1


def test_theta_counts():
  x, positions = _heads(), np.array([[1, 2, 3], [4, 5, 6]])
  assert np.abs(rope(x, positions, 100.0) -
                rope(x, positions, THETA)).max() > 0.1


def test_angles_are_float32_for_half_precision():
  """In bfloat16 the positions 1000 and 1001 would be the same."""
  x = jnp.asarray(_heads(shape=(1, 2, 1, 8)), jnp.bfloat16)
  x = jnp.broadcast_to(x[:, :1], x.shape)
  out = rope(x, np.array([[1000, 1001]]), THETA)
  assert out.dtype == jnp.bfloat16
  exact = rope(np.asarray(x, np.float32), np.array([[1000, 1001]]), THETA)
  np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=2e-2)
  assert np.abs(np.asarray(out[0, 0] - out[0, 1], np.float32)).max() > 0.1
