"""Public checkpoints into a model directory, one tensor at a time.

The whole plan is made from the headers of the files, and balanced, before
anything is written: no key of the source and no parameter of the model may be
left over.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vlm_compress.config import PARAM_DTYPES, LlavaConfig, check
from vlm_compress.config_values import to_dict
from vlm_compress.convert import adapters, hf_config, rules, vocabulary
from vlm_compress.convert.files import CONFIG, GENERATION, WEIGHTS, abstract_params, new_directory
from vlm_compress.convert.gguf_files import GgufFile
from vlm_compress.convert.processor import Processor, save_processor
from vlm_compress.convert.recognise import Found, recognise, with_voco
from vlm_compress.convert.tensors import TensorFiles, TensorWriter
from vlm_compress.models.llava import Llava, init_params

# Tables of the words, whose last row is VoCo's in its layout.
_SHARED = ('language_model/embed_tokens/embedding',
           'language_model/lm_head/kernel')


@dataclasses.dataclass(frozen=True)
class Piece:
  """What one source tensor becomes.

  Attributes:
    source: where it is.
    key: its name there.
    target: our path.
    layer: index along the leading axis, or None.
    move: name in rules.TO_OURS.
    rows: first and last + 1 of the source tensor that go there; None for all.
  """
  source: TensorFiles | GgufFile
  key: str
  target: str
  layer: int | None
  move: str
  rows: tuple[int, int] | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Of what is read."""
    shape = self.source.shape(self.key)
    if self.rows is None or not shape:
      return shape
    first, end = (min(row, shape[0]) for row in self.rows)
    return (end - first, *shape[1:])

  @property
  def nbytes(self) -> int:
    """Of what is read."""
    return math.prod(self.shape) * jnp.dtype(
        self.source.dtype(self.key)).itemsize

  def value(self) -> np.ndarray:
    """Our array."""
    array = (self.source.read(self.key) if self.rows is None
             else self.source.part(self.key, slice(*self.rows)))
    return rules.TO_OURS[self.move](array)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A conversion, before a byte is written.

  Attributes:
    config: of the model.
    pieces: in the order of the rules.
    shapes: our path -> shape, of all parameters.
    fresh: paths that no source has, which start at random (--llm, --vision).
    notes: what a reader of the result should know.
    tokenizer: name -> text of files about tokens that the source has in
      another form only.
    processor: how text and pictures are prepared.
  """
  config: LlavaConfig
  pieces: list[Piece]
  shapes: dict[str, tuple[int, ...]]
  fresh: list[str]
  notes: list[str]
  tokenizer: dict[str, str]
  processor: Processor


def make_plan(source: pathlib.Path, vision: pathlib.Path | None = None, *,
              projector: pathlib.Path | None = None, dtype: str | None = None,
              num_voco_tokens: int | None = None, allow_pickle: bool = False
              ) -> Plan:
  """Recognises a checkpoint from its files.

  Args:
    source: LLaVA (Hugging Face's or the original), VoCo-LLaMA, or a language
      model, which needs `vision` and may be a GGUF file.
    vision: directory of a CLIP tower, if not inside.
    projector: file, or directory, of a projector alone (LLaVA's first stage),
      for a language model.
    dtype: of the parameters; None keeps the source's.
    num_voco_tokens: C for a checkpoint with a <voco> row, which does not say
      it; None is 2, its scripts' number.
    allow_pickle: also read PyTorch's files, as weights alone.

  Raises:
    ConfigError: a format, field, key, shape or dtype that does not fit.
  """
  found = recognise(source, vision, projector, allow_pickle)
  config, notes = with_voco(found.config, source, num_voco_tokens)
  split = config.voco is not None and found.config.voco is None
  decoder = found.parts['decoder'][0]
  tokenizer = vocabulary.build(
      source, decoder.metadata if isinstance(decoder, GgufFile) else None,
      config.text.vocab_size + split)
  if found.token_ids and not (source / GENERATION).is_file():
    tokenizer[GENERATION] = json.dumps(found.token_ids, indent=1)
  stored = found.stored_dtype(dtype)
  check(stored in PARAM_DTYPES, f'{source}: weights are {stored}; say with '
        f'--dtype which of {PARAM_DTYPES} the result should be')
  config = dataclasses.replace(  # bfloat16 has fewer digits than float16
      config, param_dtype=stored,
      dtype='bfloat16' if stored == 'bfloat16' else 'float32')
  shapes = parameter_shapes(config)
  pieces = _pieces(found, config, shapes)
  if split:
    pieces = list(_split_voco(pieces, config.text.vocab_size))
  _balance(pieces, found)
  fresh = _check_shapes(pieces, shapes, allow_fresh=not found.has_projector)
  template = 'vicuna_v1' if config.voco is None else 'voco_v1'
  processor = Processor(found.template or template, found.image_aspect_ratio)
  return Plan(config, pieces, shapes, fresh, [*found.notes, *notes], tokenizer,
              processor)


def _pieces(found: Found, config: LlavaConfig,
            shapes: dict[str, tuple[int, ...]]) -> list[Piece]:
  """All pieces of the model, before VoCo's row is split off; `shapes` gets
  those that are carried along.
  """
  pieces = []
  for part, (rows, layers) in _tables(config).items():
    if part in found.parts:
      tensors, prefix = found.parts[part]
      pieces += [Piece(tensors, key, *target) for key, target in rules.expand(
          rows, prefix, rules.PARTS[part].root, layers).items()]
    check(part != 'head' or part in found.parts,
          f'{found.parts["decoder"][0].where} has no '
          'lm_head.weight; if the head is the embedding, set '
          f'"tie_word_embeddings": true in {hf_config.CONFIG}')
  tensors, prefix = found.parts['tower']
  carried = rules.expand(rules.CARRIED, prefix, rules.PARTS['tower'].root, 0)
  if any(key in tensors.keys for key in carried):
    for key, target in carried.items():
      pieces.append(Piece(tensors, key, *target))
      shapes[target[0]] = (config.vision.hidden_size,)
  if 'adapters' in found.parts:
    tensors, _ = found.parts['adapters']
    pieces += [Piece(tensors, path, path, None, 'same') for path in shapes
               if adapters.is_adapter(path)]
  return pieces


def _tables(config: LlavaConfig) -> dict[str, tuple[list[rules.Rule], int]]:
  """Part -> its rules and its number of layers."""
  text = config.text
  tables = {'decoder': (rules.decoder_rules(text.attention_bias),
                        text.num_hidden_layers),
            'tower': (rules.tower_rules(), config.vision.num_hidden_layers),
            'projector': (rules.projector_rules(), 0),
            'original projector': (rules.projector_rules(original=True), 0)}
  if not text.tie_word_embeddings:
    tables['head'] = (rules.head_rules(), 0)
  return tables


def parameter_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
  """Path -> shape of all parameters, the vision tower's included."""
  tree = nn.unbox(abstract_params(config, with_vision=True))
  return {path: tuple(leaf.shape) for path, leaf in
          flax.traverse_util.flatten_dict(tree, sep='/').items()}


def _split_voco(pieces: list[Piece], vocab_size: int) -> Iterator[Piece]:
  for piece in pieces:
    if piece.target not in _SHARED:
      yield piece
      continue
    yield dataclasses.replace(piece, rows=(0, vocab_size))
    if piece.target == _SHARED[0]:
      yield dataclasses.replace(piece, target='voco_embedding',
                                rows=(vocab_size, vocab_size + 1))


def _balance(pieces: list[Piece], found: Found) -> None:
  """Raises for keys that the model lacks or does not know."""
  tower = found.parts['tower'][0]
  for source in found.sources:
    wanted = {p.key for p in pieces if p.source is source}
    missing = sorted(wanted - set(source.keys))
    check(not missing, f'{source.where}: {len(missing)} tensor(s) missing, the '
          f'first is {missing[:1]}; the files do not fit {hf_config.CONFIG}')
    spare = [k for k in source.keys
             if k not in wanted and not k.endswith(rules.LEFT_OUT)]
    if source is tower and source is not found.parts['decoder'][0]:
      spare = [k for k in spare if not k.startswith(rules.CLIP_TEXT)]
    if found.config.text.tie_word_embeddings and 'head' in found.parts:
      spare = _without_tied_head(spare, source, found)
    check(not spare, f'{source.where}: {len(spare)} tensor(s) that the model '
          f'in {hf_config.CONFIG} does not have, the first is {spare[:1]}')


def _without_tied_head(spare: list[str], source: TensorFiles | GgufFile,
                       found: Found) -> list[str]:
  head = found.parts['head'][1] + 'weight'
  table = found.parts['decoder'][1] + 'embed_tokens.weight'
  if head not in spare:
    return spare
  check(np.array_equal(source.read(head), source.read(table)),
        f'{source.where}: tie_word_embeddings is set, but {head} differs from '
        f'{table}; unset it')
  return [k for k in spare if k != head]


def _check_shapes(pieces: list[Piece], shapes: dict[str, tuple[int, ...]],
                  allow_fresh: bool) -> list[str]:
  """Compares every piece with its place; returns paths without a piece."""
  for piece in pieces:
    shape = piece.shape
    want = shapes[piece.target][0 if piece.layer is None else 1:]
    got = rules.TO_OURS[piece.move](np.empty(shape, np.bool_)).shape if (
        len(shape) == len(want)) else shape
    check(got == want, f'{piece.source.where}: {piece.key} has shape '
          f'{piece.source.shape(piece.key)}, which gives {piece.target} '
          f'{got}; the model in {hf_config.CONFIG} has {want}')
  fresh = sorted(set(shapes) - {p.target for p in pieces})
  check(allow_fresh or not fresh, f'nothing in the checkpoint gives {fresh[:3]}')
  return fresh


def convert(plan: Plan, directory: pathlib.Path, *,
            copy_from: pathlib.Path | None = None, seed: int = 0,
            advance: Callable[[int], Any] = lambda n: None,
            verify: Callable[[pathlib.Path], Any] = lambda directory: None
            ) -> None:
  """Writes a model directory, whole or not at all.

  Args:
    plan: what to write.
    directory: must not exist, or be empty.
    copy_from: directory whose tokenizer files are copied.
    seed: of parameters that no source has.
    advance: called with the number of bytes just written.
    verify: called with the directory, when all is written, before it appears.

  Raises:
    ConfigError: the directory has something in it.
  """
  dtype = plan.config.param_dtype
  with new_directory(directory, copy_from) as work:
    writer = TensorWriter(work / WEIGHTS, {
        path: (shape, dtype) for path, shape in plan.shapes.items()})
    for piece in plan.pieces:
      value = piece.value()
      writer.write(piece.target, value, piece.layer)
      advance(value.nbytes)
    for path, value in _fresh(plan, seed).items():
      writer.write(path, value)
    writer.close()
    save_processor(work, plan.processor)
    (work / CONFIG).write_text(json.dumps(to_dict(plan.config), indent=1))
    for name, text in plan.tokenizer.items():
      (work / name).write_text(text, encoding='utf-8')
    verify(work)


def _fresh(plan: Plan, seed: int) -> dict[str, np.ndarray]:
  """Random values of the parameters that no source has (small ones)."""
  if not plan.fresh:
    return {}
  def draw(key):
    tree = nn.unbox(init_params(Llava(plan.config), key))
    flat = flax.traverse_util.flatten_dict(tree, sep='/')
    return {path: flat[path] for path in plan.fresh}
  return {k: np.asarray(v) for k, v in jax.jit(draw)(jax.random.key(seed)).items()}
