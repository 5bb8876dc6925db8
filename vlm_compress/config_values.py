"""Configurations as plain values, for JSON files and config pages, and back.

What comes from outside is checked here: names of fields and types.  Whether
the values can work is checked by the dataclasses themselves.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vlm_compress.config import (
  AtpConfig,
  LlavaConfig,
  LoraConfig,
  TextConfig,
  VisionConfig,
  VocoConfig,
  check,
)

_NESTED = {'vision': VisionConfig, 'text': TextConfig, 'voco': VocoConfig,
           'atp': AtpConfig, 'lora': LoraConfig}


def to_dict(config: Any) -> dict[str, Any]:
  """A config as plain JSON types."""
  return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], cls: type = LlavaConfig) -> Any:
  """A config from plain types; an unknown field is an error with its name."""
  fields = {f.name for f in dataclasses.fields(cls)}
  unknown = sorted(set(values) - fields)
  check(not unknown, f'unknown config field(s) {unknown} for {cls.__name__}; '
        f'known: {sorted(fields)}')
  kwargs = {}
  for name, value in values.items():
    if cls is LlavaConfig and name in _NESTED and value is not None:
      check(isinstance(value, dict), f'{name}={value!r}: must be an object')
      value = from_dict(value, _NESTED[name])
    value = tuple(value) if isinstance(value, list) else value
    if name not in _NESTED:
      _check_type(name, value, getattr(cls, name))
    kwargs[name] = value
  return cls(**kwargs)


def _check_type(name: str, value: Any, default: Any) -> None:
  """A field has the type of its default; a whole number is a float, too."""
  kind = type(default)
  good = type(value) is kind or (kind is float and type(value) is int)
  if kind is tuple:  # an empty default holds numbers of layers, tokens or cells
    item = type(default[0]) if default else int
    good = good and all(type(v) is item for v in value)
  check(good, f'{name}={value!r}: must be of type {kind.__name__}')
