"""What an export has no place for, in a file of its own beside it.

`vlm_compress_adapters.safetensors` has the arrays (ATP's heads, VoCo's row)
under our names, and in its header what config.json cannot say of them, so that
`convert` gives the model back.
"""

from __future__ import annotations

import json
import pathlib

from vlm_compress.config import ConfigError, LlavaConfig, check
from vlm_compress.config_values import from_dict, to_dict
from vlm_compress.convert.processor import Processor
from vlm_compress.convert.tensors import ADAPTERS, TensorFiles

ROOTS = ('atp', 'voco_embedding')  # first components of their paths
_KEY = 'vlm_compress'  # in the file's header
_FIELDS = ('voco', 'atp')


def is_adapter(path: str) -> bool:
  """Whether a parameter belongs to a compression method."""
  return path.split('/')[0] in ROOTS


def describe(config: LlavaConfig, processor: Processor | None
             ) -> dict[str, str]:
  """The file's header.

  Args:
    config: of the model, its method included.
    processor: how text and pictures are prepared; None if nothing says.
  """
  values = {name: to_dict(config)[name] for name in _FIELDS}
  values['template'] = None if processor is None else processor.template
  return {_KEY: json.dumps(values)}


def find(source: pathlib.Path) -> TensorFiles | None:
  """The file of an exported directory, None if there is none."""
  path = source / ADAPTERS
  return TensorFiles(path) if path.is_file() else None


def restore(config: LlavaConfig, file: TensorFiles
            ) -> tuple[LlavaConfig, str | None]:
  """The config with its method again, and the conversation template.

  Args:
    config: of the exported model.
    file: from `find`.

  Raises:
    ConfigError: the file does not say, or says what does not fit the model.
  """
  text = file.metadata().get(_KEY)
  check(text is not None, f'{file.where} does not say what its tensors are (the '
        f'header has no {_KEY}); export the model again, or remove the file to '
        'convert the model without them')
  try:
    values = json.loads(text)
    template = values.pop('template')
    check(template is None or isinstance(template, str),
          f'template={template!r} is no name')
    return from_dict({
        **to_dict(config), **{name: values.pop(name) for name in _FIELDS},
        # a placeholder that is no word's id, nor an image's
        'voco_token_index': max(config.text.vocab_size,
                                config.image_token_index + 1)}), template
  except (ValueError, TypeError, KeyError, AttributeError) as e:
    raise ConfigError(f'{file.where}: its header does not fit the model ({e!r}); '
                      'export the model again') from e
