"""From a LLaVA-format JSON file and pictures to a data set for training.

`prepare` writes a directory that `tfds.builder_from_directory` opens: shards
of array_record files with the rows in the order of the file.  Which rows are
in which shard is decided once, written to plan.json, and depends on nothing
but the file and the sizes of its pictures.  So shards can be written by any
number of processes, in any order and in several sittings, and the result is
the same byte for byte.

  plan.json          what the directory is made from, and the number of shards
  NAME-train.array_record-00000-of-00012, ...      the shards
  conversations/...  the text of each shard, see data/conversations.py
  shards/00000.json  what is in a shard: the shard is complete
  broken.jsonl       rows that cannot be used, and why; only if there are any
  manifest.json      all shards and their sums
  features.json, dataset_info.json                 for TFDS, written last
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

from vlm_compress import atomic, remote
from vlm_compress.config import check
from vlm_compress.data import images, manifest, record_format, workers
from vlm_compress.data.errors import DataError
from vlm_compress.data.llava_json import read_rows
from vlm_compress.data.progress import progress
from vlm_compress.data.shards import Done, Job, write_shard

PLAN, REPORT, ABOUT = 'plan.json', 'broken.jsonl', 'shards'
VERSION = '1.0.0'  # of the data set, for TFDS
_NAME = re.compile(r'[a-z][a-z0-9_]*')
_MOST_SHARDS = 99_999  # five digits in the file names


@dataclasses.dataclass(frozen=True)
class Preparation:
  """What is to be prepared.

  Attributes:
    json_file: in LLaVA's format.
    image_folder: what its image paths are relative to.
    out: directory of the data set, on a disk, or on gs:// as remote.to_path
      gives it; every worker then has a shard in TMPDIR before it is put there.
    name: of the data set for TFDS; '' makes one of the name of json_file.
    workers: processes that write shards.
    shard_mb: size of a shard to aim at, in MB (10**6 bytes).
    skip_broken: leave out rows that cannot be used.
  """
  json_file: pathlib.Path
  image_folder: pathlib.Path
  out: remote.Path
  name: str = ''
  workers: int = 1
  shard_mb: float = 256.0
  skip_broken: bool = False


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What was done.

  Attributes:
    manifest: see data/manifest.py.
    num_written: shards written now; the others were there.
    num_broken: rows that were left out; they are listed in the report.
  """
  manifest: dict[str, Any]
  num_written: int
  num_broken: int


def prepare(what: Preparation) -> Prepared:
  """Writes a data set, or what is missing of it.

  Raises:
    FileNotFoundError: no such JSON file or image folder.
    ConfigError: an impossible option.
    DataError: the file is no such JSON; rows are broken (unless skip_broken),
      after everything else is written; the directory holds something else, or
      is being written by another process; it cannot be written.
  """
  check(what.workers >= 1, f'--workers={what.workers}: at least 1')
  check(what.shard_mb > 0, f'--shard-mb={what.shard_mb}: more than 0')
  name = what.name or _name_of(what.json_file)
  check(_NAME.fullmatch(name) is not None,
        f'--name={name!r}: small letters, digits and _, with a letter first')
  if not what.image_folder.is_dir():
    raise FileNotFoundError(f'image folder {what.image_folder} does not exist')
  rows = read_rows(os.fspath(what.json_file))
  if not rows:
    raise DataError(f'{what.json_file} has no rows')
  remote.check_writable(remote.to_path(what.out), '--out')
  remote.mkdir(what.out)
  others = sorted(p.name for p in _entries(what.out)
                  if not p.name.startswith(('.lock', f'.{PLAN}.')))
  if others and PLAN not in others:
    raise DataError(f'{what.out} is not empty (it holds {others[0]}) and is no '
                    'data set of prepare-data; choose another --out')
  with _locked(what.out):
    plan = _claim(what, name, rows)
    if not remote.is_remote(what.out):
      for stale in what.out.rglob('.*.tmp'):  # of a process that was killed
        stale.unlink()
    done = _write_shards(what, plan, rows)
    broken = sorted((b for d in done for b in d.broken), key=lambda b: b['row'])
    _report(what, broken, len(rows))
    found = _manifest(what, plan, [d.shard for d in done], len(broken))
    text = json.dumps(found, indent=1, sort_keys=True)
    _saved(what.out, lambda: atomic.write_text(
        what.out / manifest.MANIFEST, text))
    _saved(what.out, lambda: _write_metadata(what.out, found))
  return Prepared(found, sum(d.written for d in done), len(broken))


