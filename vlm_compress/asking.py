"""Asks a model the questions of a benchmark, on all devices of a host.

Every device, or every group of devices that a model is spread over, is a
replica that takes the next window of questions when it is done with one.  Why
replicas and not one program over a data axis: how many tokens a pruned batch
keeps differs, and one program would run all devices at the rung of the fullest
batch, and wait for it behind every segment.  The price is that each replica
compiles its own programs.

Questions of a window have prompts of the same padded length, so there are few
shapes.  An answer does not depend on its window, batch or replica.

A question about a video has its frames as pictures, in the order of time; they are
decoded once for a window, and kept as the tower sees them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import queue
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from vlm_compress import api, sharding
from vlm_compress.batches import Answer, Request, answer_batches
from vlm_compress.config import ConfigError, LlavaConfig, check
from vlm_compress.convert.processor import PROCESSOR
from vlm_compress.convert.vocabulary import TOKENIZER
from vlm_compress.data import video
from vlm_compress.data.errors import DataError
from vlm_compress.data.prompts import prompt_row
from vlm_compress.decode.identity import fingerprint
from vlm_compress.eval.answer_log import ShardLog
from vlm_compress.eval.benchmarks.pictures import num_pictures, pictures
from vlm_compress.eval.benchmarks.question import Question, QuestionSet
from vlm_compress.eval.methods import MethodConfig
from vlm_compress.models.sequence import TEXT
from vlm_compress.vlm import UPPER_BOUND, Vlm, padded

# Batches in a window where rows regroup behind modules; otherwise it is one.
REGROUPED = 4
_SHOWN = 3  # names in a message
_METHODS_KEPT = 4


@dataclasses.dataclass(frozen=True)
class Settings:
  """How questions are asked.

  Attributes:
    batch_size: questions at a time, per replica; changes no answer.
    max_new_tokens: longest answer.
    seed: of the selector 'random'.
    frames: of a video that a question is about, each a picture.
  """
  batch_size: int = 8
  max_new_tokens: int = 128
  seed: int = 0
  frames: int = video.NUM_FRAMES


class Replica:
  """A model on one device, or spread over a group of them."""

  def __init__(self, vlm: Vlm, device: jax.Device | None):
    """`device` is None where parameters are spread over a mesh already."""
    self.device = device
    with self.here():
      vlm.segmented  # noqa: B018 - puts the parameters there
    self._vlms: dict[LlavaConfig, Vlm] = {}
    self.vlm = vlm

  def here(self) -> contextlib.AbstractContextManager:
    """New arrays are on this replica's device."""
    return (contextlib.nullcontext() if self.device is None else
            jax.default_device(self.device))

  def running(self, config: LlavaConfig) -> Vlm:
    """The same parameters under another method; programs of the last few are kept.

    Not of all: a sweep has hundreds, and a process may map only so much memory.
    """
    other = self._vlms.pop(config, None)
    if other is None:
      other = dataclasses.replace(self.vlm, config=config)
      other.__dict__['segmented'] = self.vlm.segmented.with_config(config)
    self._vlms[config] = other  # the last one in the order of use
    while len(self._vlms) > _METHODS_KEPT:
      del self._vlms[next(iter(self._vlms))]
    return other


class Checkpoint:
  """A model directory, loaded on the devices of this host.

  Attributes:
    name: of its directory; config: as loaded; replicas: see Replica.
  """

  def __init__(self, directory: str | os.PathLike, *, template: str | None = None,
               devices: Sequence[jax.Device] | None = None, tensor: int = 1):
    """Loads it.

    Args:
      directory: of the model.
      template: conversation template, if not its own.
      devices: None is all of this host's accelerators, or one CPU device.
      tensor: devices that share a copy of the model.

    Raises:
      ConfigError: a file of it is missing or damaged, or tensor divides
        something not.
    """
    if devices is None:
      devices = jax.local_devices()
      devices = devices[:max(1, tensor)] if devices[0].platform == 'cpu' else devices
    check(len(devices) % tensor == 0, f'tensor={tensor} does not divide the '
          f'{len(devices)} devices of this host')
    path = pathlib.Path(directory).absolute()
    self.name = path.parent.name if path.name == 'model' else path.name
    if tensor == 1:
      first = api.load(directory, template=template)
      self.replicas = [Replica(dataclasses.replace(first), d) for d in devices]
    else:
      groups = [list(devices[i:i + tensor]) for i in range(0, len(devices), tensor)]
      meshes = [sharding.make_mesh(1, 1, tensor, group) for group in groups]
      self.replicas = [Replica(api.load(directory, template=template, mesh=mesh), None)
                       for mesh in meshes]
      first = self.replicas[0].vlm
      sharding.check_sizes(first.config, meshes[0], 'vision_tower' in first.params)
    self.vlm, self.config = first, first.config
    self._fingerprint, self._directory = '', path

  @property
  def tokenizer_hash(self) -> str:
    """SHA-256 of the files that say how texts and pictures are prepared, 16 digits."""
    digest = hashlib.sha256()
    for name in (TOKENIZER, PROCESSOR):
      path = self._directory / name
      digest.update(path.read_bytes() if path.is_file() else b'none')
    return digest.hexdigest()[:16]

  @property
  def fingerprint(self) -> str:
    """Of the weights, wherever they are."""
    self._fingerprint = self._fingerprint or fingerprint(self.vlm.params)
    return self._fingerprint


