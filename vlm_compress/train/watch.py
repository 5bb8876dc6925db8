"""Stops a run whose loss is no number or leaps, and says on what.

The loss of a step is looked at while the next one runs, so that the device
does not wait for the host.
"""

from __future__ import annotations

import collections
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np

from vlm_compress.atomic import write_text
from vlm_compress.config import ConfigError
from vlm_compress.models.sequence import Batch
from vlm_compress.train.recipe import Recipe

NAME = 'bad_batch.json'
WINDOW = 50  # steps whose mean a leap is measured against
_FEWEST = 10


class Watch:
  """Looks at every loss; entered, so that the last one is seen, too."""

  def __init__(self, workdir: pathlib.Path, recipe: Recipe):
    self._path, self._factor = workdir / NAME, recipe.spike_factor
    self._pending: tuple[int, Any, Any] | None = None
    self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)

  def __enter__(self) -> Watch:
    return self

  def __exit__(self, kind: type | None, *_: Any) -> None:
    if kind is None:
      self.look()

  def step(self, step: int, batch: Any, loss: jax.Array) -> None:
    """Takes a step's loss, and looks at that of the step before.

    Raises:
      ConfigError: see `look`.
    """
    self.look()
    self._pending = step, batch, loss

  def checked(self, metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics of the step on the host; the loss is a number.

    Raises:
      ConfigError: see `look`.
    """
    self.look()
    return {name: float(value) for name, value in jax.device_get(metrics).items()}

  def look(self) -> None:
    """Looks at the loss that was given last.

    Raises:
      ConfigError: it is no number, or leaps; the message names the file that
        says which records the batch was made of.
    """
    if self._pending is None:
      return
    (step, batch, loss), self._pending = self._pending, None
    loss = float(jax.device_get(loss))
    mean = sum(self._losses) / max(len(self._losses), 1)
    leaps = (self._factor > 0 and len(self._losses) >= _FEWEST
             and loss > self._factor * mean)
    if math.isfinite(loss) and not leaps:
      self._losses.append(loss)
      return
    if jax.process_index() == 0:
      write_text(self._path, json.dumps({
          'step': step, 'loss': str(loss), 'records': records(batch)}) + '\n')
    what = (f'{loss:.4g}, more than {self._factor:g} times the {mean:.4g} of the '
            'steps before,' if leaps else loss)
    raise ConfigError(
        f'the loss is {what} at step {step}; {self._path} says on which '
        'records: look at them, or lower train.learning_rate and go on from '
        'the last checkpoint (--allow-config-change)')


def records(batch: Any) -> list[int] | None:
  """Numbers of the records that this process's rows were made of, if known."""
  text = batch if isinstance(batch, Batch) else (
      batch[0].text if isinstance(batch, tuple) else None)
  found = getattr(text, 'records', None)
  return None if found is None else np.asarray(found).tolist()
