"""Batches as shapes: what a training step is compiled for before there is data.

The layout is that of data/rows.py's collate functions, which a test compares.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from vlm_compress.config import LlavaConfig, VisionConfig, check
from vlm_compress.data.rows import RowSpec
from vlm_compress.models.sequence import ROW_FIELDS, Batch, VocoBatch, make_batch
from vlm_compress.train.recipe import Recipe

# BOS and the newline behind a picture, which are compressed with it.
_AROUND = 2


def reads_pixels(vision: VisionConfig) -> bool:
  """Whether the tower runs in the step, on uint8 pixels; otherwise rows have
  frozen features.
  """
  return vision.model_type == 'clip_vision_model'


def step_batch(config: LlavaConfig, recipe: Recipe, rows: RowSpec,
               placed: Sharding | None = None) -> Any:
  """What a training step of a stage takes, at the longest length of its rows.

  Args:
    config: of the model.
    recipe: stage and rows per step.
    rows: lengths and images.
    placed: where the arrays lie; by default nowhere.

  Returns:
    A Batch, or for stage 'voco' (VocoBatch, Batch or None), of
    jax.ShapeDtypeStruct.

  Raises:
    ConfigError: stage 'voco' with rows of different numbers of VoCo tokens.
  """
  turns = rows.independent_turns and not rows.one_turn
  longest = rows.bucket_lengths[-1] if rows.bucket_lengths else rows.length

  def of(length: int) -> Batch:
    return batch(config, recipe.batch_size, length, rows.max_images,
                 reads_pixels(config.vision), turns, placed)
  if recipe.stage != 'voco':
    return of(longest)
  check(len(rows.num_voco_tokens) == 1 and rows.num_voco_tokens[0] > 0,
        f'rows.num_voco_tokens={rows.num_voco_tokens}: the two-pass form needs '
        'one positive number for all rows')
  C, text = rows.num_voco_tokens[0], rows.text_length
  if rows.bucket_lengths:
    text = min(text, longest - config.num_visual_tokens - C)
  teacher = of(longest) if recipe.teacher != 'none' else None
  return voco_batch(config, of(text), C), teacher


def batch(config: LlavaConfig, num_rows: int, length: int, num_images: int = 1,
          pixels: bool = False, turns: bool = False,
          placed: Sharding | None = None) -> Batch:
  """A Batch of shapes.

  Args:
    config: of the model.
    num_rows, length, num_images: B, T, I.
    pixels: features are uint8 pixels.
    turns: turns do not see each other.
    placed: where the arrays lie.
  """
  token = {name: np.zeros(1, bool if 'mask' in name else np.int32)
           for name in ROW_FIELDS}
  size = config.vision.image_size
  shape = ((size, size, 3) if pixels else
           (config.num_patches, config.vision.hidden_size))
  one = make_batch([token], [np.zeros((0, *shape))], length=length,
                   num_images=num_images)
  one = one.replace(features=one.features.astype(
      np.uint8 if pixels else np.float32))
  if not turns:
    one = one.replace(turn_ids=None)
  one = one.replace(records=np.zeros(1, np.int32))
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      (num_rows, *x.shape[1:]), x.dtype, sharding=placed), one)


def voco_batch(config: LlavaConfig, text: Batch, num_voco_tokens: int
               ) -> VocoBatch:
  """The two-pass form of a Batch of shapes, which is its text part."""
  segment = _AROUND + config.num_visual_tokens + num_voco_tokens
  valid = text.image_valid
  return VocoBatch(
      text=text, segment_ids=(0,) * segment,
      voco_positions=jax.ShapeDtypeStruct(
          (*valid.shape, num_voco_tokens), np.int32, sharding=valid.sharding))
