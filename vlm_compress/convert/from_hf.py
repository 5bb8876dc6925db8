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

from vlm_compress.config import ConfigError, LlavaConfig, VocoConfig, check, to_dict
from vlm_compress.convert import hf_config, rules
from vlm_compress.convert.files import CONFIG, TOKENIZER, WEIGHTS, new_directory
from vlm_compress.convert.tensors import TensorFiles, TensorWriter
from vlm_compress.models.llava import Llava, init_params

VOCO_TOKEN = '<voco>'
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
  source: TensorFiles
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
  """
  config: LlavaConfig
  pieces: list[Piece]
  shapes: dict[str, tuple[int, ...]]
  fresh: list[str]
  notes: list[str]


def make_plan(source: pathlib.Path, vision: pathlib.Path | None = None, *,
              dtype: str | None = None, num_voco_tokens: int = 2) -> Plan:
  """Recognises a checkpoint from its files.

  Args:
    source: LLaVA (Hugging Face's or the original), VoCo-LLaMA, or a language
      model, which needs `vision`.
    vision: directory of a CLIP tower, if not inside.
    dtype: of the parameters; None keeps the source's.
    num_voco_tokens: C for a checkpoint with a <voco> row, which does not say.

  Raises:
    ConfigError: a format, field, key, shape or dtype that does not fit.
  """
  config, main, tower, parts = _recognise(source, vision)
  config, notes = _with_voco(config, source, num_voco_tokens)
  sources = [main] if tower is main else [main, tower]
  stored = dtype or _stored_dtype(sources)
  config = dataclasses.replace(
      config, param_dtype=stored,
      dtype='float32' if stored == 'float32' else 'bfloat16')
  text = config.text
  table = {'decoder': (rules.decoder_rules(text.attention_bias),
                       text.num_hidden_layers),
           'tower': (rules.tower_rules(), config.vision.num_hidden_layers),
           'projector': (rules.projector_rules(), 0),
           'original projector': (rules.projector_rules(original=True), 0)}
  if not text.tie_word_embeddings:
    check(parts['head'] is not None, f'{source} has no lm_head.weight; if the '
          'head is the embedding, set "tie_word_embeddings": true in '
          f'{hf_config.CONFIG}')
    table['head'] = (rules.head_rules(), 0)
  shapes, pieces = parameter_shapes(config), []
  for part, (rows, layers) in table.items():
    if parts[part] is not None:
      found = rules.expand(rows, parts[part], rules.PARTS[part].root, layers)
      pieces += [Piece(tower if part == 'tower' else main, key, *target)
                 for key, target in found.items()]
  for key, target in rules.expand(rules.CARRIED, parts['tower'],
                                  rules.PARTS['tower'].root, 0).items():
    if key in tower.keys:
      pieces.append(Piece(tower, key, *target))
      shapes[target[0]] = (config.vision.hidden_size,)
  if config.voco is not None:
    pieces = list(_split_voco(pieces, text.vocab_size))
  _balance(pieces, sources, config, parts)
  fresh = _check_shapes(pieces, shapes, allow_fresh=not _is_whole(parts))
  return Plan(config, pieces, shapes, fresh, notes)


def _is_whole(parts: dict[str, str | None]) -> bool:
  """A projector is there, so it is no language model alone."""
  return (parts['projector'] or parts['original projector']) is not None


def _recognise(source: pathlib.Path, vision: pathlib.Path | None
               ) -> tuple[LlavaConfig, TensorFiles, TensorFiles,
                          dict[str, str | None]]:
  """Config, tensors of the model and of its tower, prefix of every part."""
  main = TensorFiles(source)
  values, where = hf_config.read_json(source), str(source / hf_config.CONFIG)
  parts = {name: rules.find_prefix(name, main.keys) for name in rules.PARTS}
  check(parts['decoder'] is not None, f'{source}: no decoder; a key that ends '
        'in embed_tokens.weight is missing')
  check(_is_whole(parts) or vision is not None, f'{source} is a language model '
        'without vision tower and projector; give a CLIP directory with '
        '--vision')
  tower, tower_config = main, None
  if vision is not None:
    if parts['tower'] is None:
      tower = TensorFiles(vision)
      parts['tower'] = rules.find_prefix('tower', tower.keys)
      check(parts['tower'] is not None, f'{vision} has no CLIP vision tower')
    else:  # trained along, so it is this one; only the sizes are not inside
      check(hf_config.is_original(values), f'{source} has a vision tower of its '
            f'own ({parts["tower"]}...); leave out --vision')
    tower_config = hf_config.vision_config(hf_config.read_json(vision),
                                           str(vision / hf_config.CONFIG))
  if not _is_whole(parts):
    config = LlavaConfig(vision=tower_config,
                         text=hf_config.text_config(values, where))
  else:
    config = hf_config.llava_config(values, where, tower_config)
    check(parts['tower'] is not None, f'{source} has no vision tower; give its '
          'directory with --vision')
  return config, main, tower, parts


def parameter_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
  """Path -> shape of all parameters, the vision tower's included."""
  tree = nn.unbox(jax.eval_shape(
      lambda key: init_params(Llava(config), key, with_vision=True),
      jax.random.key(0)))
  return {path: tuple(leaf.shape) for path, leaf in
          flax.traverse_util.flatten_dict(tree, sep='/').items()}


def _stored_dtype(sources: list[TensorFiles]) -> str:
  """The one floating dtype of the weights; none is rounded unasked.

  Raises:
    ConfigError: there are several.
  """
  found = sorted({source.dtype(key) for source in sources
                  for key in source.keys if not key.endswith(rules.LEFT_OUT)})
  where = ' and '.join(str(source.where) for source in sources)
  check(len(found) == 1, f'{where}: weights are {" and ".join(found)}; say '
        'with --dtype what the result should be')
  return found[0]


def _token_id(directory: pathlib.Path, token: str) -> int | None:
  """The id of an added token, from whichever tokenizer file has it."""
  def entries(name, values):
    if name == 'added_tokens.json':
      return values.items()
    if name == TOKENIZER:
      return ((t['content'], t['id']) for t in values.get('added_tokens', ()))
    return ((t['content'], i) for i, t in
            values.get('added_tokens_decoder', {}).items())
  for name in ('added_tokens.json', TOKENIZER, 'tokenizer_config.json'):
    path = directory / name
    if not path.is_file():
      continue
    try:
      found = dict(entries(name, json.loads(path.read_text(encoding='utf-8'))))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
      raise ConfigError(f'{path} is no readable tokenizer file ({e!r})') from e
    if token in found:
      return int(found[token])
  return None


def _with_voco(config: LlavaConfig, source: pathlib.Path, count: int
               ) -> tuple[LlavaConfig, list[str]]:
  """VoCo-LLaMA's vocabulary is ours plus one row at the end."""
  token_id, rows = _token_id(source, VOCO_TOKEN), config.text.vocab_size
  if token_id is None:
    return config, []
  check(token_id == rows - 1, f'{source}: {VOCO_TOKEN} has id {token_id}, but '
        f'the vocabulary has {rows} rows; it must be the last one')
  config = dataclasses.replace(
      config, voco_token_index=token_id,
      text=dataclasses.replace(config.text, vocab_size=rows - 1),
      voco=VocoConfig(num_voco_tokens=count))
  return config, [f'{VOCO_TOKEN} (id {token_id}) became voco_embedding, with '
                  f'{count} tokens per image; its row of lm_head is left out: '
                  'it is never an answer']


def _split_voco(pieces: list[Piece], vocab_size: int) -> Iterator[Piece]:
  for piece in pieces:
    if piece.target not in _SHARED:
      yield piece
      continue
    yield dataclasses.replace(piece, rows=(0, vocab_size))
    if piece.target == _SHARED[0]:
      yield dataclasses.replace(piece, target='voco_embedding',
                                rows=(vocab_size, vocab_size + 1))


def _balance(pieces: list[Piece], sources: list[TensorFiles],
             config: LlavaConfig, parts: dict[str, str | None]) -> None:
  """Raises for keys that the model lacks or does not know."""
  for source in sources:
    wanted = {p.key for p in pieces if p.source is source}
    missing = sorted(wanted - set(source.keys))
    check(not missing, f'{source.where}: {len(missing)} tensor(s) missing, the '
          f'first is {missing[:1]}; the files do not fit {hf_config.CONFIG}')
    spare = [k for k in source.keys
             if k not in wanted and not k.endswith(rules.LEFT_OUT)]
    if len(sources) > 1 and source is sources[1]:
      spare = [k for k in spare if not k.startswith(rules.CLIP_TEXT)]
    if config.text.tie_word_embeddings and parts['head'] is not None:
      spare = _without_tied_head(spare, source, parts)
    check(not spare, f'{source.where}: {len(spare)} tensor(s) that the model '
          f'in {hf_config.CONFIG} does not have, the first is {spare[:1]}')


def _without_tied_head(spare: list[str], source: TensorFiles,
                       parts: dict[str, str | None]) -> list[str]:
  head, table = parts['head'] + 'weight', parts['decoder'] + 'embed_tokens.weight'
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
            advance: Callable[[int], Any] = lambda n: None) -> None:
  """Writes a model directory, whole or not at all.

  Args:
    plan: what to write.
    directory: must not exist, or be empty.
    copy_from: directory whose tokenizer files are copied.
    seed: of parameters that no source has.
    advance: called with the number of bytes just written.

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
    (work / CONFIG).write_text(json.dumps(to_dict(plan.config), indent=1))


def _fresh(plan: Plan, seed: int) -> dict[str, np.ndarray]:
  """Random values of the parameters that no source has (small ones)."""
  if not plan.fresh:
    return {}
  def draw(key):
    tree = nn.unbox(init_params(Llava(plan.config), key))
    flat = flax.traverse_util.flatten_dict(tree, sep='/')
    return {path: flat[path] for path in plan.fresh}
  return {k: np.asarray(v) for k, v in jax.jit(draw)(jax.random.key(seed)).items()}
