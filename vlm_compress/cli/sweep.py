"""vlm-compress sweep: a grid of checkpoints, methods, budgets, benchmarks, seeds.

  vlm-compress sweep --config=configs/sweeps.py:tiny --out=sweeps/tiny

Every cell is a run directory of `evaluate --benchmark`; finished ones are asked
nothing again, only whether they are of the same model, questions and settings, so the
sweep can be stopped at any time.  Hosts share the directory and take cells
in turn.  A cell that fails leaves its traceback in error.txt and is listed; the
rest goes on, and the exit code is 1.  The next call tries it again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from rich.console import Console

from vlm_compress import atomic
from vlm_compress.asking import Checkpoint
from vlm_compress.cli import benchmark_run, calibrate, distributed, sweep_times
from vlm_compress.cli.arguments import Parser
from vlm_compress.cli.benchmark_run import Job
from vlm_compress.cli.quickstart import versions
from vlm_compress.cli.train import load_page, override
from vlm_compress.cli.workspace import Message
from vlm_compress.config import ConfigError, check, check_whole
from vlm_compress.config_values import to_dict
from vlm_compress.convert.files import load_config
from vlm_compress.data.errors import DataError
from vlm_compress.data.video import NUM_FRAMES
from vlm_compress.eval import runs, sweep_report, sweep_rows, sweep_table
from vlm_compress.eval.benchmarks.question import QuestionSet
from vlm_compress.eval.report import print_sections
from vlm_compress.eval.result_schema import SCHEMA
from vlm_compress.eval.sweep_plan import Cell, plan
from vlm_compress.eval.sweep_tables import benches

ROWS, ERROR = 'rows.json', 'error.txt'


def parser() -> argparse.ArgumentParser:
  """The command line; --config.field=value comes on top."""
  p = Parser(prog='vlm-compress sweep', description=__doc__.splitlines()[0])
  p.add_argument('--config', required=True, metavar='FILE.py:ARG',
                 help='page of a sweep, such as configs/sweeps.py:tiny')
  p.add_argument('--out', required=True, type=pathlib.Path, metavar='DIR',
                 help='directory of the sweep; of several hosts a shared one')
  p.add_argument('--allow-partial', action='store_true',
                 help='print a table without its floors, marked as partial')
  p.add_argument('--dry-run', action='store_true',
                 help='say which cells there are and which are done, and stop')
  distributed.add_flags(p)
  return p


def main(argv: list[str]) -> int:
  """Runs what is missing and writes the table; returns the exit code."""
  args, rest = parser().parse_known_args(argv)
  page = load_page(args.config)
  override(page, rest)
  distributed.start(args)
  console = Console(stderr=True)
  say = lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
  cells = cells_of(page, say)
  if args.dry_run:
    for cell in cells:
      print(f'{cell.name}: {"done" if is_done(args.out, cell) else "to do"}')
    return 0
  index, count = jax.process_index(), jax.process_count()
  if index == 0:  # what an earlier call left says nothing about this one
    for path in [args.out / ROWS, *[home(args.out, cell) / ERROR for cell in cells]]:
      path.unlink(missing_ok=True)
  if count > 1:
    multihost_utils.sync_global_devices('the sweep begins')
  runner = Runner(page, args.out, say)
  runner.run_all(cells[index::count])
  if index > 0:
    benchmark_run.wait_until(lambda: (args.out / ROWS).exists())
    return 0
  benchmark_run.wait_until(lambda: all(
      is_done(args.out, c) or has_failed(args.out, c) for c in cells))
  # Others' cells may have been there before: they are looked at, too.
  runner.run_all([c for c in cells if c not in cells[::count]
                  and not has_failed(args.out, c)])
  times, problem = {}, None
  if page.get('time_repeats', 0):
    times, problem = runner.try_to_time(cells)
  return finish(args.out, cells, page.base, args.allow_partial or page.allow_partial, say,
                times, problem)


def cells_of(page: ConfigDict, say: Message) -> list[Cell]:
  """The cells of a page.

  Raises:
    ConfigError: a field or checkpoint is missing, or a method does not fit it.
  """
  for name in ('checkpoints', 'methods', 'benchmarks', 'seeds', 'base'):
    check(name in page, f'the page has no {name}: it is no page of a sweep; try '
          'configs/sweeps.py:tiny')
  for entry in page.methods:
    check(isinstance(entry, (tuple, list)) and len(entry) == 3 and
          isinstance(entry[2], (tuple, list)), f'methods: {entry!r} is no (checkpoint, '
          'method, (budget, ...))')
  check_whole('limit', page.limit, 0)
  check_whole('shards', page.shards, 1)
  check_whole('time_repeats', page.get('time_repeats', 0), 0)
  check_whole('frames', page.get('frames', NUM_FRAMES), 1)
  for name in page.benchmarks:
    check(name.partition(':')[0] in runs.BENCHMARKS, f'benchmarks: {name!r} is unknown; '
          f'use one of {", ".join(sorted(runs.BENCHMARKS))}')
  given = {name: path for name, path in page.checkpoints.items() if path}
  wanted = [(c, m, tuple(b)) for c, m, b in page.methods if c in given]
  for name in sorted({c for c, _, _ in page.methods} - set(given)):
    say(f'note: --config.checkpoints.{name} names no model; its methods are left out')
  check(page.base in given, f'--config.checkpoints.{page.base}: name the uncompressed '
        'model, which everything is compared with')
  configs = {(name, seed): load_config(path_of(path, seed))
             for name, path in given.items() for seed in page.seeds}
  return plan(configs, wanted, list(page.benchmarks), list(page.seeds), page.base,
              [name for name, path in given.items() if '{seed}' in path])


def path_of(path: str, seed: int) -> pathlib.Path:
  """A checkpoint's directory."""
  return pathlib.Path(path.replace('{seed}', str(seed)))


