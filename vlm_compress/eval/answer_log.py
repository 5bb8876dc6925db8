"""Questions in shards, and the answers to a shard on disk.

A shard is a fixed part of a benchmark: which questions it has depends on the
questions and on the number of shards, never on hosts or devices.  What was
answered is appended to a journal, flushed to the disk, and becomes the shard's
file when its last question is answered, so a run that is killed asks nothing
twice and loses at most what was being asked.

result_schema.py has the fields.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vlm_compress import atomic
from vlm_compress.config import check
from vlm_compress.data.errors import DataError
from vlm_compress.eval.benchmarks.question import Question
from vlm_compress.eval.result_schema import ANSWER

Rows = dict[str, dict[str, Any]]


def unit_of(question: Question) -> str:
  """What is resampled, and stays in one shard: the questions that are scored
  together, or else those about a picture.
  """
  return question.unit or question.image or question.id


def in_shards(questions: Sequence[Question], num_shards: int) -> list[list[Question]]:
  """Questions in shards, units dealt in turn.

  Args:
    questions: of a benchmark, in its order.
    num_shards: at least 1; shards that would be empty are left out.
  """
  order: dict[str, int] = {}
  shards: list[list[Question]] = [[] for _ in range(num_shards)]
  for question in questions:
    unit = order.setdefault(unit_of(question), len(order))
    shards[unit % num_shards].append(question)
  return [shard for shard in shards if shard]


def shard_path(run: pathlib.Path, index: int, count: int) -> pathlib.Path:
  """Where a finished shard is."""
  return run / f'answers-{index:05}-of-{count:05}.jsonl'


class ShardLog:
  """The answers to one shard: its journal while it is asked, then its file.

  Attributes:
    path: of the finished shard; journal: of the unfinished one.
    rows: answers so far, by question id.
    note: what was odd about the journal, '' if nothing.
  """

  def __init__(self, run: pathlib.Path, index: int, count: int,
               questions: Sequence[Question]):
    """Reads what is there.

    Raises:
      DataError: a line is no answer of this shard, or answers again.
    """
    self.path = shard_path(run, index, count)
    self.journal = self.path.with_suffix('.partial.jsonl')
    self.questions, self.note, self.index = list(questions), '', index
    self._ids = {q.id for q in questions}
    self._good = 0  # bytes of the journal that are whole lines
    self.rows: Rows = {}
    if self.path.exists():
      self.rows = read_rows(self.path, self._ids)
      lacking = len(self._ids) - len(self.rows)
      if lacking:
        raise DataError(f'{self.path}: {lacking} of {len(self._ids)} answers are '
                        'missing; delete it, and they are asked again')
    elif self.journal.exists():
      self._read_journal()

  @property
  def finished(self) -> bool:
    """Whether the shard's file is there."""
    return self.path.exists()

  @property
  def open_questions(self) -> list[Question]:
    """What has not been answered."""
    return [q for q in self.questions if q.id not in self.rows]

  def _read_journal(self) -> None:
    text = self.journal.read_bytes()
    self._good = text.rfind(b'\n') + 1
    if self._good < len(text):
      line = text.count(b'\n') + 1
      self.note = (f'{self.journal}: line {line} is torn; its question is asked again')
    self.rows = _rows(text[:self._good], self.journal, self._ids)

  @contextlib.contextmanager
  def writing(self) -> Iterator[None]:
    """The journal is open; `add` may be called.

    Raises:
      ConfigError: another process writes it.
    """
    with open(self.journal, 'ab') as self._stream:
      try:
        fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        check(False, f'{self.journal}: another process answers this shard; wait for it '
              'or end it')
      # Another one may have written since this one read.
      check(not self.path.exists(), f'{self.path}: another process has finished this '
            'shard; run again, it goes on with it')
      self._read_journal()
      self._stream.truncate(self._good)
      yield

  def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends answers; they are on the disk when this returns."""
    lines = ''.join(f'{json.dumps(row, ensure_ascii=False)}\n' for row in rows)
    self._stream.write(lines.encode())
    self._stream.flush()
    os.fsync(self._stream.fileno())
    self.rows.update({row['question_id']: dict(row) for row in rows})

  def finish(self) -> None:
    """Writes the shard's file, in the order of the questions.

    Raises:
      ConfigError: a question has no answer.
    """
    check(not self.open_questions, f'{self.path}: {len(self.open_questions)} questions '
          'have no answer')
    write_rows(self.path, [self.rows[q.id] for q in self.questions])
    self.journal.unlink(missing_ok=True)


def write_rows(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes JSON lines, atomically; no more than a row is held."""
  with atomic.replace(path) as temporary, open(temporary, 'w', encoding='utf-8') as stream:
    stream.writelines(f'{json.dumps(row, ensure_ascii=False)}\n' for row in rows)


def read_rows(path: pathlib.Path, known: set[str] | None = None) -> Rows:
  """The answers of a file by question id.

  Args:
    path: of JSON lines.
    known: ids that may occur; None allows all.

  Raises:
    DataError: a line is no answer, answers again or another question; names it.
  """
  return _rows(path.read_bytes(), path, known)


def _rows(text: bytes, path: pathlib.Path, known: set[str] | None) -> Rows:
  rows: Rows = {}
  for number, line in enumerate(text.split(b'\n')[:-1], 1):
    where = f'{path}: line {number}'
    remedy = 'delete the file, and its questions are asked again'
    try:
      row = json.loads(line)
    except ValueError as error:
      raise DataError(f'{where} is no JSON ({error}); {remedy}') from error
    if not isinstance(row, dict) or any(name not in row for name in ANSWER):
      raise DataError(f'{where} is no answer of this version; {remedy}')
    key = row['question_id']
    if key in rows:
      raise DataError(f'{where}: answers question {key!r} again; {remedy}')
    if known is not None and key not in known:
      raise DataError(f'{where}: question {key!r} is not of this shard; {remedy}')
    # Every line would keep names of its own, a third of its memory.
    rows[key] = {sys.intern(name): value for name, value in row.items()}
  if text and not text.endswith(b'\n'):
    raise DataError(f'{path}: the last line is torn; delete the file, and its '
                    'questions are asked again')
  return rows
