"""vlm-compress study: all methods and trained floors, several seeds.

  vlm-compress study --config=configs/study.py --workdir=study

Every (stage, seed) is a directory with its checkpoints, its model and its
result rows; finished ones are skipped, so the study can be stopped at any
time and, once the data is prepared, seeds can run in processes of their own.
The report is written from whatever rows are there at the end of a call.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from typing import Any

from rich.console import Console

from vlm_compress.atomic import write_text
from vlm_compress.cli import results
from vlm_compress.cli.arguments import MAX_SEED, Parser, number
from vlm_compress.cli.claims import claim
from vlm_compress.cli.quickstart import SHIPPED, versions
from vlm_compress.cli.stage import Stage, bridge, describe, run_stage
from vlm_compress.cli.train import load_module
from vlm_compress.cli.workspace import Split, open_split, tokenizer_for
from vlm_compress.config import check
from vlm_compress.convert.files import WEIGHTS, load_config, load_params
from vlm_compress.eval import scoring
from vlm_compress.eval.evaluator import Method, Question, questions_of
from vlm_compress.eval.methods import label
from vlm_compress.eval.report import print_table, write_report
from vlm_compress.eval.tables import role_of, same_budget


def parser() -> argparse.ArgumentParser:
  """The command line."""
  p = Parser(prog='vlm-compress study',
             description=__doc__.splitlines()[0])
  p.add_argument('--config', default='configs/study.py',
                 help='page with PLAN and get_config (%(default)s)')
  p.add_argument('--workdir', type=pathlib.Path, default='study',
                 help='(%(default)s)')
  p.add_argument('--base', type=pathlib.Path, default=SHIPPED,
                 help='model that all runs start from; default: the one that '
                 'ships with the package')
  p.add_argument('--seeds', type=number(int, 0, MAX_SEED), nargs='+', default=[0, 1, 2],
                 help='(%(default)s)')
  p.add_argument('--stages', nargs='+', help='only these of PLAN')
  p.add_argument('--allow-partial', action='store_true',
                 help='report although floors are missing')
  return p


def main(argv: list[str]) -> int:
  """Runs what is missing and writes the report; returns the exit code."""
  args = parser().parse_args(argv)
  page = load_module(args.config)
  console = Console(stderr=True)
  say = lambda line: console.print(line, markup=False, highlight=False)
  check(hasattr(page, 'PLAN'), f'--config={args.config} has no PLAN: it is no '
        'page of a study; try configs/study.py')
  unknown = sorted(set(args.stages or ()) - set(page.PLAN))
  check(not unknown, f'--stages {" ".join(unknown)}: unknown; {args.config} has '
        f'{", ".join(page.PLAN)}')
  stage = bridge(page.get_config(page.PLAN[0]))
  train = open_split(stage.data, stage.data.train_split, args.workdir, say)
  test = open_split(stage.data, stage.data.test_split, args.workdir, say)
  base = (load_config(args.base), load_params(args.base))
  for seed in args.seeds:
    for name in [n for n in page.PLAN if n in (args.stages or page.PLAN)]:
      here = args.workdir / f'seed{seed}' / name
      known = settings(page, name, seed, args)
      for line in claim(here, known, train.fingerprint):
        say(line)
      if not (here / 'rows.json').exists():
        say(f'[seed {seed}: {name}]')
        rows = one(stage_of(page, name, seed, args), name, here, train, test,
                   base, known, say)
        write_text(here / 'rows.json', json.dumps(rows))
  rows, stages, configs = collect(page, args, train.fingerprint)
  finish(rows, [q.example for q in asked(stage, test)
                if q.turn.kind in stage.headline])
  paths = write_report(
      {'rows': rows, 'versions': versions(), 'attribution': test.attribution,
       'stages': stages, 'config': configs},
      args.workdir, allow_partial=args.allow_partial)
  print_table(rows, allow_partial=args.allow_partial)
  print(f'report: {paths["html"]}')
  return 0


def stage_of(page, name: str, seed: int, args) -> Stage:
  """A stage with its seed, its starting point and, for floors, its counts.

  Raises:
    ConfigError: the run that the counts come from has not finished.
  """
  config = page.get_config(name)
  config.train.seed = seed
  start = getattr(page, 'START_FROM', {}).get(name)
  config.init_from = str(args.base if start is None else
                         args.workdir / f'seed{seed}' / start / 'model')
  source = getattr(page, 'COUNTS_FROM', {}).get(name)
  if source is not None:
    path = args.workdir / f'seed{seed}' / source / 'rows.json'
    check(path.exists(), f'{name} keeps as many tokens as {source}, which has '
          f'not finished: {path} is missing; add {source} to --stages')
    counts = json.loads(path.read_text())[0]['module_counts']
    config.model.atp.fixed_counts = tuple(counts)
  return bridge(config)


def settings(page, name: str, seed: int, args) -> dict[str, Any]:
  """What a run is known by.

  One that starts from another run names that run's settings and not its
  weights: rows are kept where weights are not, and weights that are trained
  again differ in the last digits.
  """
  stage = stage_of(page, name, seed, args)
  start = getattr(page, 'START_FROM', {}).get(name)
  if start is None:
    return describe(stage)
  return {**describe(dataclasses.replace(stage, init_from='')),
          'init_from': {'run': start, **settings(page, start, seed, args)}}


def collect(page, args, content: str) -> tuple[list, list, dict[str, Any]]:
  """Rows, seconds and configs of all finished runs, of whatever seed.

  Raises:
    ConfigError: a run was made with other settings than the page's, or on data
      of another content.
  """
  rows, stages, configs = [], [], {}
  for folder in sorted(args.workdir.glob('seed*')):
    digits = folder.name.removeprefix('seed')
    if not digits.isdecimal():
      continue  # somebody's copy
    seed = int(digits)
    for name in [n for n in page.PLAN if (folder / n / 'rows.json').exists()]:
      stage, here = stage_of(page, name, seed, args), folder / name
      known = settings(page, name, seed, args)
      claim(here, known, content)
      rows += json.loads((here / 'rows.json').read_text())
      stages.append({'name': f'{name}, seed {seed}',
                     'seconds': float((here / 'seconds.txt').read_text()),
                     'steps': stage.recipe.steps})
      configs[f'{name}, seed {seed}'] = known
  return rows, stages, configs


def asked(stage: Stage, test: Split) -> list[Question]:
  """The questions of the study."""
  return questions_of(test.take(stage.num_test), stage.per_kind)


def one(stage: Stage, name: str, here: pathlib.Path, train, test, base, known,
        say) -> list[dict[str, Any]]:
  """Trains one stage of one seed and returns its rows."""
  weights = pathlib.Path(stage.init_from) / WEIGHTS
  check(weights.exists(), f'{name} starts from {weights}, which is missing: add '
        f'{weights.parent.parent.name} to --stages; if only its rows are left, '
        'delete its folder to train it again')
  seed = stage.recipe.seed
  model, _ = run_stage(stage, here, train, message=say, settings=known)
  params = load_params(here / 'model')
  bench = results.Bench(
      test.take(stage.num_test), test.features, asked(stage, test),
      stage.headline, tokenizer_for(stage.data, train.examples), stage.rows.template,
      say)
  if name == 'ub':
    counts = sorted(set(stage.rows.num_voco_tokens) - {0})
    references(bench, train, model, params, seed, counts)
  elif stage.recipe.stage == 'voco':
    count = model.voco.num_voco_tokens
    distilled = model.voco.distill_weight > 0
    bench.run(Method('VoCo, CE + KL' if distilled else 'VoCo', model,
                     params, 'voco', count, seed=seed), budget=float(count))
    if not distilled:  # else the floors stand beside VoCo already
      results.input_floors(bench, *base, count, seed)
  else:
    called = label(model)
    if stage.recipe.trainable:
      called += ', frozen decoder'
    bench.run(Method(called, model, params, seed=seed), key='ATP')
    average = bench.rows[0]['layer_average_tokens']
    # A frozen decoder's floors are those of ATP, unless it missed the budget.
    if called == 'ATP' or model.atp and model.atp.selector == 'adaptive' and (
        not same_budget(average, model.atp.target_tokens)):
      counts = results.module_counts(bench.answers['ATP'])
      bench.rows[0]['module_counts'] = counts
      results.pruned_floors(bench, *base, model, counts, average, seed)
  return bench.rows


def references(bench, train, model, params, seed, counts) -> None:
  """Question only, full, and VoCo's bounds at every C of the study."""
  bench.question_only(train.take(len(train)), seed)
  plain = dataclasses.replace(model, voco=None)
  bench.run(Method('full', plain, params, seed=seed))
  for count in counts:
    upper = bench.run(Method(f'upper bound (UB), C={count}', model, params,
                             'causal', count, seed=seed))
    lower = bench.run(Method('lower bound (LB)', model, params, 'voco', count,
                             trained=False, seed=seed), budget=float(count),
                      key=f'LB@{count}')
    gap = scoring.paired_difference(
        bench.correct(upper['method']), bench.correct(f'LB@{count}'),
        bench.images())
    lower['bounds'] = [lower['accuracy'], upper['accuracy'], list(gap.ci95)]


def finish(rows: list[dict[str, Any]], images: list[int]) -> None:
  """Ratios, retention and paired differences, each within its own seed.

  A method is compared with all methods and floors of its budget.

  Args:
    rows: of all runs, changed in place.
    images: example of each question that counts for accuracy.
  """
  for seed in {row['seed'] for row in rows}:
    mine = [row for row in rows if row['seed'] == seed]
    full = next((r for r in mine if r['method'] == 'full'), None)
    if full is not None:
      bounds = {r['layer_average_tokens']: tuple(r['bounds'])
                for r in mine if 'bounds' in r}
      results.relate(mine, full, bounds)
    for row in mine:
      if role_of(row['method']) != 'method':
        continue
      row['differences'] = {}
      # of floors made for two budgets that are close, the nearer ones
      near = sorted(mine, key=lambda other: -abs(
          other['layer_average_tokens'] - row['layer_average_tokens']))
      for other in near:
        if other is not row and role_of(other['method']) in (
            'method', 'floor') and same_budget(
                row['layer_average_tokens'], other['layer_average_tokens']):
          name = other['method']
          name += '' if other['trained'] else ' (training-free)'
          row['differences'][name] = results.difference(row, other, images)
