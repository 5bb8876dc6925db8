"""Random access to a data set that `vlm-compress prepare-data` wrote.

Where it may lie: on a local disk, or on gs:// (see remote.py).  Records are
read by array_record itself: version 0.8.6 has a reader of its own for gs://
beside the one for files.  It reads such shards from a local imitation of the
service; on a real bucket we have not tried it.  Where many small reads are
slow, mount the bucket (gcsfuse) or copy the directory to a local disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import os
import re
from typing import Any, SupportsIndex

from vlm_compress import remote
from vlm_compress.config import ConfigError, check
from vlm_compress.data import manifest
from vlm_compress.data.conversations import FIELD, Conversations
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Example
from vlm_compress.data.record_format import to_example

_METADATA = ('dataset_info.json', 'features.json')
# What array_record says of a file whose bytes are not those that were written.
_DAMAGED = re.compile(r'\b(Corrupted|Invalid) Riegeli/records file|'
                      r'\bArrayRecord file should be\b')


class PreparedSource:
  """Rows of a prepared data set: len(source), source[i] -> Example.

  It may be sent to other processes, which then open the shards themselves.

  Attributes:
    name: '<directory>/<split>'.
    fingerprint: hexadecimal digest of the shards' sums and the split.
    counts: of the whole data set, see manifest.COUNTS.
    has_conversations: they can be read without the pictures.
  """

  def __init__(self, directory: str | os.PathLike[str], split: str = 'train',
               *, verify: bool = False):
    """Opens and checks a data set.

    Args:
      directory: of the data set, local or gs://... .
      split: 'train', or a part of it in TFDS's notation ('train[:10%]').
      verify: read all shards and compare them with their SHA-256, instead of
        sizes and edges only.

    Raises:
      FileNotFoundError: no such directory.
      DataError: it is not finished, or files are not what the manifest says.
      RemoteError: it cannot be read.
      ConfigError: no such split.
    """
    self.directory = os.fspath(remote.to_path(os.path.expanduser(directory)))
    self.name = f'{self.directory}/{split}'
    found = manifest.read(self.directory)
    manifest.check_shards(self.directory, found, full=verify)
    self.counts = dict(found['counts'])
    digest = hashlib.sha256(json.dumps(
        [found['name'], [s['sha256'] for s in found['shards']], split]
        ).encode())
    self.fingerprint = digest.hexdigest()[:16]
    self._records, parts = _open(self.directory, found, split)
    self.has_conversations = all(FIELD in shard for shard in found['shards'])
    self._conversations = (Conversations(self.directory, found['shards'], parts)
                           if self.has_conversations else None)

  def __len__(self) -> int:
    return len(self._records)

  def __repr__(self) -> str:
    return f'PreparedSource({self.name!r}, {self.fingerprint}, rows={len(self)})'

  def __getitem__(self, index: SupportsIndex) -> Example:
    """The example, equal to the one of the source file.

    Raises:
      IndexError: index is out of range.
      DataError: the record is damaged, or a disk does not give it.
      RemoteError: a bucket does not give it.
    """
    index = operator.index(index)
    if not -len(self) <= index < len(self):
      raise IndexError(f'{self.name} has {len(self)} rows, not {index}')
    try:
      record = self._records[index % len(self)]
    except Exception as error:  # array_record has no one error
      if isinstance(error, IndexError) or _DAMAGED.search(str(error)):
        raise self._damaged(index, error) from error
      with remote.reported(remote.to_path(self.directory),
                           f'read at record {index}'):
        if remote.is_remote(self.directory):
          raise
      raise DataError(
          f'{self.name}: record {index} cannot be read ({remote.reason(error)}); '
          'make sure that the files are there and may be read, and run again'
          ) from error
    try:
      return to_example(record)
    except Exception as error:  # of protobuf and of missing features
      raise self._damaged(index, error) from error

  def _damaged(self, index: int, error: Exception) -> DataError:
    return DataError(
        f'{self.name}: record {index} cannot be read ({remote.reason(error)}); '
        'run prepare-data again with the same arguments, which writes damaged '
        'shards anew')


  def conversation(self, index: SupportsIndex) -> Example:
    """The example with pictures of no bytes: none is read.

    Where the data set has no conversations beside its records, the example
    with its pictures.

    Raises:
      DataError: what is read is missing or damaged.
    """
    return (self[index] if self._conversations is None
            else self._conversations[index])

  def most_pictures(self) -> tuple[int, bool]:
    """Pictures of the row that has most, and whether that is known exactly.

    Without conversations beside the records there may be rows with more.
    """
    if self._conversations is not None:
      return self._conversations.most_pictures(), True
    if not self.counts['several_pictures']:
      return int(self.counts['pictures'] > 0), True
    # Counts are of the whole data set; a part may have none of those rows.
    return (2 if self.name.endswith('/train') else 0), False


def _open(directory: str, found: dict[str, Any], split: str):
  """array_record's source of a split, from TFDS's metadata; and its parts: (name
  of a shard, first record, number of records).

  TFDS reads a copy of them, so that what it finds wrong is in the files: of a
  bucket that does not answer it says the same as of damage.
  """
  import tensorflow_datasets as tfds
  from array_record.python.array_record_data_source import ArrayRecordDataSource
  try:
    with remote.local_copy(directory, _METADATA) as folder:
      splits = tfds.builder_from_directory(folder).info.splits
      lengths = splits['train'].shard_lengths
      files = [os.path.basename(path) for path in splits['train'].filepaths]
  except (remote.RemoteError, remote.NoRoom):
    raise
  except Exception as error:  # errors of json, protobuf and the file system
    raise DataError(f'{directory}: dataset_info.json or features.json is '
                    f'missing or damaged ({type(error).__name__}); run '
                    'prepare-data again with the same arguments') from error
  if (lengths, files) != ([s['records'] for s in found['shards']],
                          [s['file'] for s in found['shards']]):
    raise DataError(f'{directory}: dataset_info.json and {manifest.MANIFEST} '
                    'are of different data sets; run prepare-data again with '
                    'the same arguments, or copy both anew')
  check(re.fullmatch(r'train(\[[^\[\]+]*\])?', split) is not None,
        f"{directory} has no split {split!r}; it has 'train', and parts of it "
        "such as 'train[:10%]'")
  try:
    parts = splits[split].file_instructions
  except (ValueError, AssertionError) as error:  # TFDS asserts on 150%
    raise ConfigError(f'split={split!r} is not a part of a split; write for '
                      "example 'train[:10%]' or 'train[:100]'") from error
  check(bool(parts), f'split={split!r} of {directory} has no rows')
  names = [os.path.basename(part.filename) for part in parts]
  records = ArrayRecordDataSource([
      dataclasses.replace(part, filename=os.path.join(directory, name))
      for part, name in zip(parts, names)])
  return records, [(name, part.skip, part.take) for part, name in zip(parts, names)]
