"""The benchmarks by name.  A benchmark is a module with `read`, `score`,
`summarise` and the constants that they name; two of the video sets share one.
"""

from __future__ import annotations

import pathlib
from types import ModuleType

from vlm_compress.eval.benchmarks import (
  activitynet_qa,
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
    **{key: video_qa for key in video_qa.NAMES},
    activitynet_qa.KEY: activitynet_qa,
}


def read(key: str, root: pathlib.Path, split: str | None = None,
         ocr: bool | None = None) -> QuestionSet:
  """The questions of a benchmark.

  Args:
    key: one of BENCHMARKS.
    root: its directory, or one with a directory of that name.
    split: one of the module's SPLITS; None is the one that is scored here.
    ocr: of TextVQA, whether prompts have OCR tokens; None if their file is there.
  """
  module = BENCHMARKS[key]
  if module is video_qa:
    return video_qa.read(root, key)
  if module is textvqa:
    return textvqa.read(root, ocr)
  return module.read(root) if split is None else module.read(root, split)
