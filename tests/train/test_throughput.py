"""Rates by hand: tokens, padding, utilisation, and parts of a batch."""

from __future__ import annotations

import types

import core_helpers as helpers
import jax
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample, segment

from vlm_compress import sharding
from vlm_compress.eval.hardware import Chip
from vlm_compress.eval.training_cost import RowShape, step_cost
from vlm_compress.models.sequence import split_voco
from vlm_compress.train import throughput
from vlm_compress.train.recipe import Recipe

CHIP = Chip('slow', 2e6, 1, 1.0, 1.0, ('slow',))
LEARNS = {'multi_modal_projector/linear_1/kernel': np.zeros((32, 32))}


@pytest.fixture(name='clock')
def fixture_clock(monkeypatch):
  """A clock that stands still until it is set, and a chip of 2 MFLOP/s."""
  clock = types.SimpleNamespace(now=100.0)
  monkeypatch.setattr(throughput, 'time', types.SimpleNamespace(
      perf_counter=lambda: clock.now))
  monkeypatch.setattr(throughput, 'chip_of', lambda kind: CHIP)
  return clock


def rates(clock, config, recipe, batch, num_steps=3, seconds=4.0):
  state = types.SimpleNamespace(trainable=LEARNS)
  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  counted = throughput.Throughput(config, recipe, state, mesh)
  for _ in range(num_steps):
    counted.step(batch)
  clock.now += seconds
  found = counted.rates()
  # The next rates start anew.
  counted.step(batch)
  clock.now += 1.0
  assert counted.rates()['steps_per_second'] == 1.0
  return found


def plain():
  """20 and 18 tokens of 24 slots, 16 of them visual."""
  samples = [Sample((BOS, IMAGE, 6, 7, 8), 1), Sample((BOS, IMAGE, 6), 1)]
  return helpers.batch(samples, helpers.tiny(), length=24, num_images=1)


def test_rates_by_hand(clock):
  config, recipe = helpers.tiny(), Recipe(stage='align', batch_size=2)
  found = rates(clock, config, recipe, plain())
  assert found['steps_per_second'] == 0.75
  assert found['examples_per_second'] == 1.5
  assert found['tokens_per_second'] == (20 + 18) * 0.75
  assert found['padding_waste'] == pytest.approx(1 - 38 / 48)
  flops = step_cost(config, 'align', RowShape(24), 2,
                    {path: x.size for path, x in LEARNS.items()}).model
  assert found['model_flops_per_second'] == pytest.approx(0.75 * flops)
  assert found['mfu'] == pytest.approx(0.75 * flops / (2 * 2e6))
  assert found['memory_bytes'] > 0


def test_parts_of_a_batch_count_and_not_processes(clock, monkeypatch):
  """Of six rows this process has two; four processes may share three parts."""
  monkeypatch.setattr(jax, 'process_count', lambda: 4)
  config, recipe = helpers.tiny(), Recipe(stage='align', batch_size=6)
  found = rates(clock, config, recipe, plain())
  assert found['tokens_per_second'] == pytest.approx(3 * (20 + 18) * 0.75)
  assert found['examples_per_second'] == 6 * 0.75
  assert found['padding_waste'] == pytest.approx(1 - 38 / 48)


@pytest.mark.parametrize('teacher', [False, True])
def test_vocos_two_passes_count(clock, teacher):
  """A picture is 2 + 16 + 2 tokens; 4 and 3 of text, and a row without one."""
  config = helpers.voco_config(2, distill_weight=float(teacher))
  samples = [Sample((BOS, *segment(2), 6, 7, 8), 1), Sample((BOS, *segment(2), 6, 7), 1),
             Sample((BOS, 6, 7), 1)]
  batch = split_voco(helpers.batch(samples, config, length=32, num_images=1), config, 8)
  recipe = Recipe(stage='voco', batch_size=3, teacher='self' if teacher else 'none')
  whole = helpers.batch(samples, config, length=32, num_images=1) if teacher else None
  found = rates(clock, config, recipe, (batch, whole))
  text = int(np.sum(batch.text.valid))
  assert len(batch.segment_ids) == 20 and text == 4 + 3 + 3
  assert found['tokens_per_second'] == pytest.approx(0.75 * (2 * 20 + text))
  assert found['padding_waste'] == pytest.approx(1 - (2 * 20 + text) / (3 * (20 + 8)))
  row = RowShape(32 if teacher else 0, 8)
  flops = step_cost(config, 'voco', row, 3, {}, teacher)
  learn = 2.0 * 3 * 16 * (32 * 32 + 32 ** 2)  # kernel, and the second layer's input
  assert found['mfu'] == pytest.approx(0.75 * (flops.model + learn) / 4e6)


def test_an_unknown_chip_has_no_utilisation(clock, monkeypatch):
  monkeypatch.setattr(throughput, 'chip_of', lambda kind: None)
  found = rates(clock, helpers.tiny(), Recipe(batch_size=2), plain())
  assert 'mfu' not in found and found['model_flops_per_second'] > 0


def test_lengths_cost_what_they_are(clock):
  """Buckets: each step counts at its own length."""
  config, recipe = helpers.tiny(), Recipe(stage='align', batch_size=2)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  counted = throughput.Throughput(
      config, recipe, types.SimpleNamespace(trainable={}), mesh)
  want = 0.0
  for length in (24, 40, 24):
    counted.step(helpers.batch([Sample((BOS, IMAGE, 6), 1)] * 2, config,
                               length=length, num_images=1))
    want += step_cost(config, 'align', RowShape(length), 2, {}).model
  clock.now += 2.0
  assert counted.rates()['model_flops_per_second'] == pytest.approx(want / 2)
