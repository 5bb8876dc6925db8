"""VizWiz-VQA (arXiv 1802.08218): pictures taken by blind people.

Official: the VizWiz API's scorer.  The prediction goes through vqaEval's
normaliser, the human answers are used as they are stored.  Published numbers
are test from the server; here val can be scored.

Rules:
  official: as above.
  both-sides: human answers are normalised too (as lmms-eval does), which is
    kinder.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from fractions import Fraction

from vlm_compress.atomic import write_text
from vlm_compress.data.errors import DataError
from vlm_compress.data.records import read_json
from vlm_compress.eval.benchmarks import scores, vqa_text
from vlm_compress.eval.benchmarks.question import (
  SHORT_ANSWER,
  Part,
  Question,
  QuestionSet,
  field,
  first_file,
  home,
)

KEY = 'vizwiz'
RULES = ('official', 'both-sides')
SPLITS = ('val', 'test')
HEADLINE = scores.Headline('VizWiz accuracy', 'accuracy')
POLICY = scores.ERROR
UNANSWERABLE = ('When the provided information is insufficient, respond with '
                "'Unanswerable'.")
# Split to upload -> the split whose questions the file must hold.
UPLOADS = {'test': 'test'}
_COUNTS = {'val': (4_319,), 'test': (8_000,)}


def read(root: pathlib.Path, split: str = 'val') -> QuestionSet:
  """The questions of a split; images are <split>/<name>.

  Raises:
    DataError: a row lacks a field.
    FileNotFoundError: the file is not there.
  """
  root = home(root, KEY)
  path = first_file(root, f'{split}.json', f'Annotations/{split}.json')
  rows = read_json(path)
  if not isinstance(rows, list):
    raise DataError(f'{path} must be a list of questions')
  questions = []
  for i, row in enumerate(rows):
    where = f'{path}: question {i}'
    image, text = field(row, 'image', str, where), field(row, 'question', str, where)
    answers, groups = (), {}
    if split == 'val':
      answers = tuple(field(a, 'answer', str, where)
                      for a in field(row, 'answers', list, where))
      if not answers:
        raise DataError(f"{where}: field 'answers' is empty; copy the file again")
      groups = {'answer type': field(row, 'answer_type', str, where)}
    questions.append(Question(
        image, text, f'{text.capitalize()}\n{UNANSWERABLE}\n{SHORT_ANSWER}',
        f'{split}/{image}',
        answers=answers, groups=groups, aliases=(str(i),),
        other_ids=(pathlib.PurePath(image).stem,)))
  return QuestionSet(KEY, root, path, tuple(questions),
                     (Part('questions', len(questions), _COUNTS[split]),))


def score(questions: QuestionSet, predictions: Mapping[str, str], *,
          allow_partial: bool = False, rule: str = RULES[0]) -> scores.Scores:
  """Soft accuracy in percent, by answer type."""
  def judge(text: str, question: Question) -> tuple[str, Fraction]:
    answer, humans = vqa_text.official(text), question.answers
    if rule == 'both-sides':
      answer = vqa_text.m4c(text)
      humans = [vqa_text.m4c(human) for human in humans]
    return answer, vqa_text.soft_accuracy(answer, humans)
  return scores.score(questions, predictions, judge=judge, summarise=summarise,
                      headline=HEADLINE, policy=POLICY, rule=rule,
                      allow_partial=allow_partial,
                      remark='val; published numbers are test, from the server')


def summarise(results: Sequence[scores.Result]) -> tuple[scores.Row, ...]:
  """The table."""
  return scores.mean_rows(results, 'accuracy')


def write_submission(path: pathlib.Path, questions: QuestionSet,
                     predictions: Mapping[str, str]) -> str:
  """Writes the file that the server takes, m4c forms [LLaVA's converter].

  Returns:
    A line that says what was written.

  Raises:
    DataError: a question has no prediction.
  """
  missing = [q.id for q in questions.questions if q.id not in predictions]
  if missing:
    raise DataError(f'{len(missing)} questions of {questions.source} have no '
                    f'prediction (the first: {missing[0]}); the server wants all')
  rows = [{'image': q.id, 'answer': vqa_text.m4c(predictions[q.id])}
          for q in questions.questions]
  write_text(path, json.dumps(rows))
  return f'{path}: {len(rows)} answers'
