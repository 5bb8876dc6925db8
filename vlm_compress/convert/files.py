"""A model directory: model.safetensors, config.json, tokenizer.json, processor.json.

What training hands to evaluation, generation and other machines.  Nothing in
it can execute.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vlm_compress import atomic, remote, sharding
from vlm_compress.config import ConfigError, LlavaConfig, check
from vlm_compress.config_values import from_dict, to_dict
from vlm_compress.convert.preprocessor import PREPROCESSOR, PROCESSORS
from vlm_compress.convert.processor import PROCESSOR, Processor, save_processor
from vlm_compress.convert.tensors import FLOATS, TensorFiles, TensorWriter
from vlm_compress.convert.vocabulary import ADDED, ROLES, SENTENCEPIECE, TOKENIZER
from vlm_compress.models.llava import Llava, init_params

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
GENERATION, SPECIALS = 'generation_config.json', 'special_tokens_map.json'
# Of other formats, kept beside the weights when they are there.
TOKENIZER_FILES = (TOKENIZER, SENTENCEPIECE, ROLES, SPECIALS, ADDED,
                   PREPROCESSOR, PROCESSORS,
                   'chat_template.json', 'chat_template.jinja', GENERATION)


def save_model(directory: str | os.PathLike, params: dict[str, Any],
               config: LlavaConfig, tokenizer: Any,
               dtype: str | None = None,
               processor: Processor | None = None,
               copy_from: str | os.PathLike | None = None) -> None:
  """Writes a model directory; every file appears whole or not at all.

  Args:
    directory: created if absent; on a disk, or gs://.
    params: parameter tree; arrays that are spread over devices are brought
      together one at a time.  With several processes all of them call this,
      and the first one writes.
    config: of the model.
    tokenizer: anything with save(path).
    dtype: storage dtype of floating parameters; None keeps them.
    processor: how its text and pictures are prepared; None if unknown.
    copy_from: directory whose files of other formats are copied, or None.
  """
  directory = remote.to_path(directory)
  flat = dict(sorted(_flat(params).items()))
  if jax.process_index() != 0:
    for x in flat.values():
      _whole(x)
    return
  remote.mkdir(directory)
  with atomic.replace(directory / WEIGHTS) as temporary:
    writer = TensorWriter(temporary, {
        path: (x.shape, dtype or jnp.dtype(x.dtype).name)
        for path, x in flat.items()})
    for path, x in flat.items():
      writer.write(path, _whole(x))
    writer.close()
    # the disk had room: from here on this is another model, and not yet whole
    (directory / CONFIG).unlink(missing_ok=True)
  if copy_from is not None and pathlib.Path(copy_from) != directory:
    _copy(pathlib.Path(copy_from), directory)
  _replace(directory / TOKENIZER, tokenizer.save)
  (directory / PROCESSOR).unlink(missing_ok=True)  # perhaps of another model
  if processor is not None:
    save_processor(directory, processor)
  text = json.dumps(to_dict(config), indent=1)
  _replace(directory / CONFIG, lambda path: pathlib.Path(path).write_text(text))


def _whole(x: Any) -> np.ndarray:
  """An array on the host, also of devices that other processes have."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


@contextlib.contextmanager
def new_directory(directory: pathlib.Path, copy_from: pathlib.Path | None
                  ) -> Iterator[pathlib.Path]:
  """A model directory that appears whole or not at all.

  Args:
    directory: must not exist, or be empty.
    copy_from: directory whose tokenizer files are copied, or None.

  Yields:
    The directory to write to, with the copies.

  Raises:
    ConfigError: the directory has something in it.
  """
  check(not directory.exists() or directory.is_dir()
        and not any(directory.iterdir()), f'{directory} exists and is not '
        'empty; name another directory or delete it')
  with atomic.directory(directory) as work:
    if copy_from is not None:
      _copy(copy_from, work)
    yield work


def _copy(source: pathlib.Path, to: pathlib.Path) -> None:
  for name in TOKENIZER_FILES:
    if (source / name).is_file():
      shutil.copyfile(source / name, to / name)


