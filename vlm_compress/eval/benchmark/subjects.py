"""What is measured: a model, and prompts of one picture and 64 text tokens.

Time depends on sizes and on how many tokens are kept, not on what weights
say: the slice of the 7B model has random ones, and its modules' thresholds are
moved (the dial) until the average is what it should be.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vlm_compress.config import AtpConfig, LlavaConfig, TextConfig, VisionConfig, VocoConfig
from vlm_compress.convert.files import abstract_params, load_config, load_params
from vlm_compress.convert.lora import merge
from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.models.sequence import Batch, VocoBatch, expand_row, make_batch, split_voco
from vlm_compress.presets import prune_after_for

# As many as LLaVA-1.5's system text with a question of a line.
NUM_TEXT, NUM_BEFORE = 64, 35
BOS, NEWLINE, WORD = 1, 2, 3
SMALL = 'quickstart'  # name of the subject


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model to measure.

  Attributes:
    name: in the report.
    atp: configuration with ATP modules; `plain` and `voco` are its siblings.
    model: serves `atp`.
    features: float[n, P', Dv], of n pictures that prompts can be about.
  """
  name: str
  atp: LlavaConfig
  model: SegmentedModel
  features: np.ndarray

  @property
  def plain(self) -> LlavaConfig:
    """Without a method."""
    return dataclasses.replace(self.atp, atp=None)

  def voco(self, num_voco_tokens: int) -> LlavaConfig:
    """With VoCo tokens."""
    return dataclasses.replace(
        self.plain, voco=VocoConfig(num_voco_tokens),
        voco_token_index=self.atp.text.vocab_size)


def slice_name(num_layers: int) -> str:
  """Of `slice_of_7b`."""
  return f'7B slice, {num_layers} layers'


def slice_of_7b(num_layers: int, dtype: str, num_pictures: int) -> Subject:
  """LLaVA-1.5-7B's widths with fewer decoder layers, random weights.

  Args:
    num_layers: M.
    dtype: of activations and parameters.
    num_pictures: n.
  """
  placed = prune_after_for(num_layers)
  config = LlavaConfig(
      vision=VisionConfig(), text=TextConfig(num_hidden_layers=num_layers),
      atp=AtpConfig(prune_after=placed, target_tokens=576.0), dtype=dtype,
      param_dtype=dtype)
  rng = np.random.default_rng(0)
  features = rng.standard_normal(
      (num_pictures, config.num_patches, config.vision.hidden_size), np.float32)
  model = SegmentedModel(config, random_params(config, rng))
  return Subject(slice_name(num_layers), config, model, features)


def small(directory: Any, features: np.ndarray) -> Subject:
  """A model directory; fresh modules and a fresh VoCo row where it has none.

  LoRA adapters are merged, as transformers, which it is compared with, has them.

  Args:
    directory: of the model.
    features: float[n, P', Dv].
  """
  params, config = merge(load_params(directory), load_config(directory))
  if config.atp is None:
    config = dataclasses.replace(config, voco=None, atp=AtpConfig(
        prune_after=prune_after_for(config.text.num_hidden_layers),
        target_tokens=float(config.num_visual_tokens)))
  fresh = random_params(config, np.random.default_rng(0), of_layers=False)
  params = {**fresh, **params}
  return Subject(SMALL, config, SegmentedModel(config, params), features)


