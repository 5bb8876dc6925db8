"""SEED-Bench v1 (arXiv 2307.16125): multiple choice on pictures and videos.

Official for generated answers: LLaVA's convert_seed_for_submission, where the
text must be the letter.  LLaVA-1.5's 58.6, and VoCo's and ATP's tables, are
over all questions, videos by their middle frame; 66.1 is images only.  One id
occurs twice in the release: the second question is called <id>#2 here.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_compress.data.errors import DataError
from vlm_compress.data.records import read_json
from vlm_compress.eval.benchmarks import scores
from vlm_compress.eval.benchmarks.question import (
  LETTER,
  Part,
  Question,
  QuestionSet,
  field,
  first_file,
  home,
  with_options,
)

KEY = 'seed'
FILE = 'SEED-Bench.json'
RULES = ('exact',)
HEADLINE = scores.Headline('SEED-Bench accuracy, all (images and videos)', 'accuracy')
POLICY = scores.WRONG


def read(root: pathlib.Path) -> QuestionSet:
  """All questions; images are SEED-Bench-image/<data_id> (no extension),
  middle frames of videos SEED-Bench-video-image/<type>_<id>.png.

  Raises:
    DataError: a row lacks a field or has an unknown type.
    FileNotFoundError: the file is not there.
  """
  root = home(root, KEY)
  path = first_file(root, FILE)
  content = read_json(path)
  named = field(content, 'question_type', dict, str(path))
  types = {field(named, name, int, f'{path}: question_type'): name for name in named}
  seen: collections.Counter[str] = collections.Counter()
  questions = []
  for i, row in enumerate(field(content, 'questions', list, str(path))):
    questions.append(_question(row, types, seen, f'{path}: question {i}'))
  kinds = collections.Counter(q.groups['data'] for q in questions)
  twice = [key for key, count in seen.items() if count > 1]
  return QuestionSet(KEY, root, path, tuple(questions), (
      Part('image', kinds['image'], (14_233,)), Part('video', kinds['video'], (5_009,))),
      notes=(f'id {", ".join(twice)} occurs twice and is two questions',) if twice else ())


def _question(row: Any, types: Mapping[int, str], seen: collections.Counter[str],
              where: str) -> Question:
  key = str(field(row, 'question_id', (str, int), where))
  kind, number = field(row, 'data_type', str, where), field(row, 'question_type_id', int, where)
  answer, text = field(row, 'answer', str, where), field(row, 'question', str, where)
  if kind not in ('image', 'video') or number not in types or answer not in list('ABCD'):
    raise DataError(f'{where}: data_type {kind!r}, question_type_id {number}, answer '
                    f'{answer!r}: one of them is unknown')
  choices = [field(row, f'choice_{x}', (str, int, float), where) for x in 'abcd']
  if any(isinstance(choice, float) and not math.isfinite(choice) for choice in choices):
    raise DataError(f'{where}: a choice is no finite number; is it another version of the file?')
  choices = tuple(str(choice) for choice in choices)
  image = (f'SEED-Bench-image/{field(row, "data_id", str, where)}' if kind == 'image'
           else f'SEED-Bench-video-image/{number}_{key}.png')
  seen[key] += 1
  return Question(key if seen[key] == 1 else f'{key}#{seen[key]}', text,
                  f'{with_options(text, choices)}\n{LETTER}', image, choices, (answer,),
                  {'data': kind, 'type': types[number]}, aliases=(key,))


def score(questions: QuestionSet, predictions: Mapping[str, str], *,
          allow_partial: bool = False, rule: str = RULES[0]) -> scores.Scores:
  """Accuracy in percent: all, images, videos, by type."""
  def judge(text: str, question: Question) -> tuple[str, int]:
    return text, int(text == question.answers[0])
  found = scores.score(questions, predictions, judge=judge, summarise=summarise,
                       headline=HEADLINE, policy=POLICY, rule=rule,
                       allow_partial=allow_partial)
  return dataclasses.replace(found, headline=headline(found.results))


def headline(results: Sequence[scores.Result]) -> scores.Headline:
  """HEADLINE, named after what it is over where that is one kind only."""
  kinds = {r.question.groups['data'] for r in results}
  if len(kinds) > 1:
    return HEADLINE
  return dataclasses.replace(HEADLINE, metric=f'SEED-Bench accuracy, {kinds.pop()}s only')


def summarise(results: Sequence[scores.Result]) -> tuple[scores.Row, ...]:
  """The table."""
  return scores.mean_rows(results, 'accuracy')
