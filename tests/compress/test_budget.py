"""Counts of every method for a token budget."""

from __future__ import annotations

import dataclasses

import core_helpers as helpers
import numpy as np
import pytest

from vlm_compress import presets
from vlm_compress.compress.baselines import budget
from vlm_compress.config import ConfigError, TextConfig, VocoConfig

SEVEN_B = presets.preset('llava_1_5_7b')


def _counts(method, tokens, **options):
  found = budget.at_budget(SEVEN_B, method, tokens, **options)
  assert found.voco is None and found.text == SEVEN_B.text
  if found.atp is None:
    return found.resampler, found.num_query_tokens
  assert found.atp.selector == method and found.resampler == 'none'
  return found.atp.prune_after, found.atp.fixed_counts


def test_counts_by_hand():
  for method in ('random', 'uniform', 'divprune', 'cdpruner'):
    assert _counts(method, 144) == ((0,), (144,))
  for method in ('avg_pool', 'downsample', 'visionzip'):
    assert _counts(method, 144) == (method, 144)
  # (2 * 576 + 30 n) / 32 = 144 for n = 115.2.
  assert _counts('fastv', 144) == ((2,), (115,))
  # (1 + 1/2 + 1/4 + 1/8) / 4 of 576 = 270.
  assert _counts('pyramiddrop', 270) == ((8, 16, 24), (288, 144, 72))
  ends, counts = _counts('sparsevlm', 192)
  assert ends == (3, 7, 16)
  assert 3 * 576 + 4 * counts[0] + 9 * counts[1] + 16 * counts[2] == (
      pytest.approx(32 * 192, abs=16))
  assert counts[1] / counts[0] == pytest.approx(counts[0] / 576, abs=0.01)
  # The next size that is not below the budget by more than 5 %.
  assert _counts('downsample', 88) == ('downsample', 100)
  assert _counts('downsample', 85) == ('downsample', 81)
  assert _counts('avg_pool', 17) == ('avg_pool', 18)
  assert _counts('avg_pool', 16.8) == ('avg_pool', 16)


def test_placements_of_other_depths():
  shallow = helpers.tiny()  # M = 4, P = 16
  assert budget.at_budget(shallow, 'sparsevlm', 8).atp.prune_after == (1, 2, 3)
  assert budget.at_budget(shallow, 'pyramiddrop', 8).atp.prune_after == (1, 2, 3)
  deep = dataclasses.replace(SEVEN_B, text=TextConfig(num_hidden_layers=40))
  assert budget.at_budget(deep, 'sparsevlm', 192).atp.prune_after == (4, 9, 20)


@pytest.mark.parametrize('method', budget.TRAINING_FREE)
def test_the_average_is_what_was_asked_for(method):
  config = budget.at_budget(SEVEN_B, method, 196)
  assert budget.layer_average(config) == pytest.approx(196, abs=0.6)
  # ... counted layer by layer.
  if config.atp is not None:
    counts = [576, *config.atp.fixed_counts]
    entering = [counts[sum(end <= layer for end in config.atp.prune_after)]
                for layer in range(32)]
    assert budget.layer_average(config) == pytest.approx(np.mean(entering))


@pytest.mark.parametrize('method,tokens,words', [
    ('fastv', 30, 'two behind every cut the average is 37.875'),
    ('pyramiddrop', 144, 'two behind every cut the average is 145.5'),
    ('sparsevlm', 50, r'after layers \(3, 7, 16\) of 32, where one token'),
    ('visionzip', 1, 'nearest is 2'), ('random', 0.4, 'nearest is 1'),
    ('random', 577, 'between 0 and the 576'), ('cut', 9, "method='cut'"),
])
def test_budgets_out_of_reach(method, tokens, words):
  with pytest.raises(ConfigError, match=words):
    budget.at_budget(SEVEN_B, method, tokens)


@pytest.mark.parametrize('tokens', [88, 144, 192, 288])
@pytest.mark.parametrize('method', ['random', 'uniform'])
def test_floors_cut_where_they_are_told_to(method, tokens):
  places, counts = _counts(method, tokens, prune_after=(4, 14, 24))
  assert places == (4, 14, 24) and 576 > counts[0] > counts[1] > counts[2] >= 1
  # every cut leaves about the same share
  assert counts[0] / 576 == pytest.approx(counts[1] / counts[0], rel=0.05)
  average = (4 * 576 + 10 * counts[0] + 10 * counts[1] + 8 * counts[2]) / 32
  assert average == pytest.approx(tokens, abs=0.5)


def test_a_single_cut_by_hand():
  # 2 of 4 layers whole: (2 * 16 + 2 c) / 4 = 10 -> c = 4
  at = lambda tokens: budget.at_budget(helpers.tiny(), 'random', tokens, prune_after=(2,))
  assert at(10).atp.fixed_counts == (4,) and at(9).atp.fixed_counts == (2,)
  with pytest.raises(ConfigError, match='where one token would be left; with two'):
    at(8.5)


def test_another_placement_reaches_lower():
  assert _counts('pyramiddrop', 64, prune_after=(2, 4))[0] == (2, 4)
  with pytest.raises(ConfigError, match='in front of all'):
    budget.at_budget(SEVEN_B, 'divprune', 64, prune_after=(2,))


def test_towers_without_a_class_token_have_no_visionzip():
  base = helpers.tiny(vision=presets.efficientnet_lite0(64))
  with pytest.raises(ConfigError, match='class token.*CLIP'):
    budget.at_budget(base, 'visionzip', 4)
  assert budget.at_budget(base, 'downsample', 4).num_patches == 4
  with pytest.raises(ConfigError, match='square grid'):
    dataclasses.replace(base, resampler='downsample', num_query_tokens=5)


def test_the_base_may_have_a_method_of_its_own():
  other = dataclasses.replace(helpers.tiny(), voco=VocoConfig())
  assert budget.at_budget(other, 'fastv', 12).voco is None
  pruned = helpers.atp_config()
  assert budget.at_budget(pruned, 'avg_pool', 4).atp is None
