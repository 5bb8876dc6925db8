"""SparseVLM's raters, numbers, clusters and merging, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_compress.compress.baselines import sparsevlm


def test_raters_get_more_than_the_average_share():
  # Logits of the visual token are log 3 and 0 in one row, 0 and log 3 in the
  # other: shares 3/4 and 1/4.  The third row's tokens are equal: all rate.
  visual, words = [1.0, 0.0], [[np.log(3), 0.0], [0.0, 7.0]]
  bos = [9.0, 9.0]  # similar, but no prompt text behind an image
  x = jnp.asarray([[bos, visual, *words], [bos, visual, *words[::-1]],
                   [bos, visual, words[0], words[0]]], jnp.float32)
  is_visual = jnp.broadcast_to(jnp.asarray([False, True, False, False]), (3, 4))
  prompt = jnp.broadcast_to(jnp.asarray([False, False, True, True]), (3, 4))
  got = jax.jit(sparsevlm.text_raters)(x, is_visual, prompt)
  np.testing.assert_array_equal(
      got, [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 1, 1]])


def test_rank_of_the_raters_attention():
  """Raters with the same query say the same; others rank 2, of two images."""
  rng = np.random.default_rng(0)
  q = rng.normal(size=(2, 8, 2, 4)).astype(np.float32)
  k = rng.normal(size=(2, 8, 1, 4)).astype(np.float32)
  q[0, 7] = q[0, 6]
  mask = jnp.broadcast_to(jnp.arange(8) < 6, (2, 8, 8))
  raters = jnp.zeros((2, 8), bool).at[:, 6:].set(True)
  index = jnp.broadcast_to(jnp.arange(6).reshape(2, 3), (2, 2, 3))
  keep = jnp.ones((2, 2, 3)).at[1, 1, 1:].set(0.0)  # one token: rank 1
  got = jax.jit(sparsevlm.attention_rank)(q, k, mask, raters, index, keep)
  np.testing.assert_array_equal(got, [[1, 1], [2, 1]])


def test_numbers_by_hand():
  # 276 of 576 go: int(82.8) + 1 = 83 candidates, 8 + 1 clusters.
  assert sparsevlm.num_candidates(jnp.int32(276)) == 83
  assert sparsevlm.num_clusters(jnp.int32(276)) == 9
  assert sparsevlm.num_clusters(jnp.int32(0)) == 0
  by_rank = lambda *x: [int(y) for y in sparsevlm.deletions_by_rank(
      jnp.int32(x[0]), jnp.int32(x[1]), x[2])]
  assert by_rank(40, 4, 1.0) == [36, 2]  # int(10.8) + 1 = 11 candidates
  assert by_rank(40, 4, 0.5) == [18, 1]
  assert by_rank(40, 40, 1.0) == [0, 0]
  assert by_rank(5, 0, 1.0) == [4, 1]  # one always stays


def test_counts_include_merged_tokens():
  alive, counts = np.meshgrid(np.arange(0, 41), np.arange(1, 41))
  deleted, back = jax.jit(lambda a, c: jax.vmap(
      lambda a, c: sparsevlm.deletions_for(a, c, 40))(a, c))(
          alive.reshape(-1), counts.reshape(-1))
  deleted, back = np.asarray(deleted), np.asarray(back)
  left = alive.reshape(-1) - deleted + back
  np.testing.assert_array_equal(left, np.minimum(alive, counts).reshape(-1))
  clusters = np.asarray(sparsevlm.num_clusters(jnp.asarray(deleted)))
  selected = alive.reshape(-1) - deleted
  # As many clusters as the number that goes asks for, unless one token is left.
  assert ((back == clusters) | (selected <= 1)).all()
  assert (selected >= np.minimum(alive.reshape(-1), 1)).all()


def test_clusters_by_hand():
  # Two neighbours, itself one: squared distances 0.01, 0.01, 0.04, 0.0225 and
  # 0.0225.  The first is densest (before its equal), then 5 is farthest off.
  points = jnp.asarray([[0.0], [0.1], [100.0], [0.3], [5.0], [5.15]])
  member = jnp.asarray([True, True, False, True, True, True])
  centre, owner = jax.jit(sparsevlm.clusters)(points, member, jnp.int32(2))
  np.testing.assert_array_equal(centre, [1, 0, 0, 0, 1, 0])
  np.testing.assert_array_equal(owner[member], [0, 0, 0, 4, 4])


@pytest.mark.parametrize('count', [2, 4])
def test_clusters_by_definition(count):
  """Density peaks, token by token, of some of the points."""
  rng = np.random.default_rng(count)
  points, members = rng.normal(size=(20, 3)), np.arange(0, 20, 2)
  gap = lambda i, j: np.linalg.norm(points[i] - points[j]) / 3 ** 0.5
  density = {i: np.exp(-np.mean(np.sort([gap(i, j) ** 2 for j in members])[:count]))
             for i in members}
  farthest = max(gap(i, j) for i in members for j in members)
  # With two neighbours, nearest pairs are equally dense: the earlier is first.
  rank = lambda i: (round(density[i], 9), -i)
  score = {i: density[i] * min([gap(i, j) for j in members if rank(j) > rank(i)],
                               default=farthest) for i in members}
  centres = sorted(members, key=lambda i: -score[i])[:count]
  centre, owner = sparsevlm.clusters(
      jnp.asarray(points, jnp.float32), jnp.isin(jnp.arange(20), members), count)
  assert set(np.flatnonzero(centre)) == set(centres)
  for i in members:
    assert owner[i] == min(centres, key=lambda j: gap(i, j))


def test_the_best_of_those_that_go_are_merged():
  # 7 of 9 tokens are there, 4 go: int(1.2) + 1 = 2 candidates, 1 cluster.
  score = jnp.asarray([5.0, 9.0, 8.0, 7.0, 1.0, 2.0, 99.0, 3.0, 4.0])
  alive = jnp.arange(9) % 6 != 0
  alive = alive.at[7].set(True)
  states = jnp.arange(9.0)[:, None] * jnp.asarray([1.0, -1.0])
  deleted, back = sparsevlm.deletions_for(jnp.int32(7), jnp.int32(4), 9)
  assert (int(deleted), int(back)) == (4, 1)
  kept, centre, merged = jax.jit(sparsevlm.select_and_merge)(
      score, states, alive, deleted, back)
  # 9, 8, 7 stay; 4 and 3 (tokens 8 and 7) are one cluster, the earlier its
  # centre; 2 and 1 are gone.
  np.testing.assert_array_equal(kept, [0, 1, 1, 1, 0, 0, 0, 1, 0])
  np.testing.assert_array_equal(centre, np.arange(9) == 7)
  np.testing.assert_allclose(merged[7], [7.5, -7.5])
