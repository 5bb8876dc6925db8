"""VQAv2 (arXiv 1612.00837): ten human answers a question, soft accuracy.

Official: vqaEval of the current release, on text that went through m4c as
LLaVA uploads it.  Published numbers are test-dev from the server; here val can
be scored, which LLaVA-1.5's training data comes close to (it has VQAv2 train).

Rules:
  llava: m4c, then the current code, which compares raw texts where all ten
    humans agree.
  raw: the current code on the text itself.
  llava-2017: m4c, then the first release of the code, which always normalises
    the prediction and of the human answers only the punctuation.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
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

KEY = 'vqav2'
RULES = ('llava', 'raw', 'llava-2017')
SPLITS = ('val', 'test', 'test-dev')
# Split to upload -> the split whose questions the file must hold: the server
# wants all of test2015 for test-dev, too.
UPLOADS = {'test': 'test', 'test-dev': 'test'}
HEADLINE = scores.Headline('VQAv2 accuracy', 'accuracy')
POLICY = scores.EMPTY
ANNOTATIONS = 'v2_mscoco_val2014_annotations.json'
# Split -> question file, folder of its images, official count.
_FILES = {
    'val': ('v2_OpenEnded_mscoco_val2014_questions.json', 'val2014', 214_354),
    'test': ('v2_OpenEnded_mscoco_test2015_questions.json', 'test2015', 447_793),
    'test-dev': ('v2_OpenEnded_mscoco_test-dev2015_questions.json', 'test2015',
                 107_394),
}


def read(root: pathlib.Path, split: str = 'val') -> QuestionSet:
  """The questions of a split; images are <folder>/COCO_<folder>_<12 digits>.jpg.

  Raises:
    DataError: a row lacks a field, or a val question has no annotation, two, or
      other than ten answers.
    FileNotFoundError: a file is not there.
  """
  root = home(root, KEY)
  name, folder, count = _FILES[split]
  path = first_file(root, name)
  humans = _annotations(root) if split == 'val' else {}
  questions = []
  for i, row in enumerate(field(read_json(path), 'questions', list, str(path))):
    where = f'{path}: question {i}'
    key = field(row, 'question_id', int, where)
    text = field(row, 'question', str, where)
    answers, groups = humans.get(key, ((), {}))
    if split == 'val' and not answers:
      raise DataError(f'{where}: id {key} has no entry in {ANNOTATIONS}; the '
                      'two files belong to different releases')
    image = f'{folder}/COCO_{folder}_{field(row, "image_id", int, where):012}.jpg'
    questions.append(Question(str(key), text, f'{text}\n{SHORT_ANSWER}', image,
                              answers=answers, groups=groups))
  return QuestionSet(KEY, root, path, tuple(questions),
                     (Part('questions', len(questions), (count,)),))


def _annotations(root: pathlib.Path) -> dict[int, tuple[tuple[str, ...], dict]]:
  path = first_file(root, ANNOTATIONS)
  found = {}
  rows = field(read_json(path, _answer_alone), 'annotations', list, str(path))
  for i, row in enumerate(rows):
    where = f'{path}: annotation {i}'
    answers = tuple(a if isinstance(a, str) else field(a, 'answer', str, where)
                    for a in field(row, 'answers', list, where))
    if len(answers) != vqa_text.NUM_HUMANS:
      raise DataError(f'{where}: {len(answers)} answers; VQA has '
                      f'{vqa_text.NUM_HUMANS} a question: copy the file again')
    groups = {'answer type': field(row, 'answer_type', str, where),
              'question type': field(row, 'question_type', str, where)}
    key = field(row, 'question_id', int, where)
    if key in found:
      raise DataError(f'{where}: the id {key} occurs twice; copy the file again')
    found[key] = (answers, groups)
  return found


def _answer_alone(row: dict) -> dict | str:
  """Of two million objects {answer, answer_id, ...} only the text is kept."""
  text = row.get('answer')
  if 'answer_id' in row and isinstance(text, str):
    return sys.intern(vqa_text.spaces(text))
  return row


def accuracy_current(text: str, humans: Sequence[str]) -> Fraction:
  """Soft accuracy by the current code [official, 2021]: texts are compared as
  they are where all humans say the same.
  """
  text = vqa_text.spaces(text)
  if len(set(humans)) > 1:
    humans = [vqa_text.official(human) for human in humans]
    text = vqa_text.official(text)
  return vqa_text.soft_accuracy(text, humans)


def accuracy_2017(text: str, humans: Sequence[str]) -> Fraction:
  """Soft accuracy by the first release of the code [official, 2017]."""
  if len(set(humans)) > 1:
    humans = [vqa_text.punctuation(human) for human in humans]
  return vqa_text.soft_accuracy(vqa_text.official(text), humans)


def score(questions: QuestionSet, predictions: Mapping[str, str], *,
          allow_partial: bool = False, rule: str = RULES[0]) -> scores.Scores:
  """Soft accuracy in percent, by answer type and question type."""
  same: Callable[[str], str] = lambda text: text
  clean, accuracy = {
      'llava': (vqa_text.m4c, accuracy_current),
      'raw': (same, accuracy_current),
      'llava-2017': (vqa_text.m4c, accuracy_2017)}[rule]

  def judge(text: str, question: Question) -> tuple[str, Fraction]:
    answer = clean(text)
    return answer, accuracy(answer, question.answers)
  return scores.score(questions, predictions, judge=judge, summarise=summarise,
                      headline=HEADLINE, policy=POLICY, rule=rule,
                      allow_partial=allow_partial,
                      remark='val; published numbers are test-dev, from the server')


def summarise(results: Sequence[scores.Result]) -> tuple[scores.Row, ...]:
  """The table."""
  return scores.mean_rows(results, 'accuracy')


def write_submission(path: pathlib.Path, questions: QuestionSet,
                     predictions: Mapping[str, str]) -> str:
  """Writes the file that the server takes: every question of test2015 with its
  m4c form, the empty answer where there is no prediction [LLaVA's converter].

  Returns:
    A line that says what was written.
  """
  rows = [{'question_id': int(q.id), 'answer': vqa_text.m4c(predictions.get(q.id, ''))}
          for q in questions.questions]
  write_text(path, json.dumps(rows))
  given = sum(q.id in predictions for q in questions.questions)
  return f'{path}: {len(rows)} answers, {len(rows) - given} of them empty'