def _name_of(json_file: pathlib.Path) -> str:
  name = re.sub(r'[^a-z0-9]+', '_', json_file.stem.lower()).strip('_')
  return name if name[:1].isalpha() else f'data_{name}'


def _entries(out: remote.Path) -> list[remote.Path]:
  """What is in a directory; one of a bucket is there when something is in it."""
  return [*out.iterdir()] if remote.exists(out) else []


@contextlib.contextmanager
def _locked(out: remote.Path) -> Iterator[None]:
  """Keeps other processes out; a killed one leaves no lock behind.

  Buckets have no such locks.  Two processes there do the same work twice, and
  put the same bytes under the same names.
  """
  if remote.is_remote(out):
    yield
    return
  with open(out / '.lock', 'w') as stream:
    try:
      fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
      if e.errno not in (errno.EAGAIN, errno.EACCES):
        raise
      raise DataError(f'another process is writing {out}; wait for it, or '
                      'choose another --out') from e
    yield


def _claim(what: Preparation, name: str, rows: list[Any]) -> dict[str, Any]:
  """The plan of the directory, made now if it is new.

  Raises:
    DataError: the directory holds something else.
  """
  path = what.out / PLAN
  given = {'format': manifest.FORMAT, '--name': name,
           '--shard-mb': what.shard_mb,
           '--images': os.path.abspath(what.image_folder),
           'SHA-256 of --json': manifest.sha256(what.json_file)}
  if not path.exists():
    size = _total_bytes(rows, what.image_folder)
    count = math.ceil(size / (what.shard_mb * 1e6))
    plan = {**given, 'rows': len(rows),
            'shards': min(max(1, count), len(rows), _MOST_SHARDS)}
    _saved(what.out, lambda: atomic.write_text(path, json.dumps(plan, indent=1)))
    return plan
  try:
    plan = json.loads(path.read_text())
    plan = {key: plan[key] for key in (*given, 'rows', 'shards')}
  except (ValueError, KeyError, TypeError) as e:
    raise DataError(f'{path} is damaged; delete {what.out} and prepare the '
                    'data again') from e
  differences = [f'{key} is {given[key]}, was {plan[key]}' for key in given
                 if plan[key] != given[key]]
  if differences:
    raise DataError(f'{what.out} was begun with other arguments: '
                    f'{"; ".join(differences)}; choose another --out, or '
                    'delete this one')
  return plan


def _total_bytes(rows: list[Any], image_folder: pathlib.Path) -> int:
  """About the size of all records; pictures that are missing count nothing."""
  names, size = [], 0
  for row in rows:
    value = row.get('image') if isinstance(row, dict) else None
    names += value if isinstance(value, list) else [value]
    size += len(str(row))

  def size_of(name: Any) -> int:
    try:
      return images.resolve_path(image_folder, name).stat().st_size
    except (OSError, DataError, TypeError):
      return 0
  # Network file systems answer one question slowly, but many at a time.
  with futures.ThreadPoolExecutor(16) as pool:
    return size + sum(pool.map(size_of, filter(None, names)))


