"""gs:// beside local disks: which kind a path is of, and whole files there.

Paths on a disk are pathlib's, those of a bucket etils.epath's, which look the
same; `to_path` tells them apart.  Both epath and Orbax then reach the bucket
by gcsfs and google-cloud-storage (extra [gcs]), tensorstore by a client of its
own.  tensorflow's client, which epath takes where tensorflow is installed, is
not used: Orbax asks google-cloud-storage all the same, and tensorflow's cannot
be given the address of another server, so that nothing could be tested.  Orbax
reads what kind of bucket it is: beside objects, the account needs
storage.buckets.get (role Storage Legacy Bucket Reader has it).

An object appears whole or not at all, and cannot be appended to: see atomic.py
for files that are written at once, train/outbox.py for those that grow.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import pathlib
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from vlm_compress.config import ConfigError, check

SCHEME = 'gs://'
PROBE = '.writable-'  # objects of check_writable; they stay where nothing may be deleted
PROBE_SECONDS = 10.0  # gcsfs tries for up to a minute; nothing is lost yet
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK_FULL_TEXT = 'No space left on device'
Path = pathlib.Path | epath.Path
_REMEDY = ('check the name of the bucket, the network, your credentials (gcloud '
           'auth application-default login), and that they may create, read and '
           'delete objects there')


class RemoteError(OSError):
  """What went wrong with an object; filename is its path."""


class NoRoom(OSError):
  """The disk of local copies is full; filename is the folder of TMPDIR."""


def is_disk_full(error: BaseException) -> bool:
  """Whether a full disk or quota is behind an error.

  Libraries that write from C++ (tensorstore below Orbax) hide the errno in
  the text of another exception type, so the text counts as well.
  """
  if isinstance(error, OSError) and error.errno in _DISK_FULL:
    return True
  return _DISK_FULL_TEXT in str(error)


def check_room(error: BaseException) -> None:
  """Says which disk is full, where it is that of local copies.

  Args:
    error: what writing to one of them raised.

  Raises:
    NoRoom: the disk is full; a bucket never is.
  """
  if is_disk_full(error) and not isinstance(error, NoRoom):
    raise NoRoom(errno.ENOSPC, 'no space left on this disk, where files lie that '
                 'go to gs:// or come from there; free some space, or set TMPDIR '
                 'to a folder on a disk with room', tempfile.gettempdir()) from error


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Whether a path is in a bucket."""
  return os.fspath(path).startswith(SCHEME)


def to_path(path: str | os.PathLike[str]) -> Path:
  """A path to read and write, on a disk or in a bucket.

  Raises:
    ConfigError: of another kind of storage, or a bucket without a name.
    ModuleNotFoundError: gs:// needs gcsfs.
  """
  text = os.fspath(path)
  scheme, colon, rest = text.partition(':/')
  if not colon or not scheme.isalnum():
    return pathlib.Path(path)
  check(scheme == 'gs' and rest.startswith('/') and rest.strip('/') != '',
        f'{text}: name a folder on a disk, or gs://BUCKET/FOLDER (as text: '
        'pathlib makes gs:/ of gs://)')
  _files()
  return epath.Path(text.rstrip('/'))


@functools.cache
def _files() -> Any:
  """The file system of buckets, the same that epath uses."""
  import fsspec
  import gcsfs  # noqa: F401  # ours is the better message where it is missing
  from etils.epath import gpath
  os.environ.setdefault('EPATH_USE_TF', 'false')  # processes begun here, too
  gpath._is_tf_installed.cache_clear()  # may have been asked for a local path
  # Other processes write as well: what a folder held a while ago says nothing.
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it raises them, too
  return fsspec.filesystem('gcs', finalize_on_close=True)


@contextlib.contextmanager
def reported(path: Path, what: str) -> Iterator[None]:
  """Every error of the libraries as a RemoteError; those of a disk stay.

  Args:
    path: what is worked on, on a disk or in a bucket.
    what: is done to it, such as 'written'.

  Raises:
    RemoteError: any error but that a package is missing, or a local disk full.
  """
  if not is_remote(path):
    yield
    return
  try:
    yield
  except ImportError:
    raise
  except Exception as e:  # of gcsfs, aiohttp, google.auth, requests
    if isinstance(e, OSError) and e.errno in _DISK_FULL:
      raise
    raise RemoteError(errno.EIO, f'cannot be {what} ({reason(e)}); {_REMEDY}',
                      os.fspath(path)) from e


def reason(error: Exception) -> str:
  """What an error says, at most a line."""
  lines = str(error).strip().splitlines()
  return f'{type(error).__name__}: {lines[0][:200] if lines else "no reason given"}'


