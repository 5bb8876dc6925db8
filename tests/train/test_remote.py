"""Paths on gs:// and damaged checkpoints there, in one process."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pathlib
import tempfile
import time
import types

import flax.linen as nn
import jax
import numpy as np
import pytest

pytest.importorskip('gcsfs', reason='needs the extra [gcs]')
pytest.importorskip('google_crc32c', reason='needs the extra [test]')

from gcs_server import GcsServer, Refused  # noqa: E402
from small_run import CONFIG, RECIPE, TOKENIZER, one_device  # noqa: E402

from vlm_compress import atomic, remote  # noqa: E402
from vlm_compress.cli import __main__ as cli  # noqa: E402
from vlm_compress.cli import stage as stage_lib  # noqa: E402
from vlm_compress.cli import workspace  # noqa: E402
from vlm_compress.config import ConfigError  # noqa: E402
from vlm_compress.convert import files  # noqa: E402
from vlm_compress.models.llava import Llava, init_params  # noqa: E402
from vlm_compress.train import checkpoint, outbox  # noqa: E402
from vlm_compress.train.watch import Watch  # noqa: E402


@pytest.fixture(name='service')
def fixture_service():
  with GcsServer() as service, service.here():
    yield service


def test_kinds_of_paths(service):
  assert remote.to_path('a/b') == pathlib.Path('a/b')
  assert isinstance(remote.to_path('/x:/a'), pathlib.Path)
  path = remote.to_path('gs://bucket/a/')
  assert str(path / 'b') == 'gs://bucket/a/b' and remote.is_remote(path)
  assert remote.to_path(path) == path and not remote.is_remote('a')
  for text in ('s3://b/c', 'gs:/b/c', 'gs://', 'http://a/b', pathlib.Path('gs://b/c')):
    with pytest.raises(ConfigError, match='gs://BUCKET/FOLDER'):
      remote.to_path(text)


def test_files_appear_whole_or_not_at_all(service):
  path = 'gs://bucket/a/file.bin'
  atomic.write_text(path, 'old \u00fc\n')
  assert service.data('a/file.bin') == 'old \u00fc\n'.encode()
  with pytest.raises(KeyboardInterrupt), atomic.replace(path) as temporary:
    temporary.write_bytes(b'half')
    raise KeyboardInterrupt
  assert service.data('a/file.bin') == 'old \u00fc\n'.encode()
  large = np.random.default_rng(0).bytes(6 * 2 ** 20)  # goes up in pieces
  with atomic.replace(path) as temporary:
    temporary.write_bytes(large)
  assert service.data('a/file.bin') == large and not temporary.parent.exists()


def test_what_cannot_be_written_names_path_and_remedy(service):
  service.refuses = 403
  for write in (lambda: atomic.write_text('gs://bucket/a', 'b'),
                lambda: remote.exists(remote.to_path('gs://bucket/a'))):
    with pytest.raises(remote.RemoteError, match='Forbidden.*credentials') as caught:
      write()
    assert caught.value.filename == 'gs://bucket/a'


def test_another_process_writes_as_well(service):
  service.write('a/1', b'x', None)
  names = lambda: sorted(path.name for path in remote.to_path('gs://bucket/a').iterdir())
  assert names() == ['1']
  service.write('a/2', b'x', None)
  assert names() == ['1', '2']  # not what the folder held a moment ago


def test_a_workdir_in_which_nothing_can_be_deleted(service):
  workdir = remote.to_path('gs://bucket/run')
  checkpoint.claim_workdir(workdir, {'a': 1})

  def asked(method, path):
    if method == 'DELETE':
      raise Refused(403, 'storage.objects.delete')
  service.asked = asked
  with pytest.raises(ConfigError, match='Forbidden.*delete objects there'):
    remote.check_writable(workdir, '--workdir')
  assert any(name.startswith('run/.writable-') for name in service.names())
  # what the try has left is no training
  assert checkpoint.claim_workdir(workdir, {'a': 2}) == ['a: 1 -> 2']


def test_a_service_that_is_away_is_not_waited_for(service, monkeypatch):
  monkeypatch.setattr(remote, 'PROBE_SECONDS', 0.3)
  service.refuses, begun = 503, time.monotonic()
  with pytest.raises(ConfigError, match='--workdir=gs://bucket/run cannot be used '
                     r'\(no success within 0.3 seconds\).*network'):
    remote.check_writable(remote.to_path('gs://bucket/run'), '--workdir')
  assert time.monotonic() - begun < 10  # gcsfs alone takes half a minute or more


def _downloaded(service):
  service.write('a', b'x' * 100, None)
  with remote.scratch() as folder:
    (folder / 'a').symlink_to('/dev/full')
    remote.download(remote.to_path('gs://bucket/a'), folder / 'a')


def _written(service):
  with atomic.replace('gs://bucket/a') as temporary:
    temporary.symlink_to('/dev/full')
    temporary.write_bytes(b'x')


def _grown(service):
  with outbox.Outbox(remote.to_path('gs://bucket/run')) as box:
    (box.directory / 'metrics.jsonl').symlink_to('/dev/full')
    (box.directory / 'metrics.jsonl').write_text('1')


@pytest.mark.skipif(not pathlib.Path('/dev/full').exists(), reason='no /dev/full')
@pytest.mark.parametrize('work', [_downloaded, _written, _grown])
def test_a_full_disk_of_ours_is_not_the_bucket(work, service):
  with pytest.raises(OSError) as caught:  # noqa: PT011  # its words are below
    work(service)
  line = cli.describe(caught.value, ['--workdir=gs://bucket/run'])
  assert line.startswith(f'{tempfile.gettempdir()}: no space left')
  assert 'set TMPDIR' in line and '--workdir' not in line


def test_a_quota_of_ours_is_not_the_bucket(service):
  with pytest.raises(remote.NoRoom), remote.scratch(), remote.reported(
      remote.to_path('gs://bucket/a'), 'read'):
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize('name', [
    'UNAVAILABLE', 'RESOURCE_EXHAUSTED', 'DEADLINE_EXCEEDED', 'PERMISSION_DENIED',
    'UNAUTHENTICATED', 'ABORTED', 'CANCELLED'])
def test_what_a_service_refuses_says_nothing_of_a_checkpoint(name, monkeypatch):
  store, tries = object.__new__(checkpoint.CheckpointStore), []
  monkeypatch.setattr(checkpoint, 'RETRY_SECONDS', (0.0, 0.0))

  def refused(step, state):
    tries.append(step)
    raise ValueError(f'{words}: reading gs://bucket/run/checkpoints/2')
  monkeypatch.setattr(store, '_compare', refused)
  words = name
  assert store._read(2, None)[1] == checkpoint._UNREADABLE and len(tries) == 3
  words = 'DATA_LOSS'
  assert store._read(2, None)[1] == checkpoint._DAMAGED and len(tries) == 4


def test_a_damaged_checkpoint_is_put_aside(service):
  directory = remote.to_path('gs://bucket/run/checkpoints')
  state = types.SimpleNamespace(trainable={'w': jax.numpy.arange(4.0)}, frozen={})
  tree = {'trainable': state.trainable, 'frozen': state.frozen}
  State = dataclasses.make_dataclass('State', ['trainable', 'frozen'])
  jax.tree_util.register_dataclass(State, ['trainable', 'frozen'], [])
  store = checkpoint.CheckpointStore(directory, keep=3)
  for step in (1, 2):
    store.save(step, State(**tree), {'at': step}, 0.5)
    store.wait()
  store.close()
  for name in service.names('run/checkpoints/2/state/'):
    if 'manifest.ocdbt' in name or '/d/' in name:
      service.write(name, b'torn', None)
  for name in ('2', '2_'):  # of earlier sittings
    service.write(f'run/damaged_checkpoints/{name}/old', b'old', None)
  said = []
  store = checkpoint.CheckpointStore(directory, keep=3)
  found, data = store.restore(State(**tree), said.append)
  store.close()
  assert data == {'at': 1} and 'damaged_checkpoints' in said[0]
  np.testing.assert_array_equal(found.trainable['w'], np.arange(4.0))
  assert not service.names('run/checkpoints/2/')
  aside = service.names('run/damaged_checkpoints/')
  assert 'run/damaged_checkpoints/2__/commit_success.txt' in aside
  assert [name for name in aside if '/2__/' not in name] == [
      f'run/damaged_checkpoints/{name}/old' for name in ('2', '2_')]


def test_a_model_is_saved_and_started_from(service, tmp_path):
  params = nn.unbox(jax.jit(lambda key: init_params(Llava(CONFIG), key))(
      jax.random.key(0)))
  for directory in ('gs://bucket/model', tmp_path):
    files.save_model(directory, params, CONFIG, TOKENIZER)
  for path in tmp_path.iterdir():
    assert service.data(f'model/{path.name}') == path.read_bytes()
  mesh = one_device()
  ours, theirs = (stage_lib._given(str(where), CONFIG, print)(mesh)
                  for where in ('gs://bucket/model', tmp_path))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  spec = workspace.DataSpec(name='prepared', options=(('directory', 'x'),),
                            tokenizer='gs://bucket/model/tokenizer.json')
  assert workspace.tokenizer_for(spec, ()).vocab_size == TOKENIZER.vocab_size
  with pytest.raises(ConfigError, match='none.json does not exist'):
    workspace.tokenizer_for(dataclasses.replace(
        spec, tokenizer='gs://bucket/none.json'), ())


def test_bad_batches_are_named_there(service):
  watch = Watch(remote.to_path('gs://bucket/run'), RECIPE)
  lost = {name: np.float32('nan') for name in ('loss', 'grad_norm', 'update_norm')}
  watch.step(3, None, lost)
  with pytest.raises(ConfigError, match='gs://bucket/run/bad_batch.json'):
    watch.look()
  assert json.loads(service.data('run/bad_batch.json'))['step'] == 3
