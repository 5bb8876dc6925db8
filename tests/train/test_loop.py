"""The loop: exact resume, refusals, one device or eight, what is written."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import core_helpers as helpers
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from small_run import ATP, CONFIG, RECIPE, batches, metrics_of, one_device, run

from vlm_compress import sharding
from vlm_compress.config import ConfigError
from vlm_compress.models.llava import Llava
from vlm_compress.train import checkpoint
from vlm_compress.train.metrics import MetricLog
from vlm_compress.train.preemption import Preempted
from vlm_compress.train.state import make_state, start_params


class _Killed(Exception):
  pass


class _KilledAt:
  """An iterator that dies when asked for batch number `at`."""

  def __init__(self, inner, at):
    self._inner, self._left = inner, at - 1
    self.get_state, self.set_state = inner.get_state, inner.set_state

  def __next__(self):
    if self._left == 0:
      raise _Killed
    self._left -= 1
    return next(self._inner)


def _final_state(workdir):
  """Everything in the last checkpoint, as restored without a template."""
  import orbax.checkpoint as ocp
  with ocp.CheckpointManager(
      (workdir / 'checkpoints').absolute(), item_names=('state', 'data')) as m:
    step = m.latest_step()
    restored = m.restore(step, args=ocp.args.Composite(
        state=ocp.args.StandardRestore(), data=ocp.args.JsonRestore()))
  return step, restored['state'], restored['data']


def _same(a, b):
  left, right = (jax.tree_util.tree_leaves_with_path(x) for x in (a, b))
  assert len(left) == len(right) > 5
  for (path, x), (other, y) in zip(left, right, strict=True):
    assert path == other
    np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  out = {}
  for stage, config in (('instruct', CONFIG), ('atp', ATP)):
    workdir = tmp_path_factory.mktemp(stage)
    recipe = dataclasses.replace(RECIPE, stage=stage)
    out[stage] = workdir, run(config, recipe, workdir)
  return out


@pytest.mark.parametrize('stage', ['instruct', 'atp'])
def test_interrupted_is_uninterrupted_bit_for_bit(stage, uninterrupted,
                                                  tmp_path):
  """Killed at step 6: goes on from the checkpoint of step 4."""
  config = {'instruct': CONFIG, 'atp': ATP}[stage]
  recipe = dataclasses.replace(RECIPE, stage=stage)
  with pytest.raises(_Killed):
    run(config, recipe, tmp_path, _KilledAt(batches(config), 6))
  assert [r['step'] for r in metrics_of(tmp_path)] == [2, 4]
  # what a kill can leave: a metric too many, a torn line, a torn checkpoint
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 5, "loss": 9.9}\n3\n{"ste')
  with (tmp_path / 'throughput.jsonl').open('a') as file:
    file.write('{"step": 6, "tok')
  torn = tmp_path / 'checkpoints' / '6.orbax-checkpoint-tmp-1'
  (torn / 'state').mkdir(parents=True)
  (torn / 'state' / 'garbage').write_text('x')
  lines = []
  params = run(config, recipe, tmp_path, message=lines.append)
  assert 'resumed at step 4 of 7' in lines
  whole, want = uninterrupted[stage]
  _same(helpers.flat(params), helpers.flat(want))
  assert metrics_of(tmp_path) == metrics_of(whole)
  assert [r['step'] for r in metrics_of(whole)] == [2, 4, 6, 7]
  rates = (tmp_path / 'throughput.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in rates] == [2, 4, 6, 7]
  ours, theirs = _final_state(tmp_path), _final_state(whole)
  assert ours[0] == theirs[0] == 7 and ours[2] == theirs[2]
  _same(ours[1], theirs[1])


def test_a_notice_saves_and_stops(uninterrupted, tmp_path):
  """SIGTERM in the middle of step 3, where no checkpoint is due."""
  class Warned:
    inner = batches(CONFIG)
    get_state, set_state, count = inner.get_state, inner.set_state, 0

    def __next__(self):
      self.count += 1
      if self.count == 3:
        os.kill(os.getpid(), signal.SIGTERM)
      return next(self.inner)
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(Preempted, match='step 3 of 7.*run the same command'):
    run(CONFIG, RECIPE, tmp_path, Warned())
  assert signal.getsignal(signal.SIGTERM) == before
  lines = []
  params = run(CONFIG, RECIPE, tmp_path, message=lines.append)
  assert 'resumed at step 3 of 7' in lines
  whole, want = uninterrupted['instruct']
  _same(helpers.flat(params), helpers.flat(want))
  assert metrics_of(tmp_path) == metrics_of(whole)


@pytest.mark.parametrize('part', ['state', 'data', 'metadata'])
def test_a_damaged_checkpoint_is_put_aside(part, uninterrupted, tmp_path):
  run(CONFIG, RECIPE, tmp_path, stop_after=6)
  newest = tmp_path / 'checkpoints' / '6'
  files = {'state': [*newest.glob('state/d/*'), *newest.glob('state/**/d/*')],
           'data': [*newest.glob('data/*')],
           'metadata': [*newest.glob('state/_METADATA')]}[part]
  files = [path for path in files if path.is_file() and path.stat().st_size > 0]
  assert files
  for path in files:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
  lines = []
  params = run(CONFIG, RECIPE, tmp_path, message=lines.append)
  assert any('checkpoints/6 is damaged (' in x for x in lines), lines
  assert 'resumed at step 4 of 7' in lines
  assert (tmp_path / 'damaged_checkpoints' / '6').is_dir()
  whole, want = uninterrupted['instruct']
  _same(helpers.flat(params), helpers.flat(want))
  assert metrics_of(tmp_path) == metrics_of(whole)


def test_a_run_goes_on_with_other_devices(uninterrupted, tmp_path):
  run(ATP, dataclasses.replace(RECIPE, stage='atp'), tmp_path, stop_after=4)
  params = run(ATP, dataclasses.replace(RECIPE, stage='atp'), tmp_path,
                mesh=sharding.make_mesh(2, 2, 2))
  whole, want = uninterrupted['atp']
  want = helpers.flat(want)
  for path, value in helpers.flat(params).items():
    helpers.close(value, want[path], 1e-5)
  kernel = params['language_model']['layers']['mlp']['up_proj']['kernel']
  assert len(kernel.sharding.device_set) == 8
  assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_the_best_checkpoint_is_kept(tmp_path):
  recipe = dataclasses.replace(RECIPE, steps=12, checkpoint_steps=1, log_steps=1,
                               keep_checkpoints=1, keep_best=2)
  run(CONFIG, recipe, tmp_path)
  losses = {m['step']: m['loss'] for m in metrics_of(tmp_path)}
  best = sorted(losses, key=losses.get)[:2]
  assert {int(p.name) for p in (tmp_path / 'checkpoints').iterdir()} == {12, *best}


def test_rates(tmp_path):
  run(CONFIG, RECIPE, tmp_path)
  lines = [json.loads(line) for line in
           (tmp_path / 'throughput.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [2, 4, 6, 7]
  valid = np.mean(next(batches(CONFIG)).valid)
  for line in lines:
    assert line['examples_per_second'] == pytest.approx(8 * line['steps_per_second'])
    assert line['padding_waste'] == pytest.approx(1 - valid, abs=0.1)
    assert line['model_flops_per_second'] > 0 and line['memory_bytes'] > 1e8
    assert 'mfu' not in line  # of a CPU nobody publishes a peak


def test_stop_after_and_a_finished_run(uninterrupted, tmp_path):
  """Stopped at a checkpoint; finished runs return without a step."""
  recipe = dataclasses.replace(RECIPE, stage='instruct')
  run(CONFIG, recipe, tmp_path, stop_after=4)
  run(CONFIG, recipe, tmp_path)
  whole, want = uninterrupted['instruct']
  assert metrics_of(tmp_path) == metrics_of(whole)
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  again = run(CONFIG, recipe, tmp_path, _KilledAt(batches(CONFIG), 1))
  _same(helpers.flat(again), helpers.flat(want))
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before


def test_other_seed_other_run(uninterrupted, tmp_path):
  recipe = dataclasses.replace(RECIPE, seed=6, steps=2)
  run(CONFIG, recipe, tmp_path)
  whole, _ = uninterrupted['instruct']
  assert metrics_of(tmp_path)[0]['loss'] != metrics_of(whole)[0]['loss']


def test_wrong_checkpoint_for_the_model_is_refused(tmp_path):
  recipe = dataclasses.replace(RECIPE, steps=2)
  run(CONFIG, recipe, tmp_path)
  wider = dataclasses.replace(CONFIG, text=dataclasses.replace(
      CONFIG.text, intermediate_size=24))
  with pytest.raises(ConfigError, match='does not fit this model') as e:
    run(wider, recipe, tmp_path)
  assert '\n' not in str(e.value)
  with pytest.raises(ConfigError, match='does not fit this model'):
    run(ATP, dataclasses.replace(recipe, stage='atp'), tmp_path)


def test_workdir_of_another_config_is_refused_with_the_field(tmp_path):
  config = {'train': {'steps': 7, 'betas': (1, 2)}, 'model': {'atp': None}}
  checkpoint.claim_workdir(tmp_path, config)
  checkpoint.claim_workdir(tmp_path, config)
  other = {'train': {'steps': 8, 'betas': (1, 2)}, 'model': {'atp': None}}
  # as long as nothing was trained there, another one may have it
  (tmp_path / 'checkpoints').mkdir()
  checkpoint.claim_workdir(tmp_path, other)
  checkpoint.claim_workdir(tmp_path, config)
  (tmp_path / 'checkpoints' / '2').mkdir()
  with pytest.raises(ConfigError, match=r'train\.steps: 7 -> 8') as e:
    checkpoint.claim_workdir(tmp_path, other)
  assert 'betas' not in str(e.value) and '\n' not in str(e.value)
  checkpoint.claim_workdir(tmp_path, config)  # nothing was overwritten
  (tmp_path / 'config.json').write_text('{"train"')
  with pytest.raises(ConfigError, match='not readable JSON'):
    checkpoint.claim_workdir(tmp_path, config)


def test_given_params_start_and_missing_ones_are_fresh():
  model = Llava(ATP)
  given = start_params(Llava(CONFIG), 11, None)
  lines = []
  got = helpers.flat(start_params(model, 5, given, lines.append))
  fresh = helpers.flat(start_params(model, 5, None))
  for path, x in got.items():
    want = fresh if path.startswith('atp/') else helpers.flat(given)
    np.testing.assert_array_equal(x, want[path])
  assert 'atp/linear/kernel' in lines[0] and len(lines) == 1
  wrong = {'language_model': {'norm': {'weight': np.ones(3)}}}
  with pytest.raises(ConfigError, match=r'norm/weight has shape \(3,\)'):
    start_params(model, 5, wrong)


def test_what_is_given_and_not_used_is_said():
  lines = []
  start_params(Llava(CONFIG), 5, start_params(Llava(ATP), 11, None), lines.append)
  assert len(lines) == 1 and 'does not use: atp/' in lines[0]
  assert 'atp/linear/kernel' in lines[0] and 'language_model' not in lines[0]


def test_fresh_parameters_must_learn():
  """A projector between random frozen parts learns nothing of use."""
  whole = start_params(Llava(CONFIG), 11, None)
  given = {'language_model': whole['language_model']}
  state = lambda given, *trainable, **kwargs: make_state(
      Llava(CONFIG), dataclasses.replace(RECIPE, trainable=trainable),
      one_device(), given, **kwargs)
  with pytest.raises(ConfigError, match='lacks parameters that do not learn: '
                     'multi_modal_projector/.*train.trainable') as caught:
    state(given, 'language_model/')
  assert 'linear_2/kernel' in str(caught.value)
  assert 'language_model' not in str(caught.value)
  with pytest.raises(ConfigError, match='vision_tower/'):
    state(lambda mesh: whole, 'multi_modal_projector/', with_vision=True)
  assert state(given, 'multi_modal_projector/').trainable
  assert state(None, 'multi_modal_projector/').frozen  # all from scratch


def test_the_callers_params_survive():
  """Steps donate their state; a teacher or a second stage needs the old."""
  import pathlib
  import tempfile
  given = start_params(Llava(CONFIG), 11, None)
  before = jax.device_get(given)
  with tempfile.TemporaryDirectory() as folder:
    run(CONFIG, dataclasses.replace(RECIPE, steps=2), pathlib.Path(folder),
         params=given)
  _same(before, jax.device_get(given))


@pytest.mark.parametrize('stage', ['instruct', 'atp'])
def test_one_device_is_eight_devices(stage, uninterrupted, tmp_path):
  config = {'instruct': CONFIG, 'atp': ATP}[stage]
  recipe = dataclasses.replace(RECIPE, stage=stage)
  mesh = sharding.make_mesh(2, 2, 2) if stage == 'atp' else None
  params = run(config, recipe, tmp_path, mesh=mesh)
  whole, want = uninterrupted[stage]
  eight, one = metrics_of(tmp_path), metrics_of(whole)
  assert [r['step'] for r in eight] == [2, 4, 6, 7]
  for a, b in zip(eight, one, strict=True):
    helpers.close(a['loss'], b['loss'], 1e-5)
  want = helpers.flat(want)
  for path, value in helpers.flat(params).items():
    helpers.close(value, want[path], 1e-5)


def test_batch_that_does_not_divide_is_refused(tmp_path):
  with pytest.raises(ConfigError, match='batch_size=6.*8 devices'):
    run(CONFIG, dataclasses.replace(RECIPE, batch_size=6), tmp_path,
         mesh=sharding.make_mesh())


def test_parameters_are_listed(tmp_path):
  recipe = dataclasses.replace(RECIPE, steps=1, warmup_steps=0,
                               trainable=('multi_modal_projector/*',))
  params = flatten_dict(run(CONFIG, recipe, tmp_path, mesh=sharding.make_mesh()),
                        sep='/')
  learn, _, frozen = (tmp_path / 'parameters.txt').read_text().partition(
      'These are frozen.')
  for path, value in params.items():
    where = learn if path.startswith('multi_modal_projector') else frozen
    row, = (line for line in where.splitlines() if f'| {path} ' in line)
    assert f' {value.shape} ' in row and f' {value.size:,} ' in row
  row, = (line for line in learn.splitlines() if 'linear_1/kernel' in line)
  assert "(None, 'tensor')" in row
  assert learn.count('kernel') < frozen.count('kernel') == sum(
      'kernel' in p and not p.startswith('multi_modal') for p in params)


def test_metrics_of_what_was_not_there_are_left_out(tmp_path):
  """A batch without pictures keeps no tokens; JSON has no NaN either."""
  state = make_state(Llava(CONFIG), RECIPE, one_device())
  log = MetricLog(tmp_path, 0, RECIPE, CONFIG, state, one_device(), False)
  log.write(1, {'loss': 2.0, 'layer_average_tokens': float('nan')})
  log.close()
  assert metrics_of(tmp_path) == [{'step': 1, 'loss': 2.0}]


def test_intervals_and_event_files(tmp_path):
  recipe = dataclasses.replace(RECIPE, steps=6, log_steps=3,
                               checkpoint_steps=4)
  run(CONFIG, recipe, tmp_path, tensorboard=True)
  assert [r['step'] for r in metrics_of(tmp_path)] == [3, 6]
  assert sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()
                if p.name.isdigit()) == [4, 6]
  events = list((tmp_path / 'tensorboard').glob('events*'))
  assert events and events[0].stat().st_size > 100
