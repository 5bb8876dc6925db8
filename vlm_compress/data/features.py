"""Frozen vision features on disk: the encoder sees every picture once.

A vision tower that is not trained gives the same features in every epoch, so
they are computed once and kept as one float16 array, memory-mapped: only the
rows that are read come into memory.  The file is named by what it was made
from (weights, picture size, data), so the features of other weights are never
taken by mistake; a sidecar holds shape and checksum, so a torn file is rebuilt
and not read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vlm_compress import atomic
from vlm_compress.config import check
from vlm_compress.data import images
from vlm_compress.data.errors import DataError
from vlm_compress.data.progress import progress

_FORMAT = 1  # of the two files; another number rebuilds them
_CHUNK = 1 << 22  # bytes read at a time for the checksum


class FeatureCache:
  """Features of all pictures of a source, read from disk on demand.

  Attributes:
    array: float16[N, P, D], memory-mapped and read-only.
    path: the file.
  """

  def __init__(self, array: np.ndarray, path: str):
    self.array = array
    self.path = path

  def __len__(self) -> int:
    return self.array.shape[0]

  def __getitem__(self, index) -> np.ndarray:
    """Returns float16[P, D] of picture `index` (or more for an array)."""
    return np.asarray(self.array[index])


def cached_features(source, encode_fn: Callable[[np.ndarray], Any],
                    fingerprint: str, cache_dir: str | os.PathLike,
                    image_size: int, batch_size: int, *,
                    prepare=images.efficientnet_pixels,
                    message: Callable[[str], None] | None = None,
                    ) -> FeatureCache:
  """Opens the features of a source's pictures, computing them if needed.

  Args:
    source: random-access source whose Examples have one picture each.
    encode_fn: uint8[B, S, S, 3] -> float[B, P, D], always called with B =
      batch_size (the last batch is filled up), so that it compiles once.
    fingerprint: says what the features are made from: hash of the weights,
      picture size, fingerprint of the data set.
    cache_dir: directory of the files; '~' is expanded.
    image_size: side S of the pictures for encode_fn, in pixels.
    batch_size: pictures per call.
    prepare: (RGB picture, S) -> uint8[S, S, 3].
    message: called with a line of text about what happens; None prints it to
      stderr.

  Returns:
    The cache, in the source's order.

  Raises:
    DataError: a picture is missing or damaged, the features do not fit
      float16, or the disk is full.
  """
  check(batch_size > 0, f'batch_size={batch_size}; use 1 or more')
  check(len(source) > 0, 'the source has no examples; use another split')
  message = message or _to_stderr
  directory = os.path.expanduser(os.fspath(cache_dir))
  key = {'format': _FORMAT, 'fingerprint': fingerprint,
         'image_size': image_size, 'num_images': len(source)}
  digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
  path = os.path.join(directory, f'features-{digest[:16]}.npy')
  if os.path.exists(path) or os.path.exists(_sidecar(path)):
    try:
      return FeatureCache(_open(path, key), path)
    except (OSError, ValueError, KeyError, TypeError) as error:
      message(f'warning: feature cache {path} cannot be used ({error}); '
              'it is computed again')
  batches = _encoded(source, encode_fn, image_size, batch_size, prepare)
  message(f'encoding {len(source)} pictures into {path} (once)')
  try:
    os.makedirs(directory, exist_ok=True)
    with progress('vision features', len(source)) as advance:
      _write(path, key, batches, advance)
  except OSError as error:
    raise DataError(
        f'{path}: the feature cache cannot be written ({error.strerror or error}); '
        'free space there or choose another directory') from error
  return FeatureCache(_open(path, key), path)


def _to_stderr(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _sidecar(path: str) -> str:
  return path.removesuffix('.npy') + '.json'


def _open(path: str, key: dict[str, Any]) -> np.ndarray:
  """Opens the array; raises ValueError, KeyError or OSError if it is not
  what the sidecar and the key say."""
  with open(_sidecar(path)) as stream:
    written = json.load(stream)
  if {name: written[name] for name in key} != key:
    raise ValueError('it was made from something else')
  if os.path.getsize(path) != written['num_bytes']:
    raise ValueError('its size is wrong')
  if _checksum(path) != written['crc32']:
    raise ValueError('its checksum is wrong')
  array = np.load(path, mmap_mode='r', allow_pickle=False)
  if list(array.shape) != written['shape'] or array.dtype != np.float16:
    raise ValueError('its shape is wrong')
  return array


def _checksum(path: str | os.PathLike[str]) -> int:
  value = 0
  with open(path, 'rb') as stream:
    while chunk := stream.read(_CHUNK):
      value = zlib.crc32(chunk, value)
  return value


def _encoded(source, encode_fn, image_size: int, batch_size: int,
             prepare) -> Iterator[np.ndarray]:
  """Yields float16[b, P, D], b = batch_size but for the last."""
  for start in range(0, len(source), batch_size):
    pictures = [_pixels(source[index], image_size, prepare) for index in
                range(start, min(start + batch_size, len(source)))]
    filled = pictures + pictures[-1:] * (batch_size - len(pictures))
    features = np.asarray(encode_fn(np.stack(filled)))[:len(pictures)]
    if features.ndim != 3:
      raise ValueError('encode_fn has to return float[B, P, D]; it returned '
                       f'the shape {features.shape}')
    with np.errstate(over='ignore'):
      half = features.astype(np.float16)
    if not np.isfinite(half).all():
      raise DataError(
          f'features of pictures {start}..{start + len(pictures) - 1} are not '
          'finite in float16; check the weights of the vision tower')
    yield half


def _pixels(example, image_size: int, prepare) -> np.ndarray:
  if len(example.images) != 1:
    raise DataError(
        f'{example.example_id} has {len(example.images)} pictures; the feature '
        'cache is for examples with exactly one: leave text-only rows and rows '
        'with several pictures out of the data')
  picture = images.decode(example.images[0], name=example.example_id)
  return prepare(picture, image_size)


def _write(path: str, key: dict[str, Any], batches: Iterator[np.ndarray],
           advance: Callable[[int], None]) -> None:
  """Writes array and sidecar, each whole or not at all.

  The array is written as a plain file, batch by batch: a memory map on a full
  disk would end the process instead of raising an error.
  """
  with atomic.replace(path) as temporary:
    with open(temporary, 'wb') as stream:
      shape = None
      for batch in batches:
        if shape is None:
          shape = [key['num_images'], *batch.shape[1:]]
          np.lib.format.write_array_header_1_0(
              stream, {'descr': '<f2', 'fortran_order': False,
                       'shape': tuple(shape)})
        stream.write(batch.astype('<f2').tobytes())
        advance(len(batch))
    written = key | {'shape': shape, 'num_bytes': os.path.getsize(temporary),
                     'crc32': _checksum(temporary)}
    # The old sidecar goes first: array and sidecar never disagree unnoticed.
    with contextlib.suppress(FileNotFoundError):
      os.remove(_sidecar(path))
  atomic.write_text(_sidecar(path), json.dumps(written, indent=2))
