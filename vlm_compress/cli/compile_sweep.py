"""compile --sweep: which mesh, remat policy and batch suit a recipe on a slice.

The candidates are put in order by a rough estimate, the most promising are
compiled one after the other, and every result is kept, so that a sweep that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vlm_compress.atomic import write_text
from vlm_compress.cli.slice_programs import Program, state_bytes, train_program
from vlm_compress.cli.stage import Stage
from vlm_compress.config import REMAT_POLICIES, ConfigError, LlavaConfig, check
from vlm_compress.eval import compile_report, compiled
from vlm_compress.eval.compile_report import Table
from vlm_compress.eval.hardware import Chip, chip_of
from vlm_compress.models.llava import Llava
from vlm_compress.sharding import make_mesh
from vlm_compress.train import shapes
from vlm_compress.train.loop import check_mesh
from vlm_compress.train.state import abstract_state

MAX_TENSOR = 16
COLUMNS = ('data, fsdp, tensor', 'rows', 'remat policy', 'verdict', 'peak', 'compute',
           'HBM', 'links', 'bound', 'bound per row')


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One way to run a training step.

  Attributes:
    mesh: (data, fsdp, tensor).
    batch_size: rows per step.
    remat_policy: of the config.
  """
  mesh: tuple[int, int, int]
  batch_size: int
  remat_policy: str


def candidates(stage: Stage, config: LlavaConfig, devices: list[Any],
               batch_sizes: tuple[int, ...]) -> list[Candidate]:
  """All that divide, the most promising first.

  Raises:
    ConfigError: there are none.
  """
  num_chips, out = len(devices), []
  divisors = [n for n in range(1, num_chips + 1) if num_chips % n == 0]
  policies = REMAT_POLICIES if config.remat else (config.remat_policy,)
  for tensor in (n for n in divisors if n <= MAX_TENSOR):
    for fsdp in (n for n in divisors if num_chips // tensor % n == 0):
      mesh = (num_chips // tensor // fsdp, fsdp, tensor)
      for size in batch_sizes or (stage.recipe.batch_size,):
        if _divides(stage, config, mesh, size, devices):
          out += [Candidate(mesh, size, policy) for policy in policies]
  check(len(out) > 0, f'--sweep: no mesh of {num_chips} chips divides '
        f'{batch_sizes or (stage.recipe.batch_size,)} rows and the '
        'sizes of the model')
  return sorted(out, key=lambda c: _estimate(stage, config, c))


def _divides(stage: Stage, config: LlavaConfig, mesh: tuple[int, int, int],
             batch_size: int, devices: list[Any]) -> bool:
  parts = stage.recipe.accumulate_steps
  if batch_size % parts:
    return False
  try:
    check_mesh(config, dataclasses.replace(stage.recipe, batch_size=batch_size),
               make_mesh(*mesh, devices=devices))
  except ConfigError:
    return False
  return True


def _estimate(stage: Stage, config: LlavaConfig, one: Candidate) -> float:
  """Bytes that a chip sends per row, roughly: to order candidates, no more.

  Kernels are gathered for the forward pass, for recomputing and for the backward
  pass, and their gradients scattered; a layer's activations are summed over
  tensor four to six times; gradients are summed over data.
  """
  data, fsdp, tensor = one.mesh
  text = config.text
  kernels = text.num_hidden_layers * (
      4 * text.hidden_size ** 2 + 3 * text.hidden_size * text.intermediate_size)
  passes = {'nothing_saveable': 3, 'dots_with_no_batch_dims_saveable': 2.2,
            'dots_saveable': 2}[one.remat_policy]
  gathered = 2 * kernels / tensor * (passes + 2) * (fsdp - 1) / fsdp
  rows = one.batch_size / (data * fsdp)
  summed = (2 * rows * stage.rows.length * text.hidden_size * 2 * (passes + 2)
            * text.num_hidden_layers * (tensor - 1) / tensor)
  grads = 2 * 4 * kernels / (fsdp * tensor) * (data - 1) / data
  return (gathered + summed + grads) / one.batch_size


def run(found: dict[str, Any], stage: Stage, config: LlavaConfig, devices: list[Any],
        args: argparse.Namespace,
        compile_program: Callable[[Program, Chip, int], compiled.Report],
        ) -> tuple[str, Table, list[str]]:
  """Compiles candidates and writes what came out.

  Args:
    found: what all rows have in common.
    stage, config: of the recipe.
    devices: of the slice.
    args: batch_sizes, max_compiles, out.
    compile_program: (Program, chip, number of chips) -> Report.

  Returns:
    Title, table of all that were tried, and what is best.
  """
  chip = chip_of(devices[0].device_kind)
  todo = candidates(stage, config, devices, args.batch_sizes)
  rows, compiles = [], 0
  bar = Console(stderr=True)
  with Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), console=bar, disable=not bar.is_terminal) as progress:
    task = progress.add_task('compiling', total=min(len(todo), args.max_compiles))
    for one in todo:
      if compiles == args.max_compiles:
        break
      progress.update(task, description=f'{one.mesh}, {one.batch_size}, {one.remat_policy}')
      row = _row(found, stage, config, devices, chip, one, args.out, compile_program)
      rows.append(row)
      compiles += row['compiled']
      progress.update(task, completed=compiles)
  left = len(todo) - len(rows)
  write_text(args.out / 'sweep.json', json.dumps(
      {**found, 'rows': rows, 'not_tried': left}, indent=1) + '\n')
  title, table, notes = _result(found, rows, left)
  write_text(args.out / 'sweep.md', '\n'.join(
      [f'# {title}', '', *compile_report.table_lines(table), '', *notes, '']))
  return title, table, notes


