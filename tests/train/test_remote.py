"""Paths on gs://, what grows there, and damaged checkpoints, in one process."""

from __future__ import annotations

import dataclasses
import json
import pathlib
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


def test_outbox_copies_what_has_changed(service, monkeypatch):
  service.write('run/metrics.jsonl', b'1\n', None)
  puts, real = [], remote.upload
  monkeypatch.setattr(remote, 'upload', lambda local, path: (
      puts.append(str(path)), real(local, path)))
  workdir = remote.to_path('gs://bucket/run')
  with outbox.Outbox(workdir, ('metrics.jsonl', 'none.jsonl')) as box:
    lines, event = box.directory / 'metrics.jsonl', box.directory / 'a/b/event'
    box.send()
    assert puts == [] and lines.read_bytes() == b'1\n'
    with lines.open('a') as file:
      file.write('2\n')
    event.parent.mkdir(parents=True)
    event.write_bytes(b'x')
    box.send()
    box.send()
    assert sorted(puts) == ['gs://bucket/run/a/b/event', 'gs://bucket/run/metrics.jsonl']
    assert service.data('run/metrics.jsonl') == b'1\n2\n'
    assert not box.is_due()
    monkeypatch.setattr(outbox, 'SECONDS', -1.0)
    assert box.is_due()
    event.write_bytes(b'yz')
  assert service.data('run/a/b/event') == b'yz' and len(puts) == 3
  assert not box.directory.exists()


def test_outbox_of_a_disk_is_the_workdir(tmp_path, monkeypatch):
  monkeypatch.setattr(outbox, 'SECONDS', -1.0)
  with outbox.Outbox(tmp_path, ('metrics.jsonl',)) as box:
    assert box.directory == tmp_path and not box.is_due()
    box.send()
  assert tmp_path.exists()


def test_outbox_hides_no_error(service):
  service.refuses = 0
  def refuse(name):
    raise Refused(403, 'no')
  service.written = refuse
  workdir = remote.to_path('gs://bucket/run')
  with pytest.raises(remote.RemoteError), outbox.Outbox(workdir) as box:
    (box.directory / 'a').write_text('x')
  with pytest.raises(ConfigError), outbox.Outbox(workdir) as box:
    (box.directory / 'a').write_text('x')
    raise ConfigError('the reason')


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
  said = []
  store = checkpoint.CheckpointStore(directory, keep=3)
  found, data = store.restore(State(**tree), said.append)
  store.close()
  assert data == {'at': 1} and 'damaged_checkpoints' in said[0]
  np.testing.assert_array_equal(found.trainable['w'], np.arange(4.0))
  assert not service.names('run/checkpoints/2/')
  assert 'run/damaged_checkpoints/2/commit_success.txt' in service.names()


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