def home(out: pathlib.Path, cell: Cell) -> pathlib.Path:
  """A cell's run directory."""
  return out / 'runs' / cell.name


def is_done(out: pathlib.Path, cell: Cell) -> bool:
  """Whether a cell has its result."""
  return (home(out, cell) / runs.RESULTS).exists()


def has_failed(out: pathlib.Path, cell: Cell) -> bool:
  """Whether a cell's last try has left an error."""
  return (home(out, cell) / ERROR).exists()


class Runner:
  """Runs cells, with the last checkpoint and all questions kept in memory."""

  def __init__(self, page: ConfigDict, out: pathlib.Path, say: Message):
    self.page, self.out, self.say = page, out, say
    self._loaded: tuple[pathlib.Path, Checkpoint] | None = None
    self._questions: dict[str, Any] = {}

  def run_all(self, cells: Sequence[Cell]) -> None:
    """Runs the cells, or finds them done; what they raise is kept in error.txt."""
    for number, cell in enumerate(cells, 1):
      self.say(f'[{number} of {len(cells)}] {cell.name}')
      try:
        self.run(cell)
      except Exception as error:  # whatever it is, other cells can go on
        atomic.write_text(home(self.out, cell) / ERROR, traceback.format_exc())
        self.say(f'{cell.name} failed: {" ".join(str(error).split())[:300]}')

  def run(self, cell: Cell) -> None:
    """Runs one cell."""
    job = self._job(cell)
    questions, total, split = self._read(cell, job)
    benchmark_run.run(home(self.out, cell), self._checkpoint(cell), questions, total,
                      split, job, self.say)

  def _job(self, cell: Cell) -> Job:
    page, shift = self.page, None
    if cell.method == 'atp' and cell.budget is not None:
      shift = self._shift(cell)
    return Job(cell.method, cell.budget, cell.prune_after or None, shift, None, cell.seed,
               page.limit or None, page.shards, page.batch_size, None, page.allow_partial,
               page.get('frames', NUM_FRAMES))

  def _read(self, cell: Cell, job: Job) -> tuple[QuestionSet, int, str]:
    if cell.benchmark not in self._questions:
      self._questions[cell.benchmark] = benchmark_run.read(
          cell.benchmark, pathlib.Path(self.page.benchmarks[cell.benchmark]), job)
    return self._questions[cell.benchmark]

  def try_to_time(self, cells: Sequence[Cell]) -> tuple[dict[str, Any], str | None]:
    """`measure_times`, or nothing and what went wrong, which costs no answers."""
    try:
      return self.measure_times(cells), None
    except Exception as error:  # as in run_all
      problem = f'times were not measured: {" ".join(str(error).split())[:300]}'
      self.say(problem)
      return {}, problem

  def measure_times(self, cells: Sequence[Cell]) -> dict[str, Any]:
    """Times of the first seed's cells, those of a benchmark in turn (sweep_times.py).

    All checkpoints are in memory together.
    """
    page, seed = self.page, self.page.seeds[0]
    kept: dict[pathlib.Path, Checkpoint] = {}
    times: dict[str, Any] = {}
    lines: dict[str, list[sweep_times.Line]] = {}
    for cell in cells:
      if cell.seed != seed or has_failed(self.out, cell):
        continue
      path, job = path_of(page.checkpoints[cell.checkpoint], seed), self._job(cell)
      if path not in kept:
        kept[path] = self._checkpoint(cell)
      _, method = benchmark_run.resolved(kept[path], job)
      lines.setdefault(cell.benchmark, []).append(sweep_times.Line(
          cell.line, kept[path].replicas[0].running(method.config), method.runs_as,
          f'{kept[path].fingerprint} {json.dumps(to_dict(method.config), sort_keys=True)}'))
    known = sweep_times.key([line for some in lines.values() for line in some],
                            page.batch_size, page.time_repeats)
    there = sweep_times.read(self.out, known)
    if there is not None:
      return there
    for name, some in lines.items():
      if self._questions[name][0].videos:
        self.say(f'{name}: times of questions about videos are not measured')
        continue
      full = next(c.line for c in cells if (c.checkpoint, c.method, c.benchmark) == (
          page.base, 'full', name))
      check(any(line.name == full for line in some), f'{full} failed, which times are '
            'compared with')
      times |= sweep_times.measure(some, full, self._questions[name][0],
                                   page.batch_size, page.time_repeats, self.say)
    sweep_times.write(self.out, known, times)
    return times

  def _checkpoint(self, cell: Cell) -> Checkpoint:
    path = path_of(self.page.checkpoints[cell.checkpoint], cell.seed)
    if self._loaded is None or self._loaded[0] != path:
      self._loaded = None  # before the next one takes its place
      self._loaded = path, Checkpoint(path, tensor=self.page.tensor,
                                      template=self.page.template or None)
    return self._loaded[1]

  def _shift(self, cell: Cell) -> float:
    """The shift of a budget, calibrated once for all budgets of a checkpoint."""
    page, name = self.page, cell.checkpoint
    given = page.get('calibrations', {}).get(name)
    if given:
      return benchmark_run.calibrated(path_of(given, cell.seed), cell.budget,
                                      self._checkpoint(cell))
    check(bool(page.calibrate_with), f'which shift gives {name} {cell.budget:g} tokens is '
          f'not known: name a file of vlm-compress calibrate (--config.calibrations.{name}) '
          'or a page to calibrate with (--config.calibrate_with)')
    budgets = sorted({float(b) for c, m, many in page.methods
                      if (c, m) == (name, 'atp') for b in many})
    known = [self._checkpoint(cell).fingerprint, budgets, page.calibrate_with,
             page.calibrate_data_root]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
    path = self.out / 'calibrations' / f'{name}-{cell.seed}-{digest}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.lock(path):  # hosts need it at the same time
      if not path.exists():
        calibrate.main([
            f'--checkpoint={path_of(page.checkpoints[name], cell.seed)}',
            f'--config={page.calibrate_with}', f'--data-root={page.calibrate_data_root}',
            f'--out={path}', '--target-tokens', *[f'{b:g}' for b in budgets]])
    return benchmark_run.calibrated(path, cell.budget, self._checkpoint(cell))


