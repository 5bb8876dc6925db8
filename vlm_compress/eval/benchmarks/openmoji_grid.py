"""openmoji_grid's test pictures as a benchmark, so that small models go through
the evaluator of large ones.

It is no public benchmark: the pictures are made by this package
(data/builders/openmoji_grid.py), so it is not in the catalogue of official
files.  Exact match, blanks aside; the headline is over "what is at ...".
"""

from __future__ import annotations

import base64
import pathlib
from collections.abc import Mapping, Sequence

from vlm_compress.config import check
from vlm_compress.data.sources import open_source
from vlm_compress.eval import scoring
from vlm_compress.eval.benchmarks import scores
from vlm_compress.eval.benchmarks.question import Question, QuestionSet
from vlm_compress.eval.evaluator import questions_of

KEY = 'openmoji_grid'
RULES = ('exact',)
HEADLINE = scores.Headline('openmoji_grid accuracy, what', 'accuracy', group='kind',
                           name='what')
POLICY = scores.ERROR
# As the quickstart prepares it: another size is another data set.
OPTIONS = {'num_train': 4000, 'num_validation': 250, 'num_test': 500}
PICTURES = 200
PER_KIND = {'what': 3, 'caption': 1, 'where': 1, 'exists': 1, 'count': 1, 'category': 1}


def read(root: pathlib.Path, split: str = 'test',
         options: Mapping[str, int] | None = None) -> QuestionSet:
  """Questions about the first PICTURES of a split, PER_KIND of each.

  Args:
    root: the data set is in root/data; made there if it is not.
    split: in TFDS's notation, such as 'validation' or 'test[:20]'.
    options: of the builder; None is OPTIONS.

  Raises:
    ConfigError: no such split, or a package that makes the pictures is missing.
    DataError: files of the data set are damaged.
  """
  source = open_source(KEY, root / 'data', split, options=dict(options or OPTIONS))
  examples = [source[i] for i in range(min(PICTURES, len(source)))]
  check(bool(examples), f'{KEY}: the split {split!r} has no picture')
  questions = []
  for number, asked in enumerate(questions_of(examples, PER_KIND)):
    example, turn = examples[asked.example], asked.turn
    pairs = 'held-out' if turn.heldout else 'seen'
    questions.append(Question(
        f'{asked.example}/{number}', turn.question, turn.question, None,
        answers=(turn.answer,),
        groups={'kind': turn.kind, 'pairs': f'{turn.kind} ({pairs})'},
        picture=base64.b64encode(example.images[0]).decode(), unit=str(asked.example)))
  return QuestionSet(KEY, root, root / 'data' / KEY, tuple(questions), notes=(
      f'{len(examples)} pictures of {source.name}, {source.fingerprint}',))


def score(questions: QuestionSet, predictions: Mapping[str, str], *,
          allow_partial: bool = False, rule: str = RULES[0]) -> scores.Scores:
  """Exact match in percent, by kind."""
  def judge(text: str, question: Question) -> tuple[str, int]:
    said = scoring.normalise(text)
    return said, int(said == scoring.normalise(question.answers[0]))
  return scores.score(questions, predictions, judge=judge, summarise=summarise,
                      headline=HEADLINE, policy=POLICY, rule=rule,
                      allow_partial=allow_partial)


def summarise(results: Sequence[scores.Result]) -> tuple[scores.Row, ...]:
  """The table."""
  return scores.mean_rows(results, 'accuracy')
