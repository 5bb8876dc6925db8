"""Which answer belongs to which question.

A file is joined in one way for all its rows, the first of these that fits most
of a sample of them: by id; by the ids that other tools use; by picture and
question; by place among the questions, or among those with a picture.  The
last three need rows that say what was asked.  Whatever the way, a row that says
what was asked must have asked it, so that the answers of another benchmark
whose ids happen to exist are an error and not a score.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable, Iterable, Sequence

from vlm_compress.data.errors import DataError
from vlm_compress.eval.benchmarks.answers import Answer
from vlm_compress.eval.benchmarks.question import Question, QuestionSet, squeeze

Find = Callable[[Answer], Sequence[Question]]
_SAMPLE = 100  # rows that decide how a file is joined


def join(answers: Sequence[Answer], questions: QuestionSet) -> dict[str, str]:
  """Predictions by question id, from the rows of one or more answer files.

  Raises:
    DataError: a row fits no question, or two fit the same; names the lines.
  """
  find = _way(answers[::max(1, len(answers) // _SAMPLE)], questions)
  known = {q.groups['category'] for q in questions.questions if 'category' in q.groups}
  predictions: dict[str, str] = {}
  lines: dict[str, str] = {}
  for answer in answers:
    if _ignored(answer, questions):
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


def _ignored(answer: Answer, questions: QuestionSet) -> bool:
  return not questions.ignored.isdisjoint(answer.ids)


def _way(sample: Sequence[Answer], questions: QuestionSet) -> Find:
  """How the file's rows find their questions."""
  everything = questions.questions
  pictured = [q for q in everything if q.image is not None or q.picture is not None]
  own = _by_id(everything, lambda q: dict.fromkeys((q.id, *q.aliases)))
  other = _by_id(everything, lambda q: q.other_ids)
  ways = [own, other, _by_image(everything), _by_place(everything), _by_place(pictured)]
  if sample[0].position is not None and sample[0].index is None:
    ways[:2] = other, own  # lmms-eval: its numbers may be LLaVA's of another question
  return max(ways, key=lambda way: sum(  # the first of equals
      _ignored(a, questions) or bool(_narrow(way(a), a, None)) for a in sample))


def _by_id(questions: Sequence[Question], names: Callable[[Question], Iterable[str]]
           ) -> Find:
  table = collections.defaultdict(list)
  for question in questions:
    for name in names(question):
      table[name].append(question)

  def find(answer: Answer) -> Sequence[Question]:
    keys = (*answer.ids, *(() if answer.index is None else (answer.index,)))
    return next((table[key] for key in keys if key in table), ())
  return find


def _by_image(questions: Sequence[Question]) -> Find:
  table = collections.defaultdict(list)
  for question in questions:
    if question.image is not None:
      table[pathlib.PurePosixPath(question.image).stem].append(question)
  return lambda answer: (() if answer.question is None or answer.image is None
                         else table.get(answer.image, ()))


def _by_place(questions: Sequence[Question]) -> Find:
  def find(answer: Answer) -> Sequence[Question]:
    if answer.position is None or answer.question is None:
      return ()
    return questions[answer.position:answer.position + 1]
  return find


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
