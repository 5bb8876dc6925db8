"""One run of `vlm-compress evaluate --benchmark`: asked in shards, then scored.

Hosts share the run's directory: each answers its shards, and process 0 puts
them together when the last file is there.  Why files and no collective: the
answers are needed on a disk anyway to resume, scores are made of single answers
(F1, all passes right), and hosts may finish hours apart, which no barrier likes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)

from vlm_compress.analysis import example_maps
from vlm_compress.asking import (
  Checkpoint,
  Settings,
  ask_shard,
  check_frames,
  check_pictures,
  missing_message,
)
from vlm_compress.atomic import write_text
from vlm_compress.cli.quickstart import versions
from vlm_compress.cli.together import agreed, appears
from vlm_compress.cli.workspace import Message
from vlm_compress.config import check
from vlm_compress.config_values import to_dict
from vlm_compress.data.errors import DataError
from vlm_compress.data.video import NUM_FRAMES
from vlm_compress.eval import methods, runs
from vlm_compress.eval.answer_log import Rows, ShardLog, in_shards, shard_path
from vlm_compress.eval.benchmarks.question import QuestionSet
from vlm_compress.eval.result_schema import SCHEMA
from vlm_compress.train.checkpoint import differences
from vlm_compress.vlm import own_method

NUM_SHARDS = 16
_POLL_SECONDS = 1.0
# Longest answers: LLaVA-1.5's setting, and more than any answer of our pictures.
MAX_NEW_TOKENS = 128
MAX_NEW_TOKENS_OF = {'mmbench': 1024, 'scienceqa': 1024, 'openmoji_grid': 32}


@dataclasses.dataclass(frozen=True)
class Job:
  """What one run asks, of which model.

  Attributes:
    method: of methods.METHODS; 'auto' is the checkpoint's own.
    budget, prune_after: see methods.method_config.
    shift: of the thresholds of ATP, None as in the checkpoint.
    rule: of scoring, None for the benchmark's first.
    seed: of the selector 'random'.
    limit: questions at most, None for all.
    shards: parts that are answered and kept one by one.
    batch_size: questions at a time and replica.
    max_new_tokens: None is the benchmark's.
    allow_partial: leave out questions whose picture is not there.
    frames: of a video, for questions about one.
  """
  method: str = 'auto'
  budget: float | None = None
  prune_after: tuple[int, ...] | None = None
  shift: float | None = None
  rule: str | None = None
  seed: int = 0
  limit: int | None = None
  shards: int = NUM_SHARDS
  batch_size: int = 8
  max_new_tokens: int | None = None
  allow_partial: bool = False
  frames: int = NUM_FRAMES


def read(benchmark: str, data: pathlib.Path, job: Job) -> tuple[QuestionSet, int, str]:
  """Questions to ask, how many the benchmark has, and its split.

  Args:
    benchmark: KEY or KEY:SPLIT.
    data: its files.
    job: limit and allow_partial.

  Raises:
    ConfigError: no such benchmark, split or rule.
    DataError: pictures are missing, or files of questions damaged.
  """
  key, _, split = benchmark.partition(':')
  check(key in runs.BENCHMARKS, f'--benchmark={key}: unknown; use one of '
        f'{", ".join(sorted(runs.BENCHMARKS))}')
  module = runs.BENCHMARKS[key]
  splits = getattr(module, 'SPLITS', ())
  check(not split or key == 'openmoji_grid' or split in splits,
        f'--benchmark={benchmark}: {key} has ' +
        (f'the splits {", ".join(splits)}' if splits else 'no splits to choose from'))
  check(job.rule in (None, *module.RULES), f'--rule={job.rule}: {key} has '
        f'{", ".join(module.RULES)}')
  questions = runs.read_questions(key, data, split or None)
  total = len(questions.questions)
  if job.limit is not None:
    questions = runs.first_units(questions, job.limit)
  gone = check_pictures(questions)
  if gone and not job.allow_partial:
    raise DataError(f'{missing_message(questions, gone)}; copy them, or leave these '
                    'questions out with --allow-partial')
  if gone:
    without = {q.id for q in gone}
    check(len(without) < len(questions.questions), f'{missing_message(questions, gone)}; '
          'no question is left to ask')
    questions = questions.take(q.id for q in questions.questions if q.id not in without)
  return questions, total, split or (splits[0] if splits else '')


def resolved(checkpoint: Checkpoint, job: Job) -> tuple[str, methods.MethodConfig]:
  """The method's name, and how the checkpoint runs it.

  Raises:
    ConfigError: it does not fit the model, or a budget needs a shift.
  """
  name = job.method
  if name == 'auto':
    kind = checkpoint.config.resampler
    name = kind if kind in methods.RESAMPLERS else own_method(checkpoint.config)
  method = methods.method_config(name, checkpoint.config, job.budget, job.prune_after)
  check(job.shift is None or name == 'atp', f'--threshold-shift belongs to method atp, '
        f'not {name}')
  if job.shift is not None:
    return name, methods.with_shift(method, job.shift)
  check(not method.needs_shift, f'--budget={job.budget}: which shift of the thresholds '
        'gives it has to be found on other questions first: vlm-compress calibrate '
        f'--target-tokens {job.budget} --out FILE.json, then --calibration FILE.json')
  return name, method


def run(out: pathlib.Path, checkpoint: Checkpoint, questions: QuestionSet, total: int,
        split: str, job: Job, say: Message, share: tuple[int, int] = (0, 1)
        ) -> dict[str, Any]:
  """Asks, scores and writes what is not there yet.

  Args:
    out: directory of the run.
    checkpoint: the model, on this host.
    questions, total, split: from `read`.
    job: the rest.
    say: called with lines.
    share: (index, count) of hosts that run this together.

  Returns:
    What result.json holds.

  Raises:
    ConfigError: the directory belongs to another configuration, or the model has no
      room for so many frames.
  """
  name, method = resolved(checkpoint, job)
  rule = job.rule or runs.BENCHMARKS[questions.benchmark].RULES[0]
  limit = job.max_new_tokens or MAX_NEW_TOKENS_OF.get(questions.benchmark, MAX_NEW_TOKENS)
  about = {'split': split, 'rule': rule, 'method_key': name, 'seed': job.seed}
  if questions.videos:
    about['frames'] = job.frames
  settings = Settings(job.batch_size, limit, job.seed, job.frames)
  check_frames(checkpoint.vlm, method, questions, settings)
  first = share[0] == 0
  if first:
    claim(out, {
        'schema': SCHEMA, 'benchmark': questions.benchmark, **about,
        'questions': {'fingerprint': runs.fingerprint(questions),
                      'pictures': runs.picture_sizes(questions),
                      'number': len(questions.questions), 'of': total},
        'checkpoint': checkpoint.fingerprint, 'template': checkpoint.vlm.template(),
        'tokenizer': checkpoint.tokenizer_hash,
        'model': to_dict(method.config), 'runs_as': method.runs_as,
        'num_shards': job.shards, 'max_new_tokens': limit})
  done = first and (out / runs.RESULTS).exists()
  if share[1] > 1:
    multihost_utils.sync_global_devices('the run is claimed')
    check(appears(out / runs.CONFIG), f'--out={out}: process {share[0]} does not see '
          'what process 0 wrote there; name a folder on a disk that all hosts share')
    done = agreed(done)
  if done:
    say(f'{out}: finished already')
    return json.loads((out / runs.RESULTS).read_text())
  shards = in_shards(questions.questions, job.shards)
  _ask(out, checkpoint, method, questions, shards, settings, say, share)
  if not first:
    wait_until((out / runs.RESULTS).exists)
    return json.loads((out / runs.RESULTS).read_text())
  rows = _collect(out, shards)
  replica = checkpoint.replicas[0]
  with replica.here():  # before result.json, which says that all is there
    example_maps.record(out, replica.running(method.config), method, questions,
                        seed=job.seed, frames=job.frames)
  return runs.finish(out, questions, rows, method, {**about, 'versions': versions()}, total)


def claim(out: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Marks a directory as this configuration's, or checks that it is.

  Raises:
    ConfigError: it is another's; says in what.
  """
  config, path = json.loads(json.dumps(config)), out / runs.CONFIG
  if not path.exists():
    check(not out.is_dir() or not any(out.iterdir()), f'--out={out} is not empty and no '
          'run of evaluate; name another directory')
    write_text(path, json.dumps(config, indent=1, sort_keys=True))
    return
  try:
    found = json.loads(path.read_text())
  except ValueError as error:
    raise DataError(f'{path} is no JSON ({error}); delete the directory') from error
  changed = differences(found, config)
  check(not changed, f'--out={out} belongs to another run ({", ".join(changed)}); name '
        'another directory, or delete this one')


