"""vlm-compress calibrate: the threshold shift for a budget of visual tokens.

  vlm-compress calibrate --checkpoint=quickstart/atp/model --target-tokens 12 16 24 \
    --config=configs/quickstart.py:atp
  vlm-compress calibrate --checkpoint=quickstart/atp/model --target-tokens 12 \
    --images photos --prompt="what is at top left ?" --save=atp12

One trained ATP model serves any budget.  What it keeps depends on pictures and
questions, so calibrate on such as it will be asked; with --config they come
from the training split, and --config.section.field=value sets a field.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vlm_compress import api, atomic
from vlm_compress.cli.arguments import MAX_SEED, Parser, number
from vlm_compress.cli.pictures import picture_paths
from vlm_compress.cli.stage import bridge
from vlm_compress.cli.train import load_page, override
from vlm_compress.cli.workspace import Split, check_tower, open_split
from vlm_compress.config import LlavaConfig, check
from vlm_compress.convert.files import load_config, new_directory
from vlm_compress.convert.processor import load_processor
from vlm_compress.data.examples import Example
from vlm_compress.data.prompts import prompt_row
from vlm_compress.data.templates import TEMPLATES
from vlm_compress.decode.identity import fingerprint
from vlm_compress.eval import calibration
from vlm_compress.eval.calibration import Calibration, Prompts
from vlm_compress.eval.evaluator import Question, questions_of

NUM_PROMPTS = 512
WIDE = 100  # columns that a table may take


def parser() -> argparse.ArgumentParser:
  """The command line; --config.section.field=value comes on top."""
  p = Parser(prog='vlm-compress calibrate', description=__doc__.splitlines()[0])
  p.add_argument('--checkpoint', required=True, type=pathlib.Path,
                 metavar='DIR', help='directory of an ATP model')
  p.add_argument('--target-tokens', required=True, nargs='+', metavar='N',
                 type=number(float, 0, exclude_low=True),
                 help='visual tokens per picture, averaged over layers; '
                 'several give a row each')
  p.add_argument('--config', metavar='FILE.py[:ARG]',
                 help='names data and questions, as for evaluate')
  p.add_argument('--data-root', type=pathlib.Path, default='quickstart',
                 help='where data sets and features are kept (%(default)s)')
  p.add_argument('--split', choices=('train', 'test'), default='train',
                 help="of --config's data; who calibrates on the test split "
                 'must not report results on it (%(default)s)')
  p.add_argument('--num-prompts', type=number(int, 1),
                 help=f'with --config: how many questions ({NUM_PROMPTS})')
  p.add_argument('--images', nargs='+', type=pathlib.Path, metavar='PATH',
                 help='pictures, and directories of them (not those below)')
  p.add_argument('--prompt', action='append', metavar='TEXT',
                 help='with --images: asked about every picture; again for '
                 'more of them')
  p.add_argument('--template', choices=sorted(TEMPLATES),
                 help="with --images: conversation template (the checkpoint's own)")
  p.add_argument('--tolerance', type=number(float, 0), metavar='TOKENS',
                 help='how near is near enough '
                 f'({100 * calibration.TOLERANCE:g} %% of the target)')
  p.add_argument('--batch-size', type=number(int, 1), default=16,
                 help='prompts at a time (%(default)s)')
  p.add_argument('--seed', type=number(int, 0, MAX_SEED), default=0,
                 help='of drawing questions and of the interval (%(default)s)')
  p.add_argument('--out', type=pathlib.Path, metavar='FILE.json',
                 help='write all numbers here')
  p.add_argument('--save', type=pathlib.Path, metavar='DIR',
                 help='write the model with the shift in its config.json')
  return p


def main(argv: list[str]) -> int:
  """Calibrates; returns the exit code."""
  args, rest = parser().parse_known_args(argv)
  check_arguments(args, rest)
  config = load_config(args.checkpoint)
  calibration.check_dial(config, str(args.checkpoint))
  for target in args.target_tokens:
    calibration.check_target(config, target)
  console = Console(stderr=True)
  say = lambda line: console.print(line, markup=False, highlight=False,
                                   soft_wrap=True)
  with Progress(console=console, transient=True,
                disable=not console.is_terminal) as bar:
    prompts, vlm = (asked(args, bar) if args.config is None else
                    drawn(args, rest, say))
    say(f'{len(prompts)} prompt(s) about {len(set(prompts.pictures))} picture(s)')
    count = remembering(vlm, prompts, bar)
    found = []
    for target in args.target_tokens:
      found.append(calibration.calibrate(
          count, target, vlm.config, pictures=prompts.pictures,
          tolerance=args.tolerance, start=config.atp.threshold_shift,
          seed=args.seed))
  show(found, config)
  for one in found:
    if not one.reached:
      say(f'note: {one.target:g} tokens were asked for, {one.achieved:.4g} are '
          f'the nearest: on {one.num_prompts} prompt(s) the average moves in '
          'steps; more prompts make them smaller')
  write(args, vlm, found)
  return 0


def check_arguments(args: argparse.Namespace, rest: list[str]) -> None:
  """Raises ConfigError for arguments that do not go together."""
  check((args.config is None) != (args.images is None),
        'the prompts come from --config, or from --images and --prompt; name '
        'one of the two')
  if args.config is None:
    check(not rest, f'unrecognized arguments: {" ".join(rest)}; see '
          'vlm-compress calibrate --help')
    check(bool(args.prompt), '--images needs --prompt, what is asked about them')
    check(args.num_prompts is None, '--num-prompts belongs to --config; of '
          '--images, every picture is asked everything')
  else:
    check(args.prompt is None, '--prompt belongs to --images; with --config '
          'questions are drawn from the data')
    check(args.template is None, '--template belongs to --images; with '
          '--config it is config.rows.template')
  check(args.save is None or len(args.target_tokens) == 1, '--save writes a '
        f'model for one budget, but --target-tokens names '
        f'{len(args.target_tokens)}')
  if args.save is not None:  # before the work, not after it
    check(not args.save.exists() or args.save.is_dir()
          and not any(args.save.iterdir()), f'{args.save} exists and is not '
          'empty; name another directory or delete it')
  check(args.out is None or not args.out.is_dir(),
        f'--out: {args.out} is a directory; name a file in it')


def drawn(args: argparse.Namespace, rest: list[str],
          say: Callable[[str], None]) -> tuple[Prompts, api.Vlm]:
  """Questions of a config page's data, and the model."""
  page = load_page(args.config)
  override(page, rest)
  stage = bridge(page)
  config = load_config(args.checkpoint)
  check_tower(stage.data, config.vision, str(args.checkpoint))
  vlm = opened(args)
  name = (stage.data.train_split if args.split == 'train' else
          stage.data.test_split)
  split = open_split(stage.data, name, args.data_root, say)
  wanted = args.num_prompts or NUM_PROMPTS
  order, questions = draw(split, stage.per_kind, wanted, args.seed)
  check(bool(questions), f'{name} has no question of the kinds in '
        'eval.per_kind; name those that it has')
  if len(questions) < wanted:
    say(f'note: {name} has no more than {len(questions)} such questions')
  rows = [prompt_row(q.turn.question, 1, vlm.tokenizer, config,
                     stage.rows.template) for q in questions]
  return Prompts(rows, split.features, [order[q.example] for q in questions],
                 args.batch_size), vlm


