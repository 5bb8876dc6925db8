"""What all benchmarks have in common: a question, and a file full of them."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlm_compress.data.errors import DataError
from vlm_compress.data.paths import check_below, resolve_path

SHORT_ANSWER = 'Answer the question using a single word or phrase.'
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'
_MOST_DIGITS = 18  # of an id or index


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
  """One question of a benchmark.

  Attributes:
    id: unique in the benchmark.
    text: the question itself, as in the official file.
    prompt: what LLaVA-1.5 asks, without `<image>`.
    image: path of picture or video relative to the root, '/' between folders;
      None where there is none, or where `picture` holds it.
    options: texts of the choices A, B, ...
    answers: the right answers, () where they are not public.  For multiple
      choice it is the letter.
    groups: what scores are broken down by, {'type': 'number', ...}.
    aliases: names that LLaVA's answer files use; not always unique.
    other_ids: names that other tools use, tried after those.
    picture: the encoded picture in base64, where the official file holds it.
    unit: questions with the same unit are scored together (two about an image
      of MME, the passes of MMBench) and should stay on one host.
  """
  id: str
  text: str
  prompt: str
  image: str | None
  options: tuple[str, ...] = ()
  answers: tuple[str, ...] = ()
  groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
  aliases: tuple[str, ...] = ()
  other_ids: tuple[str, ...] = ()
  picture: str | None = None
  unit: str = ''


@dataclasses.dataclass(frozen=True)
class Part:
  """How many questions of a kind there are, and should be.

  Attributes:
    name: 'questions', 'random', ...
    count: in the files that were read.
    official: what the releases have, several where there are several; () is
      not known.
  """
  name: str
  count: int
  official: tuple[int, ...] = ()

  def __str__(self) -> str:
    wanted = ' or '.join(f'{n:,}' for n in self.official)
    return f'{self.name} {self.count:,}' + (f' of {wanted}' if wanted else '')

  @property
  def complete(self) -> bool:
    """Whether the count is that of a release."""
    return not self.official or self.count in self.official


@dataclasses.dataclass(frozen=True)
class QuestionSet:
  """The questions of one benchmark.

  Attributes:
    benchmark: its key in the catalogue.
    root: what image paths are relative to.
    source: the file or directory that was read, for messages.
    questions: in the order of the official files.
    parts: counts beside the official ones.
    ignored: ids that the official scorer leaves out; answers to them are fine.
    videos: `image` of the questions is a video.
    notes: what a reader of the scores should know about these files.
  """
  benchmark: str
  root: pathlib.Path
  source: pathlib.Path
  questions: tuple[Question, ...]
  parts: tuple[Part, ...] = ()
  ignored: frozenset[str] = frozenset()
  notes: tuple[str, ...] = ()
  videos: bool = False

  def __post_init__(self):
    if not self.questions:
      raise DataError(f'{self.source} holds no question')
    seen: set[str] = set()
    base = os.path.abspath(self.root)
    for question in self.questions:
      if question.id in seen:
        raise DataError(f'{self.source}: the question {question.id!r} occurs '
                        'twice; copy the file again')
      seen.add(question.id)
      if question.image is not None:
        try:
          check_below(base, question.image)
        except DataError as e:
          raise DataError(f'{self.source}: question {question.id!r}: {e}') from e

  def take(self, keep: Iterable[str]) -> QuestionSet:
    """The same set with only the questions of these ids, for one host."""
    wanted = set(keep)
    return dataclasses.replace(self, parts=(), questions=tuple(
        q for q in self.questions if q.id in wanted))

  def image_path(self, question: Question) -> pathlib.Path:
    """Where a question's picture or video is; never outside the root."""
    return resolve_path(self.root, question.image or '')


def home(root: pathlib.Path, key: str) -> pathlib.Path:
  """The directory of a benchmark: `root` itself, or root/key if there is one."""
  if not root.exists():
    raise FileNotFoundError(f'data directory {root} does not exist')
  return root / key if (root / key).is_dir() else root


def first_file(root: pathlib.Path, *names: str) -> pathlib.Path:
  """The first of these files that exists.

  Raises:
    FileNotFoundError: none does; names the first.
  """
  for name in names:
    if (root / name).is_file():
      return root / name
  others = f' (nor {", ".join(names[1:])})' if len(names) > 1 else ''
  raise FileNotFoundError(f'data file {root / names[0]} does not exist{others}; '
                          'see "Benchmarks" in the README')


def field(row: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
  """row[name] of a type that it must have; `where` is file and place.

  Raises:
    DataError: the row is no object, lacks the field, or has another type there.
  """
  if not isinstance(row, Mapping):
    raise DataError(f'{where}: holds a {type(row).__name__}; it must be an '
                    'object')
  value = row.get(name)
  if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = ' or '.join({'str': 'a text', 'int': 'a whole number', 'list':
                          'a list', 'dict': 'an object', 'bool': 'true or false'
                          }.get(k.__name__, k.__name__) for k in kinds)
    found = f'is {type(value).__name__}' if name in row else 'is missing'
    raise DataError(f'{where}: field {name!r} must be {wanted}, {found}; is it '
                    'another version of the file?')
  return value


def is_whole(text: str) -> bool:
  """Whether a text is a whole number, 0 or more, in digits that int() takes as one
  number and no other: `²` is a digit for Python, and thousands of them are too many.
  """
  return text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS


def with_options(question: str, options: Sequence[str]) -> str:
  """The question and a line `A. text` for every option [LLaVA]."""
  return '\n'.join([question, *(f'{letter}. {text}' for letter, text
                                in zip(LETTERS, options))])


def squeeze(text: str) -> str:
  """The text without blanks and case, to see whether two ask the same.

  VoCo-LLaMA deletes line breaks and others capitalise.  One release of POPE
  has a misspelt word.
  """
  return re.sub(r'\s+', '', text).lower().replace('imange', 'image')
