"""GQA, testdev-balanced (arXiv 1902.09506): short answers, exact match.

Official: eval.py of the release, on what LLaVA's converter makes of the text
(trailing full stops off, lower case, nothing else).  Validity, plausibility and
grounding need files that are not in the current release and are left out.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_compress.data.errors import DataError
from vlm_compress.data.records import read_json
from vlm_compress.eval.benchmarks import scores
from vlm_compress.eval.benchmarks.question import (
  SHORT_ANSWER,
  Part,
  Question,
  QuestionSet,
  field,
  first_file,
  home,
)

KEY = 'gqa'
FILE = 'testdev_balanced_questions.json'
RULES = ('official',)
HEADLINE = scores.Headline('GQA accuracy', 'accuracy')
POLICY = scores.ERROR
# Programs' operations that the official step count leaves out.
_NO_STEPS = ('exist', 'query: name', 'choose name')


def read(root: pathlib.Path) -> QuestionSet:
  """The balanced questions of testdev; images are images/<imageId>.jpg.

  Raises:
    DataError: a question lacks a field.
    FileNotFoundError: the file is not there.
  """
  root = home(root, KEY)
  path = first_file(root, FILE)
  rows = read_json(path)
  questions, ignored = [], set()
  for key, row in (rows if isinstance(rows, dict) else {'': rows}).items():
    where = f'{path}: question {key!r}'
    if not field(row, 'isBalanced', bool, where):
      ignored.add(key)
      continue
    questions.append(_question(key, row, where))
  images = len({q.image for q in questions})
  return QuestionSet(KEY, root, path, tuple(questions), (
      Part('questions', len(questions), (12_578,)), Part('images', images, (398,))),
      frozenset(ignored))


def _question(key: str, row: Mapping[str, Any], where: str) -> Question:
  text = field(row, 'question', str, where)
  types = field(row, 'types', dict, where)
  structural = field(types, 'structural', str, where)
  groups = {'kind': 'open' if structural == 'query' else 'binary',
            'structural': structural,
            'semantic': field(types, 'semantic', str, where),
            'steps': str(_steps(_program(row, where))),
            'words': str(len(text.split()))}
  named = field(row, 'groups', dict, where) if row.get('groups') is not None else {}
  if named.get('global') is not None:
    groups['global'] = field(named, 'global', str, where)
  return Question(key, text, f'{text}\n{SHORT_ANSWER}',
                  f'images/{field(row, "imageId", str, where)}.jpg',
                  answers=(field(row, 'answer', str, where),), groups=groups)


def _program(row: Mapping[str, Any], where: str) -> Sequence[Mapping[str, Any]]:
  """The operations that lead to the answer; none where the file has no programs."""
  if row.get('semantic') is None:
    return ()
  program = field(row, 'semantic', list, where)
  if not all(isinstance(step, Mapping) for step in program):
    raise DataError(f"{where}: field 'semantic' must hold objects")
  return program


def _steps(program: Sequence[Mapping[str, Any]]) -> int:
  """Operations of a question's program that count as steps [official]."""
  named = (f'{step.get("operation")}: {step.get("argument")}' for step in program)
  return sum(not any(word in name for word in _NO_STEPS) for name in named)


def parse(text: str) -> str:
  """The answer in a model's text [LLaVA's converter]: a blank at the end, an
  article or a comma inside stay, and make it wrong.
  """
  return text.rstrip('.').lower()


def score(questions: QuestionSet, predictions: Mapping[str, str], *,
          allow_partial: bool = False, rule: str = RULES[0]) -> scores.Scores:
  """Accuracy in percent, by open and binary questions, by type, by length."""
  def judge(text: str, question: Question) -> tuple[str, int]:
    answer = parse(text)
    return answer, int(answer == question.answers[0])
  return scores.score(questions, predictions, judge=judge, summarise=summarise,
                      headline=HEADLINE, policy=POLICY, rule=rule,
                      allow_partial=allow_partial)


def summarise(results: Sequence[scores.Result]) -> tuple[scores.Row, ...]:
  """The table, with the distribution (lower is better) after the total."""
  rows = scores.mean_rows(results, 'accuracy',
                          ('kind', 'structural', 'semantic', 'steps', 'words'))
  apart = distribution(results)
  if apart is None:
    return rows
  grouped = sum('global' in r.question.groups for r in results)
  return (rows[0], scores.Row('', 'distribution', grouped,
                              {'chi-square / 100': apart}), *rows[1:])


def distribution(results: Sequence[scores.Result]) -> float | None:
  """How far the answers' distribution is from the right one, per group of
  questions about the same thing [official: weighted chi-square / 100].

  Returns:
    None where no question is in such a group.
  """
  right = collections.defaultdict(collections.Counter)
  given = collections.defaultdict(collections.Counter)
  for result in results:
    group = result.question.groups.get('global')
    if group is not None:
      right[group][result.question.answers[0]] += 1
      given[group][result.parsed] += 1
  weighted = total = 0.0
  for group, wanted in right.items():
    size = wanted.total()
    weighted += size * sum((given[group][answer] - n) ** 2 / n
                           for answer, n in wanted.items())
    total += size
  return weighted / total / 100 if total else None
