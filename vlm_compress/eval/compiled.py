"""What the compiler says about a program for a slice: memory, traffic, a bound.

Nothing here has run on the chips that it is about.  Memory is the compiler's
plan.  FLOPs come from the formula (eval/training_cost.py), what is moved from the
program's text (eval/hlo_cost.py), speeds are the vendor's peaks; so the bound is
below any time that will be measured.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from vlm_compress.eval import hlo, hlo_cost
from vlm_compress.eval.hardware import Chip
from vlm_compress.eval.hlo_cost import Buffer, Collective, Moved, Share

FITS, TOO_LARGE = 'fits', 'does not fit'
_UNITS = {'': 1, 'B': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_SIZE = r'([\d.]+)([KMGT]?)B?'
# The compiler has two ways to say it; one of them lists allocations.
_USED = re.compile(rf'Used {_SIZE} of {_SIZE} hbm|'
                   rf'\({_SIZE}\) exceeds available HBM \({_SIZE}\)')
_ALLOCATION = re.compile(
    rf'^\s*\d+\. Size: {_SIZE}$(.*?)(?=^\s*=+|\Z)', re.MULTILINE | re.DOTALL)
_FIELD = {'op_name': re.compile(r'op_name="([^"]*)"'),
          'shape': re.compile(r'Shape: ([^\s{]+)'),
          'label': re.compile(r'XLA label: (\S+)')}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one chip, as the compiler plans them.

  Attributes:
    arguments, outputs: what comes in and goes out; of donated arguments their
      memory is the outputs' (`aliased`).
    temporaries: everything in between; some of it lies where arguments lay.
    code: the program.
    peak: in use at one time, the code too; programs that need more than there
      is are refused.
  """
  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int
  peak: int


@dataclasses.dataclass(frozen=True)
class Bound:
  """A roofline: the least seconds that each part takes, per run.

  Attributes:
    compute: FLOPs / chips / peak.
    memory: bytes moved in main memory / its bandwidth.
    links: bytes sent to other chips / bandwidth of all links together.
  """
  compute: float
  memory: float
  links: float

  @property
  def seconds(self) -> float:
    """All three at the same time, none waiting for another."""
    return max(self.compute, self.memory, self.links)

  @property
  def limit(self) -> str:
    """Which part it is."""
    return max(('compute', 'memory', 'links'), key=lambda n: getattr(self, n))


@dataclasses.dataclass(frozen=True)
class Report:
  """One compiled program on one slice.

  Attributes:
    name: of the program.
    batch_size: rows, on all chips.
    verdict: FITS or TOO_LARGE.
    hbm_bytes: of a chip.
    needed_bytes: of a chip, the compiler's figure.
    memory: None where the compiler gave up.
    model_flops, hardware_flops: per run, all chips; see StepCost.
    hbm_moved: bytes per chip and run; None where the compiler gave up.
    collectives: by kind.
    loops_once: loops of unknown length, see hlo_cost.
    bound: None where the compiler gave up.
    buffers: the largest.
    compile_seconds: on this machine.
  """
  name: str
  batch_size: int
  verdict: str
  hbm_bytes: int
  needed_bytes: float
  memory: Memory | None
  model_flops: float
  hardware_flops: float
  hbm_moved: float | None
  collectives: dict[str, Collective]
  loops_once: int
  bound: Bound | None
  buffers: tuple[Buffer, ...]
  compile_seconds: float = 0.0


def memory_of(compiled: Any) -> Memory:
  """Memory of a jax.stages.Compiled."""
  stats = compiled.memory_analysis()
  sizes = [stats.argument_size_in_bytes, stats.output_size_in_bytes,
           stats.alias_size_in_bytes, stats.temp_size_in_bytes,
           stats.generated_code_size_in_bytes]
  arguments, outputs, aliased, temporaries, code = sizes
  peak = getattr(stats, 'peak_memory_in_bytes', 0)  # 0: some backends give none
  return Memory(*sizes, peak=code + (
      peak or arguments + outputs - aliased + temporaries))


def bound_of(chip: Chip, num_chips: int, hardware_flops: float, moved: Moved
             ) -> Bound:
  """The roofline of a program, see Bound."""
  return Bound(compute=hardware_flops / num_chips / chip.flops,
               memory=moved.hbm_bytes / chip.hbm_bandwidth,
               links=moved.sent / chip.link_bandwidth)


