"""What a model is shown with a question: no picture, one, or frames of a video."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

from vlm_compress.config import ConfigError
from vlm_compress.data import images, video
from vlm_compress.data.errors import DataError
from vlm_compress.eval.benchmarks.question import Question, QuestionSet


def num_pictures(questions: QuestionSet, question: Question, num_frames: int) -> int:
  """How many pictures `pictures` gives: 0, 1, or num_frames of a video."""
  if question.image is None and question.picture is None:
    return 0
  return num_frames if questions.videos else 1


def pictures(questions: QuestionSet, question: Question, num_frames: int) -> Iterator[Any]:
  """The pictures of a question, RGB images of Pillow's, one at a time.

  Args:
    questions: of the benchmark.
    question: one of them.
    num_frames: of a video; see video.read_frames.

  Raises:
    DataError: a picture or video that is none; names the question.
  """
  try:
    if question.image is None:
      if question.picture is not None:
        yield images.open_picture(base64.b64decode(question.picture))
    elif questions.videos:
      yield from video.read_frames(questions.image_path(question), num_frames)
    else:
      yield images.open_picture(questions.image_path(question))
  except ConfigError:
    raise  # what is not installed has nothing to do with the question
  except (ValueError, FileNotFoundError) as error:  # a DataError is a ValueError
    raise DataError(f'{questions.source}: question {question.id!r}: {error}') from error