def generation_ends(directory: str | os.PathLike) -> list[int]:
  """Ids that end an answer, from generation_config.json; [] without one.

  Raises:
    ConfigError: it is not readable.
  """
  path = pathlib.Path(directory) / GENERATION
  if not path.is_file():
    return []
  try:
    found = json.loads(path.read_text(encoding='utf-8')).get('eos_token_id')
    found = [] if found is None else found
    return [int(i) for i in (found if isinstance(found, list) else [found])]
  except (ValueError, TypeError, AttributeError) as e:
    raise ConfigError(f'{path}: no readable eos_token_id ({e!r}); '
                      'correct it, or remove the file') from e


def _replace(path: pathlib.Path, write) -> None:
  with atomic.replace(path) as temporary:
    write(str(temporary))


def load_config(directory: str | os.PathLike) -> LlavaConfig:
  """The configuration of a model directory.

  Raises:
    ConfigError: missing, unreadable, or with unknown fields or values of
      the wrong type.
  """
  path = pathlib.Path(directory) / CONFIG
  check(path.exists(), f'{path} does not exist; is {directory} a model '
        'directory (model.safetensors, config.json, tokenizer.json)?')
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ConfigError(f'{path} is not readable JSON ({e}); write the model '
                      'directory again') from e
  check(isinstance(values, dict), f'{path} holds a JSON '
        f'{type(values).__name__}; it must be an object of config fields')
  check('model_type' not in values and 'architectures' not in values,
        f'{path} is of a public checkpoint; turn it into a model directory '
        'first: vlm-compress convert')
  try:
    return from_dict(values)
  except (ConfigError, TypeError) as e:
    raise ConfigError(f'{path}: {e}') from e


def load_params(directory: str | os.PathLike, mesh: Mesh | None = None
                ) -> dict[str, Any]:
  """The parameters of a model directory, arrays of its param_dtype.

  Args:
    directory: of the model.
    mesh: devices that the parameters are for: each is given its shards, which
      are all that is read for it.  None gives numpy arrays.

  Raises:
    ConfigError: the weights are missing, truncated, not safetensors, or not
      those of the model in config.json.
  """
  path = pathlib.Path(directory) / WEIGHTS
  check(path.exists(), f'{path} does not exist; train first or name another '
        '--checkpoint')
  tensors, config = TensorFiles(path), load_config(directory)
  boxed = abstract_params(config, with_vision=any(
      key.startswith('vision_tower/') for key in tensors.keys))
  _check_tensors(tensors, nn.unbox(boxed), path)
  dtype = jnp.dtype(config.param_dtype)
  if mesh is None:
    flat = {name: _aligned(tensors.read(name), dtype) for name in tensors.keys}
  else:
    placed = _flat(sharding.tree_shardings(boxed, mesh))
    flat = {name: jax.make_array_from_callback(
        tensors.shape(name), placed.get(name, sharding.replicated(mesh)),
        lambda index, name=name: tensors.part(name, index).astype(dtype))
            for name in tensors.keys}
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def _aligned(x: np.ndarray, dtype: Any) -> np.ndarray:
  """A copy whose memory jax shares on a CPU: aligned to 64 bytes."""
  size = x.size * np.dtype(dtype).itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  out = memory[start:start + size].view(dtype).reshape(x.shape)
  out[...] = x
  return out


def abstract_params(config: LlavaConfig, with_vision: bool) -> Any:
  """Shapes of a model's parameters, boxed with their logical axes.

  Args:
    config: of the model.
    with_vision: also those of its CLIP tower.
  """
  return jax.eval_shape(
      lambda key: init_params(Llava(config), key, with_vision),
      jax.random.key(0))


def _flat(tree: Any) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(tree, sep='/')


def _check_tensors(tensors: TensorFiles, tree: Any, path: pathlib.Path) -> None:
  """Compares weights with the parameters of a model; more do no harm.

  Raises:
    ConfigError: a parameter is missing, has another shape, or is no float.
  """
  for name, leaf in _flat(tree).items():
    check(name in tensors.keys, f'{path} has no parameter {name}, which the '
          f'model in {CONFIG} beside it needs; write the model directory again')
    check(tensors.shape(name) == leaf.shape,
          f'{path}: parameter {name} has shape {tensors.shape(name)}, but the '
          f'model in {CONFIG} beside it needs {leaf.shape}; write the model '
          'directory again')
    check(tensors.dtype(name) in FLOATS, f'{path}: parameter {name} is stored '
          f'as {tensors.dtype(name)}, which no weights are; write the model '
          'directory again')
