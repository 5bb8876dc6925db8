"""The disk is asked whether a run has room on it before the run begins."""

from __future__ import annotations

import collections
import dataclasses
import shutil

import jax
import pytest
from small_run import CONFIG, RECIPE, one_device, run

from vlm_compress import remote
from vlm_compress.config import ConfigError
from vlm_compress.models.llava import Llava
from vlm_compress.train import space
from vlm_compress.train.state import make_state

Usage = collections.namedtuple('Usage', 'total used free')


def free(monkeypatch, count, asked=None):
  """Disks have so many bytes free."""
  def usage(path):
    if asked is not None:
      asked.append(str(path))
    return Usage(10 ** 12, 0, count)
  monkeypatch.setattr(shutil, 'disk_usage', usage)


def sizes():
  """Bytes of a state and of its parameters, of real arrays."""
  state = make_state(Llava(CONFIG), RECIPE, one_device())
  total = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  return total(state), total(state.params)


@pytest.mark.parametrize('keep, best, steps, every, there, count', [
    (2, 0, 100, 10, [], 3),          # the newest appears before the oldest goes
    (2, 3, 100, 10, [], 6),
    (2, 0, 100, 10, [10], 2),        # a resumed run has some already
    (2, 0, 100, 10, [10, 20], 1),
    (2, 0, 100, 10, [10, 20, 30], 0),
    (1, 0, 100, 10, [10, 20, 30], 0),
    (5, 0, 30, 10, [], 3),           # no more than are ever saved
    (5, 0, 25, 10, [], 3),           # 10, 20 and the last, 25
    (5, 0, 25, 10, [20], 1),
    (5, 0, 25, 10, [14], 2),         # SIGTERM came at 14
    (5, 0, 25, 10, [25], 0)])
def test_checkpoints_that_are_to_come(keep, best, steps, every, there, count):
  recipe = dataclasses.replace(
      RECIPE, keep_checkpoints=keep, keep_best=best, steps=steps,
      checkpoint_steps=every)
  assert space.checkpoints_to_come(recipe, there) == count


@pytest.mark.parametrize('there, number', [((), 3), (('2', '4'), 1),
                                           (('2', '4.orbax-checkpoint-tmp'), 2)])
def test_a_byte_less_than_needed_is_too_little(tmp_path, monkeypatch, there, number):
  one, final = sizes()
  assert one > 2 * final  # with both moments
  for name in there:
    (tmp_path / 'checkpoints' / name).mkdir(parents=True)
  ask = lambda: space.check_space(tmp_path, Llava(CONFIG), RECIPE, one_device())
  free(monkeypatch, number * one + final)
  ask()
  free(monkeypatch, number * one + final - 1)
  with pytest.raises(ConfigError) as caught:
    ask()
  line = str(caught.value)
  assert '\n' not in line and f'--workdir={tmp_path}' in line, line
  assert f'{number} checkpoint(s) of {space.quantity(one, "B")}' in line, line
  assert ('are there)' in line) == bool(there)
  assert 'train.keep_checkpoints=2' in line and 'another --workdir' in line


def test_a_run_of_its_own_size_leaves_no_less_than_was_promised(tmp_path, monkeypatch):
  """What really lies there is no more than what was asked for."""
  recipe = dataclasses.replace(RECIPE, steps=6, keep_checkpoints=5)
  run(CONFIG, recipe, tmp_path / 'run')
  found = sorted(p.name for p in (tmp_path / 'run/checkpoints').iterdir())
  assert found == ['2', '4', '6']
  free(monkeypatch, sizes()[1])  # all checkpoints are there: only the model is due
  space.check_space(tmp_path / 'run', Llava(CONFIG), recipe, one_device())
  assert space.checkpoints_to_come(recipe, []) == 3


def test_of_a_bucket_tmpdir_is_asked(tmp_path, monkeypatch):
  monkeypatch.setattr(remote, 'is_remote', lambda path: True)
  monkeypatch.setattr(space.tempfile, 'gettempdir', lambda: str(tmp_path))
  asked, final = [], sizes()[1]
  ask = lambda: space.check_space('gs://bucket/run', Llava(CONFIG), RECIPE, one_device())
  free(monkeypatch, final, asked)
  ask()
  free(monkeypatch, final - 1)
  with pytest.raises(ConfigError, match=f'TMPDIR={tmp_path} .*set TMPDIR'):
    ask()
  assert asked == [str(tmp_path)]