@dataclasses.dataclass(frozen=True)
class _Prompt:
  """A question, and its prompt's size: padded slots, text tokens, those of them
  behind the image.
  """
  question: Question
  length: int
  text_tokens: int
  prompt_tokens: int


def check_pictures(questions: QuestionSet) -> list[Question]:
  """Questions whose picture's or video's file is not there.

  Raises:
    ConfigError: there are videos, and nothing that reads them.
  """
  if questions.videos:
    video.check_installed(questions.benchmark)
  there: dict[str, bool] = {}
  for q in questions.questions:
    if q.image is not None and q.image not in there:
      there[q.image] = questions.image_path(q).is_file()
  return [q for q in questions.questions if q.image is not None and not there[q.image]]


def missing_message(questions: QuestionSet, gone: Sequence[Question]) -> str:
  """What is said about pictures without a file."""
  names = list(dict.fromkeys(str(questions.image_path(q)) for q in gone))
  return (f'{questions.source}: {len(gone):,} of {len(questions.questions):,} questions '
          f'ask about {len(names):,} {"video" if questions.videos else "picture"}(s) '
          f'that are not there '
          f'({", ".join(names[:_SHOWN])}{", ..." if len(names) > _SHOWN else ""})')


def check_frames(vlm: Vlm, method: MethodConfig, questions: QuestionSet,
                 settings: Settings) -> None:
  """Whether a video's frames have room in a prompt, before anything is asked.

  Looks at the first question about a video and at the longest.

  Raises:
    ConfigError: they have none; says what helps.
    DataError: the template cannot say it, or a word is unknown.
  """
  if not questions.videos:
    return
  limit = vlm.config.text.max_position_embeddings
  for q in (questions.questions[0], max(questions.questions, key=lambda q: len(q.prompt))):
    try:
      row = _laid_out(vlm, method, q, settings.frames)
      need = int(row['positions'][-1]) + 1
      check(need < limit, f'a row needs {need} positions, which leaves none of text.max_'
            f'position_embeddings={limit} for an answer')
    except ConfigError as error:
      raise ConfigError(
          f'question {q.id!r}: {settings.frames} frames of {method.config.num_visual_tokens} '
          f'visual tokens are too many: {error}. Ask with fewer --frames, or with a method '
          'that puts fewer tokens in front of the decoder (voco, avg_pool, downsample); '
          'those that drop tokens leave positions as they are') from error


def ask_shard(checkpoint: Checkpoint, method: MethodConfig, questions: QuestionSet,
              log: ShardLog, settings: Settings,
              advance: Callable[[int], Any] = lambda count: None) -> None:
  """Asks what a shard's log has no answer to, and finishes it.

  Args:
    checkpoint, method, settings: what is asked, and how.
    questions: the benchmark, for its pictures.
    log: of the shard.
    advance: called with the number of questions just answered.

  Raises:
    DataError: a picture that is none, or a word that the tokenizer does not
      know; names the question.
  """
  def ask(replica: Replica, window: Sequence[_Prompt]) -> list[dict[str, Any]]:
    with replica.here():
      return _ask(replica.running(method.config), method, questions, window, settings,
                  log.index)
  with log.writing():  # in which it is known what is open
    windows = _windows(checkpoint.vlm, method, questions, log.open_questions, settings)
    for rows in _dealt(checkpoint.replicas, windows, ask):
      log.add(rows)
      advance(len(rows))
    log.finish()


def _laid_out(vlm: Vlm, method: MethodConfig, question: Question, num_images: int
              ) -> dict[str, Any]:
  """The question's row, as `vlm.prepare` lays it out."""
  count = (method.config.voco.num_voco_tokens if num_images and method.runs_as in
           ('voco', UPPER_BOUND) else 0)
  try:
    return prompt_row(question.prompt, num_images, vlm.tokenizer, method.config,
                      vlm.template(), count, hides=method.runs_as != UPPER_BOUND)
  except DataError as error:
    raise DataError(f'question {question.id!r}: {error}') from error


