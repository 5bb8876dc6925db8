"""What a sweep plans, and how its rows stand to each other."""

from __future__ import annotations

import json
import pathlib

import core_helpers as helpers
import pytest

from vlm_compress.config import ConfigError
from vlm_compress.eval import scoring, sweep_rows, sweep_table
from vlm_compress.eval.benchmarks import gqa
from vlm_compress.eval.benchmarks.question import Question, QuestionSet
from vlm_compress.eval.result_schema import RESULT, TABLE
from vlm_compress.eval.runs import Run
from vlm_compress.eval.sweep_plan import Cell, plan

BASE, ATP = helpers.voco_config(2), helpers.atp_config()
CONFIGS = {('base', s): BASE for s in (0, 1)} | {('atp', s): ATP for s in (0, 1)}


def names(*args, **options) -> list[str]:
  return [cell.name for cell in plan(*args, **options)]


def test_floors_and_bounds_are_planned_once():
  got = names(CONFIGS, [('base', 'voco', (2, 1)), ('atp', 'atp', ())], ['gqa', 'pope'],
              [0], 'base')
  floors = ('avg_pool', 'downsample', 'random', 'uniform')
  want = [f'{floor}--{n}' for floor in floors for n in (1, 2, 8)] + [
      'random@1,2,3--8', 'uniform@1,2,3--8', 'full--all'] + [
          f'{kind}--{n}' for kind in ('voco', 'lower_bound', 'upper_bound') for n in (1, 2)]
  assert sorted(n for n in got if '--gqa--' in n) == sorted([
      'atp--atp--all--gqa--0', *[f'base--{n}--gqa--0' for n in want]])
  assert len(got) == len(set(got)) == 2 * (1 + len(want))


def test_seeds_of_what_they_change():
  got = names(CONFIGS, [('atp', 'atp', (10,))], ['gqa'], [0, 1], 'base')
  draws = ['base--random--10--gqa--1', 'base--random@1,2,3--10--gqa--1']
  assert [n for n in got if n.endswith('--1')] == draws
  got = names(CONFIGS, [('atp', 'atp', (10,))], ['gqa'], [0, 1], 'base', ['atp'])
  assert [n for n in got if n.endswith('--1')] == [
      'atp--atp--10--gqa--1', *draws]


def test_a_seeded_base_has_a_full_model_of_each_seed():
  got = names(CONFIGS, [('base', 'voco', ())], ['gqa'], [0, 1], 'base', ['base'])
  assert [n for n in got if 'full' in n] == [f'base--full--all--gqa--{s}' for s in (0, 1)]


@pytest.mark.parametrize('peer, budget, places', [
    ('divprune', 4, ''), ('cdpruner', 4, ''), ('visionzip', 4, ''), ('fastv', 11, '@2'),
    ('pyramiddrop', 9, '@1,2,3'), ('sparsevlm', 9, '@1,2,3')])
def test_peers_stand_beside_floors_in_front_and_where_they_cut(peer, budget, places):
  got = names(CONFIGS, [('base', peer, (budget,))], ['gqa'], [0], 'base')
  want = [peer, 'avg_pool', 'downsample', 'random', 'uniform'] + (
      [f'random{places}', f'uniform{places}'] if places else [])
  assert sorted(got) == sorted(['base--full--all--gqa--0', *[
      f'base--{name}--{budget}--gqa--0' for name in want]])


@pytest.mark.parametrize('wanted, message', [
    ([('x', 'voco', ())], "no checkpoint 'x'; it has atp, base"),
    ([('base', 'atp', ())], 'no ATP modules'), ([('base', 'vco', ())], 'is unknown'),
    ([('atp', 'atp', (4,))], 'cannot be reached'), ([], 'needs benchmarks')])
def test_mistakes_are_found_before_anything_runs(wanted, message):
  with pytest.raises(ConfigError, match=message):
    plan(CONFIGS, wanted, ['gqa'], [0], 'base')


QUESTIONS = QuestionSet('gqa', pathlib.Path(), pathlib.Path(), tuple(
    Question(str(i), 'q', 'q', f'{i}.jpg', answers=('yes',), groups={'structural': 'v'})
    for i in range(20)))


def run(method: str, right: int, tokens: float, budget=None) -> Run:
  """A run with the first questions right."""
  scores = gqa.score(QUESTIONS, {str(i): 'yes' if i < right else method
                                 for i in range(20)})
  result = dict.fromkeys(RESULT) | {
      'method': method, 'accuracy': right / 20, 'layer_average_tokens': tokens,
      'budget': budget, 'value_ci95': [0.0, 100.0], 'benchmark': 'gqa', 'split': '',
      'trained': method not in ('random', 'uniform grid'), 'seed': 0, 'n': 20, 'n_asked': 20,
      'n_benchmark': 20, 'partial': False}
  return Run(pathlib.Path(method), {'model': {'atp': None}}, result, scores)


