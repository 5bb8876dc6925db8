"""Training adapters: only they move, and the rest is as in any other run."""

from __future__ import annotations

import dataclasses

import core_helpers as helpers
import jax
import numpy as np
import pytest
from small_run import ATP, CONFIG, RECIPE, batches, metrics_of, run
from test_loop import _Killed, _KilledAt, _same

from vlm_compress import sharding
from vlm_compress.config import ConfigError, LoraConfig
from vlm_compress.convert.lora import is_lora, merge
from vlm_compress.models.llava import Llava
from vlm_compress.train.optimizer import split
from vlm_compress.train.state import make_state, start_params
from vlm_compress.train.steps import At, instruct_loss

LORA = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2, alpha=4.0))
TRAIN = dataclasses.replace(RECIPE, trainable=('*/lora_*',), steps=12,
                            log_steps=1, learning_rate=3e-2)


@pytest.fixture(scope='module', name='given')
def fixture_given():
  """A model directory's parameters: no adapters yet."""
  return jax.device_get(start_params(Llava(CONFIG), 11, None))


@pytest.fixture(scope='module', name='whole')
def fixture_whole(given, tmp_path_factory):
  """An uninterrupted run, its directory and its parameters."""
  workdir = tmp_path_factory.mktemp('lora')
  return workdir, run(LORA, TRAIN, workdir, params=given)


def test_it_starts_as_the_given_model_and_gets_better(given, whole):
  workdir, params = whole
  losses = [line['loss'] for line in metrics_of(workdir)]
  first, _ = jax.jit(lambda params, batch: instruct_loss(
      Llava(CONFIG), params, batch, At(0, 0), RECIPE))(given, next(batches(CONFIG)))
  helpers.close(losses[0], first, 1e-6)
  assert losses[-1] < losses[0] - 0.3
  flat, before = helpers.flat(params), helpers.flat(given)
  fresh = helpers.flat(start_params(Llava(LORA), TRAIN.seed, given))
  for path, x in flat.items():
    if is_lora(path):
      assert np.abs(x - fresh[path]).max() > 1e-3, path
    else:
      np.testing.assert_array_equal(x, before[path])
  assert set(before) < set(flat)


def test_what_is_missing_is_fresh_and_said(given):
  lines = []
  start_params(Llava(LORA), 5, given, lines.append)
  assert len(lines) == 1 and 'q_proj/lora_a' in lines[0]
  assert 'kernel' not in lines[0]


def test_interrupted_is_uninterrupted_bit_for_bit(given, whole, tmp_path):
  with pytest.raises(_Killed):
    run(LORA, TRAIN, tmp_path, _KilledAt(batches(LORA), 6), params=given)
  params = run(LORA, TRAIN, tmp_path, params=given)
  _same(helpers.flat(params), helpers.flat(whole[1]))
  assert metrics_of(tmp_path) == metrics_of(whole[0])


def test_one_device_is_eight_devices(given, whole, tmp_path):
  run(LORA, TRAIN, tmp_path, params=given, mesh=sharding.make_mesh(2, 2, 2),
       stop_after=4)
  for a, b in zip(metrics_of(tmp_path), metrics_of(whole[0])[:4], strict=True):
    helpers.close(a['loss'], b['loss'])


def test_only_adapters_have_optimizer_state(given):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  state = make_state(Llava(LORA), TRAIN, mesh, start_params(Llava(LORA), 0, given))
  assert state.trainable and all(map(is_lora, state.trainable))
  assert not any(map(is_lora, state.frozen))
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim > 0)
  assert moments == 2 * sum(x.size for x in state.trainable.values())
  # seven projections of two layers, D = F = 16 and one key head of 8
  assert moments == 2 * 2 * 2 * (5 * (16 + 16) + 2 * (16 + 8))


def test_names_and_patterns():
  params = {'atp': {'x': 1, 'lora_a': 2}, 'b': {'atp': {'x': 3}}}
  names = lambda *trainable: sorted(split(params, trainable)[0])
  assert names() == ['atp/lora_a', 'atp/x', 'b/atp/x']
  assert names('atp/') == ['atp/lora_a', 'atp/x']
  assert names('*/x') == ['atp/x', 'b/atp/x']
  assert names('*/lora_*', 'b/') == ['atp/lora_a', 'b/atp/x']
  assert names('*/atp/*') == ['b/atp/x']  # for the whole path
  with pytest.raises(ConfigError, match=r"trainable='\*/lora_b'.*pattern"):
    names('atp/', '*/lora_b')


@pytest.mark.parametrize('config, trainable, words', [
    (CONFIG, ('*/lora_*',), r"'\*/lora_\*' matches no parameter"),
    (LORA, ('multi_modal_projector/',), r'none of its adapters learns.*\*/lora_\*'),
    (LORA, (), 'learn beside its LoRA adapter.*trainable'),
    (LORA, ('*/lora_*', 'language_model/layers/mlp/up_proj'),
     'up_proj/kernel.*learn beside')])
def test_what_makes_no_sense_is_refused(config, trainable, words, tmp_path):
  with pytest.raises(ConfigError, match=words) as e:
    run(config, dataclasses.replace(TRAIN, trainable=trainable), tmp_path)
  assert '\n' not in str(e.value)


def test_adapters_are_not_lost_on_the_way(given):
  adapted = start_params(Llava(LORA), 5, given)
  with pytest.raises(ConfigError, match='LoRA adapters.*lora_a.*merge'):
    start_params(Llava(ATP), 5, adapted)
  merged, _ = merge(adapted, LORA)
  assert 'atp' in start_params(Llava(ATP), 5, merged)
