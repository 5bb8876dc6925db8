"""What a method of a sweep must stand beside, and what is said of the best of them."""

from __future__ import annotations

import pytest
import sweep_directories as directories

from vlm_compress.config import ConfigError
from vlm_compress.eval import floors, sweep_tables, tables


def test_floors_of_another_checkpoint_count_only_without_own_ones(tmp_path):
  sweep = directories.small(tmp_path)
  for row in sweep.rows:
    row['placement'] = ()
  assert sweep_tables.benches(sweep.rows, False)
  sweep.add('random', 0.3, budget=9.0, checkpoint='voco')
  with pytest.raises(ConfigError, match='VoCo at 2 .* lacks the floor rows random, uniform'):
    sweep_tables.benches(sweep.rows, False)


def test_a_method_needs_floors_where_it_cuts_and_in_front(tmp_path):
  sweep = directories.small(tmp_path)
  sweep.rows[1]['placement'] = (1, 3)
  sweep.add('random', 0.3, budget=2.0, places=(1, 3))['placement'] = (1, 3)
  with pytest.raises(ConfigError, match='VoCo at 2 .* lacks the floor rows uniform grid cut '
                     'where it cuts at'):
    sweep_tables.benches(sweep.rows, False)
  bench, = sweep_tables.benches(sweep.rows, True)
  part = bench.parts[1]
  found = floors.floors_for(bench.parts, part, part.entries[0])
  assert sorted((f.method, f.placement) for f in found) == [
      ('average pooling', ()), ('image downsampling', ()), ('random', ()),
      ('random', (1, 3)), ('uniform grid', ())]
  sweep.add('uniform', 0.1, budget=2.0, places=(1, 3))['placement'] = (1, 3)
  assert not sweep_tables.benches(sweep.rows, False)[0].problems
  sweep.add('uniform', 0.55, budget=2.0, places=(2,))['placement'] = (2,)
  line, = floors.findings(sweep_tables.benches(sweep.rows, False)[0].parts)
  assert 'not beaten' not in line and line.endswith(
      '; a better floor, though cut elsewhere: uniform grid (cut after 2) 55.0 %.'), line
  del sweep.rows[2]  # the grid in front of all layers
  with pytest.raises(ConfigError, match='lacks the floor rows uniform grid in front of'):
    sweep_tables.benches(sweep.rows, False)


def test_a_floor_of_fewer_tokens_is_none_and_one_of_more_is(tmp_path):
  sweep = directories.small(tmp_path)
  assert [row['method_key'] for row in sweep.rows[2:4]] == ['uniform', 'avg_pool']
  sweep.rows[3]['layer_average_tokens'] = 4.0
  assert not sweep_tables.benches(sweep.rows, False)[0].problems
  sweep.rows[3]['layer_average_tokens'] = 1.0
  with pytest.raises(ConfigError, match='lacks the floor rows average pooling at'):
    sweep_tables.benches(sweep.rows, False)


def test_a_method_that_loses_has_its_difference_beside_it(tmp_path):
  sweep = directories.small(tmp_path)
  sweep.rows[1].update(accuracy=0.3, ci95=[0.28, 0.32], differences={
      'uniform grid (training-free)': directories.gap(-0.1)})
  line, = floors.findings(sweep_tables.benches(sweep.rows, False)[0].parts)
  assert ('uniform grid 40.0 %, difference -10.0 points [-11.0, -9.0], the floor is not '
          'beaten') in line


def test_trained_pooling_is_no_floor_that_suffices_and_none_of_a_peer(tmp_path):
  sweep = directories.small(tmp_path)
  sweep.add('avg_pool_linear', 0.55, budget=2.0, checkpoint='pool')['trained'] = True
  peer = sweep.add('divprune', 0.3, budget=2.0)
  voco, divprune = floors.findings(sweep_tables.benches(sweep.rows, False)[0].parts)
  assert 'best floor: average pooling + linear 55.0 %' in voco
  assert 'linear' not in divprune and 'best floor: uniform grid 40.0 %' in divprune
  sweep.rows.remove(peer)
  del sweep.rows[3]  # training-free pooling
  with pytest.raises(ConfigError, match='VoCo at 2 .* lacks the floor rows average pool'):
    sweep_tables.benches(sweep.rows, False)


def test_sections_are_the_budgets_that_were_asked_for(tmp_path):
  sweep = directories.small(tmp_path)
  sweep.add('voco', 0.5, budget=2.2, asked=3.0, checkpoint='voco')
  bench, = sweep_tables.benches(sweep.rows, True)
  assert [part.budget for part in bench.parts] == [None, 3.0, 2.0]
  assert 'VoCo at 3' in bench.problems[0]  # those at 2 were not asked for it


def test_a_budget_is_of_each_frame(tmp_path):
  sweep = directories.small(tmp_path)
  for row in sweep.rows:
    row['frames'] = 8
    row['layer_average_tokens'] *= 8
  bench, = sweep_tables.benches(sweep.rows, False)
  assert [part.budget for part in bench.parts] == [None, 16.0]
  assert tables.title(bench.parts[1], 128.0) == 'Budget: 16 tokens on average, 12 % of full'


def test_findings_name_what_needs_no_more_flops(tmp_path):
  sweep = directories.small(tmp_path)
  line, = floors.findings(sweep_tables.benches(sweep.rows, False)[0].parts)
  assert 'FLOP' not in line
  sweep.add('random', 0.55, budget=6.0)
  sweep.rows[1]['prefill_flops'] = 5.88e9
  line, = floors.findings(sweep_tables.benches(sweep.rows, False)[0].parts)
  assert 'FLOP' not in line
  sweep.rows[1]['prefill_flops'] = 5.89e9  # 2 % more are as many
  line, = floors.findings(sweep_tables.benches(sweep.rows, False)[0].parts)
  assert line.endswith('; a better floor at about 5.89 GFLOP or less: random 55.0 %.')
  sweep.rows[1]['prefill_flops'] = 17e9
  line, = floors.findings(sweep_tables.benches(sweep.rows, False)[0].parts)
  assert line.endswith('; a better floor at about 17 GFLOP or less: full 60.0 %.')
