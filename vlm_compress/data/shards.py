"""Writing one shard of a prepared data set, in whatever process.

A shard is the rows first_row .. first_row + num_rows of the source file.  It
appears under its name when all of it is on the disk, then its conversations
(data/conversations.py), and then a small JSON file about both: sums, counts and
the rows that were left out.  A shard with that file is done and is not written
again.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable
from typing import Any

from vlm_compress import atomic, remote
from vlm_compress.data import conversations, images, manifest
from vlm_compress.data.errors import DataError
from vlm_compress.data.llava_json import LlavaRow, check_row
from vlm_compress.data.record_format import to_record

# Pictures are compressed already; group_size 1 is what random access needs,
# and with one thread the file does not depend on the machine.
_WRITER = 'group_size:1,uncompressed,max_parallelism:1'


@dataclasses.dataclass(frozen=True)
class Job:
  """One shard to be.

  Attributes:
    directory: of the data set, local or gs://.
    file: name of the shard.
    about: path of the JSON file about it, relative to the directory.
    image_folder: what image paths are relative to.
    first_row: place of its first row in the source.
    rows: its rows, unchecked.
    skip_broken: leave out broken rows instead of leaving the shard unwritten.
  """
  directory: str
  file: str
  about: str
  image_folder: str
  first_row: int
  rows: list[Any]
  skip_broken: bool


@dataclasses.dataclass(frozen=True)
class Done:
  """What became of a job.

  Attributes:
    first_row, num_rows: rows of the job.
    shard: entry for the manifest, and `broken` as below; None if the shard is
      not written.
    broken: {'row', 'id', 'path', 'reason'} of the rows that cannot be used.
    failure: why it could not be written, '' if it could.
    written: it was written now, and not found.
  """
  first_row: int
  num_rows: int
  shard: dict[str, Any] | None
  broken: list[dict[str, Any]]
  failure: str = ''
  written: bool = False


def write_shard(job: Job) -> Done:
  """Writes the shard of a job, unless it is there and right."""
  found = _found(job)
  directory = remote.to_path(job.directory)
  if found is not None:
    failure = _mended(job, found)
    return Done(job.first_row, len(job.rows), found, found['broken'], failure)
  path, about = directory / job.file, directory / job.about
  broken: list[dict[str, Any]] = []
  shard, failure = None, ''
  try:
    with remote.reported(about, 'deleted'):
      about.unlink(missing_ok=True)  # says nothing about what comes
    with atomic.replace(path) as temporary:
      counts = _fill(temporary, job, broken)
      if broken and not job.skip_broken:
        raise _Unwanted
      size = temporary.stat().st_size
      shard = {'file': job.file, 'first_row': job.first_row,
               'rows': len(job.rows), **counts, 'bytes': size,
               'sha256': manifest.sha256(temporary),
               'edges': manifest.edges(temporary, size), 'broken': broken}
    shard[conversations.FIELD] = _write_conversations(job, broken)
    atomic.write_text(about, json.dumps(shard, indent=1))
  except _Unwanted:
    pass
  # Not raised: a message with its own remedy is made of it, in one process.
  except OSError as e:
    failure = e.strerror or str(e)
  return Done(job.first_row, len(job.rows), shard, broken, failure,
              written=shard is not None)


def _mended(job: Job, shard: dict[str, Any]) -> str:
  """Writes conversations that a shard lacks, without its pictures, and puts them
  into its entry; why it could not be done, or ''.
  """
  directory = remote.to_path(job.directory)
  if not conversations.what_is_wrong(directory, shard.get(conversations.FIELD)):
    return ''
  try:
    shard[conversations.FIELD] = _write_conversations(job, shard['broken'])
    atomic.write_text(directory / job.about, json.dumps(shard, indent=1))
  except OSError as e:
    return e.strerror or str(e)
  return ''


def _write_conversations(job: Job, broken: list[dict[str, Any]]) -> dict[str, Any]:
  """Of the rows of a job that are not broken; the entry for the manifest."""
  lost = {about['row'] for about in broken}
  places = enumerate(job.rows, job.first_row)
  return conversations.write(
      remote.to_path(job.directory), job.file,
      (check_row(index, raw) for index, raw in places if index not in lost))


class _Unwanted(Exception):
  """The shard is not to appear."""


def _found(job: Job) -> dict[str, Any] | None:
  """What the file about a shard says, if the shard is as it says."""
  try:
    directory = remote.to_path(job.directory)
    with remote.reported(directory, 'read'):
      shard = json.loads((directory / job.about).read_text())
    same = (shard['file'], shard['first_row'], shard['rows']) == (
        job.file, job.first_row, len(job.rows))
    if not same or shard['broken'] and not job.skip_broken:
      return None
    # An object is there whole or not at all, and the service keeps its sum.
    with remote.reported(directory, 'read'):
      wrong = manifest.what_is_wrong(directory / job.file, shard,
                                     full=not remote.is_remote(directory))
    return None if wrong else shard
  except (OSError, ValueError, KeyError, TypeError):  # torn or of other make
    return None


def _fill(path: remote.Path, job: Job, broken: list[dict[str, Any]]
          ) -> dict[str, int]:
  """Writes the records; appends to `broken`; counts what is written.

  Raises:
    OSError: the file cannot be written.
  """
  from array_record.python import array_record_module
  path.touch()  # an OSError with the right words, before the library's own
  counts = collections.Counter(dict.fromkeys(manifest.COUNTS, 0))
  writer = _io(array_record_module.ArrayRecordWriter, str(path), _WRITER)
  for offset, raw in enumerate(job.rows):
    checked = _checked(job, job.first_row + offset, raw, broken)
    if checked is None or broken and not job.skip_broken:
      continue  # goes on, to list all that is broken
    row, record = checked
    _io(writer.write, record)
    counts.update({'records': 1, 'pictures': len(row.names),
                   'text_only': int(not row.names),
                   'several_pictures': int(len(row.names) > 1),
                   'turns': len(row.turns)})
  _io(writer.close)
  reader = _io(array_record_module.ArrayRecordReader, str(path))
  num_records = _io(reader.num_records)
  reader.close()
  if num_records != counts['records']:
    raise OSError(f'{num_records} of {counts["records"]} records are in it')
  return dict(counts)


def _io(function: Callable[..., Any], *args: Any) -> Any:
  """function(*args) of array_record; its errors, of many types, as OSError."""
  try:
    return function(*args)
  except (RuntimeError, ValueError, IndexError) as e:
    raise OSError(f'array_record: {str(e).splitlines()[0]}') from e


def _checked(job: Job, index: int, raw: Any, broken: list[dict[str, Any]]
             ) -> tuple[LlavaRow, bytes] | None:
  """A row with its record, or None and an entry in `broken`."""
  about = {'row': index,
           'id': raw.get('id') if isinstance(raw, dict) else None, 'path': None}
  try:
    row = check_row(index, raw)
    pictures = []
    for name in row.names:
      about['path'] = name
      pictures.append(images.read_bytes(job.image_folder, name))
      images.decode(pictures[-1], name)
    about['path'] = None
    return row, to_record(row, pictures)
  except DataError as e:
    broken.append({**about, 'reason': str(e)})
    return None
