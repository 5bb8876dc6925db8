"""What a prepared data set consists of: manifest.json, and checks against it.

The manifest names every shard with its size and two sums: one of the whole
file, and one of its edges (the first and last 64 KiB).  Training checks sizes
and edges when it opens the data, which takes no time even for terabytes and
finds what is torn, swapped, or made by another run; a flipped bit in between
is found by array_record's own sums when the record is read, or by `full`.

Paths go through etils.epath, so that a directory may be gs://... .
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent import futures
from typing import Any

from etils import epath

from vlm_compress import remote
from vlm_compress.data.errors import DataError

FORMAT = 1  # of records and manifest
MANIFEST = 'manifest.json'
EDGE = 64 * 2**10  # bytes at either end of a shard
COUNTS = ('records', 'pictures', 'text_only', 'several_pictures', 'turns')
_SHARD_FIELDS = {'file': str, 'first_row': int, 'rows': int, 'bytes': int,
                 'sha256': str, 'edges': str, **dict.fromkeys(COUNTS, int)}


def sha256(path: str | os.PathLike[str]) -> str:
  """Hexadecimal SHA-256 of a file."""
  with epath.Path(path).open('rb') as stream:
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 22):
      digest.update(chunk)
  return digest.hexdigest()


def edges(path: str | os.PathLike[str], size: int) -> str:
  """Hexadecimal SHA-256 of the first and last EDGE bytes of a file.

  Args:
    path: the file.
    size: its size in bytes.
  """
  with epath.Path(path).open('rb') as stream:
    digest = hashlib.sha256(stream.read(EDGE))
    stream.seek(max(0, size - EDGE))
    digest.update(stream.read(EDGE))
  return digest.hexdigest()


def what_is_wrong(path: str | os.PathLike[str], shard: dict[str, Any],
                  full: bool) -> str:
  """Why a file is not the shard that was written, '' if it is.

  Args:
    path: the file.
    shard: its entry in the manifest.
    full: read all of it, not only its edges.

  Raises:
    RemoteError: it cannot be read, which says nothing about what it holds.
  """
  path = epath.Path(path)
  with remote.reported(path, 'read'):
    if not path.exists():
      return 'is missing'
    size = path.stat().length
    if size != shard['bytes']:
      return f'has {size} bytes, the manifest says {shard["bytes"]}'
    if full and sha256(path) != shard['sha256']:
      return 'is damaged (its SHA-256 is not the one in the manifest)'
    if edges(path, size) != shard['edges']:
      return 'is damaged (the sum of its edges is not the one in the manifest)'
  return ''


def read(directory: str | os.PathLike[str]) -> dict[str, Any]:
  """The manifest of a prepared data set.

  Raises:
    FileNotFoundError: there is no such directory.
    DataError: no manifest is in it, or none that this version can read.
    RemoteError: it cannot be reached.
  """
  path = epath.Path(directory) / MANIFEST
  with remote.reported(path, 'read'):
    text = path.read_bytes() if path.exists() else None
    there = text is not None or path.parent.exists()
  if text is None:
    if not there:
      raise FileNotFoundError(f'data directory {directory} does not exist')
    raise DataError(f'{path} is missing: this is no data set of vlm-compress '
                    'prepare-data, or it is not finished; run that command '
                    '(again)')
  try:
    found = json.loads(text)
  except ValueError as e:
    raise DataError(f'{path} is no JSON ({e}); run prepare-data again') from e
  if not isinstance(found, dict) or found.get('format') != FORMAT:
    raise DataError(f'{path} has another format than {FORMAT}; run '
                    'prepare-data again, into another directory')
  shards = found.get('shards')
  good = isinstance(shards, list) and all(
      isinstance(shard, dict) and all(
          isinstance(shard.get(name), kind)
          for name, kind in _SHARD_FIELDS.items()) for shard in shards)
  if not good or not isinstance(found.get('counts'), dict):
    raise DataError(f'{path} lacks fields; run prepare-data again')
  return found


def check_shards(directory: str | os.PathLike[str], manifest: dict[str, Any],
                 full: bool = False) -> None:
  """Compares all shards with the manifest.

  Args:
    directory: of the data set.
    manifest: from `read`.
    full: read whole shards, not only their edges.

  Raises:
    DataError: a shard is missing or another one; it is named.
    RemoteError: one cannot be read.
  """
  shards = manifest['shards']
  with futures.ThreadPoolExecutor(16) as pool:  # waits for a remote disk
    wrong = list(pool.map(
        lambda shard: what_is_wrong(epath.Path(directory) / shard['file'],
                                    shard, full), shards))
  for shard, reason in zip(shards, wrong, strict=True):
    if reason:
      raise DataError(f'{epath.Path(directory) / shard["file"]} {reason}; run '
                      'prepare-data again with the same arguments, which '
                      'writes this shard anew, or copy it again')
