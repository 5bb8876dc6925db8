"""What a training step costs, by formula: for MFU, and for what hours a recipe
takes.

Of a product with weights, the backward pass computes the gradient of its input
(as many FLOPs as forward) and of its weights (as many again, where they learn);
of an attention product, those of both operands.  Slots are counted, padding
included: that is what a device computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from vlm_compress.config import LlavaConfig, check
from vlm_compress.eval import efficiency

_PREFIX = 2  # BOS and newline that are compressed with each image


@dataclasses.dataclass(frozen=True)
class RowShape:
  """The slots of one row.

  Attributes:
    length: T, of the row; of VoCo's, the teacher's.
    text_length: of the text part of VoCo's two passes.
    num_images: I.
    has_pixels: the vision tower runs in the step.
  """
  length: int
  text_length: int = 0
  num_images: int = 1
  has_pixels: bool = False


@dataclasses.dataclass(frozen=True)
class StepCost:
  """FLOPs of one step on all its rows.

  Attributes:
    forward: teacher and vision tower included.
    backward: of what learns and what stands behind it.
    recompute: of remat, what of the decoder layers its policy does not keep,
      once more.  (dots_saveable keeps no kernel's output: with one, attention
      is recomputed, which is not counted.)
  """
  forward: float
  backward: float
  recompute: float

  @property
  def model(self) -> float:
    """What the method asks for; model FLOPs utilisation counts these."""
    return self.forward + self.backward

  @property
  def hardware(self) -> float:
    """What is computed."""
    return self.model + self.recompute


def step_cost(config: LlavaConfig, stage: str, row: RowShape, batch_size: int,
              trainable: Mapping[str, int], has_teacher: bool = False
              ) -> StepCost:
  """FLOPs of a training step.

  Args:
    config: of the model.
    stage: of the recipe.
    row: slots of each row.
    batch_size: rows.
    trainable: path of each parameter that learns -> how many numbers it has.
    has_teacher: a teacher reads the uncompressed row, forward only.

  Raises:
    ConfigError: stage voco without a config of it.
  """
  text, P = config.text, config.num_visual_tokens
  layers = text.num_hidden_layers
  passes = [(row.length, 0)]  # (tokens, keys in front)
  if stage == 'voco':
    check(config.voco is not None, 'stage voco needs a config with voco')
    C = config.voco.num_voco_tokens
    passes = [(_PREFIX + P + C, 0)] * row.num_images + [
        (row.text_length, row.num_images * C)]
  scored = row.text_length if stage == 'voco' else row.length
  tokens = sum(n for n, _ in passes)
  pairs = sum(float(efficiency.causal_pairs(*p)) for p in passes)
  attention = layers * float(efficiency.layer_flops(text, 0, pairs))
  products = layers * float(efficiency.layer_flops(text, tokens, 0))
  head = efficiency.lm_head_flops(text, scored)
  projector = row.num_images * efficiency.projector_flops(config)
  vision = (row.num_images * efficiency.vision_flops(config)
            if row.has_pixels else 0.0)
  selector = 0.0
  if stage == 'atp':
    selector = float(efficiency.selector_flops(
        config, float(row.num_images * P), float(row.length)))
  teacher = 0.0
  if has_teacher:
    teacher = layers * float(efficiency.layer_flops(
        text, row.length, efficiency.causal_pairs(row.length))) + (
            efficiency.lm_head_flops(text, row.length) + projector)
  size = lambda *prefixes: sum(
      n for path, n in trainable.items() if path.startswith(prefixes))
  # In front of the decoder nothing but what learns needs gradients.
  backward = 2 * attention + products + head + 2 * selector + 2.0 * (
      tokens * size('language_model/layers/') +
      scored * size('language_model/lm_head/'))
  patches = row.num_images * config.num_patches
  if size('multi_modal_projector/'):
    backward += projector / 2 + 2.0 * patches * size('multi_modal_projector/')
  if size('vision_tower/'):
    backward += 2 * vision
  forward = (attention + products + head + projector + vision + selector
             + teacher)
  recomputed = {'nothing_saveable': attention + products, 'dots_saveable': 0.0,
                'dots_with_no_batch_dims_saveable': attention}
  recompute = recomputed[config.remat_policy] if config.remat else 0.0
  return StepCost(*(batch_size * x for x in (forward, backward, recompute)))
