"""vlm-compress export: a model directory in Hugging Face's format.

  vlm-compress export --from=llava7b --to=llava7b-hf

Writes what transformers opens as LlavaForConditionalGeneration and, where there
is a tokenizer, with AutoProcessor.  Parameters that the format has no place for
are named and written beside it, where convert finds them again; LoRA adapters
are merged into the weights.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from vlm_compress.cli.arguments import Parser
from vlm_compress.cli.progress import byte_progress
from vlm_compress.convert import to_hf
from vlm_compress.convert.tensors import ADAPTERS


def parser() -> argparse.ArgumentParser:
  """The command line."""
  p = Parser(prog='vlm-compress export', description=__doc__.splitlines()[0])
  p.add_argument('--from', dest='source', required=True, type=pathlib.Path,
                 metavar='DIR', help='model directory')
  p.add_argument('--to', required=True, type=pathlib.Path, metavar='DIR')
  p.add_argument('--format', choices=('hf',), default='hf',
                 help='(%(default)s)')
  return p


def main(argv: list[str]) -> int:
  """Exports; returns the exit code."""
  args = parser().parse_args(argv)
  plan = to_hf.make_plan(args.source)
  with byte_progress('exporting', plan.nbytes) as advance:
    to_hf.export(plan, args.to, copy_from=args.source, advance=advance)
  if plan.lora is not None:
    print(f'note: LoRA adapters (rank {plan.lora.rank}, '
          f'{", ".join(plan.lora.targets)}) were merged into the weights',
          file=sys.stderr)
  if plan.tokens.extra_rows:
    print(f'note: id {plan.config.image_token_index} was added to the '
          'vocabulary as the image placeholder, with zero weights')
  if plan.invented:
    print('note: the model does not have, and LLaVA does not read, '
          f'{", ".join(plan.invented)}: written as ones and zeros')
  for note in (*plan.notes, *plan.tokens.notes):
    print(f'note: {note}')
  if plan.adapters:
    print(f'not in this format, written to {args.to / ADAPTERS}: '
          f'{", ".join(plan.adapters)}')
  print(f'{args.to}: open it with LlavaForConditionalGeneration')
  return 0
