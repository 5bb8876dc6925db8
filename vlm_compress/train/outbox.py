"""Files of a run that grow, kept on a local disk and copied to a bucket.

Lines of metrics, TensorBoard's event files and profiler traces are appended to,
which objects cannot be.  In a workdir on gs:// they are therefore written in a
local folder, and a file that has changed is put there whole: in front of every
checkpoint, so that a killed process loses at most what came behind its last
one, and about every minute, so that a run can be watched.  A copy that fails
stops no training: it is tried again with the next one, and only at the end of
the run, where there is no next one, it is an error.  A run that goes on fetches
what it appends to.  In a workdir on a disk nothing is copied.
"""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable
from typing import Any

from vlm_compress import remote

SECONDS = 60.0  # between copies, where no checkpoint is due


class Outbox:
  """Where files grow; entered, so that the last of them is copied, too.

  Attributes:
    directory: the workdir itself, or a local folder in its place.
  """

  def __init__(self, workdir: remote.Path, fetched: tuple[str, ...] = ()):
    """Takes the workdir and what an earlier sitting may have left in it.

    Args:
      workdir: on a disk or in a bucket.
      fetched: names of files that are gone on with.

    Raises:
      RemoteError: one of them cannot be read.
    """
    self._workdir, self._sent, self._fails = workdir, {}, False
    self._last = time.monotonic()
    self._stack = contextlib.ExitStack()
    self.directory = workdir
    if remote.is_remote(workdir):
      self.directory = self._stack.enter_context(
          remote.local_copy(workdir, fetched))
      self._sent = self._files()

  def __enter__(self) -> Outbox:
    return self

  def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
    with self._stack:
      # The error that ends the run is the one to be reported.
      with contextlib.suppress(*([] if kind is None else [remote.RemoteError])):
        self.send()
    if error is not None and self.directory != self._workdir:
      remote.check_room(error)

  def _files(self) -> dict[pathlib.Path, tuple[int, int]]:
    """File -> its state."""
    return {path: ((stat := path.stat()).st_size, stat.st_mtime_ns)
            for path in sorted(self.directory.rglob('*')) if path.is_file()}

  def is_due(self) -> bool:
    """Whether files should be copied although no checkpoint is written."""
    return (self.directory != self._workdir
            and time.monotonic() - self._last > SECONDS)

  def send(self) -> None:
    """Copies what has changed.

    Raises:
      RemoteError: a file cannot be written.
    """
    if self.directory == self._workdir:
      return
    try:
      for path, state in self._files().items():
        if self._sent.get(path) != state:
          remote.upload(path, self._workdir / path.relative_to(
              self.directory).as_posix())
          self._sent[path] = state
    finally:
      self._last = time.monotonic()  # a service that is away takes long to say so

  def try_send(self, message: Callable[[str], Any]) -> None:
    """Copies what has changed, as far as that goes; the rest waits.

    Args:
      message: called with a warning for the first copy that fails, and again
        only for one behind copies that went well.
    """
    try:
      self.send()
      self._fails = False
    except remote.RemoteError as e:
      if not self._fails:
        message(f'warning: {e.filename} {e.strerror}; training goes on, and it is '
                'tried again with the next copy: if the process is killed before, '
                'the lines since the last copy are lost')
      self._fails = True