def _ask(out: pathlib.Path, checkpoint: Checkpoint, method: methods.MethodConfig,
         questions: QuestionSet, shards: list, settings: Settings, say: Message,
         share: tuple[int, int]) -> None:
  """Answers this host's shards."""
  index, count = share
  mine = [ShardLog(out, i, len(shards), shard) for i, shard in enumerate(shards)
          if i % count == index]
  for log in mine:
    if log.note:
      say(f'note: {log.note}')
  there = sum(len(log.rows) for log in mine)
  console = Console(stderr=True)
  with Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TextColumn('left:'), TimeRemainingColumn(),
                console=console, transient=True, disable=not console.is_terminal) as bar:
    task = bar.add_task(f'{questions.benchmark}, {method.label}', completed=there,
                        total=sum(len(log.questions) for log in mine))
    if there:
      say(f'{out}: {there:,} questions were answered before')
    for log in mine:
      if not log.finished:
        ask_shard(checkpoint, method, questions, log, settings,
                  lambda rows: bar.advance(task, rows))
        if not console.is_terminal:
          say(f'{questions.benchmark}, {method.label}: {log.path.name} is done')


def _collect(out: pathlib.Path, shards: list) -> Rows:
  """All answers, when all hosts are done."""
  rows: Rows = {}
  for i, shard in enumerate(shards):
    path = shard_path(out, i, len(shards))
    wait_until(path.exists)
    rows.update(ShardLog(out, i, len(shards), shard).rows)
  return rows


