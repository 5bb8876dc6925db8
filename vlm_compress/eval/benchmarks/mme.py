"""MME (arXiv 2306.13394): fourteen tasks, two yes/no questions a picture.

Official: calculation.py of the release.  A task scores accuracy + accuracy+
(both questions of a picture right), 0-200; perception (ten tasks) and
cognition (four) are sums.  Tables quote perception.

Rules:
  official: yes or no within the first four characters.
  lmms-eval: also without blanks and full stops in front, and y or n alone.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping, Sequence

from vlm_compress.data.errors import DataError
from vlm_compress.eval.benchmarks import scores
from vlm_compress.eval.benchmarks.question import (
  SHORT_ANSWER,
  Part,
  Question,
  QuestionSet,
  home,
)

KEY = 'mme'
RULES = ('official', 'lmms-eval')
HEADLINE = scores.Headline('MME perception', 'score', 'points, at most 2000',
                           name='perception')
POLICY = scores.ERROR
DIRECTORY = 'MME_Benchmark_release_version'
# Task -> questions of the release.
PERCEPTION = {'existence': 60, 'count': 60, 'position': 60, 'color': 60,
              'posters': 294, 'celebrity': 340, 'scene': 400, 'landmark': 400,
              'artwork': 400, 'OCR': 40}
COGNITION = {'commonsense_reasoning': 140, 'numerical_calculation': 40,
             'text_translation': 40, 'code_reasoning': 40}
_ASK = 'Please answer yes or no.'
_IMAGES = ('.jpg', '.png', '.jpeg')


def read(root: pathlib.Path) -> QuestionSet:
  """The tasks below MME_Benchmark_release_version/, whose text files hold the
  questions.  An id is the path of the image without extension, with #1 or #2.

  Raises:
    DataError: a text file has not two questions with yes or no.
    FileNotFoundError: a task is not there.
  """
  root = home(root, KEY)
  root = root / DIRECTORY if (root / DIRECTORY).is_dir() else root
  questions, odd = [], []
  for task, official in (PERCEPTION | COGNITION).items():
    folder = root / task
    if not folder.is_dir():
      raise FileNotFoundError(f'{folder} does not exist; MME needs the folders '
                              'of all fourteen tasks')
    texts, images = folder / 'questions_answers_YN', folder / 'images'
    if not texts.is_dir():
      texts = images = folder
    before = len(questions)
    names = {p.stem: p.name for p in images.glob('*') if p.suffix.lower() in _IMAGES}
    place = images.relative_to(root).as_posix()
    for path in sorted(texts.glob('*.txt')):
      name = names.get(path.stem, f'{path.stem}.jpg')
      questions += _pair(path, task, f'{place}/{name}')
    if len(questions) - before != official:
      odd.append(task)
  return QuestionSet(KEY, root, root, tuple(questions), (
      Part('questions', len(questions), (2_374,)),
      Part('images', len(questions) // 2, (1_187,))), notes=(
          f'not the size of the release: {", ".join(odd)}',) if odd else ())


def _pair(path: pathlib.Path, task: str, image: str) -> list[Question]:
  """The two questions about an image."""
  try:
    lines = path.read_text(encoding='utf-8-sig').splitlines()
  except UnicodeDecodeError as e:
    raise DataError(f'{path}: byte {e.start} is not UTF-8') from e
  pair, stem = [], image.rpartition('.')[0]
  for number, line in enumerate(lines, 1):
    if line.strip():
      text, tab, label = line.partition('\t')
      label = label.strip().lower()
      if not tab or label not in ('yes', 'no'):
        raise DataError(f'{path}: line {number}: must be a question, a tab, and '
                        'Yes or No')
      text = text.replace(_ASK, '').rstrip()
      # Answer files name the image with its extension, which is known only
      # where the image is.
      pair.append(Question(
          f'{stem}#{len(pair) + 1}', text, f'{text}\n{SHORT_ANSWER}', image,
          answers=(label,), groups={'task': task}, unit=stem,
          aliases=tuple(stem + end for end in _IMAGES),
          other_ids=tuple(f'{task}/{path.stem}{end}' for end in _IMAGES)))
  if len(pair) != 2:
    raise DataError(f'{path}: has {len(pair)} questions; MME has two an image')
  return pair


def parse(text: str, rule: str = RULES[0]) -> str:
  """yes, no, or other, which is wrong [official, or lmms-eval's]."""
  text = text.lower()
  if rule == 'lmms-eval':
    text = text.strip().replace('.', '')
    if text in ('y', 'n'):
      return {'y': 'yes', 'n': 'no'}[text]
  start = text[:4]
  return 'yes' if 'yes' in start else 'no' if 'no' in start else 'other'


def score(questions: QuestionSet, predictions: Mapping[str, str], *,
          allow_partial: bool = False, rule: str = RULES[0]) -> scores.Scores:
  """Points of every task, and the sums."""
  def judge(text: str, question: Question) -> tuple[str, int]:
    said = parse(text, rule)
    return said, int(said == question.answers[0])
  return scores.score(questions, predictions, judge=judge, summarise=summarise,
                      headline=HEADLINE, policy=POLICY, rule=rule,
                      allow_partial=allow_partial,
                      remark='sums are over the tasks that have images with both '
                      'answers, and accuracy+ is over those images' if allow_partial else '')


def summarise(results: Sequence[scores.Result]) -> tuple[scores.Row, ...]:
  """The table: sums, then tasks.  accuracy+ is over images with both answers; a
  task without any has none, and no score, and is in no sum.
  """
  tasks = collections.defaultdict(lambda: collections.defaultdict(list))
  for r in results:
    tasks[r.question.groups['task']][r.question.unit].append(r.score)
  rows = []
  for task in (*PERCEPTION, *COGNITION):
    if task in tasks:
      single = [x for pair in tasks[task].values() for x in pair]
      both = [min(pair) for pair in tasks[task].values() if len(pair) == 2]
      accuracy = 100 * sum(single) / len(single)
      numbers, n_of = {'accuracy': accuracy}, {}
      if both:
        plus = 100 * sum(both) / len(both)
        numbers = {'score': accuracy + plus, 'accuracy': accuracy, 'accuracy+': plus}
        n_of = {'accuracy+': len(both)}
      rows.append(scores.Row('task', task, len(single), numbers, n_of=n_of))
  sums = []
  for name, members in (('perception', PERCEPTION), ('cognition', COGNITION),
                        ('total', PERCEPTION | COGNITION)):
    mine = [row for row in rows if row.name in members and 'score' in row.numbers]
    sums.append(scores.Row('', name, sum(row.n for row in mine), {
        'score': sum(row.numbers['score'] for row in mine)}))
  return (*sums, *rows)
