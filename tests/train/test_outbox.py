"""What grows in a workdir on gs://: when it is copied, and copies that fail."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import types

import pytest

pytest.importorskip('gcsfs', reason='needs the extra [gcs]')
pytest.importorskip('google_crc32c', reason='needs the extra [test]')

from gcs_server import GcsServer, Refused  # noqa: E402
from small_run import CONFIG, RECIPE, batches, one_device  # noqa: E402

from vlm_compress import remote  # noqa: E402
from vlm_compress.config import ConfigError  # noqa: E402
from vlm_compress.models.llava import Llava  # noqa: E402
from vlm_compress.train import outbox  # noqa: E402
from vlm_compress.train.loop import fit  # noqa: E402


@pytest.fixture(name='service')
def fixture_service():
  with GcsServer() as service, service.here():
    yield service


@pytest.fixture(name='copies')
def fixture_copies(monkeypatch):
  """Lines of metrics.jsonl in every copy that was begun; `fails` tells which
  of them fail.
  """
  copies = types.SimpleNamespace(lines=[], fails=lambda number: False)
  real = remote.upload

  def upload(local, path):
    if path.name == 'metrics.jsonl':
      copies.lines.append(local.read_text().count('\n'))
      if copies.fails(len(copies.lines)):
        raise remote.RemoteError(errno.EIO, 'cannot be written (away)', str(path))
    real(local, path)
  monkeypatch.setattr(remote, 'upload', upload)
  return copies


def run(said, **changes):
  """A few steps in gs://bucket/run."""
  fit(Llava(CONFIG), dataclasses.replace(RECIPE, log_steps=1, **changes),
      batches(CONFIG), remote.to_path('gs://bucket/run'), tensorboard=False,
      mesh=one_device(), message=said.append)


def warnings(said):
  return [line for line in said if line.startswith('warning: ')]


def test_a_run_is_copied_while_no_checkpoint_is_due(service, copies, monkeypatch):
  monkeypatch.setattr(outbox, 'SECONDS', -1.0)
  copies.fails = lambda number: number in (1, 2, 4)
  said = []
  run(said, steps=5, checkpoint_steps=9)
  # the first two and the fourth are lost, and the next one has their lines
  assert copies.lines == [1, 2, 3, 4, 5]
  lines = service.data('run/metrics.jsonl').splitlines()
  assert [json.loads(line)['step'] for line in lines] == [1, 2, 3, 4, 5]
  one, two = warnings(said)  # for each time that it is away, one
  assert 'gs://bucket/run/metrics.jsonl cannot be written (away)' in one == two


def test_a_copy_that_fails_is_not_in_the_way_of_a_checkpoint(service, copies):
  copies.fails = lambda number: True
  said = []
  with pytest.raises(remote.RemoteError, match='away'):  # nobody tries it again
    run(said, steps=3, checkpoint_steps=2)
  assert copies.lines == [2, 3, 3] and len(warnings(said)) == 1
  assert {name.split('/')[2] for name in service.names('run/checkpoints/')
          if name.endswith('/commit_success.txt')} == {'2', '3'}


def test_the_lines_of_a_checkpoint_are_there_before_it(service, copies):
  seen = []
  service.written = lambda name: seen.append(name)
  run([], steps=2, checkpoint_steps=1)
  first = lambda part: next(i for i, name in enumerate(seen) if part in name)
  assert first('metrics.jsonl') < first('run/checkpoints/1/')
  assert copies.lines == [1, 2]


def test_copies_are_a_minute_apart(service, copies, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(outbox, 'time', types.SimpleNamespace(
      monotonic=lambda: now[0]))
  with outbox.Outbox(remote.to_path('gs://bucket/run')) as box:
    for move, due in ((59, False), (2, True), (1, True)):
      now[0] += move
      assert box.is_due() == due
    box.send()
    assert not box.is_due()
    now[0] += 61
    assert box.is_due()
    copies.fails = lambda number: now.__setitem__(0, now[0] + 70) or True
    (box.directory / 'metrics.jsonl').write_text('1')
    said = []
    box.try_send(said.append)
    assert warnings(said) and not box.is_due()  # a minute of training is between
    copies.fails = lambda number: False


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
    event.write_bytes(b'yz')
    os.utime(event, ns=(1, 1))
    box.send()
    event.write_bytes(b'zy')  # as many bytes as before
    os.utime(event, ns=(2, 2))
  assert service.data('run/a/b/event') == b'zy' and len(puts) == 4
  assert not box.directory.exists()


def test_outbox_of_a_disk_is_the_workdir(tmp_path, monkeypatch):
  monkeypatch.setattr(outbox, 'SECONDS', -1.0)
  with outbox.Outbox(tmp_path, ('metrics.jsonl',)) as box:
    assert box.directory == tmp_path and not box.is_due()
    box.send()
  assert tmp_path.exists()


def test_outbox_hides_no_error(service):
  def refuse(name):
    raise Refused(403, 'no')
  service.written = refuse
  workdir = remote.to_path('gs://bucket/run')
  with pytest.raises(remote.RemoteError), outbox.Outbox(workdir) as box:
    (box.directory / 'a').write_text('x')
  with pytest.raises(ConfigError), outbox.Outbox(workdir) as box:
    (box.directory / 'a').write_text('x')
    raise ConfigError('the reason')
