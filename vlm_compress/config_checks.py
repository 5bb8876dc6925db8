"""The error of a configuration, and the checks that raise it."""

from __future__ import annotations

import numbers
from typing import Any


class ConfigError(ValueError):
  """A configuration that cannot work; the message names field and remedy."""


def check(condition: bool, message: str) -> None:
  """Raises ConfigError(message) unless the condition holds."""
  if not condition:
    raise ConfigError(message)


def check_whole(name: str, value: Any, least: float = float('-inf')) -> None:
  """Raises ConfigError unless it is a whole number, and not below `least`."""
  check(isinstance(value, numbers.Integral) and not isinstance(value, bool),
        f'{name}={value!r}: must be a number without fraction')
  check(value >= least, f'{name}={value}: at least {least}')


def check_positive(section: str, config: Any, *names: str) -> None:
  """Raises ConfigError unless these fields of a section are above 0."""
  for name in names:
    value = getattr(config, name)
    check(value > 0, f'{section}.{name}={value}: must be positive')
