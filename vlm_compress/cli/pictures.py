"""Pictures that a command line names: files, and directories of them."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence

from vlm_compress.data.errors import DataError

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff',
            '.ppm', '.pgm', '.pbm', '.pnm')  # of data.images.FORMATS


def picture_paths(paths: Sequence[pathlib.Path]) -> Iterator[pathlib.Path]:
  """Files as they are; of directories the pictures in them, sorted.

  Hidden files, files of other kinds and what lies deeper are left out.

  Raises:
    DataError: a directory has no picture.
  """
  for path in paths:
    if not path.is_dir():
      yield path
      continue
    inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES
                    and not p.name.startswith('.') and p.is_file())
    if not inside:
      raise DataError(f'{path} has no picture in it ({" ".join(SUFFIXES)}); '
                      'name the directory that has')
    yield from inside
