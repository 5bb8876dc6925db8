"""Conversations of a prepared data set, in files without pictures.

A record is one piece, and its pictures are a hundred times as large as its text.
Who wants the text alone, as measuring the lengths of rows does, reads
conversations/NAME.jsonl.gz beside each shard: one line per record, in their
order.  The manifest has the sum of each; data sets that were prepared before
there were such files have none, and get them when prepare-data runs again.
"""

from __future__ import annotations

import bisect
import functools
import gzip
import hashlib
import itertools
import json
import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

from etils import epath

from vlm_compress import atomic, remote
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Example, Turn
from vlm_compress.data.llava_json import LlavaRow

FIELD = 'conversations'  # of a shard's entry in the manifest
FOLDER = 'conversations'
_REMEDY = ('run prepare-data again with the same arguments, which writes it '
           'anew, or copy it again')


def write(directory: remote.Path, shard: str, rows: Iterable[LlavaRow]
          ) -> dict[str, Any]:
  """Writes the file of a shard.

  Args:
    directory: of the data set.
    shard: name of its file.
    rows: those of its records.

  Returns:
    The entry for the manifest: file, bytes, sha256 and most_pictures, the
    number of pictures of the row that has most.

  Raises:
    OSError: it cannot be written.
  """
  rows = list(rows)
  text = ''.join(json.dumps({
      'id': row.row_id, 'row': row.index, 'image': row.names, 'extra': row.extra,
      'turns': [[turn.question, turn.answer] for turn in row.turns]}) + '\n'
                 for row in rows)
  data = gzip.compress(text.encode(), mtime=0)  # the same bytes at any time
  name = f'{FOLDER}/{shard}.jsonl.gz'
  remote.mkdir((directory / name).parent)
  with atomic.replace(directory / name) as temporary:
    temporary.write_bytes(data)
  return {'file': name, 'bytes': len(data),
          'sha256': hashlib.sha256(data).hexdigest(),
          'most_pictures': max((len(row.names) for row in rows), default=0)}


def what_is_wrong(directory: remote.Path, entry: Any) -> str:
  """Why a file is not the one of an entry, '' if it is."""
  if not _is_entry(entry):
    return 'there is none'
  try:
    _data(os.fspath(directory), entry['file'], entry['sha256'])
  except DataError as e:
    return str(e)
  return ''


class Conversations:
  """Examples of a split with pictures of no bytes: len(), [i]."""

  def __init__(self, directory: str, shards: Sequence[dict[str, Any]],
               parts: Sequence[tuple[str, int, int]]):
    """Reads nothing yet; what is read last is kept by the process.

    Args:
      directory: of the data set.
      shards: their entries in the manifest, all with FIELD.
      parts: (name of a shard, first record, number of records) that the split
        consists of, in its order.

    Raises:
      DataError: an entry lacks fields.
    """
    if not all(_is_entry(shard[FIELD]) for shard in shards):
      raise DataError(f'{directory}/manifest.json: {FIELD} lack fields; run '
                      'prepare-data again')
    self._directory = directory
    entries = {shard['file']: shard for shard in shards}
    self._parts = [(entries[name][FIELD], entries[name]['records'], first, count)
                   for name, first, count in parts]
    self._ends = list(itertools.accumulate(count for *_, count in self._parts))

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: SupportsIndex) -> Example:
    """The example with pictures of no bytes.

    Raises:
      IndexError: index is out of range.
      DataError: the file is missing, or not what the manifest says.
    """
    index = operator.index(index)
    if not -len(self) <= index < len(self):
      raise IndexError(f'{self._directory} has {len(self)} rows there, not {index}')
    index %= len(self)
    k = bisect.bisect_right(self._ends, index)
    entry, records, first, count = self._parts[k]
    return self._lines(entry, records)[first + index - (self._ends[k] - count)]

  def most_pictures(self) -> int:
    """Of any row; reads only files of shards that are not wholly in the split."""
    most = 0
    for entry, records, first, count in self._parts:
      if count == records:
        most = max(most, entry['most_pictures'])
      elif entry['most_pictures'] > most:
        rows = self._lines(entry, records)[first:first + count]
        most = max(most, *(len(row.images) for row in rows))
    return most

  def _lines(self, entry: dict[str, Any], records: int) -> list[Example]:
    found = _read(self._directory, entry['file'], entry['sha256'])
    if len(found) != records:
      raise DataError(f'{self._directory}/{entry["file"]} has {len(found)} rows, '
                      f'its shard has {records}; {_REMEDY}')
    return found


def _is_entry(entry: Any) -> bool:
  fields = {'file': str, 'sha256': str, 'most_pictures': int}
  return isinstance(entry, dict) and all(
      isinstance(entry.get(name), kind) for name, kind in fields.items())


@functools.lru_cache(maxsize=2)  # rows are asked for in their order
def _read(directory: str, name: str, sha256: str) -> list[Example]:
  """The rows of a file.

  Raises:
    DataError: it is missing, or not what the manifest says.
  """
  text = gzip.decompress(_data(directory, name, sha256)).decode()
  return [_example(json.loads(line)) for line in text.splitlines()]


def _example(line: dict[str, Any]) -> Example:
  return Example(
      example_id=str(line['id']), turns=tuple(Turn(*turn) for turn in line['turns']),
      images=(b'',) * len(line['image']),
      metadata={**line['extra'], 'id': line['id'], 'row': line['row'],
                'image': line['image']})


def _data(directory: str, name: str, sha256: str) -> bytes:
  """The bytes of a file, whose sum is right."""
  path = epath.Path(directory) / name
  try:
    with remote.reported(path, 'read'):
      data = path.read_bytes()
  except OSError as e:
    raise DataError(f'{path} cannot be read ({e.strerror or e}); {_REMEDY}') from e
  if hashlib.sha256(data).hexdigest() != sha256:
    raise DataError(f'{path} is damaged (its SHA-256 is not the one in the '
                    f'manifest); {_REMEDY}')
  return data
