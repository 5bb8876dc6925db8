"""CDPruner (arXiv 2506.10967): diverse tokens, given the instruction.

A determinantal point process over projected visual tokens, whose kernel is
their cosine similarity L weighed by each token's relevance r to the
instruction, diag(r) L diag(r) (Eqs. 6-9), with r scaled to [0, 1]; the most
probable subset is built greedily, each step by one row of a Cholesky
factorisation (Chen et al., arXiv 1709.05135, Algorithm 1).

**Relevance here is that of models without a text tower.**  For LLaVA the
authors take CLIP's own text embeddings of the question, and its image
embeddings through CLIP's final norm and projection, none of which a LLaVA
model contains, and take the NEGATIVE mean similarity, because CLIP's patches
are less similar to what they show.  For models without a text encoder they use
embeddings of the language model; so do we: the mean cosine similarity of a
projected visual token with the embeddings of the prompt text behind the
image, positive, as the language model's space has no such inversion.
Numbers from here are not those of the paper's LLaVA rows.

Other differences to the authors' code: r is scaled per image, not over the
batch, whose other examples it would depend on; a token without variance left (a
copy of earlier ones) changes nothing, where the authors divide by 0; positions
are kept.

Cost: the P x P products, relevance and the greedy steps,
`efficiency.selector_flops`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_compress.compress.baselines.divprune import normalised

_EPS = 1e-6
_LEAST = 1e-10  # of a variance; below, a token is a copy of earlier ones


def relevance(tokens: jax.Array, text: jax.Array, text_mask: jax.Array
              ) -> jax.Array:
  """How relevant visual tokens are for a text.

  Args:
    tokens: float[P, D], projected visual tokens of one image.
    text: float[T, D], embeddings; text_mask: bool[T], which of them count.

  Returns:
    float32[P], mean cosine similarity, scaled to about 0 .. 1.
  """
  mask = text_mask.astype(jnp.float32)
  mean = mask @ normalised(text) / jnp.maximum(jnp.sum(mask), 1.0)
  score = normalised(tokens) @ mean
  low, high = jnp.min(score), jnp.max(score)
  return (score - low + _EPS) / jnp.maximum(high - low, _EPS)


def conditional_order(tokens: jax.Array, relevances: jax.Array, count: int
                      ) -> jax.Array:
  """When each token is taken by greedy MAP inference.

  Args:
    tokens: float[P, D], projected visual tokens of one image.
    relevances: float32[P].
    count: tokens to take.

  Returns:
    int32[P], 0 for the first one; P for those that are not taken.
  """
  P = tokens.shape[0]
  unit = normalised(tokens) * relevances[:, None]
  kernel = unit @ unit.T

  def take(step, carry):
    order, variance, rows = carry  # rows of the factor, 0 where not yet
    pick = jnp.argmax(jnp.where(order < P, -jnp.inf, variance))
    row = kernel[pick] - rows[:, pick] @ rows
    row = jnp.where(variance[pick] > _LEAST, row, 0.0) / jnp.sqrt(
        jnp.maximum(variance[pick], _LEAST))
    return (order.at[pick].set(step), variance - jnp.square(row),
            rows.at[step].set(row))
  start = (jnp.full(P, P, jnp.int32), jnp.diagonal(kernel),
           jnp.zeros((count, P)))
  return jax.lax.fori_loop(0, count, take, start)[0]
