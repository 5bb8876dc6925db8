"""What a checkpoint is, from its files: config, parts and where each part is.

Nothing is read but headers, `config.json` and the lists of added tokens.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from vlm_compress.config import ConfigError, LlavaConfig, VocoConfig, check
from vlm_compress.convert import adapters, gguf_files, hf_config, preprocessor, rules
from vlm_compress.convert.gguf_files import GgufFile
from vlm_compress.convert.pickled import open_tensors
from vlm_compress.convert.tensors import FLOATS, TensorFiles
from vlm_compress.convert.vocabulary import ADDED, ROLES, TOKENIZER

VOCO_TOKEN = '<voco>'
# Names of the file that LLaVA's first stage leaves.
PROJECTOR_FILES = ('mm_projector.safetensors', 'mm_projector.bin')
_PROJECTORS = ('projector', 'original projector')


@dataclasses.dataclass(frozen=True)
class Found:
  """A recognised checkpoint.

  Attributes:
    config: of the model, VoCo's row still in the vocabulary.
    parts: name in rules.PARTS, or 'adapters' -> its tensors and the prefix of
      its keys, for the parts that are there.
    image_aspect_ratio: how its pictures become squares.
    notes: what a reader of the result should know.
    token_ids: of BOS, EOS and padding, where config.json has them.
    template: conversation template, where an export says it.
  """
  config: LlavaConfig
  parts: dict[str, tuple[TensorFiles | GgufFile, str]]
  image_aspect_ratio: str
  notes: list[str]
  token_ids: dict[str, Any]
  template: str | None = None

  @property
  def sources(self) -> list[TensorFiles | GgufFile]:
    """Each once."""
    return list({id(t): t for t, _ in self.parts.values()}.values())

  @property
  def has_projector(self) -> bool:
    """Else it starts at random."""
    return any(name in self.parts for name in _PROJECTORS)

  def stored_dtype(self, wanted: str | None) -> str:
    """The one floating dtype of the weights; none is rounded unasked.

    Args:
      wanted: what the user says that it should become, or None.

    Raises:
      ConfigError: there are several, or a tensor holds no numbers of that kind.
    """
    found = set()
    for source in self.sources:
      for key in source.keys:
        if not key.endswith(rules.LEFT_OUT):
          found.add(source.dtype(key))
          check(source.dtype(key) in FLOATS, f'{source.where}: {key} is stored '
                f'as {source.dtype(key)}, which no weights are; only '
                f'{", ".join(FLOATS)}')
    if wanted is not None:
      return wanted
    found = sorted(found)
    where = ' and '.join(str(source.where) for source in self.sources)
    check(len(found) == 1, f'{where}: weights are {" and ".join(found)}; say '
          'with --dtype what the result should be')
    return found[0]


def recognise(source: pathlib.Path, vision: pathlib.Path | None,
              projector: pathlib.Path | None, allow_pickle: bool) -> Found:
  """Looks at the files; see from_hf.make_plan.

  Raises:
    ConfigError: something is missing, there twice, or not implemented.
  """
  main, values, where = _open(source, allow_pickle)
  parts = _parts(main)
  check('decoder' in parts or not _has_projector(parts), f'{source} holds a '
        'projector alone: give it with --projector, and its language model and '
        'tower with --llm and --vision')
  check('text' not in values or 'vision' not in values, f'{source} is a model '
        'directory already; vlm-compress export writes it in another format')
  check('decoder' in parts, f'{source}: no decoder; keys such as '
        'model.layers.0.self_attn.q_proj.weight are missing')
  whole = _has_projector(parts)
  check(whole or vision is not None, f'{source} is a language model without '
        'vision tower and projector; give a CLIP directory with --vision')
  tower = None if vision is None else _tower(vision, values, parts, source,
                                             allow_pickle)
  notes = []
  if whole:
    check(projector is None, f'{source} has a projector of its own; leave out '
          '--projector')
    config = hf_config.llava_config(values, where, tower)
    check('tower' in parts, f'{source} has no vision tower; give its directory '
          'with --vision')
  else:
    config = LlavaConfig(vision=tower,
                         text=hf_config.text_config(values, where))
    if projector is not None:
      config = _with_projector(projector, config, parts, allow_pickle, notes)
  side, template = adapters.find(source), None
  if side is not None:
    config, template = adapters.restore(config, side)
    parts['adapters'] = side, ''
    notes.append(f'its compression method comes from {side.where}')
  mode = _aspect(source, vision, values, whole, config, notes)
  said = {**(values.get('text_config') or {}), **values}
  ids = {name: said[name] for name in hf_config.SPECIAL_IDS
         if said.get(name) is not None}
  for name, value in ids.items():
    check(all(type(i) is int for i in (value if isinstance(value, list) else [value])),
          f'{where}: {name}={value!r} is no id of a token')
  return Found(config, parts, mode, notes, ids, template)


def _aspect(source: pathlib.Path, vision: pathlib.Path | None,
            values: dict[str, Any], whole: bool, config: LlavaConfig,
            notes: list[str]) -> str:
  """How pictures become squares.

  The original code says it in its config, Hugging Face's in a file of its own;
  CLIP's own file is checked, but LLaVA-1.5 pads.
  """
  found = [preprocessor.aspect_mode(directory, config.vision.image_size)
           for directory in (source, vision) if directory is not None]
  if whole and hf_config.is_original(values):
    return 'pad' if values.get('image_aspect_ratio') == 'pad' else 'crop'
  if not whole or found[0] is None:
    return 'pad'
  if found[0] == 'crop':
    notes.append(f'{source} crops pictures to their centre; LLaVA-1.5 itself '
                 'was tuned and evaluated on padded ones: '
                 '--image-aspect-ratio=pad')
  return found[0]


def _open(source: pathlib.Path, allow_pickle: bool
          ) -> tuple[TensorFiles | GgufFile, dict[str, Any], str]:
  """Tensors, values of the config, and where those stand."""
  path = gguf_files.find(source)
  if path is not None:
    file = GgufFile(path)
    return file, gguf_files.text_values(file), str(path)
  return (open_tensors(source, allow_pickle), hf_config.read_json(source),
          str(source / hf_config.CONFIG))


def _parts(tensors: TensorFiles | GgufFile
           ) -> dict[str, tuple[TensorFiles | GgufFile, str]]:
  try:
    prefixes = {name: rules.find_prefix(name, tensors.keys)
                for name in rules.PARTS}
  except ConfigError as e:
    raise ConfigError(f'{tensors.where}: {e}') from e
  return {name: (tensors, prefix) for name, prefix in prefixes.items()
          if prefix is not None}


def _has_projector(parts: dict[str, Any]) -> bool:
  return any(name in parts for name in _PROJECTORS)


def _tower(vision: pathlib.Path, values: dict,
           parts: dict[str, tuple[TensorFiles | GgufFile, str]], source: pathlib.Path,
           allow_pickle: bool):
  """Config of a CLIP directory; its tensors, unless the source has its own."""
  if 'tower' not in parts:
    found = _parts(open_tensors(vision, allow_pickle))
    check('tower' in found, f'{vision} has no CLIP vision tower')
    parts['tower'] = found['tower']
  else:  # trained along, so it is this one; only the sizes are not inside
    check(hf_config.is_original(values), f'{source} has a vision tower of its '
          f'own ({parts["tower"][1]}*); leave out --vision')
  return hf_config.vision_config(hf_config.read_json(vision),
                                 str(vision / hf_config.CONFIG))


def _with_projector(path: pathlib.Path, config: LlavaConfig,
                    parts: dict[str, tuple[TensorFiles | GgufFile, str]],
                    allow_pickle: bool, notes: list[str]) -> LlavaConfig:
  """Adds the projector of LLaVA's first stage.

  The config.json beside it says which features it was trained on.

  Raises:
    ConfigError: no projector there, or one of another language model.
  """
  directory = path
  if path.is_dir():
    there = [path / name for name in PROJECTOR_FILES if (path / name).is_file()]
    check(bool(there), f'{path} has neither {" nor ".join(PROJECTOR_FILES)}')
    path = there[0]
  else:
    directory = path.parent
  found = _parts(open_tensors(path, allow_pickle))
  check(set(found) & set(_PROJECTORS) == set(found) != set(), f'{path} holds '
        f'{sorted(found) or "no tensors of a projector"}; a projector alone '
        'has mm_projector.0.weight and so on')
  parts.update(found)
  if not (directory / hf_config.CONFIG).is_file():
    notes.append(f'{directory} has no {hf_config.CONFIG}: the projector reads '
                 f'layer {config.vision_feature_layer} of the tower, without '
                 'its class token, as in LLaVA-1.5')
    return config
  where = str(directory / hf_config.CONFIG)
  whole = hf_config.llava_config(hf_config.read_json(directory), where,
                                 config.vision)
  for name in ('hidden_size', 'num_hidden_layers', 'vocab_size'):
    ours, theirs = getattr(config.text, name), getattr(whole.text, name)
    check(ours == theirs, f'{where}: {name}={theirs}, but the language model '
          f'has {ours}: the projector was trained for another one')
  return LlavaConfig(
      vision=config.vision, text=config.text,
      vision_feature_layer=whole.vision_feature_layer,
      vision_feature_select_strategy=whole.vision_feature_select_strategy)


def added_tokens(directory: pathlib.Path) -> dict[str, int]:
  """Ids of the added tokens, from all tokenizer files that have some.

  Raises:
    ConfigError: such a file cannot be read.
  """
  def entries(name, values):
    if name == ADDED:
      return values.items()
    if name == TOKENIZER:
      return ((t['content'], t['id']) for t in values.get('added_tokens') or ())
    return ((t['content'], i) for i, t in
            (values.get('added_tokens_decoder') or {}).items())
  out: dict[str, int] = {}
  for name in (ROLES, TOKENIZER, ADDED):  # the last word is the last one's
    path = directory / name
    if not path.is_file():
      continue
    try:
      found = {str(token): int(i) for token, i in entries(
          name, json.loads(path.read_text(encoding='utf-8')))}
      if min(found.values(), default=0) < 0:
        raise ValueError(f'negative ids: {found}')
    except (ValueError, TypeError, KeyError, AttributeError) as e:
      raise ConfigError(f'{path} is no readable tokenizer file ({e!r}); '
                        'download it again') from e
    out |= found
  return out


def with_voco(config: LlavaConfig, source: pathlib.Path, count: int | None
              ) -> tuple[LlavaConfig, list[str]]:
  """VoCo-LLaMA's vocabulary is ours plus one row, and perhaps padding.

  Args:
    config: with the row in its vocabulary.
    source: where the tokenizer files are.
    count: C, which the files do not say; None is 2.

  Returns:
    The config and what to tell the user.

  Raises:
    ConfigError: a count is given and there is no such row, or the table is too
      short for it, or has words behind it.
  """
  added, rows = added_tokens(source), config.text.vocab_size
  index = added.get(VOCO_TOKEN)
  check(config.voco is None or count is None and index is None, f'{source}: '
        f'{adapters.ADAPTERS} says how many VoCo tokens an image has; leave out '
        f'--num-voco-tokens, and {VOCO_TOKEN} in the tokenizer files')
  check(index is not None or count is None, f'{source}: --num-voco-tokens, but '
        f'no tokenizer file there names {VOCO_TOKEN}; VoCo-LLaMA has an '
        f'{ADDED} with {{"{VOCO_TOKEN}": 32000}}')
  if index is None:  # a placeholder that is no word's id, nor an image's
    return dataclasses.replace(config, voco_token_index=max(
        rows, config.image_token_index + 1)), []
  check(index < rows, f'{source}: {VOCO_TOKEN} has id {index}, but the '
        f'vocabulary has {rows} rows')
  check(index != config.image_token_index, f'{source}: {VOCO_TOKEN} has id '
        f'{index}, and so have images (image_token_index in '
        f'{hf_config.CONFIG}); correct one of them')
  after = [token for token, i in added.items() if i > index]
  check(not after, f'{source}: the added tokens {after[:3]} stand behind '
        f'{VOCO_TOKEN} (id {index}), which must be the last one')
  count = 2 if count is None else count
  config = dataclasses.replace(
      config, voco_token_index=index,
      text=dataclasses.replace(config.text, vocab_size=index),
      voco=VocoConfig(num_voco_tokens=count))
  behind = rows - 1 - index
  return config, [f'{VOCO_TOKEN} (id {index}) became voco_embedding, with '
                  f'{count} tokens per image; its row of lm_head is left out: '
                  'it is never an answer' + (
                      f'; the {behind} rows behind it, which no tokenizer file '
                      'names, are taken for padding and left out, too'
                      if behind else '')]
