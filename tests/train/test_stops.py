"""What stops a run, and what must not: lost numbers, disks that are away for a
while, a profiler's trace that a kill cut off.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_run import CONFIG, RECIPE, batches, metrics_of, run

from vlm_compress import losses
from vlm_compress.cli import __main__ as cli
from vlm_compress.cli import train
from vlm_compress.config import ConfigError
from vlm_compress.models.llava import Llava
from vlm_compress.train import checkpoint
from vlm_compress.train.state import start_params
from vlm_compress.train.watch import Watch


def seen(tmp_path, losses, factor=3.0):
  """The step at which a run with these losses stops, or None."""
  watch = Watch(tmp_path, dataclasses.replace(RECIPE, spike_factor=factor))
  for step, loss in enumerate(losses):
    try:
      watch.step(step, None, {'loss': loss, 'grad_norm': 1.0, 'update_norm': 1.0})
      watch.look()
    except ConfigError:
      return step
  return None


@pytest.mark.parametrize('losses, step', [
    ([1.0] * 9 + [5.0], None), ([1.0] * 10 + [5.0], 10),  # of ten or more
    ([1.0] * 10 + [3.0], None), ([1.0] * 10 + [3.01], 10),
    ([100.0] * 30 + [1.0] * 49 + [8.0], None),  # 50 count, of which one is 100
    ([100.0] * 30 + [1.0] * 50 + [5.0], 80)])
def test_what_a_leap_is(losses, step, tmp_path):
  assert seen(tmp_path, losses) == step
  assert seen(tmp_path, losses, factor=0.0) is None


def test_a_run_that_goes_on_knows_the_last_losses(tmp_path, monkeypatch):
  known, go_on = [], Watch.go_on
  monkeypatch.setattr(Watch, 'go_on', lambda self, losses: (
      known.append(list(losses)), go_on(self, losses)))
  run(CONFIG, RECIPE, tmp_path, stop_after=4)
  run(CONFIG, RECIPE, tmp_path)
  said = {x['step']: x['loss'] for x in metrics_of(tmp_path)}
  assert known[0] == [] and len(known[1]) == 4
  assert [known[1][1], known[1][3]] == [said[2], said[4]]


def test_a_notice_outside_of_the_steps(tmp_path, monkeypatch, capsys):
  def kill(stage, args):
    del stage, args
    try:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(5)
    except Exception:  # as a retry would
      pytest.fail('is no error')
  monkeypatch.setattr(train, '_run', kill)
  before = signal.getsignal(signal.SIGTERM)
  assert cli.main(['train', '--config=configs/quickstart.py:instruct',
                   f'--workdir={tmp_path}/run']) == 0
  assert 'stopped on SIGTERM outside of the steps' in capsys.readouterr().err
  assert signal.getsignal(signal.SIGTERM) == before


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path):
  run(CONFIG, RECIPE, tmp_path, stop_after=2)
  for path in (tmp_path / 'checkpoints' / '2').glob('data/*'):
    path.write_text('{')
  for _ in range(2):  # whoever starts again does not begin at step 0
    with pytest.raises(ConfigError, match='no checkpoint can be read.*--workdir'):
      run(CONFIG, RECIPE, tmp_path)
  assert (tmp_path / 'metrics.jsonl').stat().st_size > 0


@pytest.mark.parametrize('error', [
    OSError(5, 'Input/output error'), MemoryError('no room'),
    ValueError('UNAVAILABLE: the server is away')])
def test_what_may_pass_damages_no_checkpoint(error, tmp_path, monkeypatch):
  run(CONFIG, RECIPE, tmp_path, stop_after=4)
  saved = sorted(p.name for p in (tmp_path / 'checkpoints').iterdir())
  monkeypatch.setattr(checkpoint, 'RETRY_SECONDS', (0.0, 0.0))
  restore, errors = ocp.CheckpointManager.restore, [error] * 3

  def failing(*args, **kwargs):
    if errors:
      raise errors.pop()
    return restore(*args, **kwargs)
  monkeypatch.setattr(ocp.CheckpointManager, 'restore', failing)
  with pytest.raises(ConfigError, match='checkpoints/4 cannot be read.*stays'):
    run(CONFIG, RECIPE, tmp_path)
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == saved
  assert not (tmp_path / 'damaged_checkpoints').exists()
  errors[:] = [error] * 2
  lines = []
  run(CONFIG, RECIPE, tmp_path, message=lines.append)
  assert 'resumed at step 4 of 7' in lines and not errors


@pytest.mark.parametrize('name,where', [('grad_norm', 'grads'),
                                        ('update_norm', 'updates')])
def test_lost_parameters_do_not_become_a_checkpoint(name, where, tmp_path,
                                                    monkeypatch):
  rate = 1e38 if where == 'updates' else RECIPE.learning_rate
  if where == 'grads':
    real = losses.next_token_loss
    monkeypatch.setattr(losses, 'next_token_loss', lambda *args: jax.tree.map(
        lambda x: x + 0 * jnp.sqrt(0 * x), real(*args)))
  recipe = dataclasses.replace(RECIPE, steps=1, warmup_steps=0, learning_rate=rate)
  with pytest.raises(ConfigError, match=f'{name} is (nan|inf) at step 1'):
    run(CONFIG, recipe, tmp_path)
  assert not [*(tmp_path / 'checkpoints').glob('[0-9]*')]


def test_a_step_is_profiled(tmp_path):
  run(CONFIG, RECIPE, tmp_path, stop_after=3, profile_steps=(2, 3))
  assert len([*(tmp_path / 'tensorboard').rglob('*.xplane.pb')]) == 1


@pytest.mark.parametrize('steps', [
    (4, 4), pytest.param((3, 5), marks=pytest.mark.slow),
    pytest.param((6, 99), marks=pytest.mark.slow)])
def test_a_profiled_run_goes_on_anywhere(steps, tmp_path):
  """Steps 4 and 6 have checkpoints; the trace may begin before, or never end."""
  for stop in (4, 6, None):
    run(CONFIG, RECIPE, tmp_path, stop_after=stop, profile_steps=steps)
  assert [*(tmp_path / 'tensorboard').rglob('*.xplane.pb')]
  jax.profiler.start_trace(str(tmp_path / 'mine'))  # none is left running
  jax.profiler.stop_trace()


def test_loss_that_is_no_number_stops_the_run(tmp_path):
  given = start_params(Llava(CONFIG), 0, None)
  given['language_model']['norm']['weight'] = np.full(16, np.nan, np.float32)
  with pytest.raises(ConfigError, match='loss is nan at step 1;.*learning_rate'):
    run(CONFIG, RECIPE, tmp_path, params=given)
  assert not (tmp_path / 'metrics.jsonl').exists()
  found = json.loads((tmp_path / 'bad_batch.json').read_text())
  assert found['step'] == 1 and found['loss'] == 'nan'
  assert found['records'] == next(batches(CONFIG)).records.tolist()