def _row(found: dict[str, Any], stage: Stage, config: LlavaConfig,
         devices: list[Any], chip: Chip, one: Candidate, out: pathlib.Path,
         compile_program: Callable) -> dict[str, Any]:
  """A candidate's result: kept from before, or made now."""
  key = hashlib.sha256(json.dumps(
      [{k: v for k, v in found.items() if k != 'mfu'}, dataclasses.asdict(one)],
      sort_keys=True).encode()).hexdigest()[:16]
  path = out / 'sweep' / f'{key}.json'
  if path.is_file():
    return json.loads(path.read_text())
  config = dataclasses.replace(config, remat_policy=one.remat_policy)
  recipe = dataclasses.replace(stage.recipe, batch_size=one.batch_size)
  mesh = make_mesh(*one.mesh, devices=devices)
  state = state_bytes(abstract_state(Llava(config), recipe, mesh,
                                     shapes.reads_pixels(config.vision)))
  row = {**dataclasses.asdict(one), 'state_bytes': state, 'compiled': state <= chip.hbm_bytes}
  if not row['compiled']:  # the state alone is too large
    row |= {'verdict': compiled.TOO_LARGE, 'needed_bytes': state, 'bound': None}
  else:
    done = compile_program(train_program(
        config, dataclasses.replace(stage, recipe=recipe), mesh), chip, len(devices))
    values = compiled.to_dict(done)
    row |= {name: values[name] for name in ('verdict', 'needed_bytes', 'bound',
                                            'compile_seconds', 'hardware_flops')}
  if row['bound'] is not None:
    row['bound_per_example'] = row['bound']['seconds'] / one.batch_size
  write_text(path, json.dumps(row, indent=1) + '\n')
  return row


def _result(found: dict[str, Any], rows: list[dict[str, Any]], left: int
            ) -> tuple[str, Table, list[str]]:
  """Title, the table in order of the bound, and notes."""
  order = sorted(rows, key=lambda r: (r['verdict'] != compiled.FITS,
                                      r.get('bound_per_example', float('inf'))))
  tried = (f'{left} combinations that were estimated to send more were not tried '
           '(--max-compiles).' if left else 'All combinations were tried.')
  best = compile_report.best(rows)
  if best is None:
    last = 'Nothing that was tried fits: take a larger slice.'
  else:
    data, fsdp, tensor = best['mesh']
    last = (f'Best that fits: --mesh=data={data},fsdp={fsdp},tensor={tensor} '
            f'--config.model.remat_policy={best["remat_policy"]} '
            f'--config.train.batch_size={best["batch_size"]}')
  return (f'{found["config"]} on {found["topology"]}: sweep',
          Table('What was tried', COLUMNS, [_cells(r) for r in order]),
          [compile_report.LABEL, tried, last])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
  bound, ms = row['bound'], compile_report.milliseconds
  times = ('–',) * 5 if bound is None else (
      *(ms(bound[name]) for name in ('compute', 'memory', 'links', 'seconds')),
      ms(row['bound_per_example']))
  return (', '.join(map(str, row['mesh'])), str(row['batch_size']),
          row['remat_policy'], row['verdict'],
          compile_report.gib(row['needed_bytes']), *times)
