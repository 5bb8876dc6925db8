"""Which runs a sweep has: what is asked for, and what that must stand beside.

For every compressed method at a budget come the floors at that budget: random
tokens and a uniform grid, cut in front of all layers and, for a method that cuts
deeper, also where it cuts; average pooling and a smaller picture; for VoCo its two
bounds; and the full model for each benchmark.  They are runs of the base
checkpoint, and equal ones are planned once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from vlm_compress.compress.baselines.budget import ANYWHERE
from vlm_compress.config import LlavaConfig, check
from vlm_compress.eval import methods

Wanted = Sequence[tuple[str, str, Sequence[float]]]


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
  """One run of a sweep.

  Attributes:
    checkpoint: its name in the sweep.
    benchmark: KEY or KEY:SPLIT.
    method: of methods.METHODS.
    budget: visual tokens, or None.
    seed: fills in {seed} of a checkpoint's path; of the selector 'random'.
    prune_after: see methods.method_config; () is None.
  """
  checkpoint: str
  benchmark: str
  method: str
  budget: float | None
  seed: int
  prune_after: tuple[int, ...] = ()

  @property
  def name(self) -> str:
    """Of its directory."""
    return f'{self.line}--{self.seed}'

  @property
  def line(self) -> str:
    """The same for cells that differ in the seed only."""
    places = '@' + ','.join(map(str, self.prune_after)) if self.prune_after else ''
    budget = 'all' if self.budget is None else f'{self.budget:g}'
    return '--'.join([self.checkpoint, self.method + places, budget,
                      self.benchmark.replace(':', '_').replace('/', '_')])


def is_compressed(method: str) -> bool:
  """Whether a method must stand beside floors."""
  return method not in methods.OF_BASE


def plan(configs: Mapping[tuple[str, int], LlavaConfig], wanted: Wanted,
         benchmarks: Sequence[str], seeds: Sequence[int], base: str,
         seeded: Sequence[str] = ()) -> list[Cell]:
  """All runs of a sweep, those of a checkpoint together.

  Args:
    configs: (checkpoint's name, seed) -> its config.
    wanted: (checkpoint, method, budgets); without budgets one run as trained.
    benchmarks: each method is run on all of them.
    seeds: of the sweep.
    base: name of the checkpoint that floors and bounds are runs of.
    seeded: checkpoints of which there is one per seed.  Of others, only what
      draws random tokens is run for every seed.

  Raises:
    ConfigError: names that do not exist, or a method or budget that does not
      fit a checkpoint; before anything runs.
  """
  check(bool(benchmarks) and bool(seeds) and bool(wanted), 'a sweep needs benchmarks, '
        'seeds and methods')
  names = {name for name, _ in configs}
  for name in (base, *[checkpoint for checkpoint, _, _ in wanted]):
    check(name in names, f'the sweep has no checkpoint {name!r}; it has '
          f'{", ".join(sorted(names))}')
  cells: dict[Cell, None] = {}

  def add(checkpoint: str, method: str, budget: float | None, benchmark: str, seed: int,
          prune_after: tuple[int, ...] = ()) -> methods.MethodConfig:
    several = checkpoint in seeded or method == 'random'
    seed = seed if several else seeds[0]
    cells[Cell(checkpoint, benchmark, method, budget, seed, prune_after)] = None
    return methods.method_config(method, configs[checkpoint, seed], budget,
                                 prune_after or None)
  for benchmark in benchmarks:
    for seed in seeds:
      add(base, 'full', None, benchmark, seed)
      for checkpoint, method, budgets in wanted:
        for budget in (tuple(budgets) or (None,)):
          made = add(checkpoint, method, None if budget is None else float(budget),
                     benchmark, seed)
          if is_compressed(method):
            for other, own in beside(made, method, configs[base, seed]):
              add(base, other, made.budget, benchmark, seed, own)
  return sorted(cells, key=lambda c: (c.checkpoint, c.seed, c.benchmark, c.method,
                                      c.budget or 0.0, c.prune_after))


def beside(made: methods.MethodConfig, method: str, base: LlavaConfig
           ) -> list[tuple[str, tuple[int, ...]]]:
  """(method, prune_after) of the floors and bounds of a compressed method.

  A floor at the method's own place has read all tokens as long as the method has;
  one in front of all layers may spend its whole budget on tokens that stay.  Which
  is better depends on the model, so a method must stand beside both.
  """
  places = [()]
  if made.config.atp is not None and made.config.atp.prune_after != (0,):
    places.append(tuple(made.config.atp.prune_after))
  out = [(floor, place) for floor in methods.FLOORS for place in places
         if floor in ANYWHERE or not place]
  if method == 'voco' and base.voco is not None:
    out += [('lower_bound', ()), ('upper_bound', ())]
  return out
