"""Compile reports as tables, for the terminal, for Markdown and for the README.

`found` is what compile.json holds, see cli/compile.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vlm_compress.eval import compiled
from vlm_compress.eval.compiled import Report
from vlm_compress.eval.hardware import CHIPS, Chip

LABEL = ('Compiler estimates: nothing of this has run on a TPU. Memory is the '
         "compiler's plan for one chip. Times are lower bounds: the slowest of "
         "FLOPs (by formula), main memory and links at the vendor's peak, all "
         'three at once.')


class Table(NamedTuple):
  """A table of text; the first column is left-aligned."""
  title: str
  columns: tuple[str, ...]
  rows: list[tuple[str, ...]]


def chip_named(name: str) -> Chip:
  """The chip of hardware.CHIPS with that name."""
  return next(chip for chip in CHIPS if chip.name == name)


def gib(nbytes: float) -> str:
  """'1.50 GiB', below one GiB in MiB."""
  if nbytes < 2**30:
    return f'{nbytes / 2**20:.1f} MiB'
  return f'{nbytes / 2**30:.2f} GiB'


def flop(value: float) -> str:
  """'1.25 PFLOP'."""
  for factor, prefix in ((1e15, 'P'), (1e12, 'T'), (1e9, 'G')):
    if value >= factor:
      return f'{value / factor:.3g} {prefix}FLOP'
  return f'{value / 1e6:.3g} MFLOP'


def milliseconds(seconds: float) -> str:
  """'12.3 ms'."""
  value = 1e3 * seconds
  return f'{value:.0f} ms' if value >= 100 else f'{value:.3g} ms'


def reports(found: Mapping[str, Any]) -> list[Report]:
  """The programs of a compile.json."""
  return [compiled.from_dict(values) for values in found['programs']]


def heading(found: Mapping[str, Any]) -> str:
  """What was compiled for what, in a line."""
  mesh = ', '.join(f'{axis}={size}' for axis, size in found['mesh'].items())
  return (f'{found["config"]} on {found["topology"]} ({found["num_chips"]} x '
          f'{found["chip"]}), mesh {mesh}')


def tables(found: Mapping[str, Any]) -> list[Table]:
  """All tables of one report."""
  programs = reports(found)
  out = [Table(
      'Memory of one chip', ('program', 'rows', 'verdict', 'arguments', 'outputs',
                             'of them donated', 'temporaries', 'peak', 'HBM'),
      [_memory(one) for one in programs])]
  bounded = [one for one in programs if one.bound is not None]
  if bounded:
    out.append(Table(
        'Lower bound of the time per run', (
            'program', 'model FLOPs', 'computed FLOPs', 'compute', 'HBM', 'links',
            'bound', 'limited by'), [_time(one) for one in bounded]))
  collectives = [(one.name, kind, f'{c.count:g}', gib(c.payload), gib(c.sent))
                 for one in bounded for kind, c in sorted(one.collectives.items())]
  if collectives:
    out.append(Table('Collectives per run, one chip', (
        'program', 'kind', 'count', 'payload', 'sent'), collectives))
  training = [one for one in programs if one.name.startswith('train')]
  if training:
    out.append(Table(
        'Hours of the recipe', ('program', 'rows', 'steps', 'at the bound (no less)',
                                f'at {found["mfu"]:g} MFU (assumed)'),
        [_hours(found, one) for one in training]))
  out.append(Table('Largest arrays of one chip', ('program', 'size', 'shape', 'from'), [
      (one.name, gib(b.nbytes), b.shape, short(b.op_name))
      for one in programs for b in one.buffers[:5]]))
  return out


def _memory(one: Report) -> tuple[str, ...]:
  m = one.memory
  sizes = ('–',) * 4 if m is None else tuple(map(gib, (
      m.arguments, m.outputs, m.aliased, m.temporaries)))
  return (one.name, str(one.batch_size), one.verdict, *sizes,
          gib(one.needed_bytes), gib(one.hbm_bytes))


def _time(one: Report) -> tuple[str, ...]:
  b = one.bound
  return (one.name, flop(one.model_flops), flop(one.hardware_flops),
          *map(milliseconds, (b.compute, b.memory, b.links, b.seconds)), b.limit)


def recipe_steps(found: Mapping[str, Any], one: Report) -> float:
  """Steps for as many rows as the recipe has, in batches of this size."""
  return found['steps'] * found['batch_size'] / one.batch_size


def recipe_hours(found: Mapping[str, Any], one: Report) -> tuple[float | None, float]:
  """Of the recipe: at the bound (None without one), and at the assumed MFU."""
  steps, chip = recipe_steps(found, one), chip_named(found['chip'])
  assumed = compiled.seconds_at(one.model_flops, found['num_chips'], chip, found['mfu'])
  return (None if one.bound is None else compiled.hours(steps, one.bound.seconds),
          compiled.hours(steps, assumed))


def _hours(found: Mapping[str, Any], one: Report) -> tuple[str, ...]:
  least, assumed = recipe_hours(found, one)
  return (one.name, str(one.batch_size), f'{recipe_steps(found, one):,.0f}',
          '–' if least is None else f'{least:.3g} h', f'{assumed:.3g} h')


def short(op_name: str) -> str:
  """The end of an operation's name, which says what it is."""
  parts = [p for p in op_name.split('/') if p not in ('while', 'body', 'closed_call')]
  return '/'.join(parts[-3:]) or '(no name)'


