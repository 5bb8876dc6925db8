"""A model directory as Hugging Face's LLaVA-1.5, one tensor at a time.

What that format has no place for (ATP's heads, VoCo's row) goes to a file of
its own beside it, and is named; a model with a resampler is refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_compress.config import LlavaConfig, check
from vlm_compress.convert import hf_config, rules
from vlm_compress.convert.files import TOKENIZER, WEIGHTS, load_config, new_directory
from vlm_compress.convert.from_hf import parameter_shapes
from vlm_compress.convert.preprocessor import PREPROCESSOR, values_for
from vlm_compress.convert.processor import Processor, load_processor
from vlm_compress.convert.tensors import FLOATS, TensorFiles, TensorWriter

IMAGE_TOKEN = '<image>'
ADAPTERS = 'vlm_compress_adapters.safetensors'
_TABLES = ('embed_tokens.weight', 'weight')  # of decoder and head: words first


@dataclasses.dataclass(frozen=True)
class Plan:
  """An export, before a byte is written.

  Attributes:
    source: the model's tensors.
    config: of the model as that format has it.
    pieces: their key -> (our path, layer or None, move).
    specs: their key -> (shape, dtype).
    extra_rows: added to the vocabulary, zeros, for the image placeholder.
    adapters: our paths that go to ADAPTERS.
    processor: how its pictures are prepared; None if nothing says.
  """
  source: TensorFiles
  config: LlavaConfig
  pieces: dict[str, tuple[str, int | None, str]]
  specs: dict[str, tuple[tuple[int, ...], str]]
  extra_rows: int
  adapters: list[str]
  processor: Processor | None

  @property
  def nbytes(self) -> int:
    """Of the weights that will be written."""
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize
               for shape, dtype in self.specs.values())


def make_plan(directory: pathlib.Path) -> Plan:
  """Reads a model directory's headers.

  Raises:
    ConfigError: a model that the format cannot hold, or weights that are not
      those of the config.
  """
  ours = load_config(directory)
  check(ours.vision.model_type == 'clip_vision_model', f'{directory} has a '
        f'{ours.vision.model_type} tower; the format has CLIP towers only')
  check(ours.resampler == 'none', f'{directory} has resampler='
        f'{ours.resampler!r}, which stands between the projector and the '
        'decoder: the format has no such model')
  check(not ours.text.attention_bias or not ours.text.head_dim,
        f'{directory}: a decoder with attention_bias and head_dim has no name '
        'in the format')
  source = TensorFiles(directory / WEIGHTS)
  shapes = parameter_shapes(ours)
  for path, shape in shapes.items():
    check(path in source.keys, f'{directory / WEIGHTS} has no {path}; a model '
          'trained on frozen features has no vision tower: convert one and '
          'train from there')
    check(source.dtype(path) in FLOATS, f'{directory / WEIGHTS}: {path} is '
          f'stored as {source.dtype(path)}, which no weights are')
    check(source.shape(path) == shape, f'{directory / WEIGHTS}: {path} has '
          f'shape {source.shape(path)}, its config.json says {shape}')
  rows, index = ours.text.vocab_size, ours.image_token_index
  extra = 0 if 0 <= index < rows else 1
  config = dataclasses.replace(
      ours, voco=None, atp=None, image_token_index=rows if extra else index,
      text=dataclasses.replace(ours.text, vocab_size=rows + extra))
  table = {'decoder': rules.decoder_rules(config.text.attention_bias),
           'tower': rules.tower_rules(), 'projector': rules.projector_rules()}
  if not config.text.tie_word_embeddings:
    table['head'] = rules.head_rules()
  pieces, specs = {}, {}
  for part, rows_of_table in table.items():
    where = rules.PARTS[part]
    layers = (config.vision if part == 'tower' else config.text).num_hidden_layers
    found = rules.expand(rows_of_table, where.prefixes[0], where.root, layers)
    for key, (path, layer, move) in found.items():
      shape = shapes[path][0 if layer is None else 1:]
      shape = rules.TO_THEIRS[move](np.empty(shape, np.bool_)).shape
      if key.removeprefix(where.prefixes[0]) in _TABLES:
        shape = (shape[0] + extra, *shape[1:])
      specs[key] = (shape, ours.param_dtype)
    pieces |= found
  where = rules.PARTS['tower']
  for key, target in rules.expand(rules.CARRIED, where.prefixes[0], where.root,
                                  0).items():
    specs[key] = ((config.vision.hidden_size,), ours.param_dtype)
    if target[0] in source.keys:
      pieces[key] = target
  adapters = sorted(set(source.keys) - {path for path, _, _ in pieces.values()})
  return Plan(source, config, pieces, specs, extra, adapters,
              load_processor(directory))


def export(plan: Plan, directory: pathlib.Path, *,
           copy_from: pathlib.Path | None = None,
           advance: Callable[[int], Any] = lambda n: None) -> None:
  """Writes the directory, whole or not at all.

  Args:
    plan: what to write.
    directory: must not exist, or be empty.
    copy_from: directory whose tokenizer files are copied.
    advance: called with the number of bytes just written.

  Raises:
    ConfigError: the directory has something in it.
  """
  with new_directory(directory, copy_from) as work:
    writer = TensorWriter(work / WEIGHTS, plan.specs, {'format': 'pt'})
    for key, (path, layer, move) in plan.pieces.items():
      value = (plan.source.read(path) if layer is None
               else plan.source.part(path, layer))
      value = rules.TO_THEIRS[move](value)
      missing = plan.specs[key][0][0] - value.shape[0]
      if missing:
        value = np.pad(value, ((0, missing), (0, 0)))
      writer.write(key, value)
      advance(value.nbytes)
    for key, (shape, _) in plan.specs.items():
      if key not in plan.pieces:  # the tower's last norm is lost in training
        fill = np.ones if key.endswith('weight') else np.zeros
        writer.write(key, fill(shape, np.float32))
    writer.close()
    if plan.adapters:
      side = TensorWriter(work / ADAPTERS, {
          path: (plan.source.shape(path), plan.config.param_dtype)
          for path in plan.adapters})
      for path in plan.adapters:
        side.write(path, plan.source.read(path))
      side.close()
    (work / hf_config.CONFIG).write_text(
        json.dumps(hf_config.to_hf(plan.config), indent=1))
    _add_image_token(work / TOKENIZER, plan.config.image_token_index)
    if plan.processor is not None:
      (work / PREPROCESSOR).write_text(json.dumps(values_for(
          plan.processor.image_aspect_ratio, plan.config.vision.image_size),
          indent=1))


def _add_image_token(path: pathlib.Path, index: int) -> None:
  """Gives `<image>` its id in a tokenizer.json, for transformers' processor.

  Left as it is where the id is not the next free one: the library numbers new
  tokens by itself.
  """
  if not path.is_file():
    return
  spec = json.loads(path.read_text(encoding='utf-8'))
  added = spec.get('added_tokens') or []
  words = (spec.get('model') or {}).get('vocab') or {}
  ids = {t['id'] for t in added} | set(words.values() if isinstance(words, dict)
                                       else range(len(words)))
  if any(t['content'] == IMAGE_TOKEN for t in added) or len(ids) != index:
    return
  spec['added_tokens'] = [*added, {
      'id': index, 'content': IMAGE_TOKEN, 'single_word': False,
      'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}]
  path.write_text(json.dumps(spec, ensure_ascii=False), encoding='utf-8')
