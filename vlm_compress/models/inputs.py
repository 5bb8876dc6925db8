"""What Llava's methods take besides batches: options and compressed images."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from vlm_compress.config import LlavaConfig
from vlm_compress.nn.rope import rope


@flax.struct.dataclass
class PruneOptions:
  """How the modules of an ATP model run.

  Attributes:
    temperature: float32[], tau of soft masks.
    threshold_shift: float32[], the dial at inference; None takes the config's.
    row_ids: int32[B], for the selector 'random'; None gives zeros.
    seed: int32[], for the selector 'random'.
    hard: masks are 0 or 1 (inference).
  """
  temperature: jax.Array | float = 1.0
  threshold_shift: jax.Array | None = None
  row_ids: jax.Array | None = None
  seed: jax.Array | int = 0
  hard: bool = flax.struct.field(pytree_node=False, default=True)


@flax.struct.dataclass
class Prefix:
  """Keys and values of compressed images, in front of text.

  Attributes:
    keys, values: float[M, B, S, K, H], keys at their read positions.
    valid: bool[B, S].
    order: int32[B, S], text at a later position may read them.
  """
  keys: jax.Array
  values: jax.Array
  valid: jax.Array
  order: jax.Array


@flax.struct.dataclass
class CompressedImages:
  """What VoCo leaves of images, before it is known where they stand.

  An image is compressed alone and at positions of its own, so the same keys
  and values serve any row and any place in it.

  Attributes:
    keys, values: float[M, B, I, S, K, H], keys at `positions`.
    positions: int32[S], in the image's own segment; VoCo tokens come last.
  """
  keys: jax.Array
  values: jax.Array
  positions: jax.Array


@flax.struct.dataclass
class KeptTokens:
  """What ATP leaves of an image and of the text in front of it (ours).

  Later questions read it as the first one left it: a causal decoder's states
  of these tokens do not depend on the text behind them, only the choice does.

  Attributes:
    keys, values: per segment float[m, S, K, H] of its m layers, keys rotated;
      S differs between segments.
  """
  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]


def voco_states(config: LlavaConfig, shape: tuple[int, int], keys: jax.Array,
                values: jax.Array, num_voco_tokens: int) -> CompressedImages:
  """What text may read of compression segments that have been run.

  Args:
    config: of the model.
    shape: (B, I).
    keys, values: float[M, B * I, S1, K, H], of BOS, P visual tokens, newline
      and VoCo tokens.
    num_voco_tokens: C.
  """
  P, S1 = config.num_visual_tokens, keys.shape[2]
  kept = [*range(S1 - num_voco_tokens, S1)]
  if config.voco.text_sees_prefix:
    kept = [0, *range(1 + P, S1 - num_voco_tokens)] + kept
  per_image = lambda y: y[:, :, jnp.asarray(kept)].reshape(
      y.shape[0], *shape, len(kept), *y.shape[3:])
  return CompressedImages(keys=per_image(keys), values=per_image(values),
                          positions=jnp.asarray(kept))


def place(images: CompressedImages, image_valid: jax.Array,
          voco_positions: jax.Array, rope_theta: float) -> Prefix:
  """Moves compressed images to where the text of a row reads them.

  Args:
    images: I images per row.
    image_valid: bool[B, I].
    voco_positions: int32[B, I, C], read positions of the VoCo tokens.
    rope_theta: of the decoder.

  Returns:
    A Prefix of I * S keys per row.
  """
  B, I, C = voco_positions.shape
  S = images.positions.shape[0]
  own = jnp.broadcast_to(images.positions, (B, I, S))
  read = own.at[..., S - C:].set(voco_positions)
  shift = (read - own).reshape(B, -1)
  per_row = lambda y: y.reshape(y.shape[0], B, I * S, *y.shape[4:])
  move = lambda k: rope(k, shift, rope_theta)
  valid = jnp.broadcast_to(image_valid[..., None], own.shape)
  if S > C:  # text sees BOS and newlines, too: one BOS per row
    valid = valid.at[:, 1:, 0].set(False)
  order = jnp.broadcast_to(voco_positions[..., :1], own.shape)
  return Prefix(keys=jax.vmap(move)(per_row(images.keys)),
                values=per_row(images.values), valid=valid.reshape(B, -1),
                order=order.reshape(B, -1))