def _write_shards(what: Preparation, plan: dict[str, Any], rows: list[Any]
                  ) -> list[Done]:
  """Writes missing shards; what became of all of them, in their order."""
  count = plan['shards']
  starts = [k * len(rows) // count for k in range(count + 1)]
  jobs = (Job(str(what.out), _file_name(plan, k), f'{ABOUT}/{k:05d}.json',
              str(what.image_folder), starts[k], rows[starts[k]:starts[k + 1]],
              what.skip_broken) for k in range(count))
  done, failure = [], ''
  with progress('preparing', len(rows)) as advance:
    for one in workers.run(write_shard, jobs, min(what.workers, count)):
      failure = one.failure
      if failure:
        break
      done.append(one)
      advance(one.num_rows)
  if failure:  # outside of the pool, which lets its jobs end
    raise DataError(_cannot_write(what.out, failure))
  return sorted(done, key=lambda one: one.first_row)


def _file_name(plan: dict[str, Any], k: int) -> str:
  return (f'{plan["--name"]}-train.array_record-{k:05d}-of-'
          f'{plan["shards"]:05d}')


def _cannot_write(out: remote.Path, reason: str) -> str:
  return (f'{out} cannot be written ({reason}); free space there or choose '
          'another --out, and run the command again: complete shards are kept')


def _saved(out: remote.Path, write: Callable[[], Any]) -> None:
  """Calls `write`; an OSError becomes one line."""
  failure = ''
  try:
    write()
  except OSError as e:
    failure = e.strerror or str(e)
  if failure:
    raise DataError(_cannot_write(out, failure))


def _report(what: Preparation, broken: list[dict[str, Any]], num_rows: int
            ) -> None:
  """Writes the list of broken rows.

  Raises:
    DataError: there are some, and they may not be left out.
  """
  path = what.out / REPORT
  if not broken:
    path.unlink(missing_ok=True)
    return
  lines = ''.join(json.dumps(b) + '\n' for b in broken)
  _saved(what.out, lambda: atomic.write_text(path, lines))
  if what.skip_broken:
    return
  raise DataError(
      f'{len(broken)} of {num_rows} rows cannot be used, the first: row '
      f'{broken[0]["row"]}: {broken[0]["reason"]}.  All of them are listed in '
      f'{path}.  Mend them and run the command again (complete shards are '
      'kept), or leave them out with --skip-broken')


def _manifest(what: Preparation, plan: dict[str, Any],
              shards: list[dict[str, Any]], num_broken: int) -> dict[str, Any]:
  """The manifest; nothing in it depends on when or how it was written."""
  shards = [{k: v for k, v in shard.items() if k != 'broken'}
            for shard in shards]
  counts = {name: sum(shard[name] for shard in shards)
            for name in (*manifest.COUNTS, 'bytes')}
  if not counts['records']:
    raise DataError(f'{what.json_file}: none of its {plan["rows"]} rows can be '
                    f'used; see {what.out / REPORT}')
  return {'format': manifest.FORMAT, 'name': plan['--name'],
          'version': VERSION, 'source': {
              'file': what.json_file.name, 'sha256': plan['SHA-256 of --json'],
              'rows': plan['rows']},
          'counts': {**counts, 'broken': num_broken}, 'shards': shards}


def _write_metadata(out: remote.Path, found: dict[str, Any]) -> None:
  """Writes what TFDS reads, each file whole, dataset_info.json last."""
  import tensorflow_datasets as tfds
  template = tfds.core.ShardedFileTemplate(
      data_dir=out, dataset_name=found['name'], split='train',
      filetype_suffix='array_record')
  info = tfds.core.DatasetInfo(
      builder=tfds.core.DatasetIdentity(
          name=found['name'], version=tfds.core.Version(VERSION),
          data_dir=str(out), module_name=''),
      features=record_format.features(),
      description=f'Rows of {found["source"]["file"]}, a file in LLaVA\'s '
      'format, with the bytes of their pictures.')
  info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
  info.set_splits(tfds.core.SplitDict([tfds.core.SplitInfo(
      name='train', shard_lengths=[s['records'] for s in found['shards']],
      num_bytes=found['counts']['bytes'], filename_template=template)]))
  with tempfile.TemporaryDirectory() as folder:
    info.write_to_directory(folder)
    names = sorted(os.listdir(folder), key=lambda n: n == 'dataset_info.json')
    for name in names:
      atomic.write_text(out / name,
                        pathlib.Path(folder, name).read_text(encoding='utf-8'))
