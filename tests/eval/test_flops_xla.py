"""The analytic cost formulas against XLA's own count.

`cost_analysis` counts the body of a scan once, so the model is unrolled.
XLA counts everything: besides matrix products also softmax, norms, RoPE,
activations, residuals and the masks, which the formulas leave out (below 1 %
at 7B).  The two are brought together in two ways: the difference between two
sizes that only matrix products see, and the whole with wide layers, in which
the rest is small.
"""

from __future__ import annotations

import dataclasses

import core_helpers as helpers
import flax.linen as nn
import jax
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample

from vlm_compress import config as config_lib
from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.eval import efficiency
from vlm_compress.models import llava
from vlm_compress.models.llava import PruneOptions

M, NUM_TEXT = 2, 8


def _config(hidden=128, inner=320, heads=4, kv_heads=2, atp=None):
  text = config_lib.TextConfig(
      vocab_size=160, hidden_size=hidden, intermediate_size=inner,
      num_hidden_layers=M, num_attention_heads=heads,
      num_key_value_heads=kv_heads, max_position_embeddings=64)
  return helpers.tiny(text=text, atp=atp)


def _xla_flops(config, prune=None, rows=1):
  """Prefill of rows with 16 visual and 8 text tokens each, compiled."""
  model = llava.Llava(config, unroll=M)
  params = nn.unbox(jax.eval_shape(
      lambda key: llava.init_params(model, key), jax.random.key(0)))
  sample = Sample((BOS, IMAGE) + tuple(range(6, 6 + NUM_TEXT - 1)))
  batch = helpers.batch([sample] * rows, config, length=16 + NUM_TEXT, num_images=1)

  def prefill(params, batch):
    logits, cache, _ = model.apply({'params': params}, batch, prune=prune,
                                   method='prefill')
    return logits, cache.keys, cache.values
  compiled = jax.jit(prefill).lower(params, batch).compile()
  return compiled.cost_analysis()['flops']


def _formula(config, prompt=NUM_TEXT - 1):
  """Dense figure without the vision tower, which has run before."""
  cost = efficiency.prefill_cost(config, np.full(M, 16.0), float(NUM_TEXT),
                                 prompt_tokens=float(prompt))
  return (cost.projector + cost.decoder_dense + cost.lm_head,
          float(cost.selector))


@pytest.fixture(scope='module')
def plain():
  return _xla_flops(_config())


def test_plain_prefill_within_a_few_per_cent(plain):
  """XLA's count is the formula's and a little more, never less."""
  ours, selector = _formula(_config())
  assert selector == 0.0
  assert 1.0 <= plain / ours < 1.05


@pytest.mark.parametrize('change', [
    dict(inner=640), dict(kv_heads=4)])
def test_what_a_size_adds_is_what_the_formula_adds(plain, change):
  """Elementwise work hardly depends on these: the difference is products."""
  bigger = _config(**change)
  added = _xla_flops(bigger) - plain
  ours = _formula(bigger)[0] - _formula(_config())[0]
  assert ours > 0 and 0.99 < added / ours < 1.02, (added, ours)


def test_atp_adds_the_scores_and_the_threshold_heads(plain):
  """A hard mask drops nothing: the decoder is the dense one, all tokens.

  The module recomputes q k^T of all tokens, not only of those that the
  formula counts (visual keys, visual and prompt queries), hence a wide upper
  limit for its own part.
  """
  atp = config_lib.AtpConfig(prune_after=(1,), target_tokens=12.0,
                             threshold_hidden_size=2048)
  config = _config(atp=atp)
  ours, selector = _formula(config)
  whole = _xla_flops(config, PruneOptions())
  assert selector > 2 * 2048 * 33
  assert 1.0 <= whole / (ours + selector) < 1.10
  # Twice the heads' width: only the heads grow, by 2 (2P + 2) per hidden unit
  # and what XLA makes of its exact gelu, a polynomial of some 65 FLOPs.  (Four
  # rows: products with a single row are not in XLA's count.)
  wider = dataclasses.replace(atp, threshold_hidden_size=4096)
  few, many = (_xla_flops(_config(atp=a), PruneOptions(), rows=4)
               for a in (atp, wider))
  per_unit = (many - few) / (4 * 2048)
  assert 2 * (2 * 16 + 2) <= per_unit <= 2 * (2 * 16 + 2) + 80


def test_a_shorter_row_costs_its_slots():
  """All programs of one compacted prefill, against the formula at its slots.

  Not exact, for the reasons above: elementwise work, and a module that
  multiplies all queries and keys of its segment, where the formula counts those
  that are needed.  With these counted in full the rest is 1.3 %; one slot more
  or less in a layer would be 2.5 %.
  """
  atp = config_lib.AtpConfig(prune_after=(1,), target_tokens=12.0,
                             capacities=(8,), threshold_hidden_size=256)
  config, rows = _config(atp=atp), 4
  model = SegmentedModel(config, helpers.build(config)[1])
  sample = Sample((BOS, IMAGE) + tuple(range(6, 6 + NUM_TEXT - 1)))
  batch = helpers.batch([sample] * rows, config, length=16 + NUM_TEXT, num_images=1)
  state = model.prefill(batch, PruneOptions(threshold_shift=60.0))
  assert state.slots == [16 + NUM_TEXT, 8 + NUM_TEXT]
  counted = {key[0][:2]: program.cost_analysis().get('flops', 0.0)
             for key, program in model.programs._compiled.items()}
  assert set(counted) == {('start',), ('run', 0), ('cut', 16), ('run', 1)}
  cost = efficiency.prefill_cost(config, np.array([16.0, 8.0]), float(NUM_TEXT),
                                 prompt_tokens=float(NUM_TEXT - 1))
  heads = config.text.num_attention_heads * config.text.size_per_head
  needed = 16 * 17 / 2 + 16 * (NUM_TEXT - 1)
  module = float(cost.selector) + 2 * heads * ((16 + NUM_TEXT) ** 2 - needed)
  ours = cost.projector + cost.decoder_dense + module + cost.lm_head
  assert 1.0 <= sum(counted.values()) / (rows * ours) < 1.02
