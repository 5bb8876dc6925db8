"""The examples of a run: a few of its questions, with what was kept of their pictures.

They are asked once more, each alone, and only as far as the prompt: this costs a few
prefills, and the masks of all other questions, which nobody looks at, need not travel
from the devices to the journal.  What is kept depends on nothing else in a batch, so it
is what was kept when the question was answered; in bfloat16 a token that lies at its
threshold may fall otherwise in another batch, and the report says so where the counts
differ.

Of a video its first frame is shown, with what was kept of that one among all frames.
"""

from __future__ import annotations

import base64
import io
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_compress.data import images as images_lib
from vlm_compress.data.openmoji import ATTRIBUTION
from vlm_compress.data.video import NUM_FRAMES
from vlm_compress.eval import example_log
from vlm_compress.eval.benchmarks import openmoji_grid
from vlm_compress.eval.benchmarks.pictures import pictures
from vlm_compress.eval.benchmarks.question import Question, QuestionSet
from vlm_compress.eval.methods import MethodConfig
from vlm_compress.vlm import Vlm, prepare

_QUALITY = 85  # of JPEG


def record(run: pathlib.Path, vlm: Vlm, method: MethodConfig, questions: QuestionSet, *,
           seed: int = 0, number: int = example_log.NUMBER,
           frames: int = NUM_FRAMES) -> pathlib.Path:
  """Writes a run's examples.jsonl.

  Args:
    run: its directory.
    vlm: the model under the method's config (asking.Replica.running).
    method: of the run.
    questions: of the run.
    seed: of the selector 'random', as in the run.
    number: of examples; fewer where there are fewer pictures.
    frames: of a video, as in the run.

  Returns:
    The file.

  Raises:
    DataError: a picture that is none; names it.
  """
  rows = []
  attribution = ATTRIBUTION if questions.benchmark == openmoji_grid.KEY else ''
  for question in example_log.chosen(questions.questions, number):
    seen = [vlm.pixels(picture) for picture in pictures(questions, question, frames)]
    keep = module_keep(vlm, question, seen, seed) if method.runs_as == 'atp' else None
    shown = keep is not None and keep.shape[1] == vlm.config.vision.grid_size ** 2
    rows.append({
        'question_id': question.id, 'text': question.text, 'attribution': attribution,
        'picture': base64.b64encode(_jpeg(seen[0])).decode(),
        'prune_after': list(vlm.config.atp.prune_after) if shown else [],
        'keep': example_log.masks_to_text(keep) if shown else []})
  return example_log.write(run, rows)


def module_keep(vlm: Vlm, question: Question, seen: Sequence[Any], seed: int) -> np.ndarray:
  """bool[L, P], visual tokens of the first picture that are left after each module.

  Args:
    vlm: a model with modules.
    question: its id names the row for the selector 'random', as in asking.py.
    seen: the question's pictures, see `api.generate`.
    seed: of the selector 'random'.
  """
  row = prepare(vlm, question.prompt, seen, 'atp', None)
  name = zlib.crc32(question.id.encode()) & 0x7fffffff
  state = vlm.segmented.prefill(row.batch, row.prune.replace(
      row_ids=np.asarray([name], np.int32), seed=seed))
  return np.asarray(state.pruning.state.module_keep)[:, 0, 0] > 0.5


def _jpeg(pixels: np.ndarray) -> bytes:
  stream = io.BytesIO()
  images_lib.open_picture(pixels).save(stream, 'JPEG', quality=_QUALITY)
  return stream.getvalue()