def finish(out: pathlib.Path, cells: Sequence[Cell], base: str, allow_partial: bool,
           say: Message, times: Mapping[str, Any], problem: str | None = None) -> int:
  """Writes rows.json, and the tables if they have their floors.

  Args:
    out, cells, base: of the sweep.
    allow_partial: see `tables`.
    say: called with lines.
    times: of sweep_times.measure; problem: why there are none.

  Returns:
    The exit code: 1 if a cell failed or times could not be measured.

  Raises:
    ConfigError: floors are missing and no cell failed that would say why.
  """
  found: dict[Cell, runs.Run] = {}
  for cell in cells:
    try:
      if not has_failed(out, cell):
        found[cell] = runs.load(home(out, cell))
    except (ConfigError, DataError):  # a file of a finished run is damaged
      atomic.write_text(home(out, cell) / ERROR, traceback.format_exc())
  failed = [{'cell': c.name, 'error': (home(out, c) / ERROR).read_text()}
            for c in cells if has_failed(out, c)]
  rows = sweep_rows.rows(found, base, times)
  content = {'schema': SCHEMA, 'rows': rows, 'failed': failed, 'versions': versions(),
             'partial': bool(failed) or any(row['partial'] for row in rows),
             'times_failed': problem}
  atomic.write_text(out / ROWS, json.dumps(content, indent=1) + '\n')
  for one in failed:
    say(f'failed: {one["cell"]}: {one["error"].strip().splitlines()[-1]} '
        f'({out / "runs" / one["cell"] / ERROR})')
  try:
    if rows:
      tables(out, rows, allow_partial)
  except ConfigError as error:
    if not failed:
      raise
    say(f'no table: {error}')
  return int(bool(failed or problem))


def tables(out: pathlib.Path, rows: Sequence[dict[str, Any]], allow_partial: bool) -> None:
  """Prints and writes what rows.json holds, a table per benchmark.

  Raises:
    ConfigError: a compressed method's floors are missing; nothing is printed then.
  """
  placed = [{**row, 'placement': sweep_report.placement(out, row)} for row in rows]
  for bench in benches(placed, allow_partial):  # refuses before anything is printed
    n = bench.entries[0].n
    print(f'{bench.name}: {bench.metric}, n = {n:,}' + (
        f'; {bench.asked}' if bench.partial else ''))
    print_sections(bench.parts, bench.problems)
  for path in sweep_table.write(out, rows):
    print(f'table: {path}')
  print(f'report: {sweep_report.write_report(out, allow_partial=allow_partial)["html"]}')
