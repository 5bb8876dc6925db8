"""What Llava's methods take besides batches: options and compressed images."""

from __future__ import annotations

import flax.struct
import jax


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
