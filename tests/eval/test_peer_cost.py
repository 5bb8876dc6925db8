"""What peers' selectors cost, by hand."""

from __future__ import annotations

import dataclasses

import core_helpers as helpers
import numpy as np
import pytest

from vlm_compress.compress.baselines import budget, sparsevlm
from vlm_compress.config import AtpConfig, TextConfig
from vlm_compress.eval import efficiency, peer_cost
from vlm_compress.eval.methods import label

# D = 4, N = 2, K = 1, H = 2, M = 4; P = 16.
TEXT = TextConfig(vocab_size=10, hidden_size=4, intermediate_size=6,
                  num_hidden_layers=4, num_attention_heads=2,
                  num_key_value_heads=1)
PLAIN = dataclasses.replace(helpers.tiny(), text=TEXT)


def _peer(selector, prune_after, counts):
  return dataclasses.replace(PLAIN, atp=AtpConfig(
      selector=selector, prune_after=prune_after, fixed_counts=counts,
      target_tokens=8.0))


def test_by_hand():
  flops = efficiency.selector_flops
  # One query on 16 + 3 keys: 2 * 4 * 19.
  assert flops(_peer('fastv', (2,), (5,)), [16, 16, 5, 5], 3) == 152
  # ... on 19 and 11 keys; queries and keys of as many tokens at 2 * 4 * 6.
  assert flops(_peer('pyramiddrop', (1, 3), (8, 2)), [16, 8, 8, 2], 3) == (
      8 * 30 + 48 * 30)
  # 2 * 16^2 * 4 for one image, twice that for two.
  assert flops(_peer('divprune', (0,), (5,)), [5] * 4, 3) == 2048
  assert flops(_peer('divprune', (0,), (5,)), [10] * 4, 3) == 4096
  # Relevance 2 * 16 * 4 + 3 * 4, greedy steps 25 * 16.
  assert flops(_peer('cdpruner', (0,), (5,)), [5] * 4, 3) == 2048 + 140 + 400
  # Raters 2 * 16 * 3 * 4; 2 * 4 * 3 * (16 + 8); int(2.4) + 1 = 3 and
  # int(1.5) + 1 = 2 clustered tokens: 2 * 4 * (9 + 4).
  assert flops(_peer('sparsevlm', (1, 2), (8, 3)), [16, 8, 3, 3], 3) == (
      384 + 576 + 104)


@pytest.mark.parametrize('alive, count', [(576, 300), (300, 200), (200, 110), (64, 20)])
def test_clustered_tokens_are_those_of_the_selector(alive, count):
  deleted, back = sparsevlm.deletions_for(np.array([alive]), np.array(count), 576)
  assert alive - int(deleted[0]) + int(back[0]) == count
  members = int(sparsevlm.num_candidates(deleted)[0])
  assert peer_cost._clustered(np.array(alive - count)) == members
  assert (alive, members) != (576, 83)  # as if clusters did not come back


@pytest.mark.parametrize('method', budget.TRAINING_FREE)
def test_every_method_has_a_cost_and_a_name(method):
  """Arrays of questions give what each question gives alone."""
  config = budget.at_budget(helpers.tiny(), method, 9, tolerance=0.2)
  counts = [config.num_visual_tokens, *(
      config.atp.fixed_counts if config.atp else ())]
  ends = config.atp.prune_after if config.atp else ()
  entering = np.array([counts[sum(e <= m for e in ends)] for m in range(4)], float)
  text, prompt = np.array([9.0, 30.0]), np.array([4.0, 20.0])
  both = efficiency.prefill_cost(config, np.stack([entering] * 2), text,
                                 prompt_tokens=prompt)
  one = efficiency.prefill_cost(config, entering, 30.0, prompt_tokens=20.0)
  assert both.prefill[1] == pytest.approx(one.prefill)
  assert both.prefill[0] < both.prefill[1]
  looks = method not in ('random', 'uniform') and config.atp is not None
  assert (one.selector > 0) == looks and one.selector < one.decoder
  assert label(config) not in ('full', 'ATP')


def test_names_differ():
  names = {label(budget.at_budget(helpers.tiny(), m, 9, tolerance=0.2))
           for m in budget.TRAINING_FREE}
  assert len(names) == len(budget.TRAINING_FREE)
