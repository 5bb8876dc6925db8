"""Methods by name, and what they keep at a budget."""

from __future__ import annotations

import dataclasses

import core_helpers as helpers
import pytest

from vlm_compress.compress.baselines.budget import layer_average
from vlm_compress.config import AtpConfig, ConfigError
from vlm_compress.eval import methods
from vlm_compress.eval.methods import method_config


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
  assert pooled.config.num_query_tokens == 6 and pooled.budget == 5
  smaller = method_config('downsample', base, 5)
  assert smaller.config.num_query_tokens == 9 and smaller.label == 'image downsampling'
  bound = method_config('upper_bound', base, 1)
  assert bound.label == 'upper bound (UB), C=1' and bound.config.voco.num_voco_tokens == 1
  assert bound.runs_as == 'upper_bound'
  lower = method_config('lower_bound', base, 2)
  assert (lower.trained, lower.runs_as, lower.budget) == (False, 'voco', 2)
  assert method_config('voco', base).budget == 2


@pytest.mark.parametrize('kind, label', [
    ('qformer', 'Q-Former'), ('avg_pool_linear', 'average pooling + linear')])
def test_trained_resamplers_are_methods_of_their_own(kind, label):
  base = dataclasses.replace(helpers.tiny(), resampler=kind, num_query_tokens=4)
  made = method_config(kind, base)
  assert (made.label, made.trained, made.runs_as, made.budget) == (label, True, 'full', 4)
  assert method_config(kind, base, 4).config == made.config
  assert kind not in methods.OF_BASE  # it must stand beside floors
  with pytest.raises(ConfigError, match='can have no other number'):
    method_config(kind, base, 8)
  for name, budget in (('full', None), ('random', 4), ('avg_pool', 4)):
    with pytest.raises(ConfigError, match=f"resampler='{kind}'"):
      method_config(name, base, budget)
  with pytest.raises(ConfigError, match=r"not trained with it \(resampler='none'\)"):
    method_config(kind, helpers.tiny())


def test_atp_needs_a_shift_for_another_budget():
  config = helpers.atp_config()
  as_trained = method_config('atp', config)
  assert as_trained.budget == 8 and not as_trained.needs_shift
  other = method_config('atp', config, 10)
  assert other.needs_shift and other.budget == 10
  shifted = methods.with_shift(other, -0.5)
  assert shifted.config.atp.threshold_shift == -0.5 and not shifted.needs_shift


@pytest.mark.parametrize('name', methods.METHODS)
def test_places_are_of_methods_that_have_some(name):
  base = helpers.voco_config(2)
  if name in ('random', 'uniform', 'fastv', 'pyramiddrop', 'sparsevlm'):
    assert method_config(name, base, 10, (1,)).config.atp.prune_after == (1,)
    return
  with pytest.raises(ConfigError, match=rf'where tokens are cut .* not for {name}'):
    method_config(name, base, None, (1,))


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
