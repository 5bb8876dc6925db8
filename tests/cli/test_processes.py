"""Several processes of a run: what each of them is told, seen from one."""

from __future__ import annotations

import jax
import pytest

from vlm_compress.cli import distributed, stage, train
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
  monkeypatch.setattr(stage, '_NETWORK_DISK_SECONDS', 0)
  settings = lambda: {'train': {'steps': 7}}
  with monkeypatch.context() as second:
    second.setattr(jax, 'process_index', lambda: 1)
    with pytest.raises(ConfigError, match='process 1 does not see.*hosts share'):
      stage._claim(tmp_path / 'w', settings, False, print)
  assert not (tmp_path / 'w').exists()
  stage._claim(tmp_path / 'w', settings, False, print)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  stage._claim(tmp_path / 'w', settings, False, print)
