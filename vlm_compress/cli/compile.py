"""vlm-compress compile: does a recipe fit a TPU slice, and how long does it take?

  vlm-compress compile --config=configs/llava_7b.py:voco --topology=v5e:16x16
  vlm-compress compile --config=configs/llava_7b.py:atp --topology=v5p:4x4x4 \
    --mesh=fsdp=64 --programs=train,prefill,decode --out=compile/atp_v5p
  vlm-compress compile --config=configs/llava_7b.py:voco --topology=v5e:16x16 \
    --sweep --out=compile/sweep

Needs no TPU and no data: the TPU compiler (extra [tpu-compile]) compiles for a
slice that is not there.  All figures are the compiler's estimates.  Fields of the
config are set with --config.section.field=value.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import time
from typing import Any

import jax
from jax.experimental import topologies
from rich import box
from rich.console import Console
from rich.table import Table

from vlm_compress import __version__
from vlm_compress.atomic import write_text
from vlm_compress.cli import compile_sweep
from vlm_compress.cli.arguments import Parser, number
from vlm_compress.cli.slice_programs import (
  PROGRAMS,
  Program,
  Prompt,
  largest_arguments,
  serving_programs,
  train_program,
)
from vlm_compress.cli.stage import Stage, bridge
from vlm_compress.cli.train import load_page, override
from vlm_compress.cli.workspace import sized_config
from vlm_compress.config import ConfigError, LlavaConfig, TextConfig, check
from vlm_compress.eval import compile_report, compiled
from vlm_compress.eval.compiled import Report
from vlm_compress.eval.hardware import Chip, chip_of
from vlm_compress.sharding import MESH_AXES, MeshSpec, make_mesh

EXAMPLES = 'v5e:2x2, v5e:4x4, v5e:16x16, v5p:2x2x1, v5p:2x4x4, v5p:4x4x4, v6e:16x16'
WIDE = 140  # columns that a table may take


def parser() -> argparse.ArgumentParser:
  """The command line; --config.section.field=value comes on top."""
  p = Parser(prog='vlm-compress compile', description=__doc__.splitlines()[0])
  p.add_argument('--config', required=True, metavar='FILE.py[:ARG]',
                 help='config page; --config.section.field=value sets a field')
  p.add_argument('--topology', required=True, metavar='NAME',
                 help=f'slice, by chips along each axis: {EXAMPLES}')
  p.add_argument('--mesh', type=_mesh, metavar='AXIS=N[,AXIS=N]',
                 help="data, fsdp, tensor; data takes what is left (the page's)")
  p.add_argument('--programs', type=_programs, default=('train',),
                 metavar='NAME[,NAME]', help=f'of {", ".join(PROGRAMS)} (train)')
  p.add_argument('--batch-sizes', type=_sizes, default=(), metavar='N[,N]',
                 help='rows per step, or prompts in a batch, each compiled (those of '
                 'the recipe; a prompt for each of data x fsdp)')
  p.add_argument('--prompt-tokens', type=number(int, 1), default=Prompt().text,
                 metavar='N', help='text tokens of a prompt that is served (%(default)s)')
  p.add_argument('--mfu', type=number(float, 0, 1, exclude_low=True), default=0.4,
                 help='model FLOPs utilisation that hours are also given for '
                 '(%(default)s)')
  p.add_argument('--sweep', action='store_true',
                 help='compile the training step for other meshes, remat policies '
                 'and, with --batch-sizes, batches; find the best that fits')
  p.add_argument('--max-compiles', type=number(int, 1), default=12, metavar='N',
                 help='of the sweep, the most promising ones (%(default)s)')
  p.add_argument('--out', type=pathlib.Path, default=pathlib.Path('compile'),
                 metavar='DIR', help='compile.json and compile.md go here; a sweep '
                 'goes on with what it finds (%(default)s)')
  return p


def _mesh(text: str) -> MeshSpec:
  sizes = {}
  for part in text.split(','):
    axis, equals, size = part.strip().partition('=')
    if not (equals and axis in MESH_AXES and size.removeprefix('-').isdigit()):
      raise argparse.ArgumentTypeError(
          f'{part!r} is no AXIS=N; axes are {", ".join(MESH_AXES)}')
    sizes[axis] = int(size)
  try:
    return MeshSpec(**sizes)
  except ConfigError as error:  # argparse would hide what it says
    raise argparse.ArgumentTypeError(str(error)) from error


def _programs(text: str) -> tuple[str, ...]:
  names = tuple(name.strip() for name in text.split(','))
  unknown = [name for name in names if name not in PROGRAMS]
  if unknown:
    raise argparse.ArgumentTypeError(f'{unknown[0]!r}: use {", ".join(PROGRAMS)}')
  return names


def _sizes(text: str) -> tuple[int, ...]:
  return tuple(number(int, 1)(part) for part in text.split(','))


def main(argv: list[str]) -> int:
  """Compiles and reports; returns the exit code."""
  args, rest = parser().parse_known_args(argv)
  page = load_page(args.config)
  override(page, rest)
  stage = bridge(page)
  config = config_of(stage)
  devices = slice_devices(args.topology)
  console = Console(width=None if Console().is_terminal else WIDE)
  notice = Console(stderr=True)
  say = lambda line: notice.print(line, markup=False, highlight=False)
  found = {'config': args.config, 'flags': rest, 'topology': args.topology,
           'chip': chip(devices).name, 'num_chips': len(devices),
           'steps': stage.recipe.steps, 'batch_size': stage.recipe.batch_size,
           'mfu': args.mfu, 'versions': versions()}
  if args.sweep:
    title, table, notes = compile_sweep.run(found, stage, config, devices, args,
                                            compile_program)
    show(console, title, [table], notes)
    return 0
  mesh = make_mesh(**dataclasses.asdict(args.mesh or stage.mesh), devices=devices)
  found['mesh'] = dict(mesh.shape)
  found['programs'] = []
  for program in programs_of(stage, config, mesh, args):
    say(f'compiling {program.name}, {program.batch_size} rows ...')
    one = compile_program(program, chip(devices), len(devices))
    say(f'  {one.verdict}: {compile_report.gib(one.needed_bytes)} of '
        f'{compile_report.gib(one.hbm_bytes)}; took {one.compile_seconds:.0f} s')
    found['programs'].append(compiled.to_dict(one))
  show(console, compile_report.heading(found), compile_report.tables(found),
       compile_report.notes(found))
  write_text(args.out / 'compile.json', json.dumps(found, indent=1) + '\n')
  write_text(args.out / 'compile.md', compile_report.markdown(found))
  print(f'report: {args.out / "compile.md"}')
  return 0


def config_of(stage: Stage) -> LlavaConfig:
  """The model of a stage, with the page's vocabulary: no tokenizer is opened."""
  size = stage.model['text'].get('vocab_size', TextConfig.vocab_size)
  return sized_config(stage.model, size)


