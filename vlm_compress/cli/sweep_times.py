"""Times of a sweep's methods: measured apart from the answers, in turn, in one process.

What a run takes while it asks compares nothing: a picture is encoded once for the
questions about it, windows differ in size and answers in length, and the machine
does other things at other hours.  So one batch of questions about different
pictures is read by every method in turn, several times over, up to the logits of the
answer's first token.  Texts and vision features are ready: a time is that of
projector, resampler, compression and decoder.  What VisionZip does in the tower, and
what a smaller picture saves there, is not in it.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vlm_compress import atomic
from vlm_compress.batches import Request, ready_batch
from vlm_compress.cli.workspace import Message
from vlm_compress.config import ConfigError
from vlm_compress.data.errors import DataError
from vlm_compress.data.prompts import prompt_row
from vlm_compress.eval.benchmark.timing import alternate
from vlm_compress.eval.benchmarks.pictures import pictures
from vlm_compress.eval.benchmarks.question import Question, QuestionSet
from vlm_compress.vlm import Vlm

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
  """Questions about different pictures whose prompts have as many tokens, so that
  they are one batch under every method.

  Raises:
    ConfigError: there are no `size` such questions.
  """
  lengths: dict[int, dict[Any, Question]] = collections.defaultdict(dict)
  for q in questions.questions:
    key = q.image or q.picture
    if key is None:
      continue
    row = prompt_row(q.prompt, 1, vlm.tokenizer, vlm.config, vlm.template(), 0)
    some = lengths[len(row['input_ids'])]
    some.setdefault(key, q)
    if len(some) == size:
      return list(some.values())
  most = max(map(len, lengths.values()), default=0)
  raise ConfigError(
      f'{questions.benchmark}: only {most} questions about different pictures have '
      f'prompts of one length, and {size} are to be timed together; lower '
      '--config.batch_size or raise --config.limit')


def measure(lines: Sequence[Line], full: str, questions: QuestionSet, size: int,
            repeats: int, say: Message) -> dict[str, dict[str, Any]]:
  """Seconds of a batch up to its first logits, of every line in turn.

  Args:
    lines: what is timed; the full model is one of them.
    full: its name.
    questions: `one_batch` is taken of them.
    size: of the batch.
    repeats: rounds, after one that compiles.
    say: called with what is being done.

  Returns:
    {line: {'seconds': median of a question, 'ratio': median of the rounds' ratios to
    the full model, 'rounds': seconds of a question in each, 'questions': size}}.
  """
  by_name = {line.name: line for line in lines}
  batch = one_batch(questions, by_name[full].vlm, size)
  requests = [Request(q.prompt, list(pictures(questions, q, 1)), i)
              for i, q in enumerate(batch)]
  runs = {}
  for number, line in enumerate(lines, 1):
    say(f'timing {questions.benchmark}: preparing {line.name} [{number} of {len(lines)}]')
    run = ready_batch(line.vlm, requests, line.runs_as)
    run()  # compiles
    runs[line.name] = lambda run=run: run().logits
  seconds = {name: [x / size for x in some]
             for name, some in alternate(runs, repeats).items()}
  return {name: {'seconds': statistics.median(some),
                 'ratio': statistics.median(
                     x / whole for x, whole in zip(some, seconds[full])),
                 'rounds': some, 'questions': size}
          for name, some in seconds.items()}


def key(lines: Sequence[Line], size: int, repeats: int) -> str:
  """What times belong to: models, settings and a kind of machine."""
  told = [sorted((line.name, line.reads) for line in lines), size, repeats,
          jax.__version__, jax.devices()[0].device_kind, os.cpu_count()]
  return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def write(out: pathlib.Path, known: str, times: Mapping[str, Any]) -> None:
  """Writes times.json."""
  atomic.write_text(out / TIMES, json.dumps({'key': known, 'lines': times}, indent=1) + '\n')


def read(out: pathlib.Path, known: str) -> dict[str, Any] | None:
  """The lines of times.json; None if it is not there, or of something else.

  Args:
    out: directory of the sweep.
    known: what `key` gives.

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
  return lines if known == its else None