def test_rows_stand_beside_full_bounds_and_floors():
  cell = lambda method, budget=None, checkpoint='base': Cell(
      checkpoint, 'gqa', method, budget, 0)
  runs = {cell('full', checkpoint='a qformer'): run('Q-Former', 3, 1),
          cell('full'): run('full', 16, 16), cell('upper_bound', 2.0): run('UB', 18, 16),
          cell('lower_bound', 2.0): run('LB', 2, 2, 2.0),
          cell('random', 2.0): run('random', 6, 2, 2.0),
          cell('uniform', 2.0): run('uniform grid', 4, 1, 2.0),  # fewer tokens
          cell('voco', 2.0, 'v'): run('VoCo', 10, 2, 2.0)}
  rows = {row['method']: row for row in sweep_rows.rows(runs, 'base')}
  voco = rows['VoCo']
  assert voco['ratio_to_full'] == pytest.approx(10 / 16)
  assert voco['retention'] == pytest.approx((10 - 2) / (18 - 2))
  assert voco['agreement'] == pytest.approx(10 / 20)  # wrong ones differ
  assert voco['correct'] == '1' * 10 + '0' * 10
  assert rows['random']['retention'] == pytest.approx(4 / 16)
  assert rows['UB']['retention'] is None and rows['full']['retention'] is None
  want = scoring.paired_difference([i < 10 for i in range(20)], [i < 6 for i in range(20)],
                                   [f'{i}.jpg' for i in range(20)])
  gap = voco['differences']
  assert list(gap) == ['random (training-free)']
  assert gap['random (training-free)']['mean'] == pytest.approx(want.mean)
  assert gap['random (training-free)']['ci95'] == pytest.approx(want.ci95)
  assert not rows['random']['differences']
  # A floor may have more tokens, which is in its favour, or be trained.
  runs[cell('avg_pool_linear', 2.0, 'p')] = run('average pooling + linear', 4, 4, 2.0)
  more = {row['method']: row for row in sweep_rows.rows(runs, 'base')}
  assert sorted(more['VoCo']['differences']) == [
      'average pooling + linear', 'random (training-free)']
  assert not more['average pooling + linear']['differences']  # all have fewer tokens
  runs[Cell('p', 'gqa', 'avg_pool_linear', 2.0, 1)] = run('average pooling + linear', 9, 4, 2.0)
  assert not any(row['differences'] for row in sweep_rows.rows(runs, 'base')
                 if row['method'] == 'average pooling + linear')  # nor its own other seed
  del runs[Cell('p', 'gqa', 'avg_pool_linear', 2.0, 1)]
  # Of several draws the mean; what cuts elsewhere is not compared.
  runs[Cell('base', 'gqa', 'random', 2.0, 1)] = run('random', 2, 2, 2.0)
  runs[Cell('base', 'gqa', 'random', 2.0, 2, (3,))] = run('random', 0, 2, 2.0)
  both = sweep_rows.rows(runs, 'base')
  gap = next(row for row in both if row['method'] == 'VoCo')['differences']
  other = scoring.paired_difference([i < 10 for i in range(20)], [i < 2 for i in range(20)],
                                    [f'{i}.jpg' for i in range(20)])
  assert gap['random (training-free)']['mean'] == pytest.approx((want.mean + other.mean) / 2)
  assert gap['random (training-free)']['ci95'] == pytest.approx(
      [min(want.ci95[0], other.ci95[0]), max(want.ci95[1], other.ci95[1])])
  runs[cell('voco', 2.0, 'v')].config['model']['atp'] = {'prune_after': (3,)}
  cut = next(row for row in sweep_rows.rows(runs, 'base') if row['method'] == 'VoCo')
  assert cut['differences']['random, at its cuts (training-free)']['mean'] == 10 / 20
  assert cut['differences']['random (training-free)'] == gap['random (training-free)']
  del runs[cell('upper_bound', 2.0)], runs[cell('full')]
  alone = {row['method']: row for row in sweep_rows.rows(runs, 'base')}['VoCo']
  assert alone['retention'] is None and alone['ratio_to_full'] is None


def test_a_run_is_compared_with_the_full_model_of_its_seed():
  cell = lambda method, seed: Cell('base', 'gqa', method, None, seed)
  runs = {cell('full', 0): run('full', 20, 16), cell('full', 1): run('full', 10, 16),
          cell('full', 2): run('full', 5, 16), cell('atp', 1): run('ATP', 5, 8, 8.0),
          cell('atp', 3): run('ATP', 5, 8, 8.0)}
  rows = sweep_rows.rows(runs, 'base')
  assert [row['ratio_to_full'] for row in rows[3:]] == [0.5, 0.25]  # or the first one


def test_retention_needs_bounds_that_differ_and_no_cuts():
  cell = lambda method, budget=2.0, places=(): Cell('base', 'gqa', method, budget, 0, places)
  runs = {cell('upper_bound'): run('UB', 18, 16), cell('lower_bound'): run('LB', 2, 2, 2.0),
          cell('voco'): run('VoCo', 10, 2, 2.0),
          cell('random', places=(3,)): run('random', 6, 2, 2.0)}
  of = lambda method: next(row['retention'] for row in sweep_rows.rows(runs, 'base')
                           if row['method'] == method)
  assert of('VoCo') == 0.5 and of('random') is None
  runs[cell('lower_bound')] = run('LB', 17, 2, 2.0)  # one question apart: noise
  assert of('VoCo') is None


def test_the_table_as_csv_and_parquet(tmp_path):
  pyarrow = pytest.importorskip('pyarrow.parquet')
  rows = sweep_rows.rows({Cell('base', 'gqa', 'full', None, 0): run('full', 16, 16)},
                         'base')
  csv, parquet = sweep_table.write(tmp_path, rows)
  lines = csv.read_text().splitlines()
  assert lines[0].split(',') == list(TABLE) and len(lines) == 2
  table = pyarrow.read_table(parquet)
  assert table.column_names == list(TABLE)
  one = table.to_pylist()[0]
  assert (one['method'], one['accuracy'], one['budget'], one['n']) == ('full', 0.8, None, 20)
  assert json.loads(json.dumps(rows))[0]['cell'] == 'base--full--all--gqa--0'
