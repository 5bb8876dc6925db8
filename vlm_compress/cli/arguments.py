"""Command lines: a mistake is one line, and numbers have bounds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from vlm_compress.config import ConfigError


class Parser(argparse.ArgumentParser):
  """Raises ConfigError for a mistake; prints the usage only for --help."""

  def error(self, message: str) -> NoReturn:
    raise ConfigError(f'{message}; see {self.prog} --help')


MAX_SEED = 2 ** 31 - 1  # jax's keys take 32 bits and drop the rest silently


def number(kind: type, low: float, high: float = math.inf, *,
           exclude_low: bool = False) -> Callable[[str], float]:
  """A `type=` of argparse: a finite number between bounds.

  Args:
    kind: int or float.
    low, high: allowed themselves.
    exclude_low: the number must be larger than `low`.
  """
  expected = 'a whole number' if kind is int else 'a number'
  expected += f' {">" if exclude_low else ">="} {low:g}'
  if high < math.inf:
    expected += f' and <= {high:g}'

  def read(text: str) -> float:
    try:
      value = kind(text)
    except ValueError:
      value = math.nan
    if not (low <= value <= high and math.isfinite(value)) or (
        exclude_low and value == low):
      raise argparse.ArgumentTypeError(f'{text!r} is not {expected}')
    return value
  return read