def wait_until(there: Callable[[], bool]) -> None:
  """Looks every second: hosts may finish hours apart, which no barrier likes."""
  # A host that dies ends the others: jax's coordination misses its heartbeat.
  while not there():
    time.sleep(_POLL_SECONDS)


def calibrated(path: pathlib.Path, budget: float, checkpoint: Checkpoint) -> float:
  """The shift of a budget in a file of `vlm-compress calibrate --out`.

  Raises:
    ConfigError: the file has no such budget, did not reach it, or is of another
      model or placement.
    DataError: it is no such file.
  """
  try:
    content = json.loads(path.read_text())
    found = {one['target']: one for one in content['calibrations']}
    for one in found.values():
      one['reached'], one['achieved'], one['shift']
    known, places = content['fingerprint'], content['prune_after']
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f'{path} is no file of vlm-compress calibrate --out') from error
  own = checkpoint.config.atp.prune_after if checkpoint.config.atp else ()
  check(known == checkpoint.fingerprint and tuple(places) == tuple(own), f'{path} was '
        f'calibrated with {content.get("checkpoint", "a model")} of other weights or other '
        'modules than this model has; calibrate this one')
  check(budget in found, f'{path} has the budgets '
        f'{", ".join(f"{target:g}" for target in found)}, not {budget:g}; calibrate with '
        f'--target-tokens {budget:g}')
  one = found[budget]
  check(bool(one['reached']), f'{path}: {budget:g} tokens were not reached, only '
        f'{one["achieved"]:g}; name another budget')
  return one['shift']


def show(result: Mapping[str, Any]) -> None:
  """Prints the numbers of a run, n beside every one."""
  of = f' of {result["n_benchmark"]:,}, partial' if result['partial'] else ''
  lines = []
  if result['metric'] is not None:
    low, high = result['value_ci95']
    lines.append(f'{result["metric"]}: {result["value"]:.2f} [{low:.2f}, {high:.2f}] '
                 f'({result["scale"]}, rule {result["rule"]}, n = {result["n"]:,}{of})')
    lines += [f'  {name}: {100 * one["accuracy"]:.2f} [{100 * one["ci95"][0]:.2f}, '
              f'{100 * one["ci95"][1]:.2f}] (n = {one["n"]:,})'
              for name, one in result['by_kind'].items()]
  else:
    lines.append(f'{result["benchmark"]}: answers are not public (n = {result["n"]:,}{of})')
  seconds = result['latency_seconds']
  lines.append(f'{result["method"]}: {result["layer_average_tokens"]:.2f} visual tokens '
               f'on average, {result["input_visual_tokens"]:.1f} at the input; prefill '
               f'{result["prefill_flops"]:.4g} FLOP, KV cache {result["kv_bytes"]:.4g} B; ' +
               (f'{seconds:.4f} s a question (n = {result["latency_n"]:,})' if seconds
                else 'no time without compiling'))
  lines += [f'note: {note}' for note in result['notes']]
  print('\n'.join(lines))


def main(args: argparse.Namespace, say: Message) -> int:
  """What `vlm-compress evaluate --benchmark` does; returns the exit code."""
  for name in ('checkpoint', 'data', 'out'):
    check(getattr(args, name) is not None, f'--benchmark needs --{name}; see '
          'vlm-compress evaluate --help')
  check(args.calibration is None or args.budget is not None and
        args.threshold_shift is None, '--calibration gives the shift of a --budget; give '
        'that, and no --threshold-shift')
  job = Job(args.method, args.budget, tuple(args.prune_after) if args.prune_after else None,
            args.threshold_shift, args.rule, args.seed, args.limit, args.shards, args.batch_size,
            args.max_new_tokens, args.allow_partial, args.frames or NUM_FRAMES)
  questions, total, split = read(args.benchmark, args.data, job)
  check(args.frames is None or questions.videos, f'--frames belongs to questions about '
        f'videos; {questions.benchmark} has pictures')
  checkpoint = Checkpoint(args.checkpoint, template=args.template, tensor=args.tensor,
                          devices=jax.local_devices()[:args.devices] if args.devices
                          else None)
  if args.calibration is not None:
    job = dataclasses.replace(job, shift=calibrated(
        args.calibration, args.budget, checkpoint))
  share = (jax.process_index(), jax.process_count())
  result = run(args.out, checkpoint, questions, total, split, job, say, share)
  if share[0] == 0:
    show(result)
    print(f'result: {args.out / runs.RESULTS}')
  return 0
