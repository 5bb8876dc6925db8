"""What a training step costs, by formula: for MFU, and for what hours a recipe
takes.

Of a product with weights, the backward pass computes the gradient of its input
(as many FLOPs as forward) and of its weights (as many again, where they learn);
of an attention product, those of both operands.  Slots are counted, padding
included: that is what a device computes.  Of VoCo's first pass the last layer
counts in full, though only its keys and values are read: the layers are one loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

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
    idle: where ATP's modules alone learn, the backward pass of the layers in
      front of the first one: nobody needs it, but the layers are one loop.
  """
  forward: float
  backward: float
  recompute: float
  idle: float = 0.0

  @property
  def model(self) -> float:
    """What the method asks for; model FLOPs utilisation counts these."""
    return self.forward + self.backward

  @property
  def hardware(self) -> float:
    """What is computed."""
    return self.model + self.recompute + self.idle


@dataclasses.dataclass(frozen=True)
class _Decoder:
  """Forward FLOPs of the decoder on one row, and what they are taken on.

  Attributes:
    tokens: that pass the layers.
    scored: positions whose logits are computed.
    products: with weights, of all layers; attention: between tokens.
    head: logits.
  """
  tokens: int
  scored: int
  products: float
  attention: float
  head: float


def _decoder(config: LlavaConfig, passes: list[tuple[int, int]], scored: int
             ) -> _Decoder:
  """Causal passes, each (tokens, keys in front)."""
  text, layers = config.text, config.text.num_hidden_layers
  tokens = sum(n for n, _ in passes)
  pairs = sum(float(efficiency.causal_pairs(*p)) for p in passes)
  return _Decoder(tokens, scored,
                  layers * float(efficiency.layer_flops(text, tokens, 0)),
                  layers * float(efficiency.layer_flops(text, 0, pairs)),
                  efficiency.lm_head_flops(text, scored))


def _passes(config: LlavaConfig, stage: str, row: RowShape) -> list[tuple[int, int]]:
  """What the decoder reads of a row: one pass, or VoCo's."""
  if stage != 'voco':
    return [(row.length, 0)]
  check(config.voco is not None, 'stage voco needs a config with voco')
  C, images = config.voco.num_voco_tokens, row.num_images
  seen = C + (_PREFIX if config.voco.text_sees_prefix else 0)
  compress = (_PREFIX + config.num_visual_tokens + C, 0)
  return [compress] * images + [(row.text_length, images * seen)]


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
  scored = row.text_length if stage == 'voco' else row.length
  decoder = _decoder(config, _passes(config, stage, row), scored)
  images, size = row.num_images, lambda *prefixes: sum(
      n for path, n in trainable.items() if path.startswith(prefixes))
  selector = 0.0
  if stage == 'atp':
    visual = images * config.num_visual_tokens
    selector = float(efficiency.selector_flops(
        config, float(visual), float(max(row.length - visual, 0))))
  projector = images * efficiency.projector_flops(config)
  forward = (decoder.attention + decoder.products + decoder.head + selector
             + projector + images * efficiency.resampler_flops(config))
  if row.has_pixels:
    forward += images * efficiency.vision_flops(config)
  if has_teacher:
    teacher = _decoder(config, [(row.length, 0)], row.length)
    forward += teacher.attention + teacher.products + teacher.head + projector
  # In front of the decoder nothing but what learns needs gradients.
  through = 2 * decoder.attention + decoder.products
  head = 'embed_tokens/' if config.text.tie_word_embeddings else 'lm_head/'
  backward = through + decoder.head + 2 * selector + 2.0 * (
      decoder.tokens * size('language_model/layers/')
      + decoder.scored * size(f'language_model/{head}'))
  backward += images * _backward_in_front(config, size)
  idle = 0.0
  if stage == 'atp' and size('') == size('atp/') > 0:
    idle = through * config.atp.prune_after[0] / config.text.num_hidden_layers
  kept_away = {'nothing_saveable': decoder.attention + decoder.products,
               'dots_saveable': 0.0,
               'dots_with_no_batch_dims_saveable': decoder.attention}
  recompute = kept_away[config.remat_policy] if config.remat else 0.0
  return StepCost(*(batch_size * x for x in (
      forward, backward - idle, recompute, idle)))


def _backward_in_front(config: LlavaConfig, size: Callable[..., int]) -> float:
  """Of one image: what learns of tower, projector and resampler."""
  total, hidden, wide = 0.0, config.text.hidden_size, config.vision.hidden_size
  projector = efficiency.projector_flops(config)
  tokens = projector / (2.0 * hidden * (wide + hidden))
  if size('resampler/'):
    total += 2 * efficiency.resampler_flops(config)
  if size('vision_tower/'):
    total += 2 * efficiency.vision_flops(config) + projector
  elif size('multi_modal_projector/'):  # only its second layer's input
    total += 2.0 * tokens * hidden ** 2
  return total + 2.0 * tokens * size('multi_modal_projector/')
