"""Tensors of PyTorch's own files, only where the user says that they may be read.

The original LLaVA's weights and projectors are `.bin` files: pickles, which
can hold programs.  torch's reader of weights alone (`weights_only=True`)
refuses those; it is asked only with --allow-pickle.
"""

from __future__ import annotations

import os
import pathlib
import zipfile
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_compress.config import ConfigError, check
from vlm_compress.convert.tensors import DTYPES, TensorFiles, by_key, files_of, pickles_in

INDEX = 'pytorch_model.bin.index.json'


def open_tensors(where: pathlib.Path, allow_pickle: bool = False
                 ) -> TensorFiles | PickleFiles:
  """Safetensors; pickles only where there are none, and if allowed."""
  if allow_pickle and pickles_in(where):
    return PickleFiles(where)
  return TensorFiles(where)


class PickleFiles:
  """The tensors of one or more `.bin` files; as TensorFiles.

  Attributes:
    where: the directory or file, for messages.
    keys: of all tensors, sorted.
  """

  def __init__(self, where: str | os.PathLike[str]):
    """Opens a directory (with an index, or all its files) or one file.

    Raises:
      ConfigError: torch is not installed, a file is damaged or holds anything
        but tensors, or as TensorFiles.
    """
    self.where = pathlib.Path(where)
    files = (files_of(self.where, INDEX, '') if (self.where / INDEX).exists()
             else dict.fromkeys(pickles_in(self.where)))
    self._tensors = by_key(self.where, files, INDEX, _open)
    self.keys = sorted(self._tensors)

  def shape(self, key: str) -> tuple[int, ...]:
    """The shape of a tensor."""
    return tuple(self._tensors[key].shape)

  def dtype(self, key: str) -> str:
    """Its dtype, as numpy spells it.

    Raises:
      ConfigError: a dtype that no weights have.
    """
    name = str(self._tensors[key].dtype).removeprefix('torch.')
    check(name in DTYPES.values(), f'{self.where}: {key} is stored as {name}; only '
          f'{", ".join(sorted(DTYPES.values()))} can be converted')
    return name

  def read(self, key: str) -> np.ndarray:
    """The tensor."""
    return _array(self._tensors[key])

  def part(self, key: str, index: Any) -> np.ndarray:
    """A slice of the tensor."""
    return _array(self._tensors[key][index])


def _open(path: pathlib.Path) -> dict[str, Any]:
  try:
    import torch
  except ImportError as e:
    raise ConfigError('--allow-pickle needs torch, which reads such files: '
                      "pip install 'vlm_compress[parity]'") from e
  try:  # the older format, which is no zip file, cannot be mapped
    found = torch.load(path, weights_only=True, map_location='cpu',
                       mmap=zipfile.is_zipfile(path))
  except Exception as e:  # torch raises many types on damaged files
    raise ConfigError(f'{path} cannot be read as weights alone '
                      f'({str(e).splitlines()[0]}); download it again') from e
  check(isinstance(found, dict) and all(
      isinstance(v, torch.Tensor) for v in found.values()),
      f'{path} does not hold a dictionary of tensors')
  return found


def _array(tensor: Any) -> np.ndarray:
  import torch
  tensor = tensor.detach().contiguous()
  if tensor.dtype == torch.bfloat16:  # numpy has none of its own
    return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
  return tensor.numpy()
