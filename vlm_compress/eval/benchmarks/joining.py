"""Which answer belongs to which question.

A file is joined in one way for all its rows, the first of these that fits its
first row: by id; by the ids that other tools use; by picture and question; by
place in the file, if the row also says what was asked.  Whatever the way, a
row that says what was asked must have asked it, so that the answers of another
benchmark whose ids happen to exist are an error and not a score.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable, Iterable, Sequence

from vlm_compress.data.errors import DataError
from vlm_compress.eval.benchmarks.answers import Answer
from vlm_compress.eval.benchmarks.question import Question, QuestionSet, squeeze

Find = Callable[[Answer], Sequence[Question]]


def join(answers: Sequence[Answer], questions: QuestionSet) -> dict[str, str]:
  """Predictions by question id, from the rows of one or more answer files.

  Raises:
    DataError: a row fits no question, or two fit the same; names the lines.
  """
  find = _way(answers[0], questions)
  known = {q.groups['category'] for q in questions.questions if 'category' in q.groups}
  predictions: dict[str, str] = {}
  lines: dict[str, str] = {}
  for answer in answers:
    if questions.ignored and not questions.ignored.isdisjoint(answer.ids):
      continue
    candidates = find(answer)
    if not candidates:
      raise DataError(f'{answer.where}: {_name(answer)} is no question of '
                      f'{questions.source}; is it an answer file of another '
                      'benchmark or version?')
    for category in _categories(answer, known):
      chosen = _narrow(candidates, answer, category)
      if not chosen:
        raise DataError(f'{answer.where}: asks {_shown(answer.question)}, but '
                        f'{_name(answer)} of {questions.source} is '
                        f'{_shown(candidates[0].text)}; is it an answer file of '
                        'another benchmark or version?')
      # Equal questions (an id that occurs twice) are answered in turn.
      question = next((q for q in chosen if q.id not in predictions), None)
      if question is None:
        raise DataError(f'{answer.where}: answers question {chosen[0].id!r} again; '
                        f'the first answer is in {lines[chosen[0].id]}')
      predictions[question.id], lines[question.id] = answer.text, answer.where
  return predictions


def _way(first: Answer, questions: QuestionSet) -> Find:
  """How the file's rows find their questions, seen from its first row."""
  own = _table(questions, lambda q: dict.fromkeys((q.id, *q.aliases)))
  other = _table(questions, lambda q: q.other_ids)
  pictured = _table(questions, lambda q: (_pictured(q.image, q.text),))
  by_ids = lambda table: lambda a: [
      q for key in (*a.ids, *([a.index] if a.index else [])) for q in table.get(key, ())]
  ways: list[Find] = [
      by_ids(own), by_ids(other),
      lambda a: _about(pictured, a),
      lambda a: _at_place(questions, a)]
  if first.position is not None and not first.index:  # lmms-eval's own ids first
    ways = [ways[1], ways[0], *ways[2:]]
  fits = (way for way in ways if _narrow(way(first), first, None))
  return next(fits, by_ids(own))


def _table(questions: QuestionSet, names: Callable[[Question], Iterable[str]]
           ) -> dict[str, list[Question]]:
  table = collections.defaultdict(list)
  for question in questions.questions:
    for name in names(question):
      table[name].append(question)
  return table


def _pictured(image: str | None, text: str) -> str:
  return f'{pathlib.PurePosixPath(image or "").stem}\n{squeeze(text)}'


def _about(table: dict[str, list[Question]], answer: Answer) -> Sequence[Question]:
  if answer.image is None or answer.question is None:
    return ()
  return table.get(_pictured(answer.image, answer.question.split('\n')[0]), ())


def _at_place(questions: QuestionSet, answer: Answer) -> Sequence[Question]:
  if answer.position is None or answer.question is None:
    return ()
  return questions.questions[answer.position:answer.position + 1]


def _categories(answer: Answer, known: set[str]) -> list[str | None]:
  """The categories of a row; VLMEvalKit's POPE has 'popular,random' where the
  same question is in both.
  """
  parts = (answer.category or '').split(',')
  return parts if known and known.issuperset(parts) else [None]


def _narrow(candidates: Sequence[Question], answer: Answer, category: str | None
            ) -> Sequence[Question]:
  """Those of the category that were asked; [] if another question was asked."""
  if category is not None:
    candidates = [q for q in candidates if q.groups.get('category') == category]
  if answer.question is None:
    return candidates
  if same := [q for q in candidates if q.prompt == answer.question]:
    return same
  asked = squeeze(answer.question)
  inside = [q for q in candidates if squeeze(q.text) in asked]
  longest = max((len(q.text) for q in inside), default=0)
  return [q for q in inside if len(q.text) == longest]


def _name(answer: Answer) -> str:
  if answer.ids or answer.index:
    return f'id {(*answer.ids, answer.index)[0]!r}'
  return f'number {answer.position}'


def _shown(text: str | None) -> str:
  text = ' '.join((text or '').split())
  return repr(text if len(text) <= 60 else f'{text[:57]}...')
