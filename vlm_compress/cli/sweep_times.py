"""Times of a sweep's methods: measured apart from the answers, in turn, in one process.

What a run takes while it asks compares nothing: a picture is encoded once for the
questions about it, windows differ in size and answers in length, and the machine
does other things at other hours.  So one batch of questions about different
pictures is read by every method in turn, several times over, up to the first token
of the answer.  Features of the pictures are kept between the rounds: a time is that
of projector, compression and decoder.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_compress import atomic
from vlm_compress.asking import picture_of
from vlm_compress.batches import Request, answer_batches
from vlm_compress.cli.workspace import Message
from vlm_compress.config import check
from vlm_compress.data.errors import DataError
from vlm_compress.data.prompts import prompt_row
from vlm_compress.eval.benchmarks.question import Question, QuestionSet
from vlm_compress.vlm import Vlm, padded

TIMES = 'times.json'


@dataclasses.dataclass(frozen=True)
class Line:
  """What is timed.

  Attributes:
    name: a cell's without its seed.
    vlm: the model under the method.
    runs_as: 'full', 'voco', 'atp' or 'upper_bound'.
    reads: tells other weights and other settings apart.
  """
  name: str
  vlm: Vlm = dataclasses.field(repr=False)
  runs_as: str
  reads: str


def one_batch(questions: QuestionSet, vlm: Vlm, size: int) -> list[Question]:
  """Questions about different pictures whose prompts are equally long when padded.

  Raises:
    ConfigError: there are no `size` such questions.
  """
  buckets: dict[int, dict[Any, Question]] = collections.defaultdict(dict)
  for q in questions.questions:
    key = q.image or q.picture
    if key is None:
      continue
    row = prompt_row(q.prompt, 1, vlm.tokenizer, vlm.config, vlm.template(), 0)
    bucket = buckets[padded(len(row['input_ids']))]
    bucket.setdefault(key, q)
    if len(bucket) == size:
      return list(bucket.values())
  most = max(map(len, buckets.values()), default=0)
  check(False, f'{questions.benchmark}: only {most} questions about different pictures '
        f'have prompts of one length, and {size} are to be timed together; lower '
        '--config.batch_size or raise --config.limit')
  raise AssertionError


def measure(lines: Sequence[Line], full: str, questions: QuestionSet, size: int,
            repeats: int, say: Message, clock: Callable[[], float] = time.perf_counter
            ) -> dict[str, dict[str, Any]]:
  """Seconds to the first token of a batch, of every line in turn.

  Args:
    lines: what is timed; the full model is one of them.
    full: its name.
    questions: `one_batch` is taken of them.
    size: of the batch.
    repeats: rounds, after one that compiles.
    say: called with what is being done.
    clock: for tests.

  Returns:
    {line: {'seconds': median of a question, 'ratio': median of the rounds' ratios to
    the full model, 'rounds': seconds of a question in each, 'questions': size}}.
  """
  by_name = {line.name: line for line in lines}
  batch = one_batch(questions, by_name[full].vlm, size)
  requests = [Request(q.prompt, [picture_of(questions, q)], i)
              for i, q in enumerate(batch)]

  def read(line: Line) -> float:
    start = clock()
    for _ in answer_batches(line.vlm, requests, method=line.runs_as, batch_size=size,
                            max_new_tokens=1):
      pass
    return (clock() - start) / size
  for number, line in enumerate(lines, 1):  # compiles, and encodes the pictures
    say(f'timing {questions.benchmark}: preparing {line.name} [{number} of {len(lines)}]')
    read(line)
  rounds = [{line.name: read(line) for line in lines} for _ in range(repeats)]
  return {name: {'seconds': statistics.median(r[name] for r in rounds),
                 'ratio': statistics.median(r[name] / r[full] for r in rounds),
                 'rounds': [r[name] for r in rounds], 'questions': size}
          for name in by_name}


def key(lines: Sequence[Line], size: int, repeats: int) -> str:
  """What times belong to."""
  told = [sorted((line.name, line.reads) for line in lines), size, repeats]
  return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def write(out: pathlib.Path, known: str, times: Mapping[str, Any]) -> None:
  """Writes times.json."""
  atomic.write_text(out / TIMES, json.dumps({'key': known, 'lines': times}, indent=1) + '\n')


def read(out: pathlib.Path, known: str | None = None) -> dict[str, Any] | None:
  """The lines of times.json; None if it is not there, or of something else.

  Args:
    out: directory of the sweep.
    known: what `key` gives, None for whatever is there.

  Raises:
    DataError: it is damaged.
  """
  path = out / TIMES
  if not path.exists():
    return None
  try:
    found = json.loads(path.read_text())
    lines, its = found['lines'], found['key']
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f'{path} is damaged ({error}); delete it and run the sweep again'
                    ) from error
  return lines if known in (None, its) else None
