"""Paths that stay below the data root; needs no imaging library."""

from __future__ import annotations

import os
import pathlib

from vlm_compress.data.errors import DataError


def resolve_path(root: str | os.PathLike, name: str) -> pathlib.Path:
  """The path of a file that a data set names, relative to its root.

  The check is on the text of the path: `..` and absolute names cannot leave
  the root, but symbolic links that the user made below the root may.

  Args:
    root: directory of the data.
    name: file name with '/' as in the data set, relative to root.

  Raises:
    DataError: the name is empty, or leaves the root.
  """
  return pathlib.Path(check_below(os.path.abspath(root), name))


def check_below(base: str, name: str) -> str:
  """The same for an absolute, normal `base`, as a text: for many names of one root."""
  path = os.path.normpath(os.path.join(base, name)) if name else base
  inside = path.startswith(os.path.join(base, ''))
  if not inside or '\0' in name:
    raise DataError(f'{name!r}: the path is outside the data root {base}; '
                    'correct it in the data file or move the root up')
  return path
