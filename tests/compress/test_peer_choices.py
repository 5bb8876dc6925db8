"""What FastV, PyramidDrop, DivPrune and CDPruner choose, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_compress.compress.baselines import cdpruner, divprune, pyramiddrop
from vlm_compress.compress.baselines.fastv import last_token_attention
from vlm_compress.nn.masks import Causal


def _two_heads():
  """Rows of 4 tokens whose last prompt tokens are 3 and 2; H = 2.

  The first head's logit of a key is its first number, the second's is 0.
  """
  rng = np.random.default_rng(0)
  q = rng.normal(size=(2, 4, 2, 2)).astype(np.float32)
  for row, last in enumerate((3, 2)):
    q[row, last] = [[2 ** 0.5, 0.0], [0.0, 0.0]]
  k = np.zeros((2, 4, 1, 2), np.float32)
  k[0, :, 0, 0] = np.log([1, 2, 3, 4])
  k[1, :, 0, 0] = np.log([2, 1, 1, 9])  # nobody sees the padding
  valid = jnp.asarray([[True] * 4, [True] * 3 + [False]])
  prompt = jnp.asarray([[0, 0, 1, 1], [0, 1, 1, 0]], jnp.float32)
  return jnp.asarray(q), jnp.asarray(k), Causal(valid), prompt


def test_the_last_prompt_token_looks():
  q, k, mask, prompt = _two_heads()
  got = last_token_attention(q, k, mask, prompt)
  np.testing.assert_allclose(got[0], [.175, .225, .275, .325], atol=1e-6)
  third = 1 / 3  # three keys, heads [1/2, 1/4, 1/4] and thirds
  np.testing.assert_allclose(
      got[1], [(.5 + third) / 2, (.25 + third) / 2, (.25 + third) / 2, 0],
      atol=1e-6)
  # As a stored mask, from which a key is gone: 1/8, 3/8, 4/8 and thirds.
  dense = mask.dense(4).at[0, :, 1].set(False)
  gone = last_token_attention(q, k, dense, prompt)
  np.testing.assert_allclose(
      gone[0], [(1 / 8 + third) / 2, 0, (3 / 8 + third) / 2, (1 / 2 + third) / 2],
      atol=1e-6)
  np.testing.assert_allclose(gone[1], got[1], atol=1e-7)


def test_stages_of_pyramiddrop():
  assert pyramiddrop.stage_ends(32) == (8, 16, 24)
  assert pyramiddrop.stage_counts(576) == (288, 144, 72)
  assert pyramiddrop.stage_counts(25) == (12, 6, 3)  # rounded down
  assert pyramiddrop.stage_counts(16, 0.1) == (1, 1, 1)


def _at_angles(*degrees, lengths):
  radians = np.radians(degrees)
  directions = np.stack([np.cos(radians), np.sin(radians)], axis=1)
  return jnp.asarray(directions * np.reshape(lengths, (-1, 1)), jnp.float32)


def test_divprune_takes_the_loneliest_and_then_the_farthest():
  # Nearest neighbours are 10, 10, 80 and 90 degrees away, so the last is
  # first; of the others 0 is farthest from it, then 90 from both.
  tokens = _at_angles(0, 10, 90, 180, lengths=(1, 50, 0.1, 2))
  run = jax.jit(divprune.diverse_order, static_argnums=1)
  np.testing.assert_array_equal(run(tokens, 4), [1, 3, 2, 0])
  np.testing.assert_array_equal(run(tokens, 2), [1, 4, 4, 0])
  np.testing.assert_array_equal(run(tokens[:1], 1), [0])
  same = run(jnp.ones((4, 2)), 3)  # no token is taken twice
  assert sorted(np.asarray(same)) == [0, 1, 2, 4]


def test_divprune_is_greedy_in_the_least_distance():
  tokens = np.random.default_rng(0).normal(size=(12, 3))
  unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
  distance = 1.0 - unit @ unit.T
  others = distance + 9.0 * np.eye(12)
  taken = [int(np.argmax(others.min(1)))]
  while len(taken) < 8:
    rest = [i for i in range(12) if i not in taken]
    taken.append(max(rest, key=lambda i: distance[i, taken].min()))
  order = np.asarray(divprune.diverse_order(jnp.asarray(tokens, jnp.float32), 8))
  assert [int(np.flatnonzero(order == step)[0]) for step in range(8)] == taken


def test_cdpruner_prefers_relevant_tokens_that_are_no_copies():
  tokens = jnp.asarray([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
  order = cdpruner.conditional_order(tokens, jnp.asarray([1.0, 0.9, 0.3]), 2)
  np.testing.assert_array_equal(order, [0, 3, 1])
  order = cdpruner.conditional_order(tokens, jnp.asarray([0.1, 0.9, 0.3]), 3)
  np.testing.assert_array_equal(order, [2, 0, 1])


@pytest.mark.parametrize('seed', range(3))
def test_cdpruner_is_greedy_in_the_determinant(seed):
  """Each token is the one with which the kernel's determinant is largest."""
  rng = np.random.default_rng(seed)
  tokens, relevances = rng.normal(size=(9, 6)), rng.uniform(0.2, 1.0, 9)
  unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
  kernel = relevances[:, None] * (unit @ unit.T) * relevances
  taken = []
  for _ in range(5):
    rest = [i for i in range(9) if i not in taken]
    taken.append(max(rest, key=lambda i: np.linalg.det(
        kernel[np.ix_([*taken, i], [*taken, i])])))
  order = np.asarray(cdpruner.conditional_order(
      jnp.asarray(tokens, jnp.float32), jnp.asarray(relevances, jnp.float32), 5))
  assert [int(np.flatnonzero(order == step)[0]) for step in range(5)] == taken


def test_relevance_by_hand():
  tokens = jnp.asarray([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
  text = jnp.asarray([[4.0, 0.0], [0.0, -5.0], [9.0, 0.0]])
  got = cdpruner.relevance(tokens, text, jnp.asarray([True, False, True]))
  np.testing.assert_allclose(got, [1, 0, 0.5 ** 0.5], atol=1e-5)
  # Cosines 1, -1 and 0 of both texts' mean, (1, -1) / 2: from -1/2 to 1/2.
  got = cdpruner.relevance(tokens, text, jnp.asarray([False, True, True]))
  np.testing.assert_allclose(got, [1, 0, 0.5], atol=1e-5)
