"""Compiled programs, kept by what their shapes depend on, and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding


class Programs:
  """Compiles a program the first time that its key is seen, and never again.

  Attributes:
    out: where results go; None is the default device.
    only_compiling: programs are not run, results are shapes.
  """

  def __init__(self, out: NamedSharding | None = None):
    self.out, self.only_compiling = out, False
    self._compiled: dict[tuple, Any] = {}

  def __len__(self) -> int:
    """How many programs have been compiled."""
    return len(self._compiled)

  def call(self, key: tuple, program: Callable, params: tuple, *args: Any,
           donate: Sequence[int] = ()) -> Any:
    """Runs a program.

    Args:
      key: names the program and all constants that it depends on; shapes and
        dtypes of `args` are added.
      program: a function of params and args.
      params: parameters, always of the same shapes for a key.
      args: arrays, or with `only_compiling` shapes of some.
      donate: numbers of the arguments, params included, whose memory it may
        use.
    """
    leaves, tree = jax.tree.flatten(args)
    key = (key, tree, tuple((x.shape, x.dtype) for x in leaves))
    if key not in self._compiled:
      self._compiled[key] = self._compile(program, (*params, *args), donate)
    if self.only_compiling:
      shapes = jax.eval_shape(program, *params, *args)
      # What is computed on a mesh lies there when the next program gets it.
      return shapes if self.out is None else jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.out),
          shapes)
    return self._compiled[key](*params, *args)

  def _compile(self, program: Callable, args: tuple, donate: Sequence[int]
               ) -> Any:
    if self.out is None:
      return jax.jit(program, donate_argnums=donate).lower(*args).compile()
    with jax.set_mesh(self.out.mesh):  # kernels and constraints ask for it
      return jax.jit(program, donate_argnums=donate,
                     out_shardings=self.out).lower(*args).compile()
