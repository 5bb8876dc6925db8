"""Files that appear whole or not at all, also when the process is killed.

On a disk that takes a file beside it and a rename.  An object of a bucket
(gs://, see remote.py) appears when all of it is there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Iterator

from vlm_compress import remote

_ABANDONED = 3600  # seconds; nobody takes that long to write a file


@contextlib.contextmanager
def lock(path: pathlib.Path) -> Iterator[None]:
  """Waits until no other process writes `path`; the lock ends with a process."""
  with open(path.with_name(f'{path.name}.lock'), 'ab') as stream:
    fcntl.flock(stream, fcntl.LOCK_EX)
    yield


def remove_abandoned(directory: pathlib.Path, suffix: str) -> None:
  """Removes what killed writers of `replace` have left of files that end in
  `suffix`; others may be writing now.
  """
  for path in directory.glob(f'.*{suffix}.*.tmp'):
    with contextlib.suppress(FileNotFoundError):
      if time.time() - path.stat().st_mtime > _ABANDONED:
        path.unlink()


@contextlib.contextmanager
def replace(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Gives a path to write to that becomes `path` when the block ends.

  It lies in the same directory, which must exist; of an object in TMPDIR,
  which must have room for it.  If the block raises, nothing of it is left and
  an older file stays as it was.

  Args:
    path: the file to be.

  Yields:
    The path to write to, on a local disk.

  Raises:
    OSError: the file cannot be written.
  """
  path = remote.to_path(path)
  if remote.is_remote(path):
    with remote.scratch() as folder:
      yield folder / path.name
      remote.upload(folder / path.name, path)
    return
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}.tmp')
  try:
    yield temporary
    with open(temporary, 'rb') as stream:
      os.fsync(stream.fileno())  # the content is on disk before the name is
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes a text file, UTF-8, and the directories above it."""
  path = remote.to_path(path)
  if remote.is_remote(path):
    remote.write_bytes(path, text.encode('utf-8'))
    return
  remote.mkdir(path.parent)
  with replace(path) as temporary:
    temporary.write_text(text, encoding='utf-8')


@contextlib.contextmanager
def directory(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Gives a directory to fill that becomes `path` when the block ends.

  If the block raises, nothing of it is left.

  Args:
    path: the directory to be; it must not exist, or be empty.

  Yields:
    The directory to write to, beside it.

  Raises:
    FileExistsError: `path` is a file, or a directory with something in it.
  """
  path = pathlib.Path(path)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise FileExistsError(errno.EEXIST, 'exists and is not empty', str(path))
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}.tmp')
  temporary.mkdir()
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
