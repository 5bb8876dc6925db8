"""vlm-compress compress: pictures into a vision cache, to be asked about later.

  vlm-compress compress --checkpoint=quickstart/voco8/model --images photos \
    --out=cache
  vlm-compress compress --checkpoint=quickstart/atp/model --images a.png b.png \
    --prompt="what is at top left ?" --out=two.safetensors

`generate --vision-cache` reads it.  Pictures that it has already are left
alone, so the command may be repeated, stopped, and run by several at once.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlm_compress import api, caching
from vlm_compress.cli.arguments import Parser, number
from vlm_compress.cli.pictures import picture_paths
from vlm_compress.config import check
from vlm_compress.data.errors import DataError
from vlm_compress.data.templates import TEMPLATES
from vlm_compress.decode.vision_cache import VisionCache
from vlm_compress.eval.efficiency import kv_bytes
from vlm_compress.eval.tables import quantity


def parser() -> argparse.ArgumentParser:
  """The command line."""
  p = Parser(prog='vlm-compress compress', description=__doc__.splitlines()[0])
  p.add_argument('--checkpoint', required=True, type=pathlib.Path, metavar='DIR',
                 help='directory of a model with VoCo tokens or ATP modules')
  p.add_argument('--images', required=True, nargs='+', type=pathlib.Path,
                 metavar='PATH', help='pictures, and directories of them (not '
                 'those below)')
  p.add_argument('--out', required=True, type=pathlib.Path, metavar='PATH',
                 help='a directory, which gets a file per picture, or one file '
                 '(*.safetensors) for all of them; what it has stays')
  p.add_argument('--num-voco-tokens', type=number(int, 1), metavar='C',
                 help='VoCo tokens per picture, if not as trained')
  p.add_argument('--prompt', metavar='TEXT',
                 help='ATP, where it is required: the question that decides '
                 'what is kept')
  p.add_argument('--template', choices=sorted(TEMPLATES),
                 help="conversation template (the checkpoint's own)")
  p.add_argument('--skip-broken', action='store_true',
                 help='list pictures that cannot be read, and go on')
  return p


def main(argv: list[str]) -> int:
  """Compresses; returns the exit code."""
  args = parser().parse_args(argv)
  paths = list(picture_paths(args.images))
  vlm = api.load(args.checkpoint, template=args.template)
  # Mistakes that no other picture would mend come first.
  caching.layout_of(vlm, args.num_voco_tokens, args.prompt)
  console = Console(stderr=True)
  columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
             TimeRemainingColumn())
  done, broken = [], 0
  with Progress(*columns, console=console, transient=True,
                disable=not console.is_terminal) as bar, (
                    VisionCache(args.out)) as cache:
    for path in bar.track(paths, description='compressing'):
      try:
        done.append(compress(vlm, path, cache, args))
      except DataError as error:
        if not args.skip_broken:
          raise
        broken += 1
        print(f'skipped: {" ".join(str(error).split())}', file=sys.stderr)
  check(bool(done), f'none of the {broken} pictures can be read; see above')
  show(vlm, args.out, done, broken)
  return 0


def compress(vlm: api.Vlm, path: pathlib.Path, cache: VisionCache,
             args: argparse.Namespace) -> caching.Written:
  """Puts one picture into the cache.

  Raises:
    DataError: it cannot be read; the message names it.
  """
  try:
    written = caching.compress_to(vlm, path, cache, args.num_voco_tokens,
                                  args.prompt)
  except DataError as error:
    if str(path) in str(error):
      raise
    raise DataError(f'{path}: {error}') from error
  if written.damaged is not None:
    print(f'replaced: {written.damaged}', file=sys.stderr)
  return written


def show(vlm: api.Vlm, out: pathlib.Path, done: list[caching.Written],
         broken: int) -> None:
  """Prints what was done, and what it takes."""
  new = sum(written.new for written in done)
  print(f'{out}: {new} {"entry" if new == 1 else "entries"} written, '
        f'{len(done) - new} already there'
        + f', {broken} pictures skipped' * (broken > 0))
  config = vlm.config
  each = sum(written.nbytes for written in done) / len(done)
  full = float(kv_bytes(config.text, config.num_visual_tokens, config.dtype))
  print(f'{quantity(each, "B")} per picture, {100 * each / full:.1f} % of the '
        f"full model's {quantity(full, 'B')} of visual keys and values")
