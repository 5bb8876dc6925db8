"""Tensors of checkpoint directories, read and written one at a time.

A checkpoint may be larger than the memory, so neither side is ever held
whole: reading maps the files, writing puts each piece where it belongs.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from vlm_compress.config import ConfigError, check

INDEX = 'model.safetensors.index.json'
# Names of dtypes in a safetensors file.
DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16',
          'F64': 'float64', 'I64': 'int64', 'I32': 'int32'}
FLOATS = ('float64', 'float32', 'float16', 'bfloat16')
_CODES = {name: code for code, name in DTYPES.items()}
# Of other parts of a model than its own, which lie in the same directory.
ADAPTERS = 'vlm_compress_adapters.safetensors'
_BLOCK = 2 ** 24  # bytes that are cast and written at once


class TensorFiles:
  """The tensors of one or more safetensors files, by key.

  Attributes:
    where: the directory or file, for messages.
    keys: of all tensors, sorted.
  """

  def __init__(self, where: str | os.PathLike[str]):
    """Opens a directory (with an index, or all its files) or one file.

    Raises:
      ConfigError: no safetensors there, a file of the index is missing, a
        file is truncated or no safetensors file, or a key stands twice.
    """
    self.where = pathlib.Path(where)
    self._headers = by_key(self.where, _safetensors(self.where), INDEX,
                           _header)
    self.keys = sorted(self._headers)

  def shape(self, key: str) -> tuple[int, ...]:
    """The shape of a tensor; nothing is read."""
    return self._headers[key][1]

  def dtype(self, key: str) -> str:
    """Its dtype, as numpy spells it.

    Raises:
      ConfigError: a dtype that no weights have (quantised ones).
    """
    code = self._headers[key][2]
    check(code in DTYPES, f'{self.where}: {key} is stored as {code}; only '
          f'{", ".join(sorted(DTYPES.values()))} can be converted')
    return DTYPES[code]

  def read(self, key: str) -> np.ndarray:
    """The tensor."""
    with self._open(key) as file:
      return file.get_tensor(key)

  def part(self, key: str, index: Any) -> np.ndarray:
    """A slice of the tensor; the rest is not read."""
    with self._open(key) as file:
      return file.get_slice(key)[index]

  def metadata(self) -> dict[str, str]:
    """What the headers of the files say besides."""
    out = {}
    for path in sorted({path for path, _, _ in self._headers.values()}):
      with safetensors.safe_open(path, framework='numpy') as file:
        out |= file.metadata() or {}
    return out

  def _open(self, key: str) -> Any:
    # Opened for every tensor: what a mapping has read counts as this
    # process's memory for as long as it is open.
    return safetensors.safe_open(self._headers[key][0], framework='numpy')


def files_of(where: pathlib.Path, index_name: str, pattern: str
             ) -> dict[pathlib.Path, set[str] | None]:
  """Files of a checkpoint -> keys that must be in them, None if nothing says.

  Args:
    where: a directory (its index, else all files of the pattern) or a file.
    index_name: of the file that says which key is in which file.
    pattern: of the files' names.

  Raises:
    ConfigError: no directory, or an index that cannot be read or names files
      elsewhere.
  """
  if where.is_file():
    return {where: None}
  check(where.is_dir(), f'{where} is no directory of a checkpoint')
  index = where / index_name
  if not index.exists():
    return dict.fromkeys(sorted(where.glob(pattern)))
  try:
    weight_map = json.loads(index.read_text(encoding='utf-8'))['weight_map']
    if not all(isinstance(name, str) for name in weight_map.values()):
      raise TypeError('weight_map must give names of files')
    names = {name: {k for k, v in weight_map.items() if v == name}
             for name in sorted(set(weight_map.values()))}
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ConfigError(f'{index} is no index of a sharded checkpoint ({e!r}); '
                      'download it again') from e
  for name in names:
    check(name == os.path.basename(name), f'{index} names {name!r}, which is '
          'not in its own directory')
  return {where / name: keys for name, keys in names.items()}


def by_key(where: pathlib.Path, files: dict[pathlib.Path, set[str] | None],
           index_name: str, open_file: Callable[[pathlib.Path], dict[str, Any]]
           ) -> dict[str, Any]:
  """What each key is read from.

  Args:
    where: of the checkpoint, for messages.
    files: from files_of.
    index_name: for messages.
    open_file: path -> what each of its keys is read from.

  Raises:
    ConfigError: a file of the index is missing or lacks a key, or a key
      stands twice.
  """
  out: dict[str, Any] = {}
  for path, expected in files.items():
    check(path.exists(), f'{path} is missing, but {index_name} names it; copy '
          f'it to {path.parent}')
    found = open_file(path)
    lost = sorted((expected or set()) - set(found))
    check(not lost, f'{path} has no {lost[:1]}, which {index_name} says is in '
          'it; download both again')
    twice = sorted(set(found) & set(out))
    check(not twice, f'{path}: {twice[:1]} is in another file of {where}, too; '
          'remove one of them')
    out.update(found)
  return out


def _header(path: pathlib.Path
            ) -> dict[str, tuple[pathlib.Path, tuple[int, ...], str]]:
  """Key -> file, shape and code of the dtype."""
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      slices = {key: file.get_slice(key) for key in file.keys()}
      return {key: (path, tuple(part.get_shape()), part.get_dtype())
              for key, part in slices.items()}
  except (safetensors.SafetensorError, OSError) as e:
    raise ConfigError(f'{path} is truncated or no safetensors file ({e}); '
                      'download it again') from e


def pickles_in(where: pathlib.Path) -> list[pathlib.Path]:
  """PyTorch's pickles, where there are no safetensors beside them."""
  if where.is_file():
    return [where] * (where.suffix in ('.bin', '.pt', '.pth'))
  shards = sorted(where.glob('pytorch_model*.bin'))
  done = [path for path in shards if path.with_suffix('.safetensors').exists()]
  if 0 < len(done) < len(shards):  # somebody is turning them, one by one
    return shards
  if [*where.glob('*.safetensors')]:
    return []
  return shards or sorted(where.glob('*.bin'))


