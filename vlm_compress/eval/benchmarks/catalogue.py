"""The benchmarks by name.  A benchmark is a module with `read`, `score`,
`summarise` and the constants that they name; the three video sets share one.
"""

from __future__ import annotations

import functools
import pathlib
from types import ModuleType

from vlm_compress.eval.benchmarks import (
  gqa,
  mmbench,
  mme,
  pope,
  scienceqa,
  seed,
  textvqa,
  video_qa,
  vizwiz,
  vqav2,
)
from vlm_compress.eval.benchmarks.question import QuestionSet

BENCHMARKS: dict[str, ModuleType] = {
    **{module.KEY: module for module in (gqa, vqav2, textvqa, vizwiz, pope, scienceqa,
                                         mme, mmbench, seed)},
    **{key: video_qa for key in video_qa.COUNTS},
}


def read(key: str, root: pathlib.Path, split: str | None = None) -> QuestionSet:
  """The questions of a benchmark.

  Args:
    key: one of BENCHMARKS.
    root: its directory, or one with a directory of that name.
    split: one of the module's SPLITS; None is the one that is scored here.
  """
  module = BENCHMARKS[key]
  reader = (functools.partial(module.read, key=key) if module is video_qa
            else module.read)
  return reader(root) if split is None else reader(root, split=split)