def notes(found: Mapping[str, Any]) -> list[str]:
  """What a reader must know besides."""
  out = [LABEL]
  once = sum(one.loops_once for one in reports(found))
  if once:
    out.append(f'{once} loop(s) of unknown length count once.')
  for one in reports(found):
    if one.memory is None:
      out.append(f'{one.name}, {one.batch_size} rows: the compiler gave up, it needs '
                 f'{gib(one.needed_bytes)} of {gib(one.hbm_bytes)}.')
    elif one.name.startswith('train'):
      least, assumed = recipe_hours(found, one)
      if least > assumed:
        out.append(f'{one.name}, {one.batch_size} rows: an MFU of {found["mfu"]:g} is '
                   'out of reach, it would be faster than the bound.')
  return out


def markdown(found: Mapping[str, Any]) -> str:
  """The report as a page."""
  lines = [f'# {heading(found)}', '', *notes(found), '']
  for table in tables(found):
    lines += [f'**{table.title}**', '', *table_lines(table), '']
  versions = ', '.join(f'{k} {v}' for k, v in found['versions'].items())
  return '\n'.join([*lines, versions, ''])


SUMMARY = ('recipe', 'slice', 'mesh (data, fsdp, tensor)', 'verdict', 'peak of HBM',
           'FLOPs per step', 'compute', 'HBM', 'links', 'bound per step',
           'hours, bound', 'hours at MFU')


def summary(founds: Iterable[Mapping[str, Any]]) -> str:
  """One line for each training step of several reports, as Markdown."""
  rows = []
  for found in founds:
    for one in reports(found):
      if not one.name.startswith('train'):
        continue
      least, assumed = recipe_hours(found, one)
      bound = ('–',) * 4 if one.bound is None else tuple(map(milliseconds, (
          one.bound.compute, one.bound.memory, one.bound.links, one.bound.seconds)))
      rows.append((
          found['config'].removeprefix('configs/'),
          f'{found["topology"]}, {found["num_chips"]} chips',
          ', '.join(str(n) for n in found['mesh'].values()), one.verdict,
          f'{gib(one.needed_bytes)} of {gib(one.hbm_bytes)}',
          flop(one.model_flops), *bound, '–' if least is None else f'{least:.3g}',
          f'{assumed:.3g} ({found["mfu"]:g})' if least is None or least <= assumed
          else f'out of reach ({found["mfu"]:g})'))
  return '\n'.join(table_lines(Table('', SUMMARY, rows))) + '\n'


def table_lines(table: Table) -> list[str]:
  """A table in Markdown."""
  escape = lambda cells: [re.sub(r'([|*_`<>\[\]])', r'\\\1', c) for c in cells]
  rule = [':--', *['--:'] * (len(table.columns) - 1)]
  return [f'| {" | ".join(line)} |' for line in (
      escape(table.columns), rule, *map(escape, table.rows))]


def best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
  """Of a sweep's rows, the one that fits with the smallest bound per example."""
  fitting = [r for r in rows if r['verdict'] == compiled.FITS]
  return min(fitting, key=lambda r: r['bound_per_example'], default=None)
