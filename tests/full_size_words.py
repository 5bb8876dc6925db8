"""Random answers with points that are known beforehand, and invented words and files for
them: what full_size_files.py is made of.

All words are made up, and none of them means anything to a normaliser, so that the points
of an answer are known from how it was drawn and not from the code that is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import random
from collections.abc import Iterable, Sequence

YES_NO = ('Yes', 'No')
VOCABULARY = 100_000  # VQAv2's ten answers a question are about as many different texts


@dataclasses.dataclass(frozen=True, slots=True)
class Chance:
  """What a random answer to a question may be, each as likely, and its points 0..1."""
  texts: tuple[str, ...]
  points: tuple[float, ...]

  @property
  def mean(self) -> float:
    """Expected points."""
    return sum(self.points) / len(self.points)

  @property
  def variance(self) -> float:
    """Of the points."""
    return sum(p * p for p in self.points) / len(self.points) - self.mean ** 2


@functools.cache
def one_right(texts: tuple[str, ...], right: str) -> Chance:
  """One of the texts has the point; whatever the case of its letters."""
  return Chance(texts, tuple(float(text.lower() == right.lower()) for text in texts))


@functools.cache
def agreed(count: int) -> float:
  """Points of an answer that `count` of ten people gave: for each of them in turn,
  a third for every other one who said it, at most 1; then the mean [VQA].
  """
  others = [count - 1] * count + [count] * (10 - count)
  return sum(min(1.0, n / 3) for n in others) / 10


@functools.cache
def word(number: int) -> str:
  """Six letters that are in no list of contractions, numbers or articles."""
  out = ''
  for _ in range(3):
    number, rest = divmod(number, 70)
    out += 'bdfgklmnprtvxz'[rest // 5] + 'aeiou'[rest % 5]
  return out


def common(rng: random.Random, size: int = VOCABULARY) -> str:
  """A word, few often and most seldom (about 1 / rank), as in people's answers."""
  return word(int(size ** rng.random()))


def sentence(rng: random.Random, length: int) -> str:
  """So many words and a question mark."""
  return ' '.join(common(rng, 5_000) for _ in range(length)).capitalize() + '?'


def write_list(path: pathlib.Path, rows: Iterable[dict], head: dict | None = None,
               key: str = '') -> None:
  """Writes a JSON list row by row, or an object with one at its end, under `key`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'w', encoding='utf-8') as stream:
    stream.write('[' if head is None else f'{json.dumps(head)[:-1]}, "{key}": [')
    for number, row in enumerate(rows):
      stream.write((', ' if number else '') + json.dumps(row))
    stream.write(']' if head is None else ']}')


def write_answers(path: pathlib.Path, asked: Sequence[tuple[str, str]],
                  texts: Sequence[str]) -> None:
  """Answers as `vlm-compress evaluate` writes them, with the prompt beside them.

  Args:
    path: of the JSON lines.
    asked: (id, prompt) of each question.
    texts: what was said.
  """
  with open(path, 'w', encoding='utf-8') as stream:
    for (key, prompt), text in zip(asked, texts, strict=True):
      stream.write(json.dumps({
          'question_id': key, 'prompt': prompt, 'prediction': text, 'answer_tokens': 2,
          'ended': 'eos', 'visual_tokens': [576.0] * 32, 'text_tokens': 62,
          'prompt_tokens': 27, 'latency_seconds': 0.0421, 'latency_rows': 16,
          'compiled': False, 'shard': 0}) + '\n')
