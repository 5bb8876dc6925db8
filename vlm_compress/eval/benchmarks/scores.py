"""Scores of a benchmark: per question, per group, and the headline.

A group holds sum and count, both exact (whole numbers or fractions), so that
groups of several hosts add up to the very numbers of one.  Metrics that are no
means (F1, both questions of an image, all passes) are formed from the results
of single questions; `merge` does that for the results of several hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from vlm_compress.data.errors import DataError
from vlm_compress.eval.benchmarks.question import Question, QuestionSet

# What becomes of a question without a prediction.
ERROR, WRONG, EMPTY = 'error', 'wrong', 'empty'
_SHOWN = 3  # ids in a message


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
  """One scored question.

  Attributes:
    question: what was asked.
    text: what the model said; None where there is no prediction.
    parsed: what the scorer read in it; None where it read nothing.
    score: 0..1, exact.
  """
  question: Question
  text: str | None
  parsed: str | None
  score: int | Fraction


@dataclasses.dataclass(frozen=True, slots=True)
class Tally:
  """An exact sum of scores, and of how many."""
  total: int | Fraction = 0
  count: int = 0

  def __add__(self, other: Tally) -> Tally:
    return Tally(self.total + other.total, self.count + other.count)

  @property
  def mean(self) -> float:
    """total / count; 0 of nothing."""
    return float(self.total / Fraction(self.count)) if self.count else 0.0


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the table.

  Attributes:
    group, name: ('', 'all') or, for example, ('structural', 'verify').
    n: what `numbers` are over.
    numbers: metric -> value.
    counted: what n counts.
    n_of: metric -> what it is over, where that is not n.
  """
  group: str
  name: str
  n: int
  numbers: Mapping[str, float]
  counted: str = 'questions'
  n_of: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Headline:
  """Which number tables quote.

  Attributes:
    metric: its name as tables have it.
    scale: '0-100' or what else.
    group, name, column: the row and the number in it.
  """
  metric: str
  column: str
  scale: str = '0-100'
  group: str = ''
  name: str = 'all'


@dataclasses.dataclass(frozen=True)
class Scores:
  """What `score` of a benchmark gives.

  Attributes:
    benchmark: its key.
    rule: the scoring rule, one of the benchmark's RULES.
    headline: which number tables quote; `value` and `n` are that number's.
    rows: the table, totals first.
    results: per question, in the order of the official files.
    total: questions there are; fewer results where some were left out.
    missing: questions without a prediction.
    partial: those were left out (--allow-partial).
    notes: what belongs beside the numbers.
  """
  benchmark: str
  rule: str
  headline: Headline
  rows: tuple[Row, ...]
  results: tuple[Result, ...]
  total: int
  missing: int
  partial: bool
  notes: tuple[str, ...]

  def row(self, group: str, name: str) -> Row:
    """The line of a group; KeyError where there is none."""
    for row in self.rows:
      if (row.group, row.name) == (group, name):
        return row
    raise KeyError((group, name))

  @property
  def value(self) -> float:
    """The headline number."""
    head = self.headline
    return self.row(head.group, head.name).numbers[head.column]

  @property
  def n(self) -> int:
    """What the headline number is over."""
    head = self.headline
    row = self.row(head.group, head.name)
    return row.n_of.get(head.column, row.n)

  @property
  def tallies(self) -> dict[str, dict[str, Tally]]:
    """Sum and count of the single scores, {'': {'all': ...}, group: {...}}."""
    return tally(self.results)

  def as_json(self) -> dict[str, Any]:
    """Everything, in types that JSON has; a headline over nothing is null."""
    head = self.headline
    return {
        'benchmark': self.benchmark, 'rule': self.rule,
        'headline': {'metric': head.metric, 'value': self.value if self.n else None,
                     'scale': head.scale, 'n': self.n},
        'questions': self.total, 'missing': self.missing,
        'partial': self.partial, 'notes': list(self.notes),
        'rows': [{'group': r.group, 'name': r.name, 'n': r.n,
                  'counted': r.counted, 'n_of': dict(r.n_of), **r.numbers}
                 for r in self.rows],
        'sums': {group: {name: {'sum': float(t.total), 'n': t.count}
                         for name, t in named.items()}
                 for group, named in self.tallies.items()},
        'per_question': [{'id': r.question.id, 'prediction': r.text,
                          'parsed': r.parsed, 'score': float(r.score)}
                         for r in self.results],
    }


def tally(results: Sequence[Result]) -> dict[str, dict[str, Tally]]:
  """Sum and count over all results and over each value of each group."""
  sums: dict[str, dict[str, list]] = {'': {'all': [0, 0]}}
  for result in results:
    for group, name in (('', 'all'), *result.question.groups.items()):
      entry = sums.setdefault(group, {}).setdefault(name, [0, 0])
      entry[0] += result.score
      entry[1] += 1
  return {group: {name: Tally(*entry) for name, entry in sorted(named.items())}
          for group, named in sums.items()}


