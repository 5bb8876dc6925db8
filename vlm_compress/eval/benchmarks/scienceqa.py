"""ScienceQA test (arXiv 2209.09513): school questions, some with a picture.

Official: LLaVA's eval_science_qa.  Tables quote the problems with a picture
(SQA^I).  Upstream sees from the answer file which problems have one, so that a
missing answer leaves its denominator; here it is wrong in both numbers, and
the row 'image, answered' is upstream's.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_compress.data.errors import DataError
from vlm_compress.data.records import read_json
from vlm_compress.eval.benchmarks import scores
from vlm_compress.eval.benchmarks.question import (
  LETTER,
  LETTERS,
  Part,
  Question,
  QuestionSet,
  field,
  first_file,
  home,
  with_options,
)

KEY = 'scienceqa'
RULES = ('official',)
HEADLINE = scores.Headline('ScienceQA-IMG accuracy', 'accuracy', group='picture',
                           name='image')
POLICY = scores.WRONG
_OPTIONS = LETTERS[:5]
# A character must follow the letter, any character.
_SENTENCE = re.compile(r'The answer is ([A-Z]).')


def read(root: pathlib.Path) -> QuestionSet:
  """The test split; images are images/test/<id>/image.png.

  Raises:
    DataError: a problem is missing or lacks a field.
    FileNotFoundError: a file is not there.
  """
  root = home(root, KEY)
  path, splits = first_file(root, 'problems.json'), first_file(root, 'pid_splits.json')
  problems = read_json(path)
  questions = []
  for key in field(read_json(splits), 'test', list, str(splits)):
    if not isinstance(key, str):
      raise DataError(f"{splits}: field 'test' must hold ids as texts, has "
                      f'{json.dumps(key)[:60]}')
    if not isinstance(problems, dict) or key not in problems:
      raise DataError(f'{path}: problem {key!r} of the test split in '
                      f'{splits.name} is missing')
    questions.append(_question(key, problems[key], f'{path}: problem {key!r}'))
  images = sum(q.image is not None for q in questions)
  return QuestionSet(KEY, root, path, tuple(questions), (
      Part('questions', len(questions), (4_241,)), Part('with image', images, (2_017,))))


def _question(key: str, row: Mapping[str, Any], where: str) -> Question:
  text, choices = field(row, 'question', str, where), field(row, 'choices', list, where)
  right = field(row, 'answer', int, where)
  image, hint = (field(row, name, str, where) if row.get(name) is not None else None
                 for name in ('image', 'hint'))
  if not 2 <= len(choices) <= 5 or not all(isinstance(c, str) for c in choices):
    raise DataError(f"{where}: field 'choices' must hold two to five texts")
  if not 0 <= right < len(choices):
    raise DataError(f'{where}: the answer {right} is none of its choices')
  context = f'Context: {hint}\n' if hint else ''
  groups = {'picture': 'image' if image else 'no image'}
  groups |= {name: str(row[name]) for name in ('subject', 'grade') if row.get(name)}
  return Question(
      key, text, f'{context}{with_options(text, choices)}\n{LETTER}',
      f'images/test/{key}/image.png' if image else None, tuple(choices),
      (LETTERS[right],), groups)


def parse(text: str, count: int) -> int:
  """The index of the chosen option of `count`, or -1 [official].

  A letter alone; or `B. ` at the start; or exactly one 'The answer is B' with
  something behind it.
  """
  letter = None
  if text and text in list(_OPTIONS):
    letter = text
  elif len(text) >= 3 and text[0] in _OPTIONS and text[1:3] == '. ':
    letter = text[0]
  else:
    said = _SENTENCE.findall(text)
    letter = said[0] if len(said) == 1 else None
  index = _OPTIONS.find(letter) if letter else -1
  return index if index < count else -1


def score(questions: QuestionSet, predictions: Mapping[str, str], *,
          allow_partial: bool = False, rule: str = RULES[0]) -> scores.Scores:
  """Accuracy in percent: with a picture, all, by subject and grade."""
  def judge(text: str, question: Question) -> tuple[str | None, int]:
    index = parse(text, len(question.options))
    letter = LETTERS[index] if index >= 0 else None
    return letter, int(letter == question.answers[0])
  return scores.score(questions, predictions, judge=judge, summarise=summarise,
                      headline=HEADLINE, policy=POLICY, rule=rule,
                      allow_partial=allow_partial)


def summarise(results: Sequence[scores.Result]) -> tuple[scores.Row, ...]:
  """The table."""
  rows = list(scores.mean_rows(results, 'accuracy'))
  if not any(r.question.image for r in results):  # a part without any
    rows.append(scores.Row('picture', 'image', 0, {'accuracy': 0.0}))
  answered = [r for r in results if r.question.image and r.text is not None]
  if answered:
    share = sum(r.score for r in answered) / len(answered)
    rows.append(scores.Row('picture', 'image, answered', len(answered),
                           {'accuracy': 100 * share}))
  return tuple(rows)