def report(name: str, compiled: Any, chip: Chip, num_chips: int, *,
           batch_size: int, model_flops: float, hardware_flops: float,
           taken: Share = lambda op_name: 1.0, compile_seconds: float = 0.0
           ) -> Report:
  """What a compiled program needs.

  Args:
    name: of the program.
    compiled: jax.stages.Compiled.
    chip, num_chips: what it is compiled for.
    batch_size: rows.
    model_flops, hardware_flops: by formula.
    taken: see hlo_cost.moved.
    compile_seconds: that it took.
  """
  module = hlo.parse(compiled.as_text())
  moved, memory = hlo_cost.moved(module, taken), memory_of(compiled)
  return Report(
      name=name, batch_size=batch_size,
      verdict=FITS if memory.peak <= chip.hbm_bytes else TOO_LARGE,
      hbm_bytes=chip.hbm_bytes, needed_bytes=memory.peak, memory=memory,
      model_flops=model_flops, hardware_flops=hardware_flops,
      hbm_moved=moved.hbm_bytes, collectives=moved.collectives,
      loops_once=moved.loops_once,
      bound=bound_of(chip, num_chips, hardware_flops, moved),
      buffers=tuple(hlo_cost.largest(module)), compile_seconds=compile_seconds)


def is_out_of_memory(error: Exception) -> bool:
  """Whether the compiler gave up because the chip's memory is too small."""
  text = str(error)
  return 'RESOURCE_EXHAUSTED' in text and _USED.search(text) is not None


def out_of_memory(name: str, error: Exception, *, batch_size: int,
                  model_flops: float, hardware_flops: float,
                  arguments: Sequence[Buffer] = (), compile_seconds: float = 0.0
                  ) -> Report:
  """The verdict that a compiler's refusal is.

  Args:
    error: of which `is_out_of_memory` is true.
    name, batch_size, model_flops, hardware_flops, compile_seconds: as in
      `report`.
    arguments: the largest arrays that come in, for refusals that list none.
  """
  text = str(error)
  figures = [x for x in _USED.search(text).groups() if x is not None]
  used, available = _bytes(*figures[:2]), _bytes(*figures[2:])
  buffers = []
  for size, unit, body in _ALLOCATION.findall(text):
    fields = {key: (found.group(1) if (found := pattern.search(body)) else '')
              for key, pattern in _FIELD.items()}
    buffers.append(Buffer(fields['shape'], int(_bytes(size, unit)),
                          fields['op_name'] or fields['label']))
  return Report(
      name=name, batch_size=batch_size, verdict=TOO_LARGE,
      hbm_bytes=int(available), needed_bytes=used, memory=None,
      model_flops=model_flops, hardware_flops=hardware_flops, hbm_moved=None,
      collectives={}, loops_once=0, bound=None, buffers=tuple(buffers[:8] or arguments),
      compile_seconds=compile_seconds)


def _bytes(number: str, unit: str) -> float:
  return float(number) * _UNITS[unit]


def hours(steps: int, seconds_per_step: float) -> float:
  """Of a recipe."""
  return steps * seconds_per_step / 3600


def seconds_at(model_flops: float, num_chips: int, chip: Chip, mfu: float
               ) -> float:
  """Of a step at an assumed model FLOPs utilisation."""
  return model_flops / (num_chips * chip.flops * mfu)


def to_dict(one: Report) -> dict[str, Any]:
  """A report as JSON types."""
  values = dataclasses.asdict(one)
  if one.bound is not None:
    values['bound'] |= {'seconds': one.bound.seconds, 'limit': one.bound.limit}
  return values


def from_dict(values: dict[str, Any]) -> Report:
  """Inverse of `to_dict`."""
  bound, memory = values['bound'], values['memory']
  return Report(**values | {
      'memory': memory and Memory(**memory),
      'bound': bound and Bound(*(bound[n] for n in ('compute', 'memory', 'links'))),
      'collectives': {k: Collective(**c) for k, c in values['collectives'].items()},
      'buffers': tuple(Buffer(**b) for b in values['buffers'])})
