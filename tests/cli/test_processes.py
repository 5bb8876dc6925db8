"""Several processes of a run: what each of them is told, seen from one."""

from __future__ import annotations

import json
import threading
import time

import jax
import pytest
from jax.experimental import multihost_utils

from vlm_compress.cli import claims, distributed, stage, together, train
from vlm_compress.config import ConfigError


@pytest.mark.parametrize('words, message', [
    (['--num-processes=2'], 'belong together'),
    (['--coordinator=a:1', '--process-id=0', '--distributed'], 'belong together'),
    (['--coordinator=a:1', '--num-processes=2', '--process-id=2'],
     'less than --num-processes=2')])
def test_details_that_do_not_fit_are_refused(words, message):
  args = train.parser().parse_args(['--config=a', '--workdir=b', *words])
  with pytest.raises(ConfigError, match=message):
    distributed.start(args)


def test_a_workdir_that_only_one_host_sees_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(together, '_NETWORK_DISK_SECONDS', 0)
  settings = lambda: {'train': {'steps': 7}}
  with monkeypatch.context() as second:
    second.setattr(jax, 'process_index', lambda: 1)
    with pytest.raises(ConfigError, match='process 1 does not see.*hosts share'):
      claims.claim_together(tmp_path / 'w', settings, 'a1', False, print)
  assert not (tmp_path / 'w').exists()
  claims.claim_together(tmp_path / 'w', settings, 'a1', False, print)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  claims.claim_together(tmp_path / 'w', settings, 'a1', False, print)


@pytest.mark.parametrize('process, order', [
    (0, ['make', 'meet']), (1, ['meet', 'make'])])
def test_the_first_process_goes_alone(process, order, monkeypatch):
  done = []
  monkeypatch.setattr(jax, 'process_index', lambda: process)
  monkeypatch.setattr(multihost_utils, 'sync_global_devices',
                      lambda name: done.append('meet'))
  assert together.first_alone('x', lambda: done.append('make') or 7) == 7
  assert done == order


def test_all_take_the_way_of_the_first(monkeypatch):
  assert together.agreed(True) is True and together.agreed(False) is False
  monkeypatch.setattr(multihost_utils, 'broadcast_one_to_all', lambda answer: ~answer)
  assert together.agreed(False) is True


def test_a_finished_model_is_waited_for(tmp_path, monkeypatch):
  """Another host sees it later than the one that wrote it."""
  monkeypatch.setattr(stage, 'save_model', lambda *args, **kwargs: None)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  later = threading.Timer(0.3, (tmp_path / 'config.json').touch)
  later.start()
  stage._save(tmp_path, {}, None, None, stage.RowSpec())
  assert (tmp_path / 'config.json').exists()
  later.join()
  monkeypatch.setattr(together, '_NETWORK_DISK_SECONDS', 0.1)
  began = time.monotonic()  # not seen at all: the run is finished all the same
  stage._save(tmp_path / 'unseen', {}, None, None, stage.RowSpec())
  assert time.monotonic() - began < 10


def trained(workdir, content='a1', **more):
  """A workdir with a checkpoint, of these settings and data."""
  settings = {'train': {'steps': 7}, **more}
  assert claims.claim(workdir, settings, content) == []
  (workdir / 'checkpoints' / '2').mkdir(parents=True)
  return settings


def test_other_data_are_refused(tmp_path):
  settings = trained(tmp_path)
  assert claims.claim(tmp_path, settings, 'a1') == []
  with pytest.raises(ConfigError, match='data_fingerprint: a1 -> b2.*data_fingerprint '
                     'says that rows or pictures'):
    claims.claim(tmp_path, settings, 'b2')
  with pytest.raises(ConfigError, match='steps: 7 -> 8') as caught:
    claims.claim(tmp_path, {'train': {'steps': 8}}, 'a1')
  assert 'pictures' not in str(caught.value)
  assert claims.claim(tmp_path, settings, 'b2', allow_change=True) == [
      'config changed: data_fingerprint: a1 -> b2']
  assert claims.claim(tmp_path, settings, 'b2') == []


def test_a_workdir_that_does_not_say_its_data_goes_on_with_these(tmp_path):
  settings = trained(tmp_path)
  mark = tmp_path / 'config.json'
  mark.write_text(json.dumps(settings))
  with pytest.raises(ConfigError, match='steps: 7 -> 8'):
    claims.claim(tmp_path, {'train': {'steps': 8}}, 'a1')
  assert json.loads(mark.read_text()) == settings
  line, = claims.claim(tmp_path, settings, 'a1')
  assert 'config.json did not say which data' in line
  with pytest.raises(ConfigError, match='data_fingerprint: a1 -> b2'):
    claims.claim(tmp_path, settings, 'b2')