def _windows(vlm: Vlm, method: MethodConfig, questions: QuestionSet,
             some: Sequence[Question], settings: Settings) -> list[list[_Prompt]]:
  """Some of the questions, in windows of one shape."""
  buckets: dict[tuple, list[_Prompt]] = {}
  for q in some:
    num_images = num_pictures(questions, q, settings.frames)
    row = _laid_out(vlm, method, q, num_images)
    length = padded(len(row['input_ids']))
    buckets.setdefault((num_images, length), []).append(_Prompt(
        q, length, int((row['token_types'] == TEXT).sum()),
        int(row['prompt_mask'].sum())))
  size = settings.batch_size * (REGROUPED if method.runs_as == 'atp' else 1)
  return [bucket[at:at + size] for _, bucket in sorted(buckets.items(), key=lambda b: b[0])
          for at in range(0, len(bucket), size)]


def _dealt(replicas: Sequence[Replica], windows: Sequence[Any], ask: Callable
           ) -> Iterator[list[dict[str, Any]]]:
  """Windows' rows as they are done, by whichever replica is free."""
  if len(replicas) == 1:
    yield from (ask(replicas[0], window) for window in windows)
    return
  free: queue.SimpleQueue[Replica] = queue.SimpleQueue()
  for replica in replicas:
    free.put(replica)

  def one(window: Any) -> list[dict[str, Any]]:
    replica = free.get()
    try:
      return ask(replica, window)
    finally:
      free.put(replica)
  with concurrent.futures.ThreadPoolExecutor(len(replicas)) as pool:
    jobs = [pool.submit(one, window) for window in windows]
    failed = None
    try:
      for job in concurrent.futures.as_completed(jobs):
        if job.cancelled():
          continue
        if job.exception() is None:
          yield job.result()  # also those that others were at when one failed
        elif failed is None:
          failed = job.exception()
          for other in jobs:  # those that have not begun
            other.cancel()
      if failed is not None:
        raise failed
    finally:
      for job in jobs:
        job.cancel()


def _ask(vlm: Vlm, method: MethodConfig, questions: QuestionSet,
         window: Sequence[_Prompt], settings: Settings, shard: int
         ) -> list[dict[str, Any]]:
  """Answers of a window as rows of result_schema.py."""
  start, programs = time.monotonic(), len(vlm.segmented.programs)
  opened: dict[Any, list[Any]] = {}
  requests = [Request(p.question.prompt, _opened(vlm, questions, p.question, settings, opened),
                      zlib.crc32(p.question.id.encode()) & 0x7fffffff) for p in window]
  rows = []
  for ids, answers in answer_batches(
      vlm, requests, method=method.runs_as, batch_size=settings.batch_size,
      max_new_tokens=settings.max_new_tokens, seed=settings.seed):
    rows += [_row(vlm.config, method, window[i], len(requests[i].images), answer)
             for i, answer in zip(ids, answers)]
  seconds = (time.monotonic() - start) / len(window)
  for row in rows:
    row.update(latency_seconds=round(seconds, 6), latency_rows=len(window),
               compiled=len(vlm.segmented.programs) > programs, shard=shard)
  return rows


def _opened(vlm: Vlm, questions: QuestionSet, question: Question, settings: Settings,
            opened: dict[Any, list[Any]]) -> list[Any]:
  """The question's pictures as the tower sees them, decoded once for a window."""
  key = question.image or question.picture
  if key not in opened:
    # A video's frames one at a time: as they come they may be large.
    opened[key] = [vlm.pixels(picture) for picture in pictures(
        questions, question, settings.frames)]
  return opened[key]


def _row(config: LlavaConfig, method: MethodConfig, prompt: _Prompt, num_images: int,
         answer: Answer) -> dict[str, Any]:
  layers = config.text.num_hidden_layers
  if answer.visual_tokens is not None:
    visual = [int(x) if x == int(x) else float(x) for x in answer.visual_tokens]
  else:
    each = (config.voco.num_voco_tokens if method.runs_as == 'voco' else
            config.num_visual_tokens)
    visual = [each * num_images] * layers
  row = {'question_id': prompt.question.id, 'prediction': answer.text,
         'answer_tokens': len(answer.token_ids), 'ended': answer.ended,
         'visual_tokens': visual, 'text_tokens': prompt.text_tokens,
         'prompt_tokens': prompt.prompt_tokens}
  if method.runs_as == 'atp':
    row['kept'] = [visual[place] for place in config.atp.prune_after]
  return row
