"""A model in memory, and what it makes of pictures and prompts.

What the functions of api.py share: pictures become vision features or VoCo
tokens, a prompt becomes arrays for one of the methods.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlm_compress.compress.baselines.downsample import reduced_pixels, reduced_size
from vlm_compress.config import LlavaConfig, check, check_whole
from vlm_compress.convert.processor import PROCESSOR, Processor
from vlm_compress.data import images as images_lib
from vlm_compress.data.examples import Turn
from vlm_compress.data.prompts import check_prompt, prompt_row
from vlm_compress.data.templates import TEMPLATES
from vlm_compress.data.tokenizer import Tokenizer
from vlm_compress.decode.prefilled import Prefilled, entering
from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.models.inputs import CompressedImages, KeptTokens, PruneOptions
from vlm_compress.models.llava import Llava
from vlm_compress.models.sequence import (
  ROW_FIELDS,
  VISUAL,
  Batch,
  VocoBatch,
  make_batch,
  split_voco,
)

METHODS = ('auto', 'full', 'voco', 'atp')
# VoCo's upper bound (arXiv 2406.12275, section 4.1): VoCo tokens stand in the row
# and hide nothing.  For evaluation; nobody would serve it.
UPPER_BOUND = 'upper_bound'
_LENGTH_STEP = 64  # tokens
_PICTURES_KEPT = 64  # of whose features a Vlm keeps hold


def own_method(config: LlavaConfig) -> str:
  """The method that a model was made for."""
  return ('atp' if config.atp is not None else
          'voco' if config.voco is not None else 'full')


@dataclasses.dataclass(frozen=True, eq=False)
class Vlm:
  """A model directory in memory.

  Attributes:
    config: of the model.
    params: parameters, as they were given: numpy arrays, or spread over a mesh.
    tokenizer: of the model.
    processor: how its text and pictures are prepared, None if unknown.
    directory: where it comes from, '' if from nowhere.
    end_ids: tokens that end an answer; without any, the tokenizer's EOS.
  """
  config: LlavaConfig
  params: Any
  tokenizer: Tokenizer
  processor: Processor | None = None
  directory: str = ''
  end_ids: Collection[int] = ()
  _features: dict[bytes, np.ndarray] = dataclasses.field(
      default_factory=dict, init=False, repr=False)

  def __post_init__(self):
    if not self.end_ids:
      object.__setattr__(self, 'end_ids', {self.tokenizer.eos_id})

  @property
  def model(self) -> Llava:
    """The module; its functions take `on_device`."""
    return Llava(self.config)

  @functools.cached_property
  def on_device(self) -> Any:
    """Parameters as device arrays."""
    return jax.device_put(self.params)

  @functools.cached_property
  def segmented(self) -> SegmentedModel:
    """The model for serving, with the programs compiled so far."""
    return SegmentedModel(self.config, self.params)

  def template(self) -> str:
    """The name of the conversation template.

    Raises:
      ConfigError: processor.json is missing, or names none that exists.
    """
    path = pathlib.Path(self.directory) / PROCESSOR
    check(self.processor is not None,
          f'{path} does not exist, so it is not known how the model was '
          f'asked in training; name the template (--template), one of '
          f'{sorted(TEMPLATES)}')
    name = self.processor.template
    check(name in TEMPLATES, f'{path}: template={name!r} is unknown; use one '
          f'of {sorted(TEMPLATES)}')
    return name

  def method(self, name: str = 'auto') -> str:
    """'full', 'voco' or 'atp'; 'auto' is what the model was made for.

    Raises:
      ConfigError: no such method, or the model has not what it needs.
    """
    config, where = self.config, self.directory or 'the model'
    check(name in (*METHODS, UPPER_BOUND), f'method={name!r}: use one of {METHODS}')
    if name == 'auto':
      return own_method(config)
    check(name not in ('voco', UPPER_BOUND) or config.voco is not None,
          f'{where} has no VoCo tokens; use method full')
    check(name != 'atp' or config.atp is not None,
          f'{where} has no ATP modules; use method full')
    return name

  def pixels(self, image: Any) -> np.ndarray:
    """A picture (see `generate`) as the tower sees it, uint8[S, S, 3]."""
    mode = self.processor.image_aspect_ratio if self.processor else 'pad'
    return np.asarray(images_lib.tower_pixels(
        images_lib.open_picture(image), self.config.vision, mode))

  def features(self, image: Any) -> np.ndarray:
    """Vision features of a picture (see `generate`), float[P', Dv]."""
    pixels = self.pixels(image)
    key = hashlib.sha256(pixels).digest()
    if key not in self._features:
      while len(self._features) >= _PICTURES_KEPT:
        self._features.pop(next(iter(self._features)))
      self._features[key] = self._encode(pixels)
    return self._features[key]

  def _encode(self, pixels: np.ndarray) -> np.ndarray:
    if self.config.vision.model_type == 'efficientnet_lite0':
      from vlm_compress.models.efficientnet import extract_features
      pixels = reduced_pixels(pixels[None], reduced_size(self.config))
      return np.asarray(extract_features(self._efficientnet, pixels)[0])
    check('vision_tower' in self.params, f'{self.directory or "the model"} has '
          'no weights of its CLIP tower: convert a checkpoint that has, and '
          'train from there')
    return np.asarray(_vision(self.model, self.segmented.rest, images_lib.
                              clip_normalize(pixels)[None, None])[0, 0],
                      np.float32)

  @functools.cached_property
  def _efficientnet(self) -> Any:
    from vlm_compress.convert.efficientnet import load_efficientnet_lite0
    return load_efficientnet_lite0()


@dataclasses.dataclass(frozen=True)
class CompressedImage:
  """A picture as VoCo tokens; stands for it in `generate` and `logits`.

  Attributes:
    vlm: the model that compressed it and can read it.
    num_voco_tokens: C.
    segment_ids: token ids of the compression segment.
    state: keys and values of the one image.
  """
  vlm: Vlm = dataclasses.field(repr=False)
  num_voco_tokens: int
  segment_ids: tuple[int, ...] = dataclasses.field(repr=False)
  state: CompressedImages = dataclasses.field(repr=False)


def compress_image(vlm: Vlm, image: Any, num_voco_tokens: int | None = None
                   ) -> CompressedImage:
  """A picture as VoCo tokens, so that several questions pay for it once.

  It may stand anywhere among the images of a prompt: an image is compressed
  alone, whatever stands around it.

  Args:
    vlm: a model with VoCo tokens.
    image: see `generate`.
    num_voco_tokens: C, if not as trained.

  Raises:
    DataError: the picture is none.
    ConfigError: the model has no VoCo tokens, or fewer than that.
  """
  vlm.method('voco')
  count = voco_count(vlm.config, num_voco_tokens)
  # What a compressed image has seen is the same in all templates.
  row = prompt_row('', 1, vlm.tokenizer, vlm.config, 'short', count)
  segment = _split(row, vlm.config, 1).segment_ids
  state = vlm.segmented.compress(vlm.features(image)[None, None], segment, count)
  return CompressedImage(vlm, count, segment, state)


@dataclasses.dataclass(frozen=True)
class KeptImage:
  """A picture as the tokens that ATP kept of it for a prompt.

  It stands for the picture in `generate`, also under other prompts, which then
  read what the first one kept.

  Attributes:
    vlm: the model.
    prompt: which the tokens were kept for.
    prefix_ids: token ids of the row up to the image's end.
    state: keys and values.
    visual_tokens: float[M], visual tokens that entered each layer.
  """
  vlm: Vlm = dataclasses.field(repr=False)
  prompt: str
  prefix_ids: tuple[int, ...] = dataclasses.field(repr=False)
  state: KeptTokens = dataclasses.field(repr=False)
  visual_tokens: np.ndarray = dataclasses.field(repr=False)


def keep_image(vlm: Vlm, image: Any, prompt: str) -> KeptImage:
  """A picture as what ATP keeps of it for a prompt.

  Args:
    vlm: a model with ATP modules.
    image: see `generate`.
    prompt: a question.

  Raises:
    DataError: the picture is none.
    ConfigError: the model has no ATP modules.
  """
  vlm.method('atp')
  check(not isinstance(image, (CompressedImage, KeptImage)),
        f'a {type(image).__name__} is no picture; give the picture itself')
  row = prepare(vlm, prompt, [image], 'atp', None)
  state = vlm.segmented.prefill(row.batch, row.prune)
  fields = {name: getattr(row.batch, name)[0] for name in ROW_FIELDS}
  end = _image_end(fields)
  return KeptImage(vlm, prompt, placeholder_ids(vlm, fields, end),
                   vlm.segmented.keep(state, row.size - end),
                   entering(vlm.config, state.pruning).sum((1, 2)))


def _image_end(row: dict[str, np.ndarray]) -> int:
  return int(np.flatnonzero(row['token_types'] == VISUAL)[-1]) + 1


def placeholder_ids(vlm: Vlm, row: dict[str, np.ndarray],
                    end: int | None = None) -> tuple[int, ...]:
  """Token ids of a row, or of its first, with a placeholder per visual token."""
  visual = row['token_types'][:end] == VISUAL
  ids = np.where(visual, vlm.config.image_token_index, row['input_ids'][:end])
  return tuple(ids.tolist())


class Row(NamedTuple):
  """A prompt as the model reads it: `size` tokens without padding, which
  take `positions`; batch holds the text only if there are compressed images,
  and the text behind the image if that is a kept one.
  """
  model: Llava
  batch: Batch
  size: int
  positions: int
  prune: PruneOptions | None = None
  compressed: CompressedImages | None = None
  voco_positions: np.ndarray | None = None
  kept: KeptImage | None = None


def prepare(vlm: Vlm, prompt: str | Sequence[Turn], images: Sequence[Any],
            method: str, num_voco_tokens: int | None,
            answered: bool = False) -> Row:
  """Lays a prompt out; compresses pictures that are not yet (voco).

  Every prompt of a user comes through here, so here it is checked; `answered`
  allows that its last turn has an answer.
  """
  check_prompt(prompt, answered)
  check(isinstance(images, (list, tuple)),
        f'images is a {type(images).__name__}; give a list of pictures')
  method, template, config = vlm.method(method), vlm.template(), vlm.config
  given = [i for i in images if isinstance(i, CompressedImage)]
  kept = [i for i in images if isinstance(i, KeptImage)]
  check(method == 'voco' or not given, 'a compressed image can only be read '
        f'with method voco, not {method}; give the picture itself')
  check(not kept or method == 'atp' and len(images) == 1, 'a kept image can '
        f'only be read with method atp and alone, not with method {method} and '
        f'{len(images)} image(s); give the picture itself')
  check(method == 'voco' or num_voco_tokens is None,
        f'num_voco_tokens={num_voco_tokens} has no meaning for method {method}')
  check(all(i.vlm is vlm for i in given + kept), 'a compressed or kept image '
        'comes from another model; make it with this one')
  if method == 'voco' and images:
    if num_voco_tokens is None and given:
      num_voco_tokens = given[0].num_voco_tokens
    count = voco_count(vlm.config, num_voco_tokens)
    check(all(i.num_voco_tokens == count for i in given),
          f'the compressed images have {[i.num_voco_tokens for i in given]} '
          f'VoCo tokens, but this prompt has {count} for each')
    row = prompt_row(prompt, len(images), vlm.tokenizer, config, template,
                     count)
    return _compressed_row(vlm, row, images, count)
  if method == 'full':
    config = dataclasses.replace(config, voco=None, atp=None)
  hidden = config.voco.num_voco_tokens if method == UPPER_BOUND and images else 0
  row = prompt_row(prompt, len(images), vlm.tokenizer, config, template, hidden,
                   hides=method != UPPER_BOUND)
  shape = (0, config.num_patches, config.vision.hidden_size)
  if kept:
    return _kept_row(vlm, row, kept[0], np.zeros(shape))
  features = [vlm.features(i) for i in images]
  size = len(row['input_ids'])
  batch = make_batch([row], [np.stack(features) if images else np.zeros(shape)],
                     length=padded(size), num_images=len(images))
  return Row(Llava(config), batch, size, int(row['positions'][-1]) + 1,
             PruneOptions() if method == 'atp' and images else None)


def _kept_row(vlm: Vlm, row: dict[str, np.ndarray], image: KeptImage,
              no_features: np.ndarray) -> Row:
  """The text behind an image that was pruned before."""
  end, size = _image_end(row), len(row['input_ids'])
  check(placeholder_ids(vlm, row, end) == image.prefix_ids, 'the prompt has other text '
        'in front of the image than the prompt that it was kept for')
  check(end < size, 'no text follows the image')
  text = {name: values[end:] for name, values in row.items()}
  batch = make_batch([text], [no_features], length=padded(size - end),
                     num_images=0)
  return Row(vlm.model, batch, size - end, int(row['positions'][-1]) + 1,
             kept=image)


def _compressed_row(vlm: Vlm, row: dict[str, np.ndarray],
                    images: Sequence[Any], count: int) -> Row:
  """The text behind images, all of which are compressed then."""
  ready = [i if isinstance(i, CompressedImage) else
           compress_image(vlm, i, count) for i in images]
  split = _split(row, vlm.config, len(images))
  check(all(i.segment_ids == split.segment_ids for i in ready),
        'the prompt puts other tokens between image and VoCo tokens than the '
        'compressed image has')
  along = lambda *x: jnp.concatenate(x, axis=2)
  states = [i.state for i in ready]
  compressed = states[0].replace(keys=along(*[s.keys for s in states]),
                                 values=along(*[s.values for s in states]))
  size = int(split.text.valid[0].sum())
  return Row(vlm.model, split.text, size, int(row['positions'][-1]) + 1,
             compressed=compressed, voco_positions=split.voco_positions)


def _split(row: dict[str, np.ndarray], config: LlavaConfig, num_images: int
           ) -> VocoBatch:
  """Text and segments of a row, with images whose features nobody reads."""
  nothing = np.zeros((num_images, 0, config.vision.hidden_size))
  batch = make_batch([row], [nothing], length=len(row['input_ids']),
                     num_images=num_images)
  length = int((batch.image_ids == 0).sum())
  return split_voco(batch, config, padded(length))


def prefill(vlm: Vlm, row: Row, room: int) -> Prefilled:
  """Runs a prompt; `room` new tokens can follow, or a few more."""
  room = padded(room)  # few numbers, few programs
  if row.compressed is not None:
    return vlm.segmented.read(row.batch, row.compressed, row.voco_positions, room)
  if row.kept is not None:
    before = sum(i != vlm.config.image_token_index for i in row.kept.prefix_ids)
    return vlm.segmented.read_kept(row.batch, row.kept.state, before, room)
  return vlm.segmented.prefill(row.batch, row.prune, room)


def padded(size: int) -> int:
  """The next multiple of the step of lengths: few lengths, few programs."""
  return -(-size // _LENGTH_STEP) * _LENGTH_STEP


def voco_count(config: LlavaConfig, count: int | None) -> int:
  """C: what is asked for, or what the model was trained with.

  Raises:
    ConfigError: more than that, or none.
  """
  trained = config.voco.num_voco_tokens
  if count is None:
    return trained
  check_whole('num_voco_tokens', count)
  check(1 <= count <= trained, f'num_voco_tokens={count}: '
        f'the model was made for 1 to {trained}')
  return count


@functools.partial(jax.jit, static_argnums=0)
def _vision(model: Llava, params: Any, pixels: jax.Array) -> jax.Array:
  return model.apply({'params': params}, pixels, method='vision_features')
