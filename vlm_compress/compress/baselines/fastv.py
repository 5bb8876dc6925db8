"""FastV (arXiv 2403.06764): drop visual tokens once, by who is looked at.

After layer K = 2 the visual tokens are ranked by the attention that they get, and
only the first R of them go on.  The paper speaks of the attention from all other
tokens; its code takes that from the last token of the prompt, averaged over the
heads of that layer, and so does this.

Differences to the authors' code, all deliberate:
* there, the attention of example 0 of a batch picks for all of it; here every
  row has a choice of its own, and so has every image of a row;
* its masked form saves nothing; here the tokens are gone from layers and caches
  behind layer K;
* the last token is that of the prompt: while training, answers do not count.
Kept tokens stay in order and keep their positions, as there.

Cost: one query's products with all keys, `efficiency.selector_flops`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_compress.nn.attention import attention_probs
from vlm_compress.nn.masks import Causal

LAYERS = 2  # K, layers that run on all tokens


def last_token_attention(q: jax.Array, k: jax.Array, mask: jax.Array | Causal,
                         prompt_weight: jax.Array) -> jax.Array:
  """Attention of a row's last prompt token, mean over heads.

  Args:
    q: float[B, T, N, H], k: float[B, T, K, H], rotated, of one layer.
    mask: bool[B, T, T] or Causal, who may attend to whom in it.
    prompt_weight: float32[B, T], above 0 for prompt text behind an image.

  Returns:
    float32[B, T], what each token gets; rows without prompt text mean nothing.
  """
  T = prompt_weight.shape[1]
  last = jnp.argmax(jnp.where(prompt_weight > 0, jnp.arange(T), -1), axis=1)
  if isinstance(mask, Causal):
    seen = mask.valid & (jnp.arange(T) <= last[:, None])
  else:
    seen = jnp.take_along_axis(mask, last[:, None, None], axis=1)[:, 0]
  query = jnp.take_along_axis(q, last[:, None, None, None], axis=1)
  probs = attention_probs(query, k, seen[:, None, :])
  return jnp.mean(probs, axis=(1, 2))[:, 0] * seen
