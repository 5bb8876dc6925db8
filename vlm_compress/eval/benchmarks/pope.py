"""POPE (arXiv 2305.10355): is there such an object in the picture?

Official: evaluate.py of the release as LLaVA has it.  Tables quote the plain
mean of the three categories' F1.  Upstream pairs answers and labels by their
order; here they are joined by category and id.  The files are JSON lines in
spite of their names.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from vlm_compress.data.errors import DataError
from vlm_compress.data.records import read_json_lines
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

KEY = 'pope'
RULES = ('official',)
HEADLINE = scores.Headline('POPE F1, mean of three', 'F1', name='mean')
POLICY = scores.ERROR
# Category -> what LLaVA's question file adds to its ids, sizes of releases.
CATEGORIES = {'adversarial': (0, (3_000,)), 'random': (10_000_000, (3_000, 2_910)),
              'popular': (20_000_000, (3_000,))}


def read(root: pathlib.Path) -> QuestionSet:
  """The three categories; files coco/coco_pope_*.json, images val2014/<name>.

  Raises:
    DataError: a line is wrong, or an id occurs twice in a category.
    FileNotFoundError: a file is not there.
  """
  root = home(root, KEY)
  questions, parts, notes = [], [], []
  for category, (offset, official) in CATEGORIES.items():
    name = f'coco_pope_{category}.json'
    path = first_file(root, f'coco/{name}', name)
    before = len(questions)
    for line, row in read_json_lines(path):
      where = f'{path}: line {line}'
      text, label = field(row, 'text', str, where), field(row, 'label', str, where)
      number = field(row, 'question_id', int, where)
      if label not in ('yes', 'no'):
        raise DataError(f"{where}: field 'label' is {label!r}, not yes or no")
      questions.append(Question(
          f'{category}/{number}', text, f'{text}\n{SHORT_ANSWER}',
          f'val2014/{field(row, "image", str, where)}', answers=(label,),
          groups={'category': category}, aliases=(str(offset + number),),
          other_ids=(str(number),)))
    parts.append(Part(category, len(questions) - before, official))
    if len(official) > 1:
      notes.append(f'{category} has {parts[-1].count:,} questions; there are releases '
                   f'with {" and ".join(f"{n:,}" for n in official)}')
  return QuestionSet(KEY, root, path.parent, tuple(questions), tuple(parts),
                     notes=tuple(notes))


def parse(text: str) -> str:
  """yes or no [official]: no if one of the words in front of the first full
  stop is exactly No, no or not; anything else is yes, the empty text too.
  """
  said = text.split('.')[0].replace(',', '').split(' ')
  return 'no' if any(word in ('No', 'no', 'not') for word in said) else 'yes'


def score(questions: QuestionSet, predictions: Mapping[str, str], *,
          allow_partial: bool = False, rule: str = RULES[0]) -> scores.Scores:
  """F1, accuracy, precision, recall and share of yes, in percent."""
  def judge(text: str, question: Question) -> tuple[str, int]:
    said = parse(text)
    return said, int(said == question.answers[0])
  return scores.score(questions, predictions, judge=judge, summarise=summarise,
                      headline=HEADLINE, policy=POLICY, rule=rule,
                      allow_partial=allow_partial)


def confusion(results: Sequence[scores.Result]) -> tuple[int, int, int, int]:
  """Numbers of true positives, false positives, true and false negatives;
  yes is positive.
  """
  pairs = [(r.parsed, r.question.answers[0]) for r in results]
  return tuple(pairs.count(pair) for pair in (
      ('yes', 'yes'), ('yes', 'no'), ('no', 'no'), ('no', 'yes')))


def summarise(results: Sequence[scores.Result]) -> tuple[scores.Row, ...]:
  """The table; precision and F1 are 0 where nothing is said to be there."""
  rows = []
  for category in CATEGORIES:
    mine = [r for r in results if r.question.groups['category'] == category]
    if mine:
      tp, fp, tn, fn = confusion(mine)
      precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
      f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
      shares = {'F1': f1, 'accuracy': (tp + tn) / len(mine), 'precision': precision,
                'recall': recall, 'yes ratio': (tp + fp) / len(mine)}
      rows.append(scores.Row('category', category, len(mine), {
          name: 100 * share for name, share in shares.items()}))
  mean = {name: sum(row.numbers[name] for row in rows) / len(rows)
          for name in rows[0].numbers}
  return (scores.Row('', 'mean', len(results), mean), *rows)
