"""Sweep directories as result_schema.py has them, with invented numbers."""

from __future__ import annotations

import base64
import io
import json
import pathlib

import numpy as np
from PIL import Image

from vlm_compress.eval import example_log
from vlm_compress.eval.result_schema import SCHEMA

LAYERS, SIDE, QUESTIONS = 8, 4, 40
SCRIPT = '<script>alert("x")</script> | `code`'
MOST = {'gqa': 100.0, 'mme': 2000.0}
METRICS = {'gqa': 'GQA accuracy', 'mme': 'MME perception'}
LABELS = {'full': 'full', 'atp': 'ATP', 'voco': 'VoCo', 'random': 'random',
          'uniform': 'uniform grid', 'avg_pool': 'average pooling',
          'downsample': 'image downsampling', 'divprune': 'DivPrune',
          'avg_pool_linear': 'average pooling + linear',
          'lower_bound': 'lower bound (LB)', 'upper_bound': 'upper bound (UB), C=2'}
KINDS = {'gqa': ('structural: verify', 'structural: query', 'semantic: obj <b>'),
         'mme': ('existence', 'count')}
CUTS = (1, 3, 6)


class Sweep:
  """Adds runs to a directory; `write` makes rows.json of them."""

  def __init__(self, home: pathlib.Path):
    self.home, self.rows, self.failed = home, [], []

  def add(self, method, accuracy, *, benchmark='gqa', budget=None, seed=0,
          checkpoint='base', places=(), differences=None, partial=False,
          half=0.02, asked=None, **fields):
    """One run; returns its row.  `budget` tokens are what was reached."""
    where = f'@{",".join(map(str, places))}' if places else ''
    cell = '--'.join([checkpoint, method + where, 'all' if budget is None else
                      f'{budget:g}', benchmark, str(seed)])
    entering = self.entering(method, budget, places, seed)
    most, n = MOST[benchmark], len(entering)
    score = {'accuracy': accuracy, 'n': n, 'ci95': [accuracy - half, accuracy + half]}
    average = float(entering.mean())
    row = {
        'cell': cell, 'checkpoint': checkpoint, 'benchmark': benchmark, 'split': '',
        'rule': 'official', 'metric': METRICS[benchmark], 'value': most * accuracy,
        'value_ci95': [most * x for x in score['ci95']], 'scale': '0-100',
        'scale_max': most, **score, 'n_benchmark': 5 * n if partial else n,
        'n_asked': n, 'partial': partial, 'by_kind': {k: dict(score) for k in KINDS[benchmark]},
        'method': LABELS[method], 'method_key': method,
        'trained': method in ('full', 'atp', 'voco', 'upper_bound'), 'budget': asked or budget,
        'seed': seed, 'input_visual_tokens': float(entering[:, 0].mean()),
        'layer_average_tokens': average, 'prefill_flops': 1e9 * average,
        'prefill_flops_dense': 1e9 * average, 'vision_flops': 1.0, 'projector_flops': 1.0,
        'selector_flops': 0.0, 'kv_bytes': 1e3 * average,
        'latency_seconds': 9.0, 'latency_n': n,
        'first_token_seconds': 0.1 + 0.01 * average,
        'first_token_ratio': (0.1 + 0.01 * average) / 0.26, 'line': cell.rpartition('--')[0],
        'generated_tokens': 1.0,
        'ratio_to_full': accuracy / 0.6, 'retention': None, 'agreement': 0.875,
        'agreement_ci95': [0.8, 0.925], 'differences': differences or {}}
    if method != 'voco':
      row |= {'kept_per_layer': entering.mean(0).tolist(),
              'kept_std_per_layer': entering.std(0).tolist()}
    row.update(fields)
    self.rows.append(row)
    self._run(cell, method, places, entering, benchmark)
    return row

  def entering(self, method, budget, places, seed):
    """float[Q, M], visual tokens that enter each layer."""
    out = np.full((QUESTIONS, LAYERS), float(SIDE * SIDE if budget is None else budget))
    if method == 'atp':
      rng = np.random.default_rng(seed)
      out[:] = SIDE * SIDE
      for number, place in enumerate(places):
        out[:, place:] = np.minimum(out[:, place:], rng.integers(
            4 - number, 10 - 2 * number, (QUESTIONS, 1)))
    return out

  def _run(self, cell, method, places, entering, benchmark):
    run = self.home / 'runs' / cell
    run.mkdir(parents=True)
    pruned = method in ('atp', 'random', 'uniform')
    cuts = list(places or (0,)) if pruned else []
    (run / 'config.json').write_text(json.dumps(
        {'model': {'atp': {'prune_after': cuts} if pruned else None}}))
    rows = []
    for i, tokens in enumerate(entering):
      row = {'question_id': f'q{i}', 'prediction': f'{method} says {SCRIPT}' if i == 0
             else 'yes', 'answer_tokens': 1, 'ended': 'eos',
             'visual_tokens': tokens.tolist(), 'text_tokens': 9, 'prompt_tokens': 5,
             'latency_seconds': 0.1, 'latency_rows': 1, 'compiled': False, 'shard': 0,
             'parsed': 'yes', 'score': float(i % 2), 'unit': f'p{i}', 'image': f'{i}.jpg',
             'groups': {}, 'answers': ['yes', 'yes', 'yeah']}
      if pruned:
        row['kept'] = [tokens[place] for place in cuts]
      rows.append(row)
    (run / 'answers.jsonl').write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
    keep = lambda row: [('1' * int(n)).ljust(SIDE * SIDE, '0') for n in row.get('kept', ())]
    example_log.write(run, [
        {'question_id': row['question_id'], 'text': f'is <i>this</i> number {i}?',
         'picture': picture(i), 'prune_after': cuts, 'keep': keep(row), 'attribution': ''}
        for i, row in list(enumerate(rows))[::QUESTIONS // 2]])

  def floors(self, budget, accuracy, **fields):
    """The floors of a budget, the best of them at `accuracy`."""
    for number, method in enumerate(('uniform', 'avg_pool', 'downsample', 'random')):
      self.add(method, accuracy - 0.02 * number, budget=budget, **fields)

  def write(self):
    """rows.json; returns the directory."""
    self.home.mkdir(exist_ok=True)
    (self.home / 'rows.json').write_text(json.dumps(
        {'schema': SCHEMA, 'rows': self.rows, 'failed': self.failed, 'times_failed': None,
         'partial': bool(self.failed), 'versions': {'jax': '0.10.2'}}))
    return self.home


def picture(seed: int) -> str:
  """A JPEG of coloured squares, in base64."""
  rng, stream = np.random.default_rng(seed), io.BytesIO()
  pixels = np.kron(rng.integers(0, 255, (8, 8, 3), np.uint8), np.ones((12, 12, 1), np.uint8))
  Image.fromarray(pixels).save(stream, 'JPEG')
  return base64.b64encode(stream.getvalue()).decode()


def gap(mean: float, half: float = 0.01) -> dict:
  """A paired difference."""
  return {'mean': mean, 'ci95': [mean - half, mean + half]}


def whole(home: pathlib.Path) -> Sweep:
  """Two benchmarks, three checkpoints, ATP at a budget and VoCo at another."""
  sweep = Sweep(home)
  for benchmark in ('gqa', 'mme'):
    some = {'benchmark': benchmark}
    sweep.add('full', 0.60, **some)
    sweep.add('atp', 0.58, budget=6.0, checkpoint='atp', places=CUTS, differences={
        'uniform grid, at its cuts (training-free)': gap(0.08),
        'average pooling (training-free)': gap(0.1),
        'random (training-free)': gap(0.005)}, **some)
    for seed in (0, 1, 2):
      sweep.add('random', 0.44 + 0.02 * seed, budget=6.5, asked=6.0, places=CUTS, seed=seed, **some)
    sweep.add('uniform', 0.50, budget=6.5, asked=6.0, places=CUTS, **some)
    sweep.floors(6.5, 0.48, asked=6.0, **some)
    sweep.add('voco', 0.45, budget=2.0, checkpoint='voco', retention=0.75, **some)
    sweep.add('lower_bound', 0.30, budget=2.0, **some)
    sweep.add('upper_bound', 0.59, **some)
    sweep.floors(2.0, 0.46, **some)
  return sweep


def small(home: pathlib.Path) -> Sweep:
  """A sweep of one benchmark with one method and its floors."""
  sweep = Sweep(home)
  sweep.add('full', 0.6)
  sweep.add('voco', 0.5, budget=2.0, checkpoint='voco')
  sweep.floors(2.0, 0.4)
  return sweep
