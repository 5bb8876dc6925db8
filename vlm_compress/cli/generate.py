"""vlm-compress generate: answers about pictures, as they come.

  vlm-compress generate --checkpoint=quickstart/atp/model --image=grid.png \
    --prompt="what is at top left ?"
  vlm-compress generate --checkpoint=quickstart/voco8/model --image=grid.png \
    --interactive --vision-cache=cache
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable

from vlm_compress import api, caching
from vlm_compress.cli.arguments import MAX_SEED, Parser, number
from vlm_compress.config import ConfigError, check
from vlm_compress.data.errors import DataError
from vlm_compress.data.images import open_picture
from vlm_compress.data.templates import TEMPLATES
from vlm_compress.decode.vision_cache import VisionCache
from vlm_compress.vlm import METHODS


def parser() -> argparse.ArgumentParser:
  """The command line."""
  p = Parser(prog='vlm-compress generate', description=__doc__.splitlines()[0])
  p.add_argument('--checkpoint', type=pathlib.Path,
                 default=pathlib.Path('quickstart/atp/model'),
                 help='model directory (%(default)s)')
  p.add_argument('--image', action='append', default=[], type=pathlib.Path,
                 metavar='FILE', help='a picture; again for more of them, left '
                 'out to ask without')
  p.add_argument('--prompt', help='the question; pictures stand in front of it, '
                 'as in training, also where <image> says so')
  p.add_argument('--interactive', action='store_true',
                 help='asks for questions (after --prompt), one a line, until '
                 'an empty one. All are about the same pictures, which are encoded (voco: and '
                 'compressed) once; a question knows nothing of those before')
  p.add_argument('--method', choices=METHODS, default='auto',
                 help="auto: the checkpoint's own (%(default)s)")
  p.add_argument('--num-voco-tokens', type=number(int, 1), metavar='C',
                 help='VoCo tokens per picture, if not as trained')
  p.add_argument('--vision-cache', type=pathlib.Path, metavar='PATH',
                 help='where compressed pictures are (vlm-compress compress): '
                 'a directory, which gets those that it has not, or a file')
  p.add_argument('--kept-for', metavar='TEXT',
                 help='with --vision-cache and an ATP model: read what was kept '
                 'for this question (that of each prompt)')
  p.add_argument('--template', choices=sorted(TEMPLATES),
                 help="conversation template (the checkpoint's own)")
  p.add_argument('--max-new-tokens', type=number(int, 1), default=32,
                 help='(%(default)s)')
  p.add_argument('--temperature', type=number(float, 0), default=0.0,
                 help='0 is greedy (%(default)s)')
  p.add_argument('--top-p', type=number(float, 0, 1, exclude_low=True),
                 default=1.0, help='(%(default)s)')
  p.add_argument('--seed', type=number(int, 0, MAX_SEED), default=0,
                 help='(%(default)s)')
  return p


def main(argv: list[str]) -> int:
  """Prints the answers; returns the exit code."""
  args = parser().parse_args(argv)
  check(args.prompt is not None or args.interactive,
        '--prompt is required, or --interactive; see vlm-compress generate '
        '--help')
  vlm = api.load(args.checkpoint, template=args.template)
  # Mistakes that no other question would mend come first.
  vlm.template()
  method = vlm.method(args.method)
  check_cache(args, method)
  pictures = prepared(vlm, method, args)
  if args.prompt is not None:
    ask(vlm, args.prompt, pictures, method, args)
  return interact(vlm, pictures, method, args) if args.interactive else 0


def check_cache(args: argparse.Namespace, method: str) -> None:
  """Raises ConfigError for a --vision-cache or --kept-for of no use."""
  check(args.kept_for is None or method == 'atp' and (
      args.vision_cache is not None), '--kept-for belongs to --vision-cache and '
        'method atp; leave it out')
  if args.vision_cache is not None:
    check(method != 'full', '--vision-cache has no meaning for method full: '
          'it compresses nothing')
    check(bool(args.image), '--vision-cache needs a picture: --image')
    check(method == 'voco' or len(args.image) == 1, '--vision-cache takes one '
          f'picture with method atp, not {len(args.image)}: what is kept of '
          'several depends on all of them')


def prepared(vlm: api.Vlm, method: str, args: argparse.Namespace
             ) -> Callable[[str], list]:
  """Does what is the same for all questions; gives what stands for the pictures
  under one of them.
  """
  pictures = [open_picture(path) for path in args.image]
  if args.vision_cache is not None:
    look = functools.partial(
        caching.cached_image, vlm, where=VisionCache(args.vision_cache),
        num_voco_tokens=args.num_voco_tokens,
        say=lambda line: print(f'vision cache: {line}', file=sys.stderr))
    if method == 'atp' and args.kept_for is None:
      return lambda question: [look(p, prompt=question) for p in pictures]
    pictures = [look(picture, prompt=args.kept_for) for picture in pictures]
  elif method == 'voco':
    pictures = [api.compress_image(vlm, picture, args.num_voco_tokens)
                for picture in pictures]
  else:
    for picture in pictures:
      vlm.features(picture)  # kept for the questions
  return lambda question: pictures


def ask(vlm: api.Vlm, prompt: str, pictures: Callable[[str], list], method: str,
        args: argparse.Namespace) -> None:
  """Prints one answer as it comes."""
  images = pictures(prompt)
  answer = api.generate(
      vlm, prompt, images, method=method,
      num_voco_tokens=args.num_voco_tokens, max_new_tokens=args.max_new_tokens,
      temperature=args.temperature, top_p=args.top_p, seed=args.seed,
      stream=lambda piece: print(piece, end='', flush=True))
  print(flush=True)
  if answer.ended == 'context':
    print('note: the answer ends here because the context of '
          f'{vlm.config.text.max_position_embeddings} tokens is full',
          file=sys.stderr)
  if answer.visual_tokens is not None:
    kept = answer.visual_tokens
    print(f'visual tokens per layer: {kept.astype(int).tolist()}, average '
          f'{kept.mean():.1f} of {len(images) * vlm.config.num_visual_tokens}',
          file=sys.stderr)


def interact(vlm: api.Vlm, pictures: Callable[[str], list], method: str,
             args: argparse.Namespace) -> int:
  """Answers questions from stdin; 2 if one of them could not be answered."""
  code, shown = 0, sys.stdin.isatty()
  if hasattr(sys.stdin, 'reconfigure'):  # bad bytes are a question's mistake
    sys.stdin.reconfigure(errors='surrogateescape')
  while True:
    if shown:
      print('> ', end='', file=sys.stderr, flush=True)
    question = sys.stdin.readline().strip()
    if not question:
      return code
    try:
      ask(vlm, question, pictures, method, args)
    except (ConfigError, DataError) as error:
      print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
      code = 2
