"""Times of things that alternate, and the memory that they take."""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from vlm_compress import resident


def alternate(cases: Mapping[Any, Callable[[], Any]], repeats: int,
              warmup: int = 1, tick: Callable[[Any], Any] = lambda name: None,
              pause: Callable[[Any], float] = lambda name: 0.0
              ) -> dict[Any, list[float]]:
  """Times each case once a round, in an order that is drawn anew for each (seed 0).

  A machine that is slow for a while is then slow for all of them, and nobody
  always follows the same neighbour.

  Args:
    cases: name -> function of nothing; jax arrays that it returns are waited
      for.
    repeats: rounds that count; warmup: rounds before, which do not.
    tick: called with the name of each case that has run.
    pause: seconds of rest after a case; threads of another library may go on
      spinning for a while.

  Returns:
    name -> seconds of each round.
  """
  seconds: dict[str, list[float]] = {name: [] for name in cases}
  names = list(cases)
  rng = random.Random(0)
  for turn in range(warmup + repeats):
    rng.shuffle(names)
    for name in names:
      started = time.perf_counter()
      jax.block_until_ready(cases[name]())
      if turn >= warmup:
        seconds[name].append(time.perf_counter() - started)
      tick(name)
      time.sleep(pause(name))
  return seconds


def median_ms(seconds: list[float]) -> float:
  """Median in milliseconds."""
  return 1e3 * statistics.median(seconds)


def spread(seconds: list[float]) -> float:
  """(Largest - smallest) / median."""
  return (max(seconds) - min(seconds)) / statistics.median(seconds)


def peak_rise(run: Callable[[], Any], tries: int = 2, long: float = 2.0
              ) -> int | None:
  """Bytes by which the process grows at most while a function runs.

  Reads the kernel's high-water mark, which covers what XLA, torch and Python
  allocate besides what is there (weights, caches); the largest of some tries.
  None where there is no mark (not Linux).

  Args:
    run: the function.
    tries: how often it runs.
    long: seconds; a function that takes longer runs once.
  """
  rises = []
  for _ in range(tries):
    gc.collect()
    _give_back()
    before = resident.now()
    if before is None or not resident.restart_peak():
      return None
    started = time.perf_counter()
    jax.block_until_ready(run())
    rises.append(max(0, resident.peak() - before))
    if time.perf_counter() - started > long:
      break
  return max(rises)


def _give_back() -> None:
  """What the allocator keeps for later would hide what a run takes anew."""
  try:
    ctypes.CDLL('libc.so.6').malloc_trim(0)
  except (OSError, AttributeError):
    pass  # another libc keeps less
