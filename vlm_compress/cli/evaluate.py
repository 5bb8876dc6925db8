"""vlm-compress evaluate: a trained model on a test split.

  vlm-compress evaluate --config=configs/quickstart.py:atp \
    --checkpoint=quickstart/atp/model --reference=vlm_compress/checkpoints/quickstart
  vlm-compress evaluate --benchmark=gqa --data=eval --checkpoint=llava7b --out=runs/gqa
  vlm-compress evaluate --benchmark=openmoji_grid --data=quickstart --method=random \
    --budget=16 --checkpoint=vlm_compress/checkpoints/quickstart --out=runs/random16
  vlm-compress evaluate --benchmark=msvd_qa --data=eval --frames=8 --method=voco \
    --checkpoint=runs/llava_7b/voco/model --out=runs/msvd
  vlm-compress evaluate --check-data eval

With --config and --reference (the model before compression) the floors at equal
tokens, the bounds and the ratios stand beside it.  With --benchmark one method is
asked a whole benchmark, in shards, by all hosts; stopped, it goes on where it was.
Questions about a video are asked with --frames of its frames as pictures, and a
budget is of each of them.
--check-data says which files of the public benchmarks are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

from rich.console import Console

from vlm_compress.cli import benchmark_run, distributed, results
from vlm_compress.cli.arguments import MAX_SEED, Parser, number
from vlm_compress.cli.score import show_files
from vlm_compress.cli.stage import bridge
from vlm_compress.cli.train import load_page, override
from vlm_compress.cli.workspace import check_tower, open_split
from vlm_compress.config import check
from vlm_compress.convert.files import TOKENIZER, load_config, load_params
from vlm_compress.data.templates import TEMPLATES
from vlm_compress.data.tokenizer import load as load_tokenizer
from vlm_compress.data.video import NUM_FRAMES
from vlm_compress.eval import methods, runs
from vlm_compress.eval.evaluator import Method, questions_of
from vlm_compress.eval.methods import label
from vlm_compress.eval.report import print_table, write_report
from vlm_compress.vlm import own_method, voco_count

OF_CONFIG = ('auto', 'full', 'voco', 'atp')


def parser() -> argparse.ArgumentParser:
  """The command line; --config.section.field=value comes on top."""
  p = Parser(prog='vlm-compress evaluate', description=__doc__.splitlines()[0])
  p.add_argument('--config', metavar='FILE.py[:ARG]',
                 help='names the data and the questions')
  p.add_argument('--checkpoint', type=pathlib.Path, help='model directory')
  p.add_argument('--reference', type=pathlib.Path,
                 help='model directory of the uncompressed model')
  p.add_argument('--method', choices=('auto', *methods.METHODS), default='auto',
                 help="auto: the checkpoint's own (%(default)s); with --config only "
                 f'{", ".join(OF_CONFIG)}')
  p.add_argument('--num-voco-tokens', type=number(int, 1), metavar='C',
                 help='VoCo tokens per picture, if not as trained')
  p.add_argument('--data-root', type=pathlib.Path, default='quickstart',
                 help='where data sets and features are kept (%(default)s)')
  p.add_argument('--out', type=pathlib.Path,
                 help='write report.json, report.md and report.html here; with '
                 '--benchmark the directory of the run')
  p.add_argument('--seed', type=number(int, 0, MAX_SEED), default=0,
                 help='of random selection (%(default)s)')
  p.add_argument('--check-data', type=pathlib.Path, metavar='DIR',
                 help='say which benchmarks are complete there, and stop')
  _benchmark_flags(p.add_argument_group('with --benchmark'))
  distributed.add_flags(p)
  return p


def _benchmark_flags(p) -> None:
  p.add_argument('--benchmark', metavar='KEY[:SPLIT]', help=f'one of '
                 f'{", ".join(sorted(runs.BENCHMARKS))}')
  p.add_argument('--data', type=pathlib.Path, metavar='DIR', help='its official files; of '
                 'openmoji_grid where the quickstart keeps its data')
  p.add_argument('--budget', type=number(float, 0, exclude_low=True), metavar='TOKENS',
                 help='visual tokens, mean over layers; of voco C')
  p.add_argument('--threshold-shift', type=number(float, -64, 64), metavar='X',
                 help='of atp, if not as in the checkpoint')
  p.add_argument('--calibration', type=pathlib.Path, metavar='FILE.json',
                 help="of atp: what calibrate's --out wrote, to find the shift of --budget")
  p.add_argument('--prune-after', type=number(int, 0), nargs='+', metavar='LAYER',
                 help='of random and uniform, which else cut in front of all layers, and of '
                 'FastV, PyramidDrop and SparseVLM: layers behind which tokens are cut')
  p.add_argument('--rule', help='another way to score')
  p.add_argument('--frames', type=number(int, 1), metavar='F', help='of every video: the '
                 f'middles of F equal spans of its time ({NUM_FRAMES})')
  p.add_argument('--limit', type=number(int, 1), metavar='N', help='only the first questions')
  p.add_argument('--allow-partial', action='store_true',
                 help='leave out questions whose picture or video is not there')
  p.add_argument('--shards', type=number(int, 1), default=benchmark_run.NUM_SHARDS,
                 help='parts of the benchmark, dealt to hosts (%(default)s)')
  p.add_argument('--batch-size', type=number(int, 1), default=8,
                 help='questions at a time, of each copy of the model (%(default)s)')
  p.add_argument('--max-new-tokens', type=number(int, 1), metavar='N',
                 help=f'longest answer ({benchmark_run.MAX_NEW_TOKENS})')
  p.add_argument('--template', choices=sorted(TEMPLATES),
                 help="conversation template, if not the checkpoint's own")
  p.add_argument('--tensor', type=number(int, 1), default=1,
                 help='devices that share a copy of the model (%(default)s)')
  p.add_argument('--devices', type=number(int, 1),
                 help="of this host (all accelerators, or one CPU device)")


def main(argv: list[str]) -> int:
  """Evaluates; returns the exit code."""
  args, rest = parser().parse_known_args(argv)
  if args.check_data is not None:
    check(not rest, f'unrecognized arguments: {" ".join(rest)}')
    show_files(args.check_data)
    return 0
  console = Console(stderr=True)
  say = lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
  if args.benchmark is not None:
    check(not rest, f'unrecognized arguments: {" ".join(rest)}')
    for name in ('config', 'reference', 'num_voco_tokens'):
      check(getattr(args, name) is None, f'--{name.replace("_", "-")} has no place beside '
            '--benchmark; see vlm-compress evaluate --help')
    distributed.start(args)
    return benchmark_run.main(args, say)
  check(args.method in OF_CONFIG, f'--method={args.method} needs --benchmark')
  lacking = [f'--{name}' for name in ('config', 'checkpoint') if not getattr(args, name)]
  check(not lacking, 'the following arguments are required: '
        f'{", ".join(lacking)}; see vlm-compress evaluate --help')
  config = load_page(args.config)
  override(config, rest)
  stage = bridge(config)
  model, params = load_config(args.checkpoint), load_params(args.checkpoint)
  check_tower(stage.data, model.vision, str(args.checkpoint))
  if args.reference is not None:
    check_tower(stage.data, load_config(args.reference).vision,
                str(args.reference))
  tokenizer = load_tokenizer(args.checkpoint / TOKENIZER)
  check(tokenizer.vocab_size == model.text.vocab_size,
        f'{args.checkpoint}: the tokenizer has {tokenizer.vocab_size} words, '
        f'the model {model.text.vocab_size}')
  test = open_split(stage.data, stage.data.test_split, args.data_root, say)
  examples = test.take(stage.num_test)
  bench = results.Bench(examples, test.features,
                        questions_of(examples, stage.per_kind),
                        stage.headline, tokenizer, stage.rows.template, say)
  method = own_method(model) if args.method == 'auto' else args.method
  if args.reference is None:
    alone(bench, model, params, method, args)
  else:
    beside_floors(bench, model, params, method, args)
  partial = args.reference is None
  print_table(bench.rows, allow_partial=partial)
  if args.out is not None:
    args.out.mkdir(parents=True, exist_ok=True)
    paths = write_report({'rows': bench.rows, 'attribution': test.attribution},
                         args.out, allow_partial=partial)
    print(f'report: {paths["html"]}')
  return 0


def alone(bench, model, params, method, args) -> None:
  """One row, without floors."""
  count = _num_voco(model, method, args)
  if method == 'voco':
    bench.run(Method('VoCo', model, params, 'voco', count, seed=args.seed),
              budget=float(count))
  elif method == 'atp':
    check(model.atp is not None, f'{args.checkpoint} has no ATP modules')
    bench.run(Method(label(model), model, params, seed=args.seed))
  else:
    plain = dataclasses.replace(model, voco=None, atp=None)
    bench.run(Method(label(plain), plain, params, seed=args.seed))


def beside_floors(bench, model, params, method, args) -> None:
  """The row of the method with the reference, its floors and bounds."""
  base, base_params = load_config(args.reference), load_params(args.reference)
  plain = dataclasses.replace(base, voco=None, atp=None)
  full = bench.run(Method('full', plain, base_params, seed=args.seed))
  bounds = {}
  if method == 'voco':
    bounds = results.voco_rows(bench, base, base_params, model, params,
                               _num_voco(model, method, args), args.seed)
  elif method == 'atp':
    check(model.atp is not None, f'{args.checkpoint} has no ATP modules')
    check(model.atp.selector == 'adaptive', f'{args.checkpoint} selects by '
          f'{model.atp.selector}: it is a floor itself; leave out --reference')
    results.atp_rows(bench, base, base_params, model, params, args.seed)
  else:
    check(model.resampler != 'none', f'{args.checkpoint} is not compressed, as '
          '--reference is; leave one of them out')
    plain = dataclasses.replace(model, voco=None, atp=None)
    bench.run(Method(label(plain), plain, params, seed=args.seed))
  results.relate(bench.rows, full, bounds)


def _num_voco(model, method, args) -> int:
  if method != 'voco':
    return 0
  check(model.voco is not None, f'{args.checkpoint} has no VoCo tokens')
  return voco_count(model, args.num_voco_tokens)
