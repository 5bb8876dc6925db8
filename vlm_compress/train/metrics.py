"""Training metrics to TensorBoard, to a jsonl file and to the console."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import Any

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


def _summary_writer(workdir: pathlib.Path):
  # clu's writer imports tensorflow: seconds, and notices about its build.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  from clu import metric_writers
  return metric_writers.SummaryWriter(str(workdir / 'tensorboard'))


class MetricLog:
  """Scalars by step, in three places.

  On resume, lines of metrics.jsonl behind the restored step are dropped, so
  that an interrupted run leaves the same file as an uninterrupted one.
  """

  def __init__(self, workdir: pathlib.Path, first_step: int, num_steps: int,
               title: str, tensorboard: bool = True):
    self._path = workdir / 'metrics.jsonl'
    self._keep_before(first_step)
    self._writer = _summary_writer(workdir) if tensorboard else None
    self._title, self._num_steps = title, num_steps
    console = Console(stderr=True)
    self._progress = Progress(
        TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn('eta'), TimeRemainingColumn(),
        TextColumn('{task.fields[note]}'), console=console,
        disable=not console.is_terminal)
    self._task = self._progress.add_task(title, total=num_steps,
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
      except (json.JSONDecodeError, KeyError):
        break  # a torn last line of a killed process
    write_text(self._path, ''.join(f'{line}\n' for line in kept))

  def step(self, step: int) -> None:
    """Moves the progress bar."""
    self._progress.update(self._task, completed=step)

  def write(self, step: int, scalars: dict[str, Any]) -> None:
    """Writes scalars of a step."""
    values = {name: float(value) for name, value in sorted(scalars.items())}
    with self._path.open('a') as file:
      file.write(json.dumps({'step': step, **values}) + '\n')
    if self._writer is not None:
      self._writer.write_scalars(step, values)
    note = ' '.join(f'{name}={values[name]:.4g}' for name in
                    ('loss', 'loss_text', 'layer_average_tokens')
                    if name in values)
    self._progress.update(self._task, note=note)
    if self._progress.disable and (
        step == self._num_steps or step % max(self._num_steps // 5, 1) == 0):
      print(f'{self._title} {step}/{self._num_steps} {note}', file=sys.stderr,
            flush=True)

  def close(self) -> None:
    """Flushes everything."""
    self._progress.stop()
    if self._writer is not None:
      self._writer.flush()
      self._writer.close()