def upload(local: str | os.PathLike[str], path: epath.Path) -> None:
  """Puts a local file into a bucket; an older object stays until it is there.

  Raises:
    RemoteError: it cannot be written.
  """
  with reported(path, 'written'):
    _files().put_file(os.fspath(local), os.fspath(path))


def write_bytes(path: epath.Path, data: bytes) -> None:
  """Writes an object.

  Raises:
    RemoteError: it cannot be written.
  """
  with reported(path, 'written'):
    _files().pipe_file(os.fspath(path), data)


def download(path: epath.Path, local: str | os.PathLike[str]) -> None:
  """Copies an object to a local file.

  Raises:
    RemoteError: it cannot be read.
  """
  with reported(path, 'read'):
    _files().get_file(os.fspath(path), os.fspath(local))


def mkdir(path: Path) -> None:
  """Makes a directory and those above it; a bucket needs none."""
  if not is_remote(path):
    path.mkdir(parents=True, exist_ok=True)


def exists(path: Path) -> bool:
  """Whether there is such a file or directory.

  Raises:
    RemoteError: the bucket does not answer.
  """
  with reported(path, 'read'):
    return path.exists()


def generation(path: epath.Path) -> str:
  """The number of an object, another one whenever it is written; '' if unknown.

  Raises:
    RemoteError: the bucket does not answer, or has no such object.
  """
  with reported(path, 'read'):
    return str(_files().info(os.fspath(path)).get('generation', ''))


def move(path: Path, target: Path) -> None:
  """Renames a directory; one of a bucket object by object.

  Raises:
    OSError: it cannot be done.
  """
  if not is_remote(path):
    path.rename(target)
    return
  with reported(path, 'moved'):
    # A kill in between leaves a copy too many, and nothing lost.
    _files().copy(f'{path}/', f'{target}/', recursive=True)
    _files().rm(os.fspath(path), recursive=True)


@contextlib.contextmanager
def local_copy(directory: str | os.PathLike[str], names: Sequence[str]
               ) -> Iterator[pathlib.Path]:
  """A directory that libraries can open: itself, or a copy while it is needed.

  Args:
    directory: on a disk or in a bucket.
    names: the files that are wanted of a bucket, as far as there are such.

  Yields:
    The local directory; a copy is in TMPDIR and removed at the end.

  Raises:
    RemoteError: one cannot be read.
  """
  if not is_remote(directory):
    yield pathlib.Path(directory)
    return
  source = to_path(directory)
  with scratch() as folder:
    for name in names:
      if exists(source / name):
        download(source / name, folder / name)
    yield folder


@contextlib.contextmanager
def scratch() -> Iterator[pathlib.Path]:
  """A local folder that is gone afterwards; TMPDIR says where.

  What a killed process leaves in it is for the system to clear away.

  Raises:
    NoRoom: the disk is full.
  """
  try:
    with tempfile.TemporaryDirectory(prefix='vlm_compress_') as folder:
      yield pathlib.Path(folder)
  except Exception as e:
    check_room(e)
    raise


def check_writable(path: Path, flag: str) -> None:
  """Tries a directory of a bucket before long work; a local one is left alone.

  Args:
    path: the directory.
    flag: names it in the message.

  Raises:
    ConfigError: objects cannot be written, read or deleted there.
  """
  if not is_remote(path):
    return
  check('/' in os.fspath(path).removeprefix(SCHEME), f'{flag}={path}: name a '
        'folder of the bucket, gs://BUCKET/FOLDER')
  import fsspec
  from fsspec import asyn
  probe = os.fspath(path / f'{PROBE}{uuid.uuid4().hex}')
  try:
    same = asyn.sync(_files().loop, _probe, probe, timeout=PROBE_SECONDS)
  except fsspec.FSTimeoutError as e:
    raise ConfigError(f'{flag}={path} cannot be used (no success within '
                      f'{PROBE_SECONDS:g} seconds); {_REMEDY}') from e
  except Exception as e:  # of gcsfs, aiohttp, google.auth, requests
    raise ConfigError(f'{flag}={path} cannot be used ({reason(e)}); {_REMEDY}'
                      ) from e
  check(same, f'{flag}={path}: an object is not what was written a moment ago')


async def _probe(path: str) -> bool:
  """Writes, reads and deletes an object; whether it was what was written."""
  await _files()._pipe_file(path, b'yes')
  same = await _files()._cat_file(path) == b'yes'
  await _files()._rm_file(path)
  return same