def add_tallies(*parts: Mapping[str, Mapping[str, Tally]]
                ) -> dict[str, dict[str, Tally]]:
  """Tallies of several hosts as those of one."""
  total: dict[str, dict[str, Tally]] = {}
  for part in parts:
    for group, named in part.items():
      for name, value in named.items():
        mine = total.setdefault(group, {})
        mine[name] = mine.get(name, Tally()) + value
  return total


def mean_rows(results: Sequence[Result], column: str,
              groups: Sequence[str] | None = None) -> tuple[Row, ...]:
  """Rows of means in percent: all, then each group (all of them by default)."""
  tallies = tally(results)
  chosen = ['', *(groups if groups is not None else
                  [group for group in tallies if group])]
  return tuple(Row(group, name, value.count, {column: 100 * value.mean})
               for group in chosen
               for name, value in tallies.get(group, {}).items())


Parse = Callable[[str, Question], tuple[str | None, int | Fraction]]
Summarise = Callable[[Sequence[Result]], tuple[Row, ...]]


def score(questions: QuestionSet, predictions: Mapping[str, str], *, judge: Parse,
          summarise: Summarise, headline: Headline, policy: str, rule: str,
          allow_partial: bool, remark: str = '') -> Scores:
  """The part of scoring that all benchmarks share.

  Args:
    questions: what was to be asked.
    predictions: question id -> the model's text, in any order.
    judge: (text, question) -> what was read in it, and the score 0..1.
    summarise: the table, from results.
    headline: which of its numbers tables quote.
    policy: what becomes of missing predictions: ERROR, WRONG or EMPTY (scored
      as the empty text).
    rule: name of the scoring rule, for the record.
    allow_partial: leave out what has no prediction, whatever the policy.
    remark: a note that belongs to the benchmark.

  Raises:
    DataError: predictions for questions that do not exist, answers that are
      not public, none to score, or missing ones where that is an error.
  """
  known = {q.id for q in questions.questions}
  strange = [key for key in predictions
             if key not in known and key not in questions.ignored]
  if strange:
    raise DataError(f'{len(strange)} prediction(s) for questions that '
                    f'{questions.source} does not have ({_some(strange)})')
  if any(not q.answers for q in questions.questions):
    raise DataError(f'{questions.source} has no answers: they are not public; '
                    'write a file for the server with --submission')
  missing = [q.id for q in questions.questions if q.id not in predictions]
  if len(missing) == len(questions.questions):
    raise DataError(f'no prediction for any question of {questions.source}')
  if missing and policy == ERROR and not allow_partial:
    raise DataError(f'{len(missing)} of {len(questions.questions)} questions of '
                    f'{questions.source} have no prediction ({_some(missing)}), '
                    'which is an error in this benchmark; ask them, or score '
                    'only what is there with --allow-partial')
  results = []
  for question in questions.questions:
    text = predictions.get(question.id, '' if policy == EMPTY else None)
    if question.id in predictions or not allow_partial:
      parsed, points = (None, 0) if text is None else judge(text, question)
      results.append(Result(question, text, parsed, points))
  return Scores(questions.benchmark, rule, headline, summarise(results),
                tuple(results), len(questions.questions), len(missing),
                bool(missing) and allow_partial,
                _notes(questions, missing, policy, allow_partial, remark))


def merge(parts: Sequence[Scores], questions: QuestionSet,
          summarise: Summarise, headline: Headline | None = None) -> Scores:
  """Scores of several hosts as those of one, also where they are no means.

  Args:
    parts: of the hosts.
    questions: all of them.
    summarise: the table, from results.
    headline: which of its numbers tables quote; None is the first part's.

  Raises:
    DataError: two parts scored the same question.
  """
  place = {q.id: i for i, q in enumerate(questions.questions)}
  results = sorted((r for part in parts for r in part.results),
                   key=lambda r: place[r.question.id])
  for a, b in zip(results, results[1:]):
    if a.question.id == b.question.id:
      raise DataError(f'question {a.question.id!r} was scored twice')
  notes = dict.fromkeys(note for part in parts for note in part.notes)
  return dataclasses.replace(
      parts[0], headline=headline or parts[0].headline,
      rows=summarise(results), results=tuple(results),
      total=sum(part.total for part in parts),
      missing=sum(part.missing for part in parts),
      partial=any(part.partial for part in parts), notes=tuple(notes))


def _some(ids: Sequence[str]) -> str:
  return ', '.join(ids[:_SHOWN]) + (', ...' if len(ids) > _SHOWN else '')


def _notes(questions: QuestionSet, missing: Sequence[str], policy: str,
           allow_partial: bool, remark: str) -> tuple[str, ...]:
  notes = [note for note in (remark, *questions.notes) if note]
  odd = [str(part) for part in questions.parts if not part.complete]
  if odd:
    notes.append(f'not the size of a release: {", ".join(odd)}')
  if missing:
    what = ('left out' if allow_partial else 'scored as the empty answer'
            if policy == EMPTY else 'counted as wrong')
    notes.append(f'warning: {len(missing)} of {len(questions.questions)} '
                 f'questions have no prediction ({_some(missing)}); {what}')
  return tuple(notes)
