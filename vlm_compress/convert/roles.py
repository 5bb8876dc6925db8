"""Which tokens begin, end and fill a row: tokenizer_config.json."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from vlm_compress.config import ConfigError, check

ROLES = 'tokenizer_config.json'
# Classes of transformers that put BOS in front unless the file says otherwise;
# the others do what the post-processor in tokenizer.json does.
_BOS_FIRST = ('LlamaTokenizer', 'LlamaTokenizerFast')


@dataclasses.dataclass(frozen=True)
class Roles:
  """Names of the special tokens.

  Attributes:
    bos: put in front of every row; None for a model that has none there.
    eos: closes an answer.
    pad: None for `<pad>`, or whatever there is instead.
  """
  bos: str | None = '<s>'
  eos: str = '</s>'
  pad: str | None = None


def read_roles(path: pathlib.Path, puts_in_front: Callable[[str | None], bool]
               ) -> Roles:
  """Roles from a tokenizer_config.json; the usual ones without it.

  Args:
    path: of the file.
    puts_in_front: whether the tokenizer.json itself puts this token there.

  Raises:
    ConfigError: it is not readable.
  """
  usual = Roles()
  if not path.is_file():
    return usual
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
    bos, eos, pad = (
        _token(values, f'{name}_token', getattr(usual, name))
        for name in ('bos', 'eos', 'pad'))
    adds = values.get('add_bos_token')
    kind = values.get('tokenizer_class')
    if adds is None and kind is not None and kind not in _BOS_FIRST:
      adds = puts_in_front(bos)
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ConfigError(f'{path} is no readable tokenizer configuration ({e!r})'
                      ) from e
  check(eos is not None, f'{path}: eos_token is null, but answers need an end')
  return Roles(bos if adds is None or adds else None, eos, pad)


def _token(values: dict[str, Any], name: str, usual: str | None) -> str | None:
  """A token's name, which stands as such or in an object; '' is unsaid."""
  value = values.get(name, usual)
  if isinstance(value, dict):
    value = value['content']
  if not isinstance(value, str | None):
    raise TypeError(f'{name}={value!r}')
  return usual if value == '' else value
