"""A model directory as Hugging Face's LLaVA-1.5, one tensor at a time.

What that format has no place for (ATP's heads, VoCo's row) goes to a file of
its own beside it, and is named; LoRA adapters are merged into the weights; a
model with a resampler is refused.  All that transformers' processor needs is
written, whatever the model was made from.
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

from vlm_compress.config import LlavaConfig, LoraConfig, check
from vlm_compress.convert import adapters, hf_config, lora, rules
from vlm_compress.convert.files import WEIGHTS, load_config, new_directory
from vlm_compress.convert.from_hf import parameter_shapes
from vlm_compress.convert.hf_tokenizer import Tokens, plan_tokens, read_object
from vlm_compress.convert.preprocessor import (
  PREPROCESSOR,
  PROCESSORS,
  processor_values,
  values_for,
)
from vlm_compress.convert.processor import PROCESSOR, Processor, load_processor
from vlm_compress.convert.tensors import ADAPTERS, FLOATS, TensorFiles, TensorWriter

_TABLES = ('embed_tokens.weight', 'weight')  # of decoder and head: words first


@dataclasses.dataclass(frozen=True)
class Plan:
  """An export, before a byte is written.

  Attributes:
    source: the model's tensors.
    config: of the model as that format has it.
    lora: adapters of the model that are merged, or None.
    pieces: their key -> (our path, layer or None, move).
    specs: their key -> (shape, dtype).
    invented: their keys of tensors that the model lost and nothing reads.
    adapters: our paths that go to ADAPTERS.
    header: of that file.
    tokens: the image placeholder, and the tokenizer files.
    files: name -> values of the JSON files beside the weights.
    notes: what a reader of the result should know.
  """
  source: TensorFiles
  config: LlavaConfig
  lora: LoraConfig | None
  pieces: dict[str, tuple[str, int | None, str]]
  specs: dict[str, tuple[tuple[int, ...], str]]
  invented: list[str]
  adapters: list[str]
  header: dict[str, str]
  tokens: Tokens
  files: dict[str, dict[str, Any]]
  notes: list[str]

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
  source, shapes = _weights(directory, ours)
  tokens = plan_tokens(directory, ours)
  config = dataclasses.replace(
      ours, voco=None, atp=None, lora=None, image_token_index=tokens.image_token_index,
      text=dataclasses.replace(
          ours.text, vocab_size=ours.text.vocab_size + tokens.extra_rows))
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
        shape = (shape[0] + tokens.extra_rows, *shape[1:])
      specs[key] = (shape, ours.param_dtype)
    pieces |= found
  invented = []
  where = rules.PARTS['tower']
  for key, target in rules.expand(rules.CARRIED, where.prefixes[0], where.root,
                                  0).items():
    specs[key] = ((config.vision.hidden_size,), ours.param_dtype)
    if target[0] in source.keys:
      pieces[key] = target
    else:
      invented.append(key)
  moved = {path for path, _, _ in pieces.values()}
  side = [path for path in source.keys
          if path not in moved and not lora.is_lora(path)]
  processor = load_processor(directory)
  files, notes = _processors(directory, config, tokens, processor)
  return Plan(source, config, ours.lora, pieces, specs, invented, side,
              adapters.describe(ours, processor), tokens, files, notes)


def _weights(directory: pathlib.Path, config: LlavaConfig
             ) -> tuple[TensorFiles, dict[str, tuple[int, ...]]]:
  """The model's tensors, all there and no others, and shapes of its parameters.

  Raises:
    ConfigError: they are not those of the config.
  """
  where = directory / WEIGHTS
  source, shapes = TensorFiles(where), parameter_shapes(config)
  for path, shape in shapes.items():
    check(path in source.keys, f'{where} has no {path}' + (
        '; a model trained on frozen features has no vision tower: convert one '
        'and train from there' if path.startswith('vision_tower/') and not any(
            key.startswith('vision_tower/') for key in source.keys)
        else '; write the model directory again'))
    check(source.shape(path) == shape, f'{where}: {path} has shape '
          f'{source.shape(path)}, its config.json says {shape}; write the model '
          'directory again')
  carried = [path for path, _, _ in rules.expand(
      rules.CARRIED, '', rules.PARTS['tower'].root, 0).values()]
  there = [path for path in carried if path in source.keys]
  check(len(there) in (0, len(carried)), f'{where} has {there[:1]} of {carried}; '
        'write the model directory again')
  spare = sorted(set(source.keys) - set(shapes) - set(carried))
  check(not spare, f'{where}: {len(spare)} tensor(s) that the model in its '
        f'config.json does not have, the first is {spare[:1]}; remove them')
  for path in source.keys:
    check(source.dtype(path) in FLOATS, f'{where}: {path} is stored as '
          f'{source.dtype(path)}, which no weights are')
  return source, shapes


def _processors(directory: pathlib.Path, config: LlavaConfig, tokens: Tokens,
                processor: Processor | None) -> tuple[dict[str, dict[str, Any]], list[str]]:
  """What transformers' processor reads, and notes.

  What a source said comes along where it is not about pictures.
  """
  notes = [] if processor is not None else [
      f'{directory} has no {PROCESSOR}; pictures are padded to a square, as '
      'vlm-compress generate does']
  mode = 'pad' if processor is None else processor.image_aspect_ratio
  path = directory / PROCESSORS
  said = read_object(path) if path.is_file() else {}
  return {PREPROCESSOR: values_for(mode, config.vision.image_size),
          PROCESSORS: {**said, **processor_values(
              config, mode, tokens.image_token)}}, notes


def _weight(plan: Plan, path: str, layer: int | None) -> np.ndarray:
  """A parameter, of one layer or whole, with its adapter merged into it."""
  read = lambda name: (plan.source.read(name) if layer is None
                       else plan.source.part(name, layer))
  pair = lora.adapter_of(path, plan.source.keys)
  if pair is None:
    return read(path)
  return lora.folded(read(path), *map(read, pair), plan.lora.scale)


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
      value = rules.TO_THEIRS[move](_weight(plan, path, layer))
      writer.write_rows(key, value)
      advance(value.nbytes)
    for key in plan.invented:  # the tower's last norm is lost in training
      fill = np.ones if key.endswith('weight') else np.zeros
      writer.write(key, fill(plan.specs[key][0], np.float32))
    writer.close()
    if plan.adapters:
      side = TensorWriter(work / ADAPTERS, {
          path: (plan.source.shape(path), plan.config.param_dtype)
          for path in plan.adapters}, plan.header)
      for path in plan.adapters:
        side.write(path, plan.source.read(path))
      side.close()
    values = {**plan.files, hf_config.CONFIG: hf_config.to_hf(
        plan.config, plan.tokens.token_ids)}
    for name, value in values.items():
      (work / name).write_text(json.dumps(value, indent=1))
    for name, text in plan.tokens.files.items():
      if text is None:
        (work / name).unlink()
      else:
        (work / name).write_text(text, encoding='utf-8')
