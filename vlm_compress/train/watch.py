"""Stops a run whose numbers are lost or whose loss leaps, and says on what.

Those of a step are looked at while the next one runs, so that the device does
not wait for the host.  Besides the loss, which is taken in front of the update,
they are the norms of gradients and update: parameters that are lost must not
become a checkpoint, which every later start would go on from.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vlm_compress import remote
from vlm_compress.atomic import write_text
from vlm_compress.config import ConfigError
from vlm_compress.models.sequence import Batch
from vlm_compress.train.recipe import Recipe

NAMES = ('loss', 'grad_norm', 'update_norm')  # of metrics that are looked at
WINDOW = 50  # steps whose mean a leap is measured against
_FEWEST = 10


class Watch:
  """Looks at every step; entered, so that the last one is seen, too."""

  def __init__(self, workdir: remote.Path, recipe: Recipe):
    part = f'_{jax.process_index()}' if jax.process_count() > 1 else ''
    self._path = workdir / f'bad_batch{part}.json'
    self._factor = recipe.spike_factor
    self._pending: tuple[int, Any, dict[str, Any]] | None = None
    self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)

  @property
  def losses(self) -> list[float]:
    """Those that a leap is measured against; part of a checkpoint, so that a
    run that goes on stops where it would have stopped."""
    return list(self._losses)

  def go_on(self, losses: Sequence[float]) -> None:
    """Takes `losses` of the run that is gone on with."""
    self._losses.extend(losses)

  def __enter__(self) -> Watch:
    return self

  def __exit__(self, kind: type | None, *_: Any) -> None:
    if kind is None:
      self.look()

  def step(self, step: int, batch: Any, metrics: dict[str, Any]) -> None:
    """Takes a step's metrics, and looks at those of the step before.

    Raises:
      ConfigError: see `look`.
    """
    self.look()
    self._pending = step, batch, {name: metrics[name] for name in NAMES}

  def checked(self, metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics of the step on the host; nothing is lost.

    Raises:
      ConfigError: see `look`.
    """
    self.look()
    return {name: float(value) for name, value in jax.device_get(metrics).items()}

  def look(self) -> None:
    """Looks at the metrics that were given last.

    Raises:
      ConfigError: one of NAMES is no number, or the loss leaps; the message
        names the file that says which records this process's rows of the batch
        were made of.  Every process writes one.
    """
    if self._pending is None:
      return
    (step, batch, found), self._pending = self._pending, None
    found = {name: float(value) for name, value in jax.device_get(found).items()}
    loss, lost = found['loss'], [n for n in NAMES if not math.isfinite(found[n])]
    mean = sum(self._losses) / max(len(self._losses), 1)
    leaps = (self._factor > 0 and len(self._losses) >= _FEWEST
             and loss > self._factor * mean)
    if not lost and not leaps:
      self._losses.append(loss)
      return
    write_text(self._path, json.dumps({
        'step': step, **{name: str(value) for name, value in found.items()},
        'records': records(batch)}) + '\n')
    what = f'{lost[0]} is {found[lost[0]]}' if lost else (
        f'loss is {loss:.4g}, more than {self._factor:g} times the {mean:.4g} of '
        'the steps before,')
    raise ConfigError(
        f'{what} at step {step}; {self._path} says on which records: look at '
        'them, or lower train.learning_rate and go on from the last checkpoint '
        '(--allow-config-change)')


def records(batch: Any) -> list[int] | None:
  """Numbers of the records that this process's rows were made of, if known."""
  text = batch if isinstance(batch, Batch) else (
      batch[0].text if isinstance(batch, tuple) else None)
  found = getattr(text, 'records', None)
  return None if found is None else np.asarray(found).tolist()
