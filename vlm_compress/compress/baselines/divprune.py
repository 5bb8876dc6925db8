"""DivPrune (arXiv 2503.02175): the subset of tokens that differ most.

Max-min diversity over projected visual tokens with cosine distance (Eqs. 3-5),
solved greedily: first the token whose nearest neighbour is farthest away, then
again and again the token that is farthest from the nearest one already taken
(Algorithm 1).  Neither text nor attention takes part.

The first n picks are the choice for n, so one order serves all counts.

Differences to the authors' code: it knows one example of one image whose
tokens start at position 35, and renumbers what is left; here every image is
pruned for itself, wherever it stands, and tokens keep their positions.  A
token is never taken twice, also where all distances are 0.

Cost: the P x P products, `efficiency.selector_flops`; comparisons are not
counted.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_EPS = 1e-12


def normalised(tokens: jax.Array) -> jax.Array:
  """float[..., D] -> float32[..., D] of length 1."""
  tokens = tokens.astype(jnp.float32)
  norm = jnp.linalg.norm(tokens, axis=-1, keepdims=True)
  return tokens / jnp.maximum(norm, _EPS)


def diverse_order(tokens: jax.Array, count: int) -> jax.Array:
  """When each token is taken.

  Args:
    tokens: float[P, D], projected visual tokens of one image.
    count: tokens to take.

  Returns:
    int32[P], 0 for the first one; P for those that are not taken.
  """
  P = tokens.shape[0]
  unit = normalised(tokens)
  distance = 1.0 - unit @ unit.T
  to_others = jnp.where(jnp.eye(P, dtype=bool), jnp.inf, distance)

  def take(step, carry):
    order, nearest = carry
    first = jnp.min(to_others, axis=1)
    score = jnp.where(step == 0, first, nearest)
    pick = jnp.argmax(jnp.where(order < P, -jnp.inf, score))
    return order.at[pick].set(step), jnp.minimum(nearest, distance[pick])
  start = jnp.full(P, P, jnp.int32), jnp.full(P, jnp.inf)
  return jax.lax.fori_loop(0, count, take, start)[0]
