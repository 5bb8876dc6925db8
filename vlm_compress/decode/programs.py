"""Compiled programs, kept by what their shapes depend on, and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Sharding


class Programs:
  """Compiles a program the first time that its key is seen, and never again.

  Attributes:
    out: where results go; None leaves it to the compiler.
    only_compiling: programs are not run, results are shapes.
  """

  def __init__(self, out: Sharding | None = None):
    self.out, self.only_compiling = out, False
    self._compiled: dict[tuple, Any] = {}

  def __len__(self) -> int:
    """How many programs have been compiled."""
    return len(self._compiled)

  def call(self, key: tuple, program: Callable, *args: Any,
           donate: Sequence[int] = ()) -> Any:
    """Runs a program.

    Args:
      key: names the program and all shapes and constants that it depends on.
      program: a function of arrays.
      args: its arguments; arrays, or with `only_compiling` shapes of some.
      donate: numbers of the arguments whose memory it may use.
    """
    if key not in self._compiled:
      options = {} if self.out is None else {'out_shardings': self.out}
      jitted = jax.jit(program, donate_argnums=donate, **options)
      self._compiled[key] = jitted.lower(*args).compile()
    if self.only_compiling:
      return jax.eval_shape(program, *args)
    return self._compiled[key](*args)
