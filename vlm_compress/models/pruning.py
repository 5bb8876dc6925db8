"""What the pruning modules need to know about a batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from vlm_compress.compress import atp, selection
from vlm_compress.config import LlavaConfig
from vlm_compress.models.inputs import PruneOptions
from vlm_compress.models.sequence import VISUAL, Batch


def prune_inputs(config: LlavaConfig, batch: Batch, options: PruneOptions,
                 x: jax.Array, heads: Any) -> atp.PruneInputs:
  """Collects it.

  Args:
    config: of a model with `atp`.
    batch: T tokens per row.
    options: how the modules run.
    x: float[B, T, D], embeddings of the batch.
    heads: parameters of ATP's modules, or None.
  """
  B, I = batch.features.shape[:2]
  shape = (B, I, config.num_visual_tokens)
  row_ids = options.row_ids
  row_ids = jnp.zeros(B, jnp.int32) if row_ids is None else row_ids
  shift = options.threshold_shift
  shift = config.atp.threshold_shift if shift is None else shift
  index = atp.canvas_index(batch.visual_slots, shape)
  if config.atp.selector in ('divprune', 'cdpruner'):
    order = selection.embedding_order(config.atp, x, index, batch.prompt_mask)
  else:
    order = selection.selection_order(config.atp.selector, shape,
                                      config.vision.grid_size, row_ids,
                                      options.seed)
  return atp.PruneInputs(
      heads=heads, visual_index=index, image_valid=batch.image_valid,
      visual_slots=batch.visual_slots, image_ids=batch.image_ids,
      prompt_weight=selection.prompt_queries(
          config.atp, x, batch.token_types == VISUAL, batch.prompt_mask),
      order=order, temperature=jnp.float32(options.temperature),
      threshold_shift=jnp.float32(shift), hard=options.hard,
      config=config.atp, grid_size=config.vision.grid_size)
