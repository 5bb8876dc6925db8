"""vlm-compress benchmark: what compression saves on this machine.

  vlm-compress benchmark --out=results/benchmark
  vlm-compress benchmark --part=quickstart --checkpoint=quickstart/atp/model

Everything that is compared runs in one process, in turns; figures are medians.
What has been measured is kept in OUT/benchmark.json, and a second call goes on
with what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from vlm_compress import __version__
from vlm_compress.atomic import write_text
from vlm_compress.cli.arguments import Parser, number
from vlm_compress.config import DTYPES, ConfigError, check

PARTS = ('quickstart', 'slice', 'training')
SHARES, VOCO_TOKENS = (0.25, 0.15), (1, 8)
QUICKSTART_PICTURES, SLICE_PICTURES, REGROUP_BATCH = 64, 8, 4
SHIPPED = pathlib.Path(__file__).parents[1] / 'checkpoints' / 'quickstart'


def parser() -> argparse.ArgumentParser:
  """The command line."""
  p = Parser(prog='vlm-compress benchmark', description=__doc__.splitlines()[0])
  p.add_argument('--part', action='append', choices=PARTS,
                 help='again for more of them (all)')
  p.add_argument('--checkpoint', type=pathlib.Path, default=SHIPPED,
                 help='model directory of the part quickstart (the base model '
                 'of the quickstart, which gets modules that nobody trained)')
  p.add_argument('--dtype', action='append', choices=DTYPES,
                 help='of the slice; again for more (both)')
  p.add_argument('--batch', action='append', type=number(int, 1, SLICE_PICTURES),
                 help='prompts at a time; again for more (1, 4)')
  p.add_argument('--layers', type=number(int, 7), default=8,
                 help='decoder layers of the slice (%(default)s); with fewer than '
                 '7, 15 %% of the tokens is below the floor')
  p.add_argument('--repeats', type=number(int, 1), default=5,
                 help='rounds whose median counts (%(default)s)')
  p.add_argument('--no-torch', action='store_true',
                 help='without transformers, the outside reference')
  p.add_argument('--out', type=pathlib.Path, default=pathlib.Path('benchmark'),
                 help='directory of the results (%(default)s)')
  return p


def main(argv: list[str]) -> int:
  """Measures; returns the exit code."""
  args = parser().parse_args(argv)
  from vlm_compress.eval.benchmark import report
  args.out.mkdir(parents=True, exist_ok=True)
  log = Log(args.out / 'benchmark.json', _setting(args))
  console = Console(stderr=True)
  with Progress(console=console, transient=True,
                disable=not console.is_terminal) as bar:
    task = bar.add_task('benchmark', total=None)
    tick = lambda name: bar.update(task, advance=1, description=name)
    for part in args.part or PARTS:
      {'quickstart': _quickstart, 'slice': _slice,
       'training': _training}[part](args, log, tick)
  for path in report.write(log.found, args.out):
    print(path)
  return 0


class Log:
  """What has been measured so far, in a JSON file."""

  def __init__(self, path: pathlib.Path, setting: dict[str, Any]):
    self.path = path
    self.found = {'setting': setting, 'inference': [], 'adaptive': [],
                  'training': []}
    if path.exists():
      try:
        before = json.loads(path.read_text(encoding='utf-8'))
        was = dict(before['setting'])
        if set(before) != set(self.found):
          raise ValueError(f'it has {sorted(before)}')
      except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{path} is no result of this command; name another '
                          '--out or delete it') from error
      other = {name: (was.get(name), setting.get(name))
               for name in sorted({*was, *setting})
               if was.get(name) != setting.get(name)}
      check(not other, f'{path} was measured in another setting (then, now: '
            f'{other}); name another --out')
      self.found = before

  def has(self, kind: str, **values: Any) -> bool:
    """Whether rows with these values are there."""
    return any(all(row[k] == v for k, v in values.items())
               for row in self.found[kind])

  def add(self, kind: str, rows: list[dict[str, Any]]) -> None:
    """Adds rows and writes the file."""
    self.found[kind] += rows
    write_text(self.path, json.dumps(self.found, indent=1) + '\n')


def _setting(args: argparse.Namespace) -> dict[str, Any]:
  """Rows of two settings do not belong into one table."""
  import importlib.metadata

  import jax

  from vlm_compress.convert.files import WEIGHTS
  weights = args.checkpoint / WEIGHTS
  check(weights.is_file(), f'{weights} does not exist; name a model directory: '
        '--checkpoint')
  with open(weights, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  outside = {} if args.no_torch else {
      name: importlib.metadata.version(name) for name in ('torch', 'transformers')
      if importlib.util.find_spec(name)}
  return {'vlm_compress': __version__, 'code': _code_hash(), 'python': platform.python_version(),
          'jax': jax.__version__, 'backend': jax.default_backend(),
          'cores': os.cpu_count(), 'cpu': cpu_name(), 'repeats': args.repeats,
          'checkpoint': digest[:16], **outside}


def _code_hash() -> str:
  """Of all sources of the package: times of two of them are not compared."""
  digest = hashlib.sha256()
  root = pathlib.Path(__file__).parents[1]
  for path in sorted(root.rglob('*.py')):
    digest.update(f'{path.relative_to(root)}\n'.encode() + path.read_bytes())
  return digest.hexdigest()[:16]


def cpu_name() -> str:
  """What the system calls the processor."""
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8')
  except OSError:
    return platform.processor()
  lines = [x for x in text.splitlines() if x.startswith(('model name', 'cpu MHz'))]
  return lines[0].partition(':')[2].strip() if lines else platform.machine()


def _outside(subject: Any, num_rows: int, model: Any) -> dict[str, Any]:
  """transformers with all tokens, and with a quarter of them from the start."""
  from vlm_compress.eval.benchmark import torch_reference as torch_lib
  if model is None:
    return {}
  P = subject.plain.num_visual_tokens
  return {f'transformers, {n} tokens': torch_lib.Reference(
      model, subject, num_rows, n) for n in (P, P // 4)}


def _torch_model(args: argparse.Namespace, subject: Any) -> Any:
  from vlm_compress.eval.benchmark import torch_reference as torch_lib
  if args.no_torch:
    return None
  missing = torch_lib.available()
  check(missing is None, f'{missing}: pip install -e ".[parity]", or leave the '
        'outside reference out with --no-torch')
  return torch_lib.build(subject)


def _inference(args: argparse.Namespace, log: Log, tick: Callable[[str], Any],
               make: Callable[[], Any], name: str, dtype: str, encode: Any
               ) -> None:
  """All batch sizes of one subject, which is made only if one is missing."""
  from vlm_compress.eval.benchmark import adaptive, inference
  batches = [b for b in args.batch or (1, 4) if not log.has(
      'inference', subject=name, dtype=dtype, batch=b)]
  regroups = dtype == 'float32' and not log.has('adaptive', subject=name)
  if not batches and not regroups:
    return
  subject = make()
  model = _torch_model(args, subject) if batches else None
  for num_rows in batches:
    log.add('inference', inference.measure(
        subject, num_rows, repeats=args.repeats, shares=SHARES,
        voco_tokens=VOCO_TOKENS, encode=encode,
        outside=_outside(subject, num_rows, model), tick=tick))
  if regroups:
    log.add('adaptive', [adaptive.measure(
        subject, share=SHARES[0], batch_size=REGROUP_BATCH,
        repeats=min(args.repeats, 3), tick=tick)])


def _quickstart(args: argparse.Namespace, log: Log, tick: Callable[[str], Any]
                ) -> None:
  from vlm_compress.convert.efficientnet import load_efficientnet_lite0
  from vlm_compress.convert.files import load_config
  from vlm_compress.data.grids import make_grid
  from vlm_compress.eval.benchmark import subjects
  from vlm_compress.models.efficientnet import extract_features
  config = load_config(args.checkpoint)
  check(config.vision.model_type == 'efficientnet_lite0', f'{args.checkpoint} '
        'is no model of the quickstart: it has another vision tower')
  tower, size = load_efficientnet_lite0(), config.vision.image_size
  pixels = np.stack([make_grid('test', i, image_size=size).image
                     for i in range(QUICKSTART_PICTURES)])
  encode = lambda count: extract_features(tower, pixels[:count])
  _inference(args, log, tick, lambda: subjects.small(
      args.checkpoint, np.asarray(encode(QUICKSTART_PICTURES))), subjects.SMALL,
             config.dtype, encode)


def _slice(args: argparse.Namespace, log: Log, tick: Callable[[str], Any]
           ) -> None:
  from vlm_compress.eval.benchmark import subjects
  for dtype in args.dtype or DTYPES:
    _inference(args, log, tick, lambda dtype=dtype: subjects.slice_of_7b(
        args.layers, dtype, SLICE_PICTURES), subjects.slice_name(args.layers),
               dtype, None)


def _training(args: argparse.Namespace, log: Log, tick: Callable[[str], Any]
              ) -> None:
  from vlm_compress.eval.benchmark import training
  if not log.has('training'):
    log.add('training', training.measure(training.config_of(), 2, args.repeats,
                                         tick))