def slice_devices(topology: str) -> list[Any]:
  """The devices of a slice that need not exist.

  Raises:
    ModuleNotFoundError: libtpu is not installed.
    ConfigError: there is no such slice.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ModuleNotFoundError("No module named 'libtpu'", name='libtpu')
  # Before libtpu is loaded: it would look for a TPU and for its neighbours.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  jax.config.update('jax_platforms', 'cpu')
  try:
    devices = list(topologies.get_topology_desc(
        platform='tpu', topology_name=topology).devices)
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    raise ConfigError(f'--topology={topology}: the TPU compiler knows no such '
                      f'slice; such are {EXAMPLES} ({str(error).splitlines()[0]})'
                      ) from error
  chip(devices)
  return devices


def chip(devices: list[Any]) -> Chip:
  """What the devices are.

  Raises:
    ConfigError: their figures are not in eval/hardware.py.
  """
  kind = devices[0].device_kind
  found = chip_of(kind)
  check(found is not None, f'--topology: no figures of {kind!r}; eval/hardware.py '
        'has those of other chips')
  return found


def versions() -> dict[str, str]:
  """Of what estimates depend on."""
  return {'vlm_compress': __version__, 'jax': jax.__version__,
          'libtpu': importlib.metadata.version('libtpu')}


def programs_of(stage: Stage, config: LlavaConfig, mesh: Any,
                args: argparse.Namespace) -> list[Program]:
  """What the command line asks for.

  Raises:
    ConfigError: mesh, sizes of the model and rows do not fit.
  """
  out = []
  if 'train' in args.programs:
    for size in args.batch_sizes or (stage.recipe.batch_size,):
      recipe = dataclasses.replace(stage.recipe, batch_size=size)
      out.append(train_program(config, dataclasses.replace(stage, recipe=recipe),
                               mesh))
  prompt = Prompt(text=args.prompt_tokens)
  for which in args.programs:
    if which != 'train':
      for size in args.batch_sizes or (mesh.shape['data'] * mesh.shape['fsdp'],):
        out += serving_programs(config, mesh, which, size, prompt)
  return out


def compile_program(program: Program, on: Chip, num_chips: int) -> Report:
  """Compiles; running out of the chip's memory is a verdict."""
  start = time.perf_counter()
  took = lambda: time.perf_counter() - start
  figures = dict(batch_size=program.batch_size, model_flops=program.model_flops,
                 hardware_flops=program.hardware_flops)
  try:
    done = program.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if not compiled.is_out_of_memory(error):
      raise
    return compiled.out_of_memory(
        program.name, error, arguments=largest_arguments(program),
        compile_seconds=took(), **figures)
  return compiled.report(program.name, done, on, num_chips, taken=program.taken,
                         compile_seconds=took(), **figures)


def show(console: Console, title: str, tables: list[compile_report.Table],
         notes: list[str]) -> None:
  """Prints tables of text."""
  console.print(title, style='bold', markup=False, highlight=False)
  for one in tables:
    table = Table(title=one.title, title_justify='left', box=box.SIMPLE)
    for i, column in enumerate(one.columns):
      table.add_column(column, justify='left' if i == 0 else 'right',
                       overflow='fold')
    for row in one.rows:
      table.add_row(*(cell.replace('[', r'\[') for cell in row))
    console.print(table)
  for line in notes:
    console.print(line, markup=False, highlight=False)
