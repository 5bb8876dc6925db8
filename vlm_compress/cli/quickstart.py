"""vlm-compress quickstart: train, compress and evaluate a small VLM.

Alignment, instruction tuning, VoCo with 8 tokens and with 1, ATP at a quarter
of the tokens, then every method beside its floors on held-out pictures.  The
first two stages start from the checkpoint that the package ships unless
--from-scratch asks for them.  Run it again after an interruption and it goes
on where it was.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console

import vlm_compress
from vlm_compress.cli import results
from vlm_compress.cli.arguments import MAX_SEED, Parser, number
from vlm_compress.cli.quickstart_config import get_config
from vlm_compress.cli.stage import Stage, bridge, run_stage
from vlm_compress.cli.workspace import Split, open_split, tokenizer_for
from vlm_compress.convert.files import TOKENIZER, load_config, load_params, save_model
from vlm_compress.convert.processor import Processor
from vlm_compress.data.tokenizer import load as load_tokenizer
from vlm_compress.eval.evaluator import Method, questions_of
from vlm_compress.eval.report import print_table, write_figures, write_report
from vlm_compress.train.checkpoint import claim_workdir

SHIPPED = pathlib.Path(vlm_compress.__file__).parent / 'checkpoints' / 'quickstart'
PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def parser() -> argparse.ArgumentParser:
  """The command line."""
  p = Parser(prog='vlm-compress quickstart',
             description=__doc__.splitlines()[0])
  p.add_argument('--workdir', type=pathlib.Path, default='quickstart',
                 help='data, checkpoints and report go here (%(default)s)')
  p.add_argument('--seed', type=number(int, 0, MAX_SEED), default=0,
                 help='of training and random selection (%(default)s)')
  p.add_argument('--from-scratch', action='store_true',
                 help='train the base model too (a few times as long)')
  p.add_argument('--export-base', type=pathlib.Path, metavar='DIR',
                 help='write the base model there in bfloat16; with '
                 '--from-scratch, how the shipped one was made')
  p.add_argument('--no-tensorboard', action='store_true',
                 help='write metrics to jsonl and console only')
  return p


def stage_of(name: str, seed: int, init_from: pathlib.Path | str) -> Stage:
  """A stage with its seed and starting point."""
  config = get_config(name)
  config.train.seed = seed
  config.init_from = str(init_from)
  return bridge(config)


def versions() -> dict[str, str]:
  """Versions of what the numbers depend on."""
  found = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {'vlm_compress': vlm_compress.__version__,
          'python': platform.python_version(), **found}


def main(argv: list[str]) -> int:
  """Runs everything; returns the exit code."""
  args = parser().parse_args(argv)
  console = Console(stderr=True)
  say = lambda line: console.print(line, markup=False, highlight=False)
  work = args.workdir
  claim_workdir(work, {'command': 'quickstart', 'seed': args.seed,
                       'from_scratch': args.from_scratch})
  started = time.perf_counter()
  spec = stage_of('instruct', args.seed, '').data
  train = open_split(spec, spec.train_split, work, say)
  test = open_split(spec, spec.test_split, work, say)
  seconds = {'data and features': time.perf_counter() - started}
  models: dict[str, tuple[Any, Any]] = {}

  def run(name: str, init_from: pathlib.Path | str) -> pathlib.Path:
    say(f'[{name}]')
    stage = stage_of(name, args.seed, init_from)
    config, seconds[name] = run_stage(
        stage, work / name, train, message=say,
        tensorboard=not args.no_tensorboard)
    model = work / name / 'model'
    models[name] = (config, load_params(model))
    return model

  base = SHIPPED
  if args.from_scratch:
    base = run('instruct', run('align', ''))
  models['base'] = (load_config(base), load_params(base))
  if args.export_base is not None:
    save_model(args.export_base, models['base'][1], models['base'][0],
               load_tokenizer(base / TOKENIZER), 'bfloat16',
               Processor(stage_of('instruct', args.seed, '').rows.template))
  run('voco1', run('voco8', base))
  run('atp', base)
  report = evaluate(models, train, test, work, args.seed, seconds, say)
  paths = write_report(report, work)
  write_figures(report, work)
  print_table(report['rows'])
  print(f'report: {paths["html"]}')
  return 0


def evaluate(models: dict[str, tuple[Any, Any]], train: Split, test: Split,
             work: pathlib.Path, seed: int, seconds: dict[str, float],
             say) -> dict[str, Any]:
  """All rows and examples of the report."""
  started = time.perf_counter()
  stage = stage_of('instruct', seed, '')
  examples = test.take(stage.num_test)
  bench = results.Bench(
      examples, test.features, questions_of(examples, stage.per_kind),
      stage.headline, tokenizer_for(stage.data, train.examples), stage.rows.template,
      say)
  config, params = models['base']
  plain = dataclasses.replace(config, voco=None)
  bench.question_only(train.take(len(train)), seed)
  full = bench.run(Method('full', plain, params, seed=seed))
  bounds = {}
  for count in (8, 1):
    bounds |= results.voco_rows(bench, config, params,
                                *models[f'voco{count}'], count, seed)
  results.atp_rows(bench, config, params, *models['atp'], seed)
  results.relate(bench.rows, full, bounds)
  seconds['evaluation'] = time.perf_counter() - started
  return {
      'rows': bench.rows, 'versions': versions(),
      'config': _configs(seed, [name for name in seconds if _steps(name)]),
      'stages': [{'name': name, 'seconds': value,
                  'steps': _steps(name)} for name, value in seconds.items()],
      'attribution': test.attribution,
      'examples': shown(bench, models['atp'][0].vision.grid_size)}


def _steps(name: str) -> int | None:
  try:
    return get_config(name).train.steps
  except KeyError:
    return None


def _configs(seed: int, names: list[str]) -> dict[str, Any]:
  """The configs of the stages that ran, without what they start from."""
  out: dict[str, Any] = {
      'seed': seed, 'devices': len(jax.devices()),
      'prune_after': get_config('atp').model.atp.prune_after}
  for name in names:
    config = get_config(name)
    config.train.seed = seed
    out[name] = json.loads(config.to_json_best_effort())
  return out


def shown(bench: results.Bench, grid_size: int, count: int = 6
          ) -> list[dict[str, Any]]:
  """Pictures with keep maps and answers, one question of each."""
  atp = bench.answers['ATP']
  out, seen = [], set()
  for i, question in enumerate(bench.questions):
    if question.turn.kind != 'what' or question.example in seen:
      continue
    seen.add(question.example)
    image = bench.examples[question.example].images[0]
    out.append({
        'image_png_base64': base64.b64encode(image).decode(),
        'question': question.turn.question, 'answer': question.turn.answer,
        'predictions': {name: bench.answers[name].texts[i]
                        for name in ('full', 'VoCo@8', 'VoCo@1', 'ATP')},
        'keep_maps': {'ATP': atp.module_keep[i].reshape(
            -1, grid_size, grid_size).astype(int).tolist()},
        'thresholds': {'ATP': np.round(atp.thresholds[i], 3).tolist()}})
    if len(out) == count:
      break
  return out