def _safetensors(where: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
  """files_of; what is no safetensors is refused, with the way out.

  Raises:
    ConfigError: there are none.
  """
  pickles = pickles_in(where)
  if pickles:
    names = [str(path) for path in pickles]
    raise ConfigError(
        f'{names[0]} is a pickle, which may hold programs and is not opened '
        'unasked: where you trust it, give --allow-pickle, or turn it into '
        'safetensors: python -c "import torch, safetensors.torch as s; '
        "[s.save_file({k: v.clone() for k, v in torch.load(f, "
        "weights_only=True).items()}, f.rsplit('.', 1)[0] + '.safetensors') "
        f'for f in {names}]"')
  found = files_of(where, INDEX, '*.safetensors')
  if where.is_dir():
    found.pop(where / ADAPTERS, None)
  check(bool(found), f'{where} has no *.safetensors')
  return found


class TensorWriter:
  """Writes one safetensors file piece by piece.

  The library writes from memory; this reserves the space and fills it in any
  order, so that an array of all layers is written layer by layer.
  """

  def __init__(self, path: str | os.PathLike[str],
               specs: Mapping[str, tuple[tuple[int, ...], str]],
               metadata: Mapping[str, str] | None = None):
    """Creates the file.

    Args:
      path: of the file; see atomic.directory for all-or-nothing.
      specs: key -> (shape, dtype name).
      metadata: strings for the file's header.
    """
    self._specs = dict(specs)
    self._left = {key: _pieces(shape) for key, (shape, _) in specs.items()}
    header: dict[str, Any] = {'__metadata__': dict(metadata)} if metadata else {}
    end = 0
    self._start = {}
    for key, (shape, dtype) in specs.items():
      size = math.prod(shape) * jnp.dtype(dtype).itemsize
      self._start[key] = end
      header[key] = {'dtype': _CODES[dtype], 'shape': list(shape),
                     'data_offsets': [end, end + size]}
      end += size
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # data begin at a multiple of 8
    self._offset = 8 + len(text)
    self._file = open(path, 'wb')
    self._file.write(len(text).to_bytes(8, 'little') + text)
    self._file.truncate(self._offset + end)

  def write(self, key: str, value: np.ndarray, index: int | None = None) -> None:
    """Writes a tensor, or its part `index` along the leading axis.

    Raises:
      ValueError: another shape than announced.
    """
    shape = self._specs[key][0]
    want = shape if index is None else shape[1:]
    if value.shape != want:
      raise ValueError(f'{key}: {value.shape} written where {want} belongs')
    self._write(key, value, (index or 0) * math.prod(want))
    self._left[key] -= _pieces(shape) if index is None else 1

  def write_rows(self, key: str, value: np.ndarray) -> None:
    """Writes a tensor's first rows; the others stay zeros.

    Raises:
      ValueError: rows of another shape than announced, or too many.
    """
    shape = self._specs[key][0]
    if value.shape[1:] != shape[1:] or len(value) > shape[0]:
      raise ValueError(f'{key}: {value.shape} written where {shape} belongs')
    self._write(key, value, 0)
    self._left[key] -= _pieces(shape)

  def _write(self, key: str, value: np.ndarray, start: int) -> None:
    """Writes numbers from number `start` of a tensor on.

    A few rows at a time: a cast and a transpose of the whole would be two more
    copies of it, perhaps of twice its size.
    """
    dtype = jnp.dtype(self._specs[key][1])
    self._file.seek(self._offset + self._start[key] + start * dtype.itemsize)
    rows = value.reshape(1) if value.ndim == 0 else value
    step = max(1, _BLOCK // max(1, math.prod(rows.shape[1:]) * dtype.itemsize))
    for first in range(0, len(rows), step):
      block = np.ascontiguousarray(rows[first:first + step], dtype)
      self._file.write(block.reshape(-1).view(np.uint8).data)

  def close(self) -> None:
    """Ends the file.

    Raises:
      ValueError: a tensor was not written, or written twice.
    """
    self._file.close()
    wrong = [key for key, left in self._left.items() if left != 0]
    if wrong:
      raise ValueError(f'not written, or written twice: {wrong[:5]}')


def _pieces(shape: Iterable[int]) -> int:
  return next(iter(shape), 1)
