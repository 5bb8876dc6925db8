"""VoCo-LLaMA (arXiv 2406.12275): who may see what.

The rule of the released code, with the switch for the paper's Eq. 3 and our
extension to several images.  See `voco_mask` for the matrix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_compress.nn.masks import causal_mask


def hidden_from_text(is_voco: jax.Array, is_visual: jax.Array,
                     image_ids: jax.Array, text_sees_prefix: bool) -> jax.Array:
  """Keys that text after the VoCo tokens may not attend to.

  Args:
    is_voco, is_visual: bool[B, S].
    image_ids: int32[B, S]; i >= 1 in image i's compression segment, 0 text,
      -1 BOS of a row with VoCo tokens.
    text_sees_prefix: hide visual tokens only (Eq. 3), not BOS and newline.

  Returns:
    bool[B, S]; nothing in a row without VoCo tokens.
  """
  hidden = is_visual if text_sees_prefix else (image_ids != 0) & ~is_voco
  return hidden & _compressed(is_voco)


def _compressed(is_voco: jax.Array) -> jax.Array:
  return jnp.any(is_voco, axis=1, keepdims=True)


def voco_mask(valid: jax.Array, is_voco: jax.Array, is_visual: jax.Array,
              image_ids: jax.Array, turn_ids: jax.Array,
              text_sees_prefix: bool = False) -> jax.Array:
  """Attention mask of the masked single pass (VoCo-LLaMA, Eq. 3).

  Two visual tokens v, two VoCo tokens c, two text tokens t:

    v 1 . . . . .
    v 1 1 . . . .
    c 1 1 1 . . .
    c 1 1 1 1 . .
    t . . 1 1 1 .
    t . . 1 1 1 1

  A compression segment sees BOS and itself; text sees earlier text and the
  VoCo tokens of earlier images.  Rows without VoCo tokens are causal,
  with images or without.

  Args:
    valid: bool[B, S], False for padding.
    is_voco, is_visual, image_ids: as in `hidden_from_text`.
    turn_ids: int32[B, S], see `causal_mask`.
    text_sees_prefix: see `hidden_from_text`.

  Returns:
    bool[B, S, S].
  """
  causal = causal_mask(valid, turn_ids)
  q_image, k_image = image_ids[:, :, None], image_ids[:, None, :]
  hidden = hidden_from_text(is_voco, is_visual, image_ids, text_sees_prefix)
  in_segment = (q_image != 0) & _compressed(is_voco)[..., None]
  own_segment = (k_image == q_image) | (k_image == -1)
  return causal & jnp.where(in_segment, own_segment, ~hidden[:, None, :])
