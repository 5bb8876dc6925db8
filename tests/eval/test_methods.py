"""Methods by name, and what they keep at a budget."""

from __future__ import annotations

import dataclasses

import core_helpers as helpers
import numpy as np
import pytest

from vlm_compress.compress.baselines.budget import layer_average
from vlm_compress.config import AtpConfig, ConfigError, LlavaConfig
from vlm_compress.eval import methods
from vlm_compress.eval.methods import cut_counts, method_config

BIG = LlavaConfig()  # 576 tokens, 32 layers


def average(counts, places, tokens=576, layers=32) -> float:
  entering = [tokens] * layers
  for place, count in zip(places, counts):
    entering[place:] = [count] * (layers - place)
  return float(np.mean(entering))


@pytest.mark.parametrize('budget', [88, 144, 192, 288])
def test_counts_at_the_papers_placement(budget):
  places = (4, 14, 24)
  counts = cut_counts(BIG, budget, places)
  assert average(counts, places) == pytest.approx(budget, abs=0.5)
  assert 576 > counts[0] > counts[1] > counts[2] >= 1
  # every cut leaves about the same share
  assert counts[0] / 576 == pytest.approx(counts[1] / counts[0], rel=0.05)


def test_counts_by_hand():
  assert cut_counts(BIG, 64, (0,)) == (64,)
  # 2 of 4 layers whole: (2 * 16 + 2 c) / 4 = 10 -> c = 4
  assert cut_counts(helpers.tiny(), 10, (2,)) == (4,)
  with pytest.raises(ConfigError, match='the least is 8.5'):
    cut_counts(helpers.tiny(), 8, (2,))
  assert cut_counts(helpers.tiny(), 8.1, (2,)) == (1,)  # as far off as peers may be
  assert cut_counts(helpers.tiny(), 8.5, (2,)) == (1,)


def test_methods_of_a_base_model():
  base = dataclasses.replace(helpers.voco_config(2))
  full = method_config('full', base)
  assert full.config.voco is None and (full.label, full.budget) == ('full', None)
  for name, label in (('random', 'random'), ('uniform', 'uniform grid')):
    made = method_config(name, base, 4)
    assert (made.config.atp.prune_after, made.config.atp.fixed_counts) == ((0,), (4,))
    assert (made.label, made.trained, made.runs_as) == (label, False, 'atp')
    assert layer_average(made.config) == 4
  pooled = method_config('avg_pool', base, 5)  # 5 tokens would be strips
  assert pooled.config.num_query_tokens == 6 and pooled.budget == 6
  bound = method_config('upper_bound', base, 1)
  assert bound.label == 'upper bound (UB), C=1' and bound.config.voco.num_voco_tokens == 1
  assert method_config('lower_bound', base, 2).trained is False
  assert method_config('voco', base).budget == 2


def test_atp_needs_a_shift_for_another_budget():
  config = helpers.atp_config()
  as_trained = method_config('atp', config)
  assert as_trained.budget == 8 and not as_trained.needs_shift
  other = method_config('atp', config, 10)
  assert other.needs_shift and other.budget == 10
  shifted = methods.with_shift(other, -0.5)
  assert shifted.config.atp.threshold_shift == -0.5 and not shifted.needs_shift


@pytest.mark.parametrize('name, budget, message', [
    ('fastv2', 4, 'is unknown; use one of full'), ('random', None, 'needs a budget'),
    ('random', 17, 'at most 16'), ('full', 4, 'has no budget'),
    ('voco', 3, 'made for 1 to 2'), ('voco', 1.5, 'made for 1 to 2'),
    ('atp', None, 'no ATP modules'), ('avg_pool', None, 'needs a budget')])
def test_what_does_not_fit_is_refused(name, budget, message):
  with pytest.raises(ConfigError, match=message):
    method_config(name, helpers.voco_config(2), budget)


def test_a_target_below_the_floor_is_refused():
  with pytest.raises(ConfigError, match='cannot be reached'):
    method_config('atp', helpers.atp_config(), 4.0)
  config = dataclasses.replace(helpers.tiny(), atp=AtpConfig(
      selector='random', prune_after=(1,), fixed_counts=(2,), target_tokens=2.0))
  with pytest.raises(ConfigError, match="selector='random'"):
    method_config('atp', config)
