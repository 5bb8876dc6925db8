"""vlm-compress convert: public weights into a model directory.

  vlm-compress convert --from=llava-1.5-7b-hf --to=llava7b
  vlm-compress convert --from=llava-v1.5-7b --vision=clip-vit-large --to=llava7b
  vlm-compress convert --llm=vicuna-7b --vision=clip-vit-large --to=start7b
  vlm-compress convert --llm=vicuna-7b --vision=clip-vit-large \
    --projector=mm_projector.safetensors --to=stage1
  vlm-compress convert --llm=smollm2.gguf --vision=clip-vit-base --to=small

The format is recognised from the files.  Tensors are copied one at a time, so
a checkpoint may be larger than the memory.  A tokenizer.model, or the
vocabulary in a GGUF file, becomes a tokenizer.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib

from vlm_compress.cli.arguments import MAX_SEED, Parser, number
from vlm_compress.cli.progress import byte_progress
from vlm_compress.config import PARAM_DTYPES, ConfigError, check
from vlm_compress.convert import from_hf
from vlm_compress.convert.files import GENERATION, TOKENIZER, generation_ends
from vlm_compress.convert.processor import ASPECT_MODES
from vlm_compress.data.errors import DataError
from vlm_compress.data.templates import TEMPLATES


def parser() -> argparse.ArgumentParser:
  """The command line."""
  p = Parser(prog='vlm-compress convert', description=__doc__.splitlines()[0])
  source = p.add_mutually_exclusive_group(required=True)
  source.add_argument('--from', dest='source', type=pathlib.Path, metavar='DIR',
                      help='LLaVA-1.5 (Hugging Face or original) or VoCo-LLaMA')
  source.add_argument('--llm', type=pathlib.Path, metavar='DIR',
                      help='LLaMA or Qwen2 language model (a .gguf file, too), '
                      'with --vision: a VLM with a fresh projector')
  p.add_argument('--vision', type=pathlib.Path, metavar='DIR',
                 help='CLIP, where the source has no vision tower')
  p.add_argument('--projector', type=pathlib.Path, metavar='PATH',
                 help="mm_projector file of LLaVA's first stage, or its "
                 'directory; with --llm and --vision')
  p.add_argument('--allow-pickle', action='store_true',
                 help='also read .bin files, with torch and as weights alone; '
                 'off, because pickles can hold programs')
  p.add_argument('--to', required=True, type=pathlib.Path, metavar='DIR')
  p.add_argument('--dtype', choices=PARAM_DTYPES,
                 help="of the parameters; the source's by default")
  p.add_argument('--num-voco-tokens', type=number(int, 1), metavar='C',
                 help='VoCo-LLaMA: tokens per image, which its files do not '
                 'say (2)')
  p.add_argument('--template', choices=sorted(TEMPLATES),
                 help='conversation template that it was trained with; '
                 'vicuna_v1, or voco_v1 for VoCo-LLaMA, by default')
  p.add_argument('--image-aspect-ratio', choices=ASPECT_MODES,
                 help="how pictures become squares; the source's by default")
  p.add_argument('--seed', type=number(int, 0, MAX_SEED), default=0,
                 help='of a fresh projector (%(default)s)')
  return p


def check_tokens(directory: pathlib.Path, source: pathlib.Path) -> None:
  """Opens the tokenizer as `generate` will, and what ends an answer.

  Args:
    directory: what is written, not yet under its name.
    source: where its files come from, for messages.

  Raises:
    ConfigError: a file of the source that `generate` would refuse.
  """
  beside = source if source.is_dir() else source.parent
  try:
    ends = generation_ends(directory)
    if (directory / TOKENIZER).exists():
      from vlm_compress.data import tokenizer as tokenizer_lib
      count = tokenizer_lib.load(directory / TOKENIZER).vocab_size
      where = beside / GENERATION
      check(all(0 <= i < count for i in ends),
            f'{where if where.exists() else source}: eos_token_id={ends}, but '
            f'the tokenizer beside it has {count} tokens; correct one of them')
  except (ConfigError, DataError) as e:
    raise ConfigError(str(e).replace(str(directory), str(beside))) from e


def main(argv: list[str]) -> int:
  """Converts; returns the exit code."""
  args = parser().parse_args(argv)
  source = args.llm if args.source is None else args.source
  check(args.llm is None or args.vision is not None,
        '--llm needs --vision, the directory of a CLIP tower')
  check(args.projector is None or args.llm is not None,
        '--projector belongs to --llm, the language model it was trained for')
  plan = from_hf.make_plan(
      source, args.vision, projector=args.projector, dtype=args.dtype,
      num_voco_tokens=args.num_voco_tokens, allow_pickle=args.allow_pickle)
  said = {'template': args.template,
          'image_aspect_ratio': args.image_aspect_ratio}
  plan = dataclasses.replace(plan, processor=dataclasses.replace(
      plan.processor, **{k: v for k, v in said.items() if v is not None}))
  for note in plan.notes:
    print(f'note: {note}')
  if plan.fresh:
    print(f'fresh parameters: {", ".join(plan.fresh)}')
  with byte_progress('converting', sum(p.nbytes for p in plan.pieces)) as advance:
    from_hf.convert(plan, args.to, copy_from=source, seed=args.seed,
                    advance=advance,
                    verify=lambda work: check_tokens(work, source))
  count = sum(math.prod(shape) for shape in plan.shapes.values())
  print(f'{args.to}: {count / 1e6:,.1f} M parameters, '
        f'{plan.config.param_dtype}')
  if TOKENIZER in plan.tokenizer:
    print(f'{TOKENIZER} is built from the vocabulary of {source}')
  if not (args.to / TOKENIZER).exists():
    print(f'note: {source} has no {TOKENIZER}; put one into {args.to} before '
          'it is asked anything')
  return 0
