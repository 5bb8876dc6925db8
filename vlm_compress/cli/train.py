"""vlm-compress train: one stage from a config page.

  vlm-compress train --config=configs/quickstart.py:voco8 \
    --config.init_from=vlm_compress/checkpoints/quickstart --workdir=runs/voco8

Fields of the config are set with --config.section.field=value.  Run it again
with the same --workdir and it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import inspect
import pathlib
import sys
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from vlm_compress.cli import distributed
from vlm_compress.cli.arguments import Parser
from vlm_compress.cli.stage import OPTIONAL, Stage, bridge, run_stage, vision_of
from vlm_compress.cli.together import first_alone
from vlm_compress.cli.workspace import open_split
from vlm_compress.config import (
  AtpConfig,
  ConfigError,
  LlavaConfig,
  LoraConfig,
  TextConfig,
  VisionConfig,
  VocoConfig,
  check,
)
from vlm_compress.data.rows import RowSpec
from vlm_compress.remote import check_writable, is_remote, to_path
from vlm_compress.sharding import MeshSpec
from vlm_compress.train.preemption import stops_at_once
from vlm_compress.train.recipe import Recipe


def parser() -> argparse.ArgumentParser:
  """The command line; --config.section.field=value comes on top."""
  p = Parser(prog='vlm-compress train', description=__doc__.splitlines()[0])
  p.add_argument('--config', required=True, metavar='FILE.py[:ARG]',
                 help='config page; --config.section.field=value sets a field')
  p.add_argument('--workdir', required=True, metavar='DIR',
                 help='checkpoints, metrics and the model go here; local, or '
                 'gs://BUCKET/FOLDER')
  p.add_argument('--data-root', metavar='DIR',
                 help='where data sets and features are kept (default: the '
                 'parent of --workdir)')
  p.add_argument('--allow-config-change', action='store_true',
                 help='go on in a workdir that another configuration began')
  p.add_argument('--profile-steps', type=_steps, metavar='FIRST:LAST',
                 help='write a profiler trace of these steps for TensorBoard')
  p.add_argument('--no-tensorboard', action='store_true',
                 help='write metrics to jsonl and console only')
  distributed.add_flags(p)
  return p


def _steps(text: str) -> tuple[int, int]:
  first, colon, last = text.partition(':')
  if not (colon and first.isdigit() and last.isdigit()
          and 1 <= int(first) <= int(last)):
    raise argparse.ArgumentTypeError(f'{text!r} is no FIRST:LAST, such as 10:12')
  return int(first), int(last)


def load_module(path: str) -> Any:
  """A config page as a module.

  Raises:
    ConfigError: no such file, no Python, or no get_config in it.
  """
  check(pathlib.Path(path).is_file(), f'--config: {path} does not exist')
  check(path.endswith('.py'), f'--config: {path} is no .py file')
  spec = importlib.util.spec_from_file_location('config_page', path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except SyntaxError as e:
    raise ConfigError(f'{e.filename}, line {e.lineno}: {e.msg}') from e
  check(hasattr(module, 'get_config'), f'{path} has no function get_config')
  return module


def load_page(spec: str) -> ConfigDict:
  """get_config(arg) of 'file.py:arg'.

  Raises:
    ConfigError: as load_module, an unknown argument, or get_config takes
      none or needs one.
  """
  path, _, arg = spec.partition(':')
  module, args = load_module(path), [arg] if arg else []
  try:
    inspect.signature(module.get_config).bind(*args)
  except TypeError as e:
    raise ConfigError(
        f'--config={spec}: get_config of {path} takes '
        f'{inspect.signature(module.get_config)} ({e}); write --config={path}'
        f'{"" if arg else ":ARG"}') from e
  try:
    config = module.get_config(*args)
  except KeyError as e:
    raise ConfigError(f'--config={spec}: {path} has no config {e}; its '
                      'docstring lists what it has') from e
  except (TypeError, ValueError, AttributeError) as e:
    raise ConfigError(f'--config={spec}: get_config of {path} fails: '
                      f'{str(e).splitlines()[0]}') from e
  check(isinstance(config, ConfigDict), f'--config={spec}: get_config of '
        f'{path} returns a {type(config).__name__}, not a ConfigDict')
  return config


def override(config: ConfigDict, flags: list[str]) -> None:
  """Applies --config.section.field=value; an unknown field raises.

  A value is read as Python literal where the field is no string, and must
  have the field's type.  Any field of model.lora turns that option on.
  """
  import ast
  for flag in flags:
    name, equals, text = flag.partition('=')
    check(name.startswith('--config.') and bool(equals),
          f'{flag}: expected --config.section.field=value')
    *sections, field = name.removeprefix('--config.').split('.')
    model = config.get('model')
    if (sections[:2] == ['model', 'lora'] and isinstance(model, ConfigDict)
        and model.get('lora') is None):
      with model.unlocked():
        model.lora = ConfigDict()
    node = config
    for section in sections:
      if node is config and section in OPTIONAL and section not in node:
        with node.unlocked():
          node[section] = ConfigDict()
      known = sorted(node) if isinstance(node, ConfigDict) else []
      check(section in known, f'{flag}: the config has no {section!r}; it has '
            f'{known or "no sections there"}')
      node = node[section]
    check(isinstance(node, ConfigDict), f'{flag}: {".".join(sections)} has no '
          'fields')
    if field not in node:  # a page need not list what it leaves at its default
      defaults = _defaults(sections)
      check(field in defaults, f'{flag}: unknown config field {field!r}; known '
            f'here: {sorted({*node, *defaults})}')
      with node.unlocked():
        node[field] = defaults[field]
    value = text
    if not isinstance(node[field], str):
      try:
        value = ast.literal_eval(text)
      except (ValueError, SyntaxError) as e:
        raise ConfigError(f'{flag}: {text!r} is no value; write it as in '
                          'Python') from e
    try:
      node[field] = value
    except TypeError as e:
      raise ConfigError(f'{flag}: {e}') from e


def _defaults(sections: list[str]) -> dict[str, Any]:
  """Fields of the dataclass behind a section of a page."""
  cls = {'model': LlavaConfig, 'model.text': TextConfig,
         'model.vision': VisionConfig, 'model.voco': VocoConfig,
         'model.atp': AtpConfig,
         'model.lora': LoraConfig, 'rows': RowSpec, 'train': Recipe,
         'mesh': MeshSpec}.get('.'.join(sections))
  if cls is None:
    return {}
  return {f.name: f.default for f in dataclasses.fields(cls)
          if isinstance(f.default, (bool, int, float, str, tuple))}


def main(argv: list[str]) -> int:
  """Trains; returns the exit code."""
  args, rest = parser().parse_known_args(argv)
  config = load_page(args.config)
  override(config, rest)
  stage = bridge(config)
  distributed.start(args)
  # Of several processes none may leave alone: jax tells them, at the next step.
  with (contextlib.nullcontext() if distributed.is_one_of_several() else
        stops_at_once()):
    _run(stage, args)
  return 0


def _run(stage: Stage, args: argparse.Namespace) -> None:
  """The same on every process; the first one speaks."""
  first = jax.process_index() == 0
  console = Console(stderr=True, quiet=not first)
  say = lambda line: console.print(line, markup=False, highlight=False)
  workdir = to_path(args.workdir)
  check_writable(workdir, '--workdir')
  root = to_path(args.data_root) if args.data_root else (
      workdir if is_remote(workdir) else workdir.absolute()).parent
  split = first_alone('the data are prepared', lambda: open_split(
      stage.data, stage.data.train_split, root, say, vision_of(stage)))
  run_stage(stage, workdir, split, message=say,
            tensorboard=not args.no_tensorboard,
            allow_change=args.allow_config_change,
            profile_steps=args.profile_steps)
  if first:
    print(f'model: {workdir / "model"}', file=sys.stdout)
