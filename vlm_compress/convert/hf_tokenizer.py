"""The tokenizer files of an export, so that transformers gives our ids.

Its processor finds the image placeholder by name, puts BOS in front only where
`tokenizer.json` says so, and ends an answer at what `generation_config.json`
names; each is added where the model directory does without.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from vlm_compress.config import ConfigError, LlavaConfig, check
from vlm_compress.convert.files import GENERATION, SPECIALS, generation_ends
from vlm_compress.convert.hf_config import SPECIAL_IDS
from vlm_compress.convert.recognise import VOCO_TOKEN
from vlm_compress.convert.roles import read_roles
from vlm_compress.convert.vocabulary import ADDED, ROLES, TOKENIZER

IMAGE_TOKEN = '<image>'


@dataclasses.dataclass(frozen=True)
class Tokens:
  """What an export says about tokens.

  Attributes:
    image_token_index: id of the image placeholder.
    extra_rows: of the vocabulary, which the model has not, for that id.
    image_token: its name.
    token_ids: of BOS, EOS and padding, for config.json.
    files: name -> text, or None for a file that is left out.
    notes: what a reader of the result should know.
  """
  image_token_index: int
  extra_rows: int
  image_token: str = IMAGE_TOKEN
  token_ids: dict[str, Any] = dataclasses.field(default_factory=dict)
  files: dict[str, str | None] = dataclasses.field(default_factory=dict)
  notes: list[str] = dataclasses.field(default_factory=list)


def plan_tokens(directory: pathlib.Path, config: LlavaConfig) -> Tokens:
  """Looks at the tokenizer files of a model directory.

  Args:
    directory: of the model.
    config: of the model, its method included.

  Raises:
    ConfigError: a file that is not readable, or lacks a token that has a role.
  """
  rows, index = config.text.vocab_size, config.image_token_index
  path, inside = directory / TOKENIZER, 0 <= index < rows
  if not path.is_file():
    note = (f'{directory} has no {TOKENIZER}; the processor of transformers '
            f'needs one, in which {IMAGE_TOKEN} has the id ')
    index = index if inside else rows
    return Tokens(index, int(index == rows), notes=[f'{note}{index}'])
  spec, drop = read_object(path), config.voco is not None
  try:
    added = spec.get('added_tokens') or []
    spec['added_tokens'] = _without(added, VOCO_TOKEN) if drop else added
    ids = _ids(spec)
    _puts(spec.get('post_processor'), '')
  except (ValueError, TypeError, KeyError, AttributeError) as e:
    raise ConfigError(f'{path} is no readable tokenizer file ({e!r}); write the '
                      'model directory again') from e
  spare = [token for token, i in ids.items()
           if i >= rows + (token == IMAGE_TOKEN)]
  check(not spare, f'{path}: {len(spare)} tokens such as {spare[:1]} have no row '
        f'in the embedding, which has {rows}; they are not of the same model')
  if not inside:  # the first row that no token has, if there is one
    index = ids.get(IMAGE_TOKEN, 1 + max(ids.values(), default=-1))
  token, notes = _name_image(spec, ids, index, path)
  files = _configure(directory, spec, ids, drop)
  if spec != read_object(path):
    files[TOKENIZER] = json.dumps(spec, ensure_ascii=False)
  files |= _generation(directory, json.loads(files[ROLES]), ids)
  ends = (json.loads(files[GENERATION]) if GENERATION in files else
          read_object(directory / GENERATION))
  extra = int(index == rows)
  fits = lambda i: all(0 <= j < rows + extra for j in (i if isinstance(i, list) else [i]))
  return Tokens(index, extra, token, {
      name: ends[name] for name in SPECIAL_IDS
      if ends.get(name) is not None and fits(ends[name])}, files, notes)


def read_object(path: pathlib.Path) -> dict[str, Any]:
  """A JSON file that holds an object.

  Raises:
    ConfigError: it does not.
  """
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as e:
    raise ConfigError(f'{path} is not readable JSON ({e}); write the model '
                      'directory again') from e
  check(isinstance(values, dict), f'{path} must hold a JSON object; write the '
        'model directory again')
  return values


def _ids(spec: dict[str, Any]) -> dict[str, int]:
  """Token -> id, of a tokenizer.json."""
  words = spec['model']['vocab']
  if not isinstance(words, dict):  # with scores, in the order of their ids
    words = {word: i for i, (word, _) in enumerate(words)}
  return {**words, **{t['content']: t['id'] for t in spec['added_tokens']}}


def _without(value: Any, token: str) -> Any:
  """A JSON value without a token, as a key, an element or an object."""
  names = lambda v: v == token or isinstance(v, dict) and v.get('content') == token
  if isinstance(value, dict):
    return {k: _without(v, token) for k, v in value.items()
            if k != token and not names(v)}
  if isinstance(value, list):
    return [_without(v, token) for v in value if not names(v)]
  return value


def _name_image(spec: dict[str, Any], ids: dict[str, int], index: int,
                path: pathlib.Path) -> tuple[str, list[str]]:
  """Adds `<image>` where it can be; the placeholder's name, and notes."""
  names = {i: token for token, i in ids.items()}
  found = ids.get(IMAGE_TOKEN)
  if found == index or index in names:
    return names[index], []
  if found is not None:
    return IMAGE_TOKEN, [f'{path}: {IMAGE_TOKEN} has the id {found}, but images '
                         f'stand at id {index}; correct one of them before '
                         'transformers reads pictures']
  if sorted(names) != list(range(index)):  # it numbers new tokens by itself
    return IMAGE_TOKEN, [f'{path} lacks {IMAGE_TOKEN}, and id {index} is not its '
                         'next free one, so it cannot be added: give pictures '
                         'to transformers as ids, not as text']
  spec['added_tokens'] = [*spec['added_tokens'], {
      'id': index, 'content': IMAGE_TOKEN, 'single_word': False,
      'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}]
  return IMAGE_TOKEN, []


def _configure(directory: pathlib.Path, spec: dict[str, Any],
               ids: dict[str, int], drop: bool) -> dict[str, str | None]:
  """tokenizer_config.json and what is like it; BOS goes into `spec`."""
  path = directory / ROLES
  roles = read_roles(path, lambda bos: _puts(spec.get('post_processor'), bos))
  for token in (roles.bos, roles.eos, roles.pad):
    check(token is None or token in ids, f'{path}: {token!r} is no token of '
          f'{TOKENIZER} beside it; name the tokens that have these roles there '
          '(bos_token, eos_token, pad_token)')
  if roles.bos is not None and not _puts(spec.get('post_processor'), roles.bos):
    template = _template(roles.bos, ids[roles.bos])
    before = spec.get('post_processor')
    spec['post_processor'] = template if before is None else {
        'type': 'Sequence', 'processors': [before, template]}
  values = read_object(path) if path.is_file() else {}
  for name, token in (('bos', roles.bos), ('eos', roles.eos), ('pad', roles.pad),
                      ('unk', spec['model'].get('unk_token'))):
    said = values.get(f'{name}_token')
    values[f'{name}_token'] = (
        said.get('content') if isinstance(said, dict) else said) or token
  # the class that takes tokenizer.json as it is; LlamaTokenizer builds anew
  values |= {'tokenizer_class': 'PreTrainedTokenizerFast',
             'add_bos_token': roles.bos is not None}
  files = {ROLES: values}
  for name in (ADDED, SPECIALS):
    if drop and (directory / name).is_file():
      files[name] = read_object(directory / name)
  if drop:
    files = {name: _without(values, VOCO_TOKEN) for name, values in files.items()}
  return {name: json.dumps(values, indent=1, ensure_ascii=False) if values else None
          for name, values in files.items()}


def _puts(processor: dict[str, Any] | None, token: str | None) -> bool:
  """Whether a post-processor puts a token in front."""
  if processor is None or token is None:
    return False
  if processor['type'] == 'Sequence':
    return any(_puts(inner, token) for inner in processor['processors'])
  first = next(iter(processor.get('single', ())), {})
  return (first.get('SpecialToken', {}).get('id') == token or
          processor.get('cls', [None])[0] == token)


def _template(bos: str, bos_id: int) -> dict[str, Any]:
  """A post-processor that puts BOS in front of each of one or two texts."""
  pair = [part for kind, name in enumerate('AB') for part in (
      {'SpecialToken': {'id': bos, 'type_id': kind}},
      {'Sequence': {'id': name, 'type_id': kind}})]
  return {'type': 'TemplateProcessing', 'single': pair[:2], 'pair': pair,
          'special_tokens': {bos: {'id': bos, 'ids': [bos_id], 'tokens': [bos]}}}


def _generation(directory: pathlib.Path, roles: dict[str, Any],
                ids: dict[str, int]) -> dict[str, str]:
  """A generation_config.json that says what ends an answer, if none does."""
  path = directory / GENERATION
  if generation_ends(directory):
    return {}
  found = {f'{name}_token_id': ids.get(roles[f'{name}_token'])
           for name in ('bos', 'eos', 'pad')}
  said = read_object(path) if path.is_file() else {}
  values = {**{k: v for k, v in found.items() if v is not None},
            **{k: v for k, v in said.items() if v is not None}}
  return {GENERATION: json.dumps(values, indent=1)}
