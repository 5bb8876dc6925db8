"""Files of a run that grow, kept on a local disk and copied to a bucket.

Lines of metrics, TensorBoard's event files and profiler traces are appended to,
which objects cannot be.  In a workdir on gs:// they are therefore written in a
local folder, and a file that has changed is put there whole: in front of every
checkpoint, so that a killed process loses at most what came behind its last
one, and about every minute, so that a run can be watched.  A run that goes on
fetches what it appends to.  In a workdir on a disk nothing is copied.
"""

from __future__ import annotations

import contextlib
import pathlib
import time

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
    self._workdir, self._sent = workdir, {}
    self._last = time.monotonic()
    self._stack = contextlib.ExitStack()
    self.directory = workdir
    if remote.is_remote(workdir):
      self.directory = self._stack.enter_context(
          remote.local_copy(workdir, fetched))
      self._sent = self._files()

  def __enter__(self) -> Outbox:
    return self

  def __exit__(self, kind: type | None, *_: object) -> None:
    with self._stack:
      # The error that ends the run is the one to be reported.
      with contextlib.suppress(*([] if kind is None else [remote.RemoteError])):
        self.send()

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
    self._last = time.monotonic()
    for path, state in self._files().items():
      if self._sent.get(path) != state:
        remote.upload(path, self._workdir / path.relative_to(
            self.directory).as_posix())
        self._sent[path] = state
