"""What of the benchmarks' files is there, and what is missing."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import stat

from vlm_compress.data.errors import DataError
from vlm_compress.eval.benchmarks import catalogue, mmbench
from vlm_compress.eval.benchmarks.question import Part


@dataclasses.dataclass(frozen=True)
class Found:
  """The state of one split of one benchmark.

  Attributes:
    benchmark, split: which; split is '' where there is one only, and the file's
      name where MMBench has several.
    parts: questions beside the official counts.
    images: pictures or videos that the questions name, each once.
    missing: those without a file, or with an empty one; `example` is the first.
    problem: why the questions cannot be read, '' if they can.
    absent: a file of questions is not there at all.
    notes: which release it is, and the like.
  """
  benchmark: str
  split: str
  parts: tuple[Part, ...] = ()
  images: int = 0
  missing: int = 0
  example: str = ''
  problem: str = ''
  absent: bool = False
  notes: tuple[str, ...] = ()

  @property
  def state(self) -> str:
    """'not there', 'damaged', 'other size', 'images missing' or 'complete'."""
    if self.problem:
      return 'not there' if self.absent else 'damaged'
    if not all(part.complete for part in self.parts):
      return 'other size'
    return 'images missing' if self.missing else 'complete'


def check(root: pathlib.Path) -> list[Found]:
  """Looks at every benchmark below a directory.

  Args:
    root: has a directory per benchmark, named by its key; or is the directory
      of a single one.

  Raises:
    FileNotFoundError: there is no such directory.
  """
  if not root.is_dir():
    raise FileNotFoundError(f'data directory {root} does not exist')
  several = any((root / key).is_dir() for key in catalogue.BENCHMARKS)
  found = []
  for key, module in catalogue.BENCHMARKS.items():
    home = root / key if several else root
    if len(tables := _tables(key, home)) > 1:
      found += [dataclasses.replace(_look(key, '', path), split=path.name) for path in tables]
    else:
      found += [_look(key, split, home) for split in getattr(module, 'SPLITS', ('',))]
  return found


def _tables(key: str, root: pathlib.Path) -> list[pathlib.Path]:
  """MMBench's files, of which a directory may have several, one a language."""
  try:
    return mmbench.files(root) if key == mmbench.KEY else []
  except FileNotFoundError:
    return []


def _look(key: str, split: str, root: pathlib.Path) -> Found:
  try:
    return _read(key, split, root)
  except FileNotFoundError as e:
    return Found(key, split, problem=str(e), absent=True)
  except (DataError, OSError) as e:
    return Found(key, split, problem=str(e))
  # What no reader has thought of must not hide what there is of the others.
  except Exception as e:
    return Found(key, split, problem=f'{root}: cannot be read ({type(e).__name__}: {e})')


def _read(key: str, split: str, root: pathlib.Path) -> Found:
  questions = catalogue.read(key, root, split or None)
  named = {q.image: q for q in questions.questions if q.image is not None}
  gone = [name for name, q in named.items()
          if not _has_content(questions.image_path(q))]
  return Found(key, split, questions.parts, len(named), len(gone),
               gone[0] if gone else '', notes=questions.notes)


def _has_content(path: pathlib.Path) -> bool:
  """Whether it is a file that is not empty, as broken downloads are."""
  try:
    info = os.stat(path)
  except OSError:
    return False
  return stat.S_ISREG(info.st_mode) and info.st_size > 0