def random_params(config: LlavaConfig, rng: np.random.Generator,
                  of_layers: bool = True) -> dict[str, Any]:
  """Parameters of a model with ATP modules, and a VoCo row beside them.

  Decoder layers come one by one, so that no stack of them is ever in memory.

  Args:
    config: of the model, with `atp`.
    rng: draws.
    of_layers: also those of the decoder, the vision tower and the projector.
  """
  one = dataclasses.replace(config, atp=None, text=dataclasses.replace(
      config.text, num_hidden_layers=1))
  text = config.text
  dtype = jnp.dtype(config.param_dtype)

  def draw(path: str, shape: tuple[int, ...], dtype: Any = dtype) -> np.ndarray:
    if path.endswith(('weight', 'scale')):
      return np.ones(shape, dtype)
    if path.endswith('bias'):
      return np.zeros(shape, dtype)
    scale = np.float32(text.initializer_range)
    return (rng.standard_normal(shape, np.float32) * scale).astype(dtype)

  heads = nn.unbox(abstract_params(config, False))['atp']
  out: dict[str, Any] = {
      'atp': _fresh_heads(config, heads, rng),
      'voco_embedding': draw('voco', (1, text.hidden_size))}
  if not of_layers:
    return out
  shapes = nn.unbox(abstract_params(
      one, with_vision=config.vision.model_type == 'clip_vision_model'))
  layer = shapes['language_model'].pop('layers')
  flat = flax.traverse_util.flatten_dict(shapes, sep='/')
  rest = flax.traverse_util.unflatten_dict(
      {path: draw(path, x.shape) for path, x in flat.items()}, sep='/')
  flat = flax.traverse_util.flatten_dict(layer, sep='/')
  rest['language_model']['layers'] = [flax.traverse_util.unflatten_dict(
      {path: draw(path, x.shape[1:]) for path, x in flat.items()}, sep='/')
      for _ in range(text.num_hidden_layers)]
  return {**rest, **out}


def _fresh_heads(config: LlavaConfig, shapes: Any, rng: np.random.Generator
                 ) -> Any:
  """Modules whose thresholds differ a little between instances, as trained
  ones do; the redundancy score alone decides, at about the average score.
  """
  heads = jax.tree.map(
      lambda x: (rng.standard_normal(x.shape) * 0.05).astype(np.float32), shapes)
  heads['redundancy']['bias'][:] = 0.0
  heads['spatial']['bias'][:] = 30.0  # never: the dial then moves one thing
  return heads


def prompt_batch(subject: Subject, num_rows: int) -> Batch:
  """Prompts of NUM_TEXT text tokens, the picture behind NUM_BEFORE of them."""
  ids = ([BOS] + [WORD] * (NUM_BEFORE - 1) + [subject.plain.image_token_index]
         + [WORD] * (NUM_TEXT - NUM_BEFORE))
  return _batch(subject, subject.plain, ids, num_rows)


def voco_batch(subject: Subject, num_rows: int, num_voco_tokens: int
               ) -> VocoBatch:
  """The same number of text tokens in VoCo's layout, the picture first."""
  config = subject.voco(num_voco_tokens)
  ids = ([BOS, config.image_token_index, NEWLINE] +
         [config.voco_token_index] * num_voco_tokens + [NEWLINE] +
         [WORD] * (NUM_TEXT - 3))
  return split_voco(_batch(subject, config, ids, num_rows), config, NUM_TEXT - 2)


def picture_batch(subject: Subject, num_rows: int) -> Batch:
  """BOS, picture and newline: what a visual cache in front of text holds."""
  ids = [BOS, subject.plain.image_token_index, NEWLINE]
  return _batch(subject, subject.plain, ids, num_rows)


def text_batch(subject: Subject, num_rows: int) -> Batch:
  """The text behind `picture_batch`."""
  whole = ([BOS, subject.plain.image_token_index, NEWLINE] +
           [WORD] * (NUM_TEXT - 2))
  row = expand_row(whole, [False] * len(whole), [0] * len(whole), subject.plain)
  start = len(row['positions']) - (NUM_TEXT - 2)
  row = {name: values[start:] for name, values in row.items()}
  nothing = np.zeros((0, *subject.features.shape[1:]), np.float32)
  return make_batch([row] * num_rows, [nothing] * num_rows,
                    length=NUM_TEXT - 2, num_images=0)


def _batch(subject: Subject, config: LlavaConfig, ids: list[int], num_rows: int
           ) -> Batch:
  rows = [expand_row(ids, [False] * len(ids), [0] * len(ids), config)] * num_rows
  return make_batch(rows, [subject.features[i:i + 1] for i in range(num_rows)],
                    length=len(rows[0]['positions']), num_images=1)
