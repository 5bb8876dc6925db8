"""What was kept of a few pictures, in a run's directory: examples.jsonl.

answers.jsonl has counts and no questions' texts; for the pictures of a report
that is not enough.  One object per question:

  question_id    as in answers.jsonl; text: the question
  picture        JPEG of what the vision tower saw, in base64; null without one
  prune_after    layers behind which tokens are cut; [] without modules
  keep           one text of 0 and 1 for each of them: 1 is a visual token that was
                 left after that module, row by row of the grid; [] without modules,
                 or where visual tokens have no place on the picture
  attribution    whose the picture is; '' where the benchmark says so itself
"""

from __future__ import annotations

import base64
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_compress import atomic
from vlm_compress.data.errors import DataError
from vlm_compress.eval.answer_log import unit_of
from vlm_compress.eval.benchmarks.question import Question

EXAMPLES = 'examples.jsonl'
NUMBER = 6
FIELDS = ('question_id', 'text', 'picture', 'prune_after', 'keep', 'attribution')


def chosen(questions: Sequence[Question], number: int = NUMBER) -> list[Question]:
  """The first question about each of some pictures, spread over a benchmark.

  They depend on the questions only, so that all runs of a sweep show the same,
  and nobody has picked those that look well.

  Args:
    questions: of a run, in their order.
    number: at most that many.
  """
  first: dict[str, Question] = {}
  for question in questions:
    if question.image is not None or question.picture is not None:
      first.setdefault(unit_of(question), question)
  found = list(first.values())
  count = min(number, len(found))
  return [found[i * len(found) // count] for i in range(count)]


def write(run: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> pathlib.Path:
  """Writes a run's examples.jsonl, whole or not at all; returns its path."""
  path = run / EXAMPLES
  atomic.write_text(path, ''.join(
      f'{json.dumps({name: row[name] for name in FIELDS}, ensure_ascii=False)}\n'
      for row in rows))
  return path


def read(run: pathlib.Path) -> dict[str, dict[str, Any]]:
  """A run's examples by question id; {} if it wrote none.

  Raises:
    DataError: the file is damaged; names the line.
  """
  path = run / EXAMPLES
  if not path.exists():
    return {}
  rows = {}
  for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
    try:
      row = json.loads(line)
      lacking = [name for name in FIELDS if name not in row]
    except (ValueError, TypeError) as error:
      raise DataError(f'{path}: line {number} is no JSON ({error}); delete the file') from error
    if lacking:
      raise DataError(f'{path}: line {number} has no {", ".join(lacking)}; delete the file')
    rows[row['question_id']] = row
  return rows


def masks_to_text(keep: np.ndarray) -> list[str]:
  """bool[L, P] -> L texts of P digits."""
  return [''.join('01'[int(k)] for k in module) for module in np.asarray(keep)]


def masks(row: Mapping[str, Any]) -> np.ndarray:
  """bool[L, g, g] of an example; L is 0 where nothing was recorded.

  Raises:
    DataError: a text that is no square of 0 and 1.
  """
  if not row['keep']:
    return np.zeros((0, 1, 1), bool)
  side = math.isqrt(len(row['keep'][0]))
  if any(set(text) - {'0', '1'} or len(text) != side * side for text in row['keep']):
    raise DataError(f'{EXAMPLES}: the keep map of question {row["question_id"]!r} is no '
                    f'square of 0 and 1; delete the file')
  return np.asarray([[int(c) for c in text] for text in row['keep']], bool).reshape(
      -1, side, side)


def picture(row: Mapping[str, Any]) -> bytes | None:
  """The JPEG of an example, None without one.

  Raises:
    DataError: it is no base64.
  """
  if row['picture'] is None:
    return None
  try:
    return base64.b64decode(row['picture'], validate=True)
  except (ValueError, TypeError) as error:
    raise DataError(f'{EXAMPLES}: the picture of question {row["question_id"]!r} is no '
                    f'base64 ({error}); delete the file') from error
