"""vlm-compress prepare-data: a LLaVA-format file and pictures as a data set.

  vlm-compress prepare-data --json=blip_laion_cc_sbu_558k.json \
    --images=pretrain --out=data/pretrain --workers=16
  vlm-compress prepare-data --json=llava_v1_5_mix665k.json --images=images \
    --out=data/mix665k --workers=16 --skip-broken

Writes array_record shards that TFDS opens, and training reads with
data.name=prepared and data.options.directory.  Run it again after it was
stopped, and it writes what is missing.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

from vlm_compress.cli.arguments import Parser, number
from vlm_compress.data.prepare import REPORT, Preparation, Prepared, prepare
from vlm_compress.eval.tables import quantity
from vlm_compress.remote import Path, to_path


def parser() -> argparse.ArgumentParser:
  """The command line."""
  p = Parser(prog='vlm-compress prepare-data',
             description=__doc__.splitlines()[0],
             epilog='\n'.join(__doc__.splitlines()[1:]),
             formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--json', required=True, type=pathlib.Path, metavar='FILE',
                 help="rows in LLaVA's format")
  p.add_argument('--images', required=True, type=pathlib.Path, metavar='DIR',
                 help='folder that the image paths of the rows are relative to')
  p.add_argument('--out', required=True, metavar='DIR',
                 help='directory of the data set; local, or gs://BUCKET/FOLDER')
  p.add_argument('--name', default='', metavar='NAME',
                 help="of the data set for TFDS (made of the file's name)")
  p.add_argument('--workers', type=number(int, 1), metavar='N',
                 default=min(16, os.cpu_count() or 1),
                 help='processes that write shards (%(default)s)')
  p.add_argument('--shard-mb', type=number(float, 0, exclude_low=True),
                 default=256.0, metavar='M',
                 help='size of a shard to aim at, in MB (%(default)g)')
  p.add_argument('--skip-broken', action='store_true',
                 help='leave out rows that cannot be used, instead of failing '
                 f'at the end; OUT/{REPORT} lists them either way')
  return p


def main(argv: list[str]) -> int:
  """Prepares; returns the exit code."""
  args = parser().parse_args(argv)
  out = to_path(args.out)
  done = prepare(Preparation(
      json_file=args.json, image_folder=args.images, out=out,
      name=args.name, workers=args.workers, shard_mb=args.shard_mb,
      skip_broken=args.skip_broken))
  show(out, done)
  return 0


def show(out: Path, done: Prepared) -> None:
  """Prints what is in the data set, and what was left out of it."""
  counts, shards = done.manifest['counts'], len(done.manifest['shards'])
  print(f'{out}: {counts["records"]} rows with {counts["pictures"]} pictures '
        f'({counts["text_only"]} text only, {counts["several_pictures"]} with '
        f'several), {quantity(counts["bytes"], "B")} in {shards} shards '
        f'({done.num_written} written, {shards - done.num_written} already '
        'there)')
  if done.num_broken:
    print(f'{done.num_broken} rows are left out; {out / REPORT} says why',
          file=sys.stderr)
