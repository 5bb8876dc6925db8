"""What of the benchmarks' files is there, and what is missing."""

from __future__ import annotations

import dataclasses
import os
import pathlib

from vlm_compress.data.errors import DataError
from vlm_compress.eval.benchmarks import catalogue
from vlm_compress.eval.benchmarks.question import Part


@dataclasses.dataclass(frozen=True)
class Found:
  """The state of one split of one benchmark.

  Attributes:
    benchmark, split: which; split is '' where there is one only.
    parts: questions beside the official counts.
    images: pictures or videos that the questions name, each once.
    missing: those without a file; `example` is the first of them.
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
  return [_look(key, split, root / key if several else root)
          for key, module in catalogue.BENCHMARKS.items()
          for split in getattr(module, 'SPLITS', ('',))]


def _look(key: str, split: str, root: pathlib.Path) -> Found:
  try:
    questions = catalogue.read(key, root, split or None)
  except FileNotFoundError as e:
    return Found(key, split, problem=str(e), absent=True)
  except DataError as e:
    return Found(key, split, problem=str(e))
  named = {q.image: q for q in questions.questions if q.image is not None}
  gone = [name for name, q in named.items()
          if not os.path.isfile(questions.image_path(q))]
  return Found(key, split, questions.parts, len(named), len(gone),
               gone[0] if gone else '', notes=questions.notes)
