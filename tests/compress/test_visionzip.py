"""What VisionZip keeps and merges, and smaller pictures, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vlm_compress.compress.baselines import downsample, visionzip


def test_shares_of_the_authors():
  assert visionzip.split_count(64) == (53, 10)  # and the class token
  assert visionzip.split_count(128) == (107, 20)
  assert visionzip.split_count(192) == (161, 30)
  assert visionzip.split_count(6) == (5, 0)
  assert visionzip.split_count(2) == (1, 0)


def test_without_contextual_tokens_by_hand():
  hidden = jnp.arange(10.0).reshape(2, 5, 1)
  attention = jnp.asarray([[.1, .4, .2, .3], [.4, .3, .2, .1]])
  got = visionzip.zip_tokens(hidden, attention, jnp.ones((2, 4, 3)), 3)
  np.testing.assert_array_equal(got[..., 0], [[0, 2, 4], [5, 6, 7]])


def test_contextual_tokens_by_hand():
  """count 13: 10 dominant patches and 2 contextual tokens of the other six.

  Of the others, in grid order a b c d e f, a and d are targets; b, e and f have
  keys like a's, c's is like d's, though a's is a hundred times as long.
  """
  rng = np.random.default_rng(0)
  others = np.array([2, 3, 7, 8, 11, 15])
  dominant = np.setdiff1d(np.arange(16), others)
  attention = np.where(np.isin(np.arange(16), others), 0.1, 0.5)
  attention = (attention + rng.uniform(0, 0.1, 16)).astype(np.float32)
  hidden = rng.normal(size=(1, 17, 4)).astype(np.float32)
  keys = rng.normal(size=(1, 16, 2)).astype(np.float32)
  keys[0, others] = [[10, 0], [8, 1], [0.1, 9], [0, 0.1], [5, -1], [2, 0]]
  got = np.asarray(jax.jit(visionzip.zip_tokens, static_argnums=3)(
      hidden, attention[None], keys, 13))[0]
  patches = hidden[0, 1:]
  np.testing.assert_array_equal(got[0], hidden[0, 0])
  np.testing.assert_array_equal(got[1:11], patches[dominant])
  np.testing.assert_allclose(
      got[11], patches[2] + patches[[3, 11, 15]].mean(0), rtol=1e-6)
  np.testing.assert_allclose(got[12], patches[8] + patches[7], rtol=1e-6)


def test_smaller_pictures_by_hand():
  # Four pixels to two: a triangle two pixels wide to each side of the middle,
  # weights 3/4, 3/4 and 1/4 of 7/4 at the edge.
  ramp = np.broadcast_to(np.float32([0, 7, 14, 21])[:, None, None], (4, 4, 3))
  got = np.asarray(downsample.reduced_pixels(ramp[None], 2))
  assert got.shape == (1, 2, 2, 3)
  np.testing.assert_allclose(got[0, :, 0, 0], [5.0, 16.0], rtol=1e-6)
  whole = np.uint8(ramp)
  small = np.asarray(downsample.reduced_pixels(whole, 2))
  assert small.dtype == np.uint8 and small[:, 1, 2].tolist() == [5, 16]
  assert downsample.reduced_pixels(whole, 4) is whole


def test_positions_of_a_smaller_grid():
  ramp = np.broadcast_to(np.float32([0, 7, 14, 21])[:, None], (4, 4))
  table = np.concatenate([[[50.0]], ramp.reshape(16, 1)]).astype(np.float32)
  got = np.asarray(downsample.reduced_positions(jnp.asarray(table), 2))
  np.testing.assert_allclose(got[:, 0], [50, 5, 5, 16, 16], rtol=1e-6)
