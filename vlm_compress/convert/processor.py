"""How text and pictures are prepared for a model: processor.json beside it.

Weights answer well only behind the conversation template and the pictures
that they were trained with, which config.json does not say.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

from vlm_compress import remote
from vlm_compress.atomic import write_text
from vlm_compress.config import ConfigError, check

PROCESSOR = 'processor.json'
ASPECT_MODES = ('pad', 'crop')


@dataclasses.dataclass(frozen=True)
class Processor:
  """How text and pictures are prepared.

  Attributes:
    template: name of the conversation template (data/templates.py has them,
      and refuses other names).
    image_aspect_ratio: 'pad' puts a picture on a square, 'crop' keeps its
      centre.
  """
  template: str
  image_aspect_ratio: str = 'pad'

  def __post_init__(self):
    check(isinstance(self.template, str) and bool(self.template),
          f'template={self.template!r}: must be the name of a conversation '
          'template')
    check(self.image_aspect_ratio in ASPECT_MODES,
          f'image_aspect_ratio={self.image_aspect_ratio!r}: use one of '
          f'{ASPECT_MODES}')


def save_processor(directory: str | os.PathLike, processor: Processor) -> None:
  """Writes processor.json into a model directory, all or nothing."""
  write_text(remote.to_path(directory) / PROCESSOR,
             json.dumps(dataclasses.asdict(processor), indent=1))


def load_processor(directory: str | os.PathLike) -> Processor | None:
  """Reads processor.json of a model directory, None if there is none.

  Raises:
    ConfigError: unreadable, or with missing or unknown fields, or with values
      that nothing can use; the message names file and field.
  """
  path = pathlib.Path(directory) / PROCESSOR
  if not path.exists():
    return None
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ConfigError(f'{path} is not readable JSON ({e}); write the model '
                      'directory again') from e
  known = [f.name for f in dataclasses.fields(Processor)]
  check(isinstance(values, dict), f'{path} holds a JSON '
        f'{type(values).__name__}; it must be an object with {known}')
  unknown = sorted(set(values) - set(known))
  check(not unknown, f'{path}: unknown field(s) {unknown}; known: {known}')
  check('template' in values, f'{path}: the field template is missing; it '
        'names the conversation template')
  try:
    return Processor(**values)
  except ConfigError as e:
    raise ConfigError(f'{path}: {e}') from e
