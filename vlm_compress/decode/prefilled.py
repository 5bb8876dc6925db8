"""Prompts that have been read, and how many slots that took."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from vlm_compress.config import LlavaConfig
from vlm_compress.models.segments import Pruning, SegmentCache
from vlm_compress.models.sequence import VISUAL, Batch

TEXT_STEP = 8  # slots for text come in multiples of this


@dataclasses.dataclass
class Prefilled:
  """Prompts that have been read, ready to be continued.

  Attributes:
    logits: float32[B, V], of the next token.
    positions: int32[B], of the next token.
    caches: of each segment.
    slots: of each segment's cache without its room.
    counts: int[B] per segment, slots that hold a token.
    room: tokens that can be added; used: that have been.
    pruning: what the modules decided, or None.
  """
  logits: jax.Array
  positions: jax.Array
  caches: list[SegmentCache]
  slots: list[int]
  counts: list[np.ndarray]
  room: int
  used: int = 0
  pruning: Pruning | None = None


def entering(config: LlavaConfig, pruning: Pruning) -> np.ndarray:
  """Visual tokens that entered each layer, float32[M, B, I]."""
  valid = np.asarray(pruning.inputs.image_valid, np.float32)
  counts = np.sum(np.asarray(pruning.state.module_keep), axis=-1)
  passed = [sum(c <= layer for c in config.atp.prune_after)
            for layer in range(config.text.num_hidden_layers)]
  return np.stack([counts[n - 1] if n else valid * config.num_visual_tokens
                   for n in passed])


def row_text_slots(batch: Batch) -> np.ndarray:
  """int[B], slots for what is not visual in each row, multiples of TEXT_STEP."""
  text = np.sum(batch.valid & (batch.token_types != VISUAL), axis=1)
  return -(-text // TEXT_STEP) * TEXT_STEP


def text_slots(batch: Batch) -> int:
  """`row_text_slots` of the fullest row."""
  return int(np.max(row_text_slots(batch)))
