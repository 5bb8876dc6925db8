"""One dial for any budget: which shift of the thresholds keeps how many tokens.

`threshold_shift` is added to the logits of both thresholds of every module, so
one trained ATP model serves all budgets between its floor and all tokens; a
larger shift keeps fewer.  `calibrate` finds the shift for a requested average
on a set of prompts, by bisection.

The count is not quite monotone in the shift: no token comes back at the first
module, but later modules score what is left against itself.  And it moves in
steps, large ones for few prompts.  So the nearest shift that was looked at
counts, and the result says how near it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vlm_compress.config import LlavaConfig, check, token_floor
from vlm_compress.decode.prefilled import entering
from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.eval.scoring import mean_with_interval
from vlm_compress.models.inputs import PruneOptions
from vlm_compress.models.sequence import Batch, make_batch

TOLERANCE = 0.002  # of the target
RESOLUTION = 1e-4  # of the shift; no finer steps are taken
FARTHEST = 64.0  # from the start; a sigmoid is 0 or 1 long before
INTERVAL = '95 % percentile bootstrap, pictures resampled'

Count = Callable[[float], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Calibration:
  """A shift and what it keeps.  Counts are visual tokens per image.

  Attributes:
    target: layer-average tokens that were asked for.
    shift: threshold_shift.
    achieved: layer-average tokens at it, mean over the prompts.
    ci95: of `achieved`, see INTERVAL.
    reached: `achieved` is within `tolerance` of the target.
    tolerance: in tokens.
    mean, std, p50, p90, p99: float[L], of the tokens kept after each module,
      over the prompts.
    layer_averages: float[M], mean of the tokens that enter each layer.
    num_prompts, num_pictures: what it rests on.
    tried: (shift, average) of every shift that was looked at, by shift.
  """
  target: float
  shift: float
  achieved: float
  ci95: tuple[float, float]
  reached: bool
  tolerance: float
  mean: np.ndarray
  std: np.ndarray
  p50: np.ndarray
  p90: np.ndarray
  p99: np.ndarray
  layer_averages: np.ndarray
  num_prompts: int
  num_pictures: int
  tried: tuple[tuple[float, float], ...]

  @property
  def evaluations(self) -> int:
    """How many shifts were looked at."""
    return len(self.tried)

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON types."""
    plain = lambda x: x.tolist() if isinstance(x, np.ndarray) else x
    values = {f.name: plain(getattr(self, f.name))
              for f in dataclasses.fields(self)}
    return {**values, 'evaluations': self.evaluations, 'interval': INTERVAL}


def check_dial(config: LlavaConfig, where: str = 'the model') -> None:
  """Raises ConfigError for a model without thresholds; `where` names it."""
  check(config.atp is not None, f'{where} has no ATP modules, so there are no '
        'thresholds to shift; name an ATP model')
  check(config.atp.selector == 'adaptive', f'{where} has atp.selector='
        f'{config.atp.selector!r}: it keeps atp.fixed_counts='
        f'{config.atp.fixed_counts} whatever the thresholds; name a model with '
        'the selector adaptive')


def check_target(config: LlavaConfig, target: float) -> None:
  """Raises ConfigError for a budget that no shift can give."""
  floor, most = token_floor(config), config.num_visual_tokens
  check(floor <= target <= most, f'a target of {target:g} tokens cannot be '
        f'reached: {_limits(config)}')


def _limits(config: LlavaConfig) -> str:
  return (f'with atp.prune_after={config.atp.prune_after} of '
          f'{config.text.num_hidden_layers} layers the layer average lies '
          f'between the floor {token_floor(config):g} and '
          f'{config.num_visual_tokens}')


