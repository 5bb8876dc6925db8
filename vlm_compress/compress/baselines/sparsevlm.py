"""SparseVLM (arXiv 2410.04417): text rates visual tokens; some are recycled.

* Raters (section 3.2): prompt tokens to which visual tokens are more similar
  than to the average one.  In front of the decoder every visual token spreads
  a softmax over the prompt's embeddings; a prompt token is a rater if its mean
  share is above the mean of all.
* Behind a layer, a visual token's score is its attention from the raters, mean
  over heads and raters (Eq. 5).
* How many go (section 3.3): lambda (n - rank), rank that of the raters' x n
  attention.  Or given counts, as the authors' released code has them instead.
* Recycling (section 3.4): of those that go, the best 30 % and one more are
  clustered by density peaks, one cluster for ten tokens and one more, and the
  mean of a cluster's hidden states stays.

Differences to the authors' code, all deliberate:
* a merged token takes the slot and position of its cluster's centre; there,
  merged tokens stand behind all kept ones and positions are numbered anew;
* given counts include merged tokens, so that a token budget means what it says;
* densities get no random numbers; of equal ones the earlier token is denser;
* every row and image is treated for itself (there, only batches of one work);
  with several images in a row all of them vote for the raters;
* where no token is above the mean, all prompt tokens are raters;
* the paper adds up a cluster, the code averages; so do we.
The later corrections of the repository's version 2 are not part of this.

Cost: scores and distances, `efficiency.selector_flops`; the singular values of
the rank (without given counts) and the merging itself are not counted.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_compress.nn.attention import attention_probs

PRUNED_AFTER = (3, 7, 16)  # of 32 layers


def text_raters(x: jax.Array, is_visual: jax.Array, is_prompt: jax.Array
                ) -> jax.Array:
  """Which prompt tokens rate.

  Args:
    x: float[B, T, D], embeddings in front of the decoder.
    is_visual, is_prompt: bool[B, T].

  Returns:
    bool[B, T].
  """
  x = x.astype(jnp.float32)
  similar = jnp.einsum('bvd,btd->bvt', x, x)
  similar = jnp.where(is_prompt[:, None, :], similar, -jnp.inf)
  shares = jnp.where(is_prompt[:, None, :], jax.nn.softmax(similar, -1), 0.0)
  mean = jnp.einsum('bv,bvt->bt', is_visual.astype(jnp.float32), shares)
  mean = mean / jnp.maximum(jnp.sum(is_visual, 1, keepdims=True), 1)
  average = jnp.sum(mean, 1, keepdims=True) / jnp.maximum(
      jnp.sum(is_prompt, 1, keepdims=True), 1)
  raters = is_prompt & (mean > average)
  return jnp.where(jnp.any(raters, 1, keepdims=True), raters, is_prompt)


def attention_rank(q: jax.Array, k: jax.Array, mask: jax.Array,
                   raters: jax.Array, visual_index: jax.Array,
                   keep: jax.Array) -> jax.Array:
  """Rank of the attention from raters to the visual tokens of each image.

  Args:
    q: float[B, T, N, H], k: float[B, T, K, H], rotated.
    mask: bool[B, T, T].
    raters: bool[B, T].
    visual_index: int32[B, I, P], places of the tokens in the row.
    keep: float32[B, I, P], tokens still there.

  Returns:
    int32[B, I]; singular values count from max(shape) eps of the largest on.
  """
  def row(q, k, mask, raters, index, keep):
    probs = jnp.mean(attention_probs(q[None], k[None], mask[None]), (0, 1, 2))
    matrix = jnp.moveaxis(probs[:, index], 1, 0) * keep[:, None, :]
    matrix = matrix * raters[:, None]
    values = jnp.linalg.svd(matrix, compute_uv=False)
    larger = jnp.maximum(jnp.sum(raters), jnp.sum(keep, axis=-1))
    least = larger * jnp.finfo(jnp.float32).eps * jnp.max(values, axis=-1)
    return jnp.sum(values > least[:, None], axis=-1, dtype=jnp.int32)
  return jax.lax.map(lambda args: row(*args), (
      q, k, mask, raters, visual_index, keep))


def num_candidates(deleted: jax.Array) -> jax.Array:
  """Tokens that are clustered, of so many that go."""
  return jnp.where(deleted > 0, 3 * deleted // 10 + 1, 0)


def num_clusters(deleted: jax.Array) -> jax.Array:
  """Tokens that come back for so many that go."""
  return jnp.where(deleted > 0, num_candidates(deleted) // 10 + 1, 0)


def deletions_by_rank(alive: jax.Array, rank: jax.Array, scale: float
                      ) -> tuple[jax.Array, jax.Array]:
  """Tokens that go, and that come back: lambda (n - rank), one always stays.

  Args:
    alive: int32[...], n; rank: int32[...].
    scale: lambda.

  Returns:
    int32[...] each.
  """
  wanted = jnp.floor(scale * (alive - rank)).astype(jnp.int32)
  deleted = jnp.clip(wanted, 0, jnp.maximum(alive - 1, 0))
  return deleted, num_clusters(deleted)


def deletions_for(alive: jax.Array, count: jax.Array, most: int
                  ) -> tuple[jax.Array, jax.Array]:
  """Tokens that go, and that come back, so that `count` are left.

  Args:
    alive: int32[...], tokens still there, at most `most`.
    count: int32[], what is to be left; where that is fewer than one token and
      the clusters, there are fewer clusters.

  Returns:
    int32[...] each.
  """
  deleted = jnp.arange(most + 1)
  left = alive[..., None] - deleted + num_clusters(deleted)
  few = (left <= count) | (deleted >= alive[..., None] - 1)
  chosen = jnp.argmax(few, axis=-1).astype(jnp.int32)
  back = jnp.minimum(num_clusters(chosen), count - (alive - chosen))
  return chosen, jnp.maximum(back, 0)


def clusters(states: jax.Array, member: jax.Array, count: jax.Array
             ) -> tuple[jax.Array, jax.Array]:
  """Density-peak clustering with k nearest neighbours, k the cluster count.

  Args:
    states: float[P, D].
    member: bool[P], what is clustered.
    count: int32[], clusters, at most the number of members.

  Returns:
    bool[P], centres; and int32[P], the centre that each member belongs to.
  """
  P, D = states.shape
  x = states.astype(jnp.float32)
  square = jnp.sum(jnp.square(x), axis=-1)
  distance = jnp.maximum(square[:, None] + square - 2.0 * x @ x.T, 0.0)
  distance = jnp.sqrt(jnp.where(jnp.eye(P, dtype=bool), 0.0, distance) / D)
  pair = member[:, None] & member
  near = jnp.sort(jnp.where(pair, jnp.square(distance), jnp.inf), axis=1)
  near = jnp.where(jnp.arange(P) < count, near, 0.0)
  density = jnp.exp(-jnp.sum(near, axis=1) / jnp.maximum(count, 1))
  earlier = jnp.arange(P) < jnp.arange(P)[:, None]
  denser = pair & ((density > density[:, None]) |
                   (density == density[:, None]) & earlier)
  farthest = jnp.max(jnp.where(pair, distance, 0.0))
  apart = jnp.min(jnp.where(denser, distance, farthest), axis=1)
  score = jnp.where(member, -apart * density, jnp.inf)
  ranks = jnp.argsort(jnp.argsort(score, stable=True), stable=True)
  centre = member & (ranks < count)
  owner = jnp.argmin(jnp.where(centre, distance, jnp.inf), axis=1)
  return centre, jnp.where(centre, jnp.arange(P), owner)


def select_and_merge(score: jax.Array, states: jax.Array, alive: jax.Array,
                     deleted: jax.Array, back: jax.Array
                     ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Chooses and recycles tokens of one image.

  Args:
    score: float32[P].
    states: float[P, D], hidden states.
    alive: bool[P], tokens still there.
    deleted, back: int32[], see `deletions_for`.

  Returns:
    bool[P], tokens left; bool[P], those of them that are merged ones; and
    float32[P, D], the means of the clusters at their centres.
  """
  ranks = jnp.argsort(jnp.argsort(jnp.where(alive, -score, jnp.inf),
                                  stable=True), stable=True)
  selected = jnp.sum(alive) - deleted
  kept = alive & (ranks < selected)
  member = alive & ~kept & (ranks < selected + num_candidates(deleted))
  centre, owner = clusters(states, member, back)
  belongs = member & (owner == jnp.arange(len(score))[:, None])
  weight = belongs.astype(jnp.float32)
  total = jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1.0)
  return kept | centre, centre, weight @ states.astype(jnp.float32) / total
