"""VisionZip (arXiv 2412.04467): dominant and merged tokens leave the tower.

At the CLIP layer whose output feeds the projector (section 3.2):
* dominant tokens: the class token, and the patches that it attends to most,
  summed over heads, in grid order;
* contextual tokens: of the remaining patches every so manieth is a target; each
  other one is assigned to the target with the most similar key (cosine, keys
  averaged over heads), and their mean is added to the target.
Then they all go through the projector, and the decoder reads them as the
image: consecutive positions, dominant ones first.

That is what the authors' code does, the sum of target and mean included (the
paper speaks of averaging).  10 of 64 tokens are contextual, the authors' share
(10 of 64, 20 of 128, 30 of 192), rounded down; with fewer than 7 tokens none.
One token fewer than the rest is a patch: the class token counts.

Needs the attention of a class token: not for EfficientNet.  Nothing of it
depends on the prompt.

Cost: the tower runs as ever; ranking and merging are not counted.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_compress.compress.baselines.divprune import normalised


def split_count(count: int) -> tuple[int, int]:
  """Dominant patches (without the class token) and contextual tokens."""
  contextual = count * 10 // 64
  return count - 1 - contextual, contextual


def zip_tokens(hidden: jax.Array, class_attention: jax.Array, keys: jax.Array,
               count: int) -> jax.Array:
  """The tokens that are left of each picture.

  Args:
    hidden: float[B, 1 + P, D], output of the layer, class token first.
    class_attention: float32[B, P], from the class token to each patch, mean or
      sum over the layer's heads.
    keys: float[B, P, H], the layer's keys of the patches, mean over heads.
    count: tokens afterwards, at least 2.

  Returns:
    float[B, count, D]: class token, dominant patches, contextual tokens.
  """
  dominant, contextual = split_count(count)
  patches = hidden[:, 1:]
  take = lambda x, index: jnp.take_along_axis(x, index[..., None], axis=1)
  ranks = jnp.argsort(jnp.argsort(-class_attention, axis=1, stable=True),
                      axis=1, stable=True)
  # Stable: both groups stay in grid order.
  order = jnp.argsort(ranks >= dominant, axis=1, stable=True)
  parts = [hidden[:, :1], take(patches, order[:, :dominant])]
  if contextual > 0:
    rest = order[:, dominant:]
    parts.append(_merged(take(patches, rest), take(keys, rest), contextual))
  return jnp.concatenate(parts, axis=1)


def _merged(states: jax.Array, keys: jax.Array, count: int) -> jax.Array:
  """float[B, R, D] and float[B, R, H] -> float[B, count, D], see above."""
  R = states.shape[1]
  targets = jnp.arange(count) * max(1, R // count)
  is_target = jnp.zeros(R, bool).at[targets].set(True)
  unit = normalised(keys)
  similar = jnp.einsum('brh,bch->brc', unit, unit[:, targets])
  belongs = jax.nn.one_hot(jnp.argmax(similar, axis=-1), count)
  belongs = jnp.where(is_target[:, None], 0.0, belongs)
  total = jnp.einsum('brc,brd->bcd', belongs, states.astype(jnp.float32))
  number = jnp.maximum(jnp.sum(belongs, axis=1), 1.0)[..., None]
  return states[:, targets] + (total / number).astype(states.dtype)
