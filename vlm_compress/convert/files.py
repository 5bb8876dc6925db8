"""A model directory: model.safetensors, config.json, tokenizer.json.

What training hands to evaluation, generation and other machines.  Nothing in
it can execute.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax

from vlm_compress.config import ConfigError, LlavaConfig, check, from_dict, to_dict

WEIGHTS, CONFIG, TOKENIZER = 'model.safetensors', 'config.json', 'tokenizer.json'


def save_model(directory: str | os.PathLike, params: dict[str, Any],
               config: LlavaConfig, tokenizer: Any,
               dtype: str | None = None) -> None:
  """Writes a model directory; every file appears whole or not at all.

  Args:
    directory: created if absent.
    params: parameter tree.
    config: of the model.
    tokenizer: anything with save(path).
    dtype: storage dtype of floating parameters; None keeps them.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  flat = {path: jnp.asarray(x, dtype or x.dtype) for path, x in flat.items()}
  _replace(directory / WEIGHTS,
           lambda path: safetensors.flax.save_file(flat, path))
  _replace(directory / TOKENIZER, tokenizer.save)
  text = json.dumps(to_dict(config), indent=1)
  _replace(directory / CONFIG, lambda path: pathlib.Path(path).write_text(text))


def _replace(path: pathlib.Path, write) -> None:
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    write(str(temporary))
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def load_config(directory: str | os.PathLike) -> LlavaConfig:
  """The configuration of a model directory.

  Raises:
    ConfigError: missing, unreadable, or with unknown fields.
  """
  path = pathlib.Path(directory) / CONFIG
  check(path.exists(), f'{path} does not exist; is {directory} a model '
        'directory (model.safetensors, config.json, tokenizer.json)?')
  try:
    return from_dict(json.loads(path.read_text()))
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ConfigError(f'{path} is not readable JSON ({e}); write the model '
                      'directory again') from e
  except ConfigError as e:
    raise ConfigError(f'{path}: {e}') from e


def load_params(directory: str | os.PathLike) -> dict[str, Any]:
  """The parameters of a model directory, float32 numpy arrays.

  Raises:
    ConfigError: the weights are missing, truncated or not safetensors.
  """
  path = pathlib.Path(directory) / WEIGHTS
  check(path.exists(), f'{path} does not exist; train first or name another '
        '--checkpoint')
  try:
    flat = safetensors.flax.load_file(path)
  except safetensors.SafetensorError as e:
    raise ConfigError(f'{path} is damaged ({e}); write the model directory '
                      'again') from e
  flat = {name: np.asarray(x, np.float32) for name, x in flat.items()}
  return flax.traverse_util.unflatten_dict(flat, sep='/')