def draw(split: Split, per_kind: dict[str, int], count: int, seed: int
         ) -> tuple[list[int], list[Question]]:
  """Up to `count` questions about pictures drawn from a split.

  Returns:
    Numbers of the drawn examples, and questions whose `example` counts those.
  """
  order = np.random.default_rng(seed).permutation(len(split)).tolist()
  examples: list[Example] = []
  questions: list[Question] = []
  step = -(-count // max(1, sum(per_kind.values())))
  while len(questions) < count and len(examples) < len(order):
    examples += [split.examples[i] for i in
                 order[len(examples):len(examples) + step]]
    questions = questions_of(examples, per_kind)
  return order, questions[:count]


def asked(args: argparse.Namespace, bar: Progress) -> tuple[Prompts, api.Vlm]:
  """Every picture of --images with every --prompt, and the model."""
  paths = list(picture_paths(args.images))
  vlm = opened(args)
  each = [prompt_row(text, 1, vlm.tokenizer, vlm.config, vlm.template())
          for text in args.prompt]
  features = [vlm.features(path) for path in
              bar.track(paths, description='encoding pictures')]
  numbers = [i for i in range(len(paths)) for _ in each]
  return Prompts(each * len(paths), features, numbers, args.batch_size), vlm


def opened(args: argparse.Namespace) -> api.Vlm:
  """The model with few rungs: what it keeps does not depend on them, and most
  of the time would go into compiling segments of every size.
  """
  vlm = api.load(args.checkpoint, template=args.template)
  P = vlm.config.num_visual_tokens
  return with_atp(vlm, capacities=tuple(sorted({-(-P // 4), -(-P // 2)})))


def with_atp(vlm: api.Vlm, **fields: Any) -> api.Vlm:
  """The same model with fields of its AtpConfig replaced."""
  atp = dataclasses.replace(vlm.config.atp, **fields)
  return dataclasses.replace(vlm, config=dataclasses.replace(vlm.config, atp=atp))


def remembering(vlm: api.Vlm, prompts: Prompts, bar: Progress
                ) -> calibration.Count:
  """A counter that shows a bar and runs nothing twice, for several targets."""
  seen: dict[float, np.ndarray] = {}
  task = bar.add_task('calibrating', total=len(prompts))
  count = calibration.counter(vlm.segmented, prompts, len(prompts),
                              lambda rows: bar.advance(task, rows))

  def look(shift: float) -> np.ndarray:
    if shift not in seen:
      bar.reset(task, description=f'shift {shift:+.4f}')
      seen[shift] = count(shift)
    return seen[shift]
  return look


def show(found: Sequence[Calibration], config: LlavaConfig) -> None:
  """Prints the table, a row per target and module."""
  table = Table(box=box.SIMPLE_HEAD, show_edge=False, collapse_padding=True)
  for name in ('asked', 'shift', 'achieved', '95 % interval', 'after',
               'mean', 'p50', 'p90', 'p99'):
    table.add_column(name, justify='right', no_wrap=True)
  for one in found:
    head = [f'{one.target:g}', f'{one.shift:+.4f}', f'{one.achieved:.2f}',
            '{:.2f} – {:.2f}'.format(*one.ci95)]
    for module, layer in enumerate(config.atp.prune_after):
      row = [x[module] for x in (one.mean, one.p50, one.p90, one.p99)]
      table.add_row(*head, str(layer), *(f'{x:.1f}' for x in row),
                    end_section=module + 1 == len(config.atp.prune_after))
      head = [''] * 4
  console = Console()
  console.width = max(console.width, WIDE)  # rather broken lines than lost digits
  console.print(table, '')
  for line in ('asked, achieved: visual tokens per picture, of '
               f'{config.num_visual_tokens}, averaged over layers',
               f'interval: {calibration.INTERVAL}',
               'mean, p50, p90, p99: tokens kept after that layer, over prompts'):
    console.print(line, markup=False, highlight=False)


def write(args: argparse.Namespace, vlm: api.Vlm,
          found: Sequence[Calibration]) -> None:
  """What --out and --save ask for."""
  if args.out is not None:
    source = ({'config': args.config, 'split': args.split} if args.config else
              {'images': [str(p) for p in args.images], 'prompts': args.prompt})
    atomic.write_text(args.out, json.dumps({
        'checkpoint': str(args.checkpoint), 'fingerprint': fingerprint(vlm.params),
        'seed': args.seed, **source,
        'num_visual_tokens': vlm.config.num_visual_tokens,
        'prune_after': vlm.config.atp.prune_after,
        'calibrations': [one.to_dict() for one in found]}, indent=1))
    print(f'numbers: {args.out}')
  if args.save is not None:
    shift = found[0].shift
    with new_directory(args.save, None) as work:
      # as it was, also where --template or `opened` say otherwise
      api.save(dataclasses.replace(
          with_atp(vlm, threshold_shift=shift, capacities=load_config(
              args.checkpoint).atp.capacities),
          processor=load_processor(args.checkpoint)), work)
    print(f'model: {args.save}, atp.threshold_shift={shift:g}')
