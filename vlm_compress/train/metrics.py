"""Training metrics to TensorBoard, to jsonl files and to the console.

Only the first process writes.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)

from vlm_compress.atomic import write_text
from vlm_compress.config import LlavaConfig
from vlm_compress.train.recipe import Recipe
from vlm_compress.train.state import TrainState
from vlm_compress.train.throughput import Throughput

GROWING = ('metrics.jsonl', 'throughput.jsonl')
_NOTED = ('loss', 'loss_text', 'layer_average_tokens', 'mfu')


def _summary_writer(workdir: pathlib.Path):
  # clu's writer imports tensorflow: seconds, and notices about its build.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  from clu import metric_writers
  return metric_writers.SummaryWriter(str(workdir / 'tensorboard'))


def _parameter_tables(state: TrainState) -> str:
  # clu again; shardings are known without looking at values.
  from clu import parameter_overview
  table = lambda part: parameter_overview.get_parameter_overview(
      part, include_stats='sharding')
  return (f'These learn.\n{table(state.trainable)}\n\n'
          f'These are frozen.\n{table(state.frozen)}\n')


class MetricLog:
  """Scalars by step, in three places, and rates beside them.

  metrics.jsonl has what follows from data and seed: on resume, its lines behind
  the restored step are dropped, so that an interrupted run leaves the same file
  as an uninterrupted one.  Rates are in throughput.jsonl, shapes and placement
  of all parameters in parameters.txt.
  """

  def __init__(self, workdir: pathlib.Path, first_step: int, recipe: Recipe,
               config: LlavaConfig, state: TrainState, mesh: Mesh,
               tensorboard: bool = True):
    self._path, self._rates = (workdir / name for name in GROWING)
    self._recipe, self._writes = recipe, jax.process_index() == 0
    self._throughput = Throughput(config, recipe, state, mesh)
    self._writer = None
    if self._writes:
      self._keep_before(first_step)
      _drop_torn_line(self._rates)
      write_text(workdir / 'parameters.txt', _parameter_tables(state))
      self._writer = _summary_writer(workdir) if tensorboard else None
    console = Console(stderr=True)
    self._progress = Progress(
        TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn('eta'), TimeRemainingColumn(),
        TextColumn('{task.fields[note]}'), console=console,
        disable=not (console.is_terminal and self._writes))
    self._task = self._progress.add_task(recipe.stage, total=recipe.steps,
                                         completed=first_step, note='')
    self._progress.start()

  def _keep_before(self, first_step: int) -> None:
    if not self._path.exists():
      return
    kept = []
    for line in self._path.read_text().splitlines():
      try:
        if json.loads(line)['step'] <= first_step:
          kept.append(line)
      except (json.JSONDecodeError, KeyError, TypeError):
        break  # no line of ours, and none behind it can be trusted
    write_text(self._path, ''.join(f'{line}\n' for line in kept))

  def step(self, step: int, batch: Any) -> None:
    """Moves the progress bar, and counts the rows of a step."""
    self._throughput.step(batch)
    self._progress.update(self._task, completed=step)

  def write(self, step: int, scalars: dict[str, Any]) -> None:
    """Writes scalars of a step, and the rates of the steps before it."""
    rates = self._throughput.rates()
    if not self._writes:
      return
    values = {name: float(value) for name, value in sorted(scalars.items())
              if not math.isnan(value)}  # of pictures, in a batch without any
    for path, line in ((self._path, values), (self._rates, rates)):
      with path.open('a') as file:
        file.write(json.dumps({'step': step, **line}) + '\n')
    if self._writer is not None:
      self._writer.write_scalars(step, values | {
          f'throughput/{name}': value for name, value in rates.items()})
    shown = values | rates
    note = ' '.join(f'{name}={shown[name]:.4g}' for name in _NOTED if name in shown)
    self._progress.update(self._task, note=note)
    steps = self._recipe.steps
    if self._progress.disable and (
        step == steps or step % max(steps // 5, 1) == 0):
      print(f'{self._recipe.stage} {step}/{steps} {note}', file=sys.stderr,
            flush=True)

  def flush(self) -> None:
    """Writes out what TensorBoard's writer holds back."""
    if self._writer is not None:
      self._writer.flush()

  def close(self) -> None:
    """Flushes everything."""
    self._progress.stop()
    self.flush()
    if self._writer is not None:
      self._writer.close()


def _drop_torn_line(path: pathlib.Path) -> None:
  """Cuts off what a killed process has begun of a last line, if anything."""
  text = path.read_bytes() if path.exists() else b''
  if text and not text.endswith(b'\n'):
    write_text(path, text[:text.rfind(b'\n') + 1].decode())


class Profile:
  """A profiler trace of some steps, as far as they are run; for TensorBoard."""

  def __init__(self, workdir: pathlib.Path, steps: tuple[int, int] | None):
    """Takes the first and the last step, or None for no trace."""
    self._directory = str(workdir / 'tensorboard')
    self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
    self._runs = False

  def step(self, step: int) -> None:
    """In front of each step: begins or ends the trace where it is due."""
    if step in self._steps and not self._runs:
      jax.profiler.start_trace(self._directory)
      self._runs = True
    elif step not in self._steps:
      self.close()

  def close(self) -> None:
    """Ends the trace if there is one."""
    if self._runs:
      self._runs = False
      jax.profiler.stop_trace()
