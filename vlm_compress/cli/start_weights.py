"""Digests of the weights that a run starts from, remembered in its workdir.

A workdir is known by the content of its start weights.  Reading 28 GB takes
minutes in which every device waits, so a run that goes on takes the digest from
init_digest.json, as long as the file is the one that was read: same path and
size and, on a disk, same times of change; in a bucket, same generation.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from vlm_compress import remote
from vlm_compress.atomic import write_text
from vlm_compress.data.manifest import sha256

MEMORY = 'init_digest.json'
# Clocks of file systems are coarse: a file that changed so short a time ago may
# change again and look the same.
_SETTLED_SECONDS = 5.0


def content_digest(path: remote.Path) -> str:
  """'sha256:...' of a file, all of which is read."""
  return f'sha256:{sha256(path)}'


class Digests:
  """SHA-256 of files; of one that has not changed, the remembered one."""

  def __init__(self, workdir: remote.Path):
    """Reads nothing yet.

    Args:
      workdir: of the run, where the memory is.
    """
    self._path = workdir / MEMORY
    self._new: dict[str, Any] | None = None

  def __call__(self, path: remote.Path) -> str:
    """'sha256:...' of a file.

    Raises:
      OSError: it cannot be read.
    """
    began, known = time.time(), self._known()
    # Taken before it is read: what changes meanwhile is not remembered as read.
    stamp, settled = _stamp(path, began)
    if stamp is not None and known.get('file') == stamp:
      return known['digest']
    digest = content_digest(path)
    self._new = {'file': stamp, 'digest': digest} if settled else None
    return digest

  def save(self) -> None:
    """Remembers what was read, now that the workdir is the run's own."""
    if self._new is not None:
      write_text(self._path, json.dumps(self._new, indent=1))

  def _known(self) -> dict[str, Any]:
    """What is remembered; nothing where that is no such file."""
    try:
      found = json.loads(self._path.read_text()) if remote.exists(self._path) else {}
      return found if isinstance(found.get('digest'), str) else {}
    except (ValueError, AttributeError):  # torn, or not ours: it is read anew
      return {}


def _stamp(path: remote.Path, now: float) -> tuple[dict[str, Any] | None, bool]:
  """What says that a file is unchanged, and whether to rely on it from now on."""
  if remote.is_remote(path):
    generation = remote.generation(path)
    stamp = {'path': os.fspath(path), 'generation': generation}
    return (stamp, True) if generation else (None, False)
  found = path.stat()
  # ctime cannot be set: a copy that keeps the times of its source has another.
  return ({'path': os.path.abspath(path), 'bytes': found.st_size,
           'mtime_ns': found.st_mtime_ns, 'ctime_ns': found.st_ctime_ns},
          now - max(found.st_mtime, found.st_ctime) > _SETTLED_SECONDS)
