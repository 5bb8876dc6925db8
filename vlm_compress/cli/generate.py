"""vlm-compress generate: one answer about one picture.

  vlm-compress generate --checkpoint=quickstart/atp/model --image=grid.png \
    --prompt="what is at top left ?"
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from vlm_compress.cli.arguments import MAX_SEED, Parser, number
from vlm_compress.cli.evaluate import own_method
from vlm_compress.cli.workspace import encoder
from vlm_compress.config import LlavaConfig, check
from vlm_compress.convert.files import TOKENIZER, load_config, load_params
from vlm_compress.data import images
from vlm_compress.data.examples import Example, Turn
from vlm_compress.data.rows import RowSpec, layout
from vlm_compress.data.tokenizer import load as load_tokenizer
from vlm_compress.decode.generate import answer_ids, generate
from vlm_compress.models.llava import Llava, PruneOptions
from vlm_compress.models.sequence import make_batch, split_voco


def parser() -> argparse.ArgumentParser:
  """The command line."""
  p = Parser(prog='vlm-compress generate', description=__doc__.splitlines()[0])
  p.add_argument('--checkpoint', type=pathlib.Path,
                 default=pathlib.Path('quickstart/atp/model'),
                 help='model directory (%(default)s)')
  p.add_argument('--image', required=True, type=pathlib.Path)
  p.add_argument('--prompt', required=True)
  p.add_argument('--method', choices=('auto', 'full', 'voco', 'atp'),
                 default='auto', help="auto: the checkpoint's own (%(default)s)")
  p.add_argument('--num-voco-tokens', type=number(int, 1), metavar='C',
                 help='VoCo tokens, if not as trained')
  p.add_argument('--template', default='short', help='(%(default)s)')
  p.add_argument('--max-new-tokens', type=number(int, 1), default=32,
                 help='(%(default)s)')
  p.add_argument('--temperature', type=number(float, 0), default=0.0,
                 help='0 is greedy (%(default)s)')
  p.add_argument('--top-p', type=number(float, 0, 1, exclude_low=True),
                 default=1.0, help='(%(default)s)')
  p.add_argument('--seed', type=number(int, 0, MAX_SEED), default=0,
                 help='(%(default)s)')
  return p


def _features(config: LlavaConfig, params: Any, pixels: np.ndarray
              ) -> np.ndarray:
  """uint8[1, S, S, 3] -> float[1, P', Dv], by the checkpoint's own tower."""
  if config.vision.model_type == 'efficientnet_lite0':
    return encoder()[0](pixels)
  check('vision_tower' in params, 'the checkpoint has no weights of its CLIP '
        'tower: convert one that has, and train from there')
  return np.asarray(Llava(config).apply(
      {'params': params}, images.clip_normalize(pixels)[None],
      method='vision_features')[0], np.float32)


def main(argv: list[str]) -> int:
  """Prints the answer; returns the exit code."""
  args = parser().parse_args(argv)
  config, params = load_config(args.checkpoint), load_params(args.checkpoint)
  tokenizer = load_tokenizer(args.checkpoint / TOKENIZER)
  method = own_method(config) if args.method == 'auto' else args.method
  check(method != 'voco' or config.voco is not None,
        f'{args.checkpoint} has no VoCo tokens; use --method=full')
  check(method != 'atp' or config.atp is not None,
        f'{args.checkpoint} has no ATP modules; use --method=full')
  data = images.read_bytes(args.image.parent, args.image.name)
  picture = images.decode(data, str(args.image))
  pixels = images.tower_pixels(picture, config.vision)
  features = _features(config, params, np.asarray(pixels)[None])
  example = Example(example_id=args.image.name, images=(data,),
                    turns=(Turn(args.prompt),))
  count = 0
  if method == 'voco':
    count = (config.voco.num_voco_tokens if args.num_voco_tokens is None
             else args.num_voco_tokens)
  elif method == 'full':
    config = dataclasses.replace(config, voco=None, atp=None)
  row = layout(example, example.turns, RowSpec(template=args.template),
               tokenizer, config, count, prompt_only=True)
  batch = make_batch([row], [features], length=len(row['input_ids']),
                     num_images=1)
  if method == 'voco':  # in two passes
    batch = split_voco(batch, config, int((row['image_ids'] == 0).sum()))
  model = Llava(config)
  run = jax.jit(lambda params, batch: generate(
      model, params, batch, max_new_tokens=args.max_new_tokens,
      eos_id=tokenizer.eos_id,
      prune=PruneOptions() if method == 'atp' else None,
      temperature=args.temperature, top_p=args.top_p, seed=args.seed))
  result = run(params, batch)
  print(tokenizer.decode(answer_ids(result.tokens[0], tokenizer.eos_id)))
  if result.outputs.entering is not None:
    kept = np.asarray(result.outputs.entering).sum((1, 2, 3))
    print(f'visual tokens per layer: {kept.astype(int).tolist()}, average '
          f'{kept.mean():.1f} of {config.num_visual_tokens}', file=sys.stderr)
  return 0