def calibrate(count: Count, target: float, config: LlavaConfig, *,
              pictures: Sequence[Hashable] | None = None,
              tolerance: float | None = None, start: float = 0.0,
              resolution: float = RESOLUTION, seed: int = 0) -> Calibration:
  """Finds the shift whose layer average is the target.

  It looks at `start`, at points 1, 2, 4, ... away until the target lies
  between two of them, and halves that bracket.

  Args:
    count: shift -> float[Q, M], visual tokens per image that enter each layer,
      per prompt; see `counter`.
    target: layer-average tokens per image.
    config: of the model; gives its floor and where the modules are.
    pictures: names the picture of each prompt, for the interval: prompts about
      one picture are not independent.  None takes all for different.
    tolerance: tokens that are near enough; None is TOLERANCE of the target.
    start: first shift.
    resolution: width of the bracket that is not halved any more.
    seed: of the bootstrap.

  Returns:
    Calibration at the nearest of the shifts that were looked at, of two equally
    near ones the one with fewer tokens.

  Raises:
    ConfigError: no shift reaches the target; the message says what can be.
  """
  check_dial(config)
  check_target(config, target)
  tolerance = TOLERANCE * target if tolerance is None else tolerance
  tried: dict[float, float] = {}
  best: tuple[tuple[float, float], float, np.ndarray] | None = None

  def average(shift: float) -> float:
    nonlocal best
    counts = np.asarray(count(shift), np.float64)
    value = tried[shift] = float(counts.mean())
    order = (abs(value - target), value)
    if best is None or order < best[0]:
      best = order, shift, counts
    return value

  surrounded = _search(average, target, tolerance, start, resolution)
  (distance, achieved), shift, counts = best
  check(surrounded, f'a target of {target:g} tokens is not reached: on these '
        f'prompts shifts from {min(tried):g} to '
        f'{max(tried):g} give averages from {min(tried.values()):.4g} to '
        f'{max(tried.values()):.4g}; {_limits(config)}')
  pictures = range(len(counts)) if pictures is None else pictures
  interval = mean_with_interval(
      counts.mean(1), pictures, seed=seed,
      value_range=(token_floor(config), float(config.num_visual_tokens)))
  kept = counts[:, list(config.atp.prune_after)]
  p50, p90, p99 = np.percentile(kept, [50, 90, 99], axis=0)
  return Calibration(
      target, shift, achieved, interval.ci95, distance <= tolerance, tolerance,
      kept.mean(0), kept.std(0), p50, p90, p99, counts.mean(0), len(counts),
      interval.num_images, tuple(sorted(tried.items())))


def _search(average: Callable[[float], float], target: float, tolerance: float,
            start: float, resolution: float) -> bool:
  """Looks at shifts, nearer and nearer to the target.

  Returns:
    Whether the target lies between the averages of two shifts, or is near one.
  """
  near = lambda value: abs(value - target) <= tolerance
  value, inner, outer, step = average(start), start, start, 1.0
  if near(value):
    return True
  up = value > target
  while (value > target) == up:
    if step > FARTHEST:
      return False
    inner, outer = outer, start + (step if up else -step)
    value, step = average(outer), 2 * step
    if near(value):
      return True
  many, few = (inner, outer) if up else (outer, inner)
  while few - many > resolution:
    middle = (many + few) / 2
    value = average(middle)
    if near(value):
      break
    many, few = (middle, few) if value > target else (many, middle)
  return True


class Prompts:
  """Prompts about one picture each, as batches of one shape.

  Iterating makes them anew, so features may stay on disk; the last batch is
  filled up with copies of the last prompt.
  """

  def __init__(self, rows: Sequence[dict[str, np.ndarray]], features: Any,
               pictures: Sequence[int], batch_size: int):
    """Args:
      rows: fields of `sequence.ROW_FIELDS` of each prompt.
      features: features[i] is float[P', Dv] of picture i.
      pictures: the picture of each prompt.
      batch_size: prompts at a time.
    """
    check(len(rows) > 0, 'there are no prompts to calibrate on')
    self.rows, self.features, self.pictures = rows, features, pictures
    self.batch_size = min(batch_size, len(rows))
    self.length = max(len(row['input_ids']) for row in rows)

  def __len__(self) -> int:
    """How many prompts, without copies."""
    return len(self.rows)

  def __iter__(self) -> Iterator[Batch]:
    for first in range(0, len(self.rows), self.batch_size):
      chosen = [min(i, len(self.rows) - 1)
                for i in range(first, first + self.batch_size)]
      yield make_batch(
          [self.rows[i] for i in chosen],
          [np.asarray(self.features[self.pictures[i]])[None] for i in chosen],
          length=self.length, num_images=1)


def counter(model: SegmentedModel, batches: Iterable[Batch],
            num_rows: int | None = None,
            advance: Callable[[int], Any] = lambda rows: None) -> Count:
  """What `calibrate` asks a model: shift -> float[Q, M].

  Args:
    model: with adaptive modules.
    batches: prompts with at least one image each, iterated once per shift.
    num_rows: Q, if rows at the end are copies that fill a batch.
    advance: called with the number of rows just done.

  Returns:
    A function that runs all prompts at a shift.  Of several images in a row
    it gives the mean.

  Raises:
    ConfigError: the model has no thresholds; when called, a prompt without
      image.
  """
  check_dial(model.config)

  def count(shift: float) -> np.ndarray:
    parts = []
    for batch in batches:
      images = np.sum(batch.image_valid, axis=1)
      check(bool((images > 0).all()), 'a prompt has no picture, so no visual '
            'tokens to count; leave it out')
      state = model.prefill(batch, PruneOptions(threshold_shift=shift))
      parts.append((entering(model.config, state.pruning).sum(2) / images).T)
      advance(len(images))
    return np.concatenate(parts)[:num_rows]
  return count
