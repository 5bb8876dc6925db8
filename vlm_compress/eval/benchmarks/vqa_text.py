"""The two text normalisers of the VQA family, and their soft accuracy.

`official` is vqaEval's, the scorer of VQAv2 and VizWiz.  `m4c` is the one of
TextVQA (EvalAIAnswerProcessor), which LLaVA also applies to its predictions
before it uploads them.  They differ: m4c turns `it's` into `it 's` and
`red,blue` into `redblue`, which the official form of the same words is not.
Both keep the quirks of the published code, because the published numbers have
them; each is marked below.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from fractions import Fraction

from vlm_compress.eval.benchmarks.contractions import CONTRACTIONS

NUM_HUMANS = 10  # answers to every question of VQAv2 and TextVQA
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r'\d,\d')
# The published look-behind is misspelt and never fires: a full stop after a
# digit goes as well, only one in front of a digit stays.
_FULL_STOP = re.compile(r'\.(?!\d)')
# The published call passes a flag (re.UNICODE, 32) where the count belongs.
_MOST_FULL_STOPS = 32
_NUMBERS = {word: str(value) for value, word in enumerate(
    ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight',
     'nine', 'ten'))} | {'none': '0'}
_ARTICLES = ('a', 'an', 'the')


def spaces(text: str) -> str:
  """Line breaks and tabs become blanks, and the ends are stripped [vqaEval]."""
  return text.replace('\n', ' ').replace('\t', ' ').strip()


def punctuation(text: str) -> str:
  """The punctuation step [vqaEval].

  A mark is deleted where the text has it beside a blank, anywhere, or has a
  comma between digits, anywhere; otherwise it becomes a blank.
  """
  joined = _DIGIT_COMMA_DIGIT.search(text) is not None
  out = text
  for mark in _MARKS:
    if mark in text:
      loose = joined or mark + ' ' in text or ' ' + mark in text
      out = out.replace(mark, '' if loose else ' ')
  return _FULL_STOP.sub('', out, count=_MOST_FULL_STOPS)


def words(text: str) -> str:
  """Lower case, digits for small numbers, no articles, apostrophes put back
  into contractions [vqaEval].
  """
  kept = (_NUMBERS.get(word, word) for word in text.lower().split())
  return ' '.join(CONTRACTIONS.get(word, word) for word in kept
                  if word not in _ARTICLES)


@functools.lru_cache(1 << 16)
def official(text: str) -> str:
  """The normal form of vqaEval."""
  return words(punctuation(spaces(text)))


@functools.lru_cache(1 << 16)
def m4c(text: str) -> str:
  """The normal form of m4c's EvalAIAnswerProcessor."""
  text = text.lower().replace(',', '').replace('?', '').replace("'s", " 's")
  return words(punctuation(spaces(text.strip())))


def soft_accuracy(answer: str, humans: Sequence[str]) -> Fraction:
  """VQA's accuracy of one answer, 0..1, exactly [vqaEval].

  For each human in turn: min(1, others that agree with the answer / 3); then
  the mean.  Others are told apart by position, so that equal answers count.

  Args:
    answer: normalised.
    humans: the human answers, in the form that they are compared in.
  """
  total, same = len(humans), sum(human == answer for human in humans)
  thirds = same * min(3, same - 1) + (total - same) * min(3, same)
  return Fraction(thirds, 3 * total)
