"""Start weights are read for their digest once, and changed ones are noticed."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from vlm_compress import atomic, remote
from vlm_compress.cli import start_weights
from vlm_compress.cli.start_weights import MEMORY, Digests


@pytest.fixture(name='reads')
def fixture_reads(monkeypatch):
  """Paths of the files that were read for their sum."""
  reads, real = [], start_weights.sha256
  monkeypatch.setattr(start_weights, 'sha256', lambda path: (
      reads.append(str(path)), real(path))[1])
  return reads


@pytest.fixture(name='weights')
def fixture_weights(tmp_path, monkeypatch):
  monkeypatch.setattr(start_weights, '_SETTLED_SECONDS', -1.0)
  (tmp_path / 'w').write_bytes(b'some weights')
  return tmp_path / 'w'


def start(workdir, path):
  """What a run does: asks, claims its workdir, and remembers."""
  digests = Digests(workdir)
  found = digests(path)
  digests.save()
  return found


def sum_of(data):
  return f'sha256:{hashlib.sha256(data).hexdigest()}'


def test_unchanged_weights_are_read_once(weights, tmp_path, reads):
  run = tmp_path / 'run'
  assert [start(run, weights) for _ in range(3)] == [sum_of(b'some weights')] * 3
  assert reads == [str(weights)]
  start(tmp_path / 'other', weights)  # another workdir remembers nothing of it
  assert len(reads) == 2


def in_place(path):
  before = path.stat()
  path.write_bytes(b'SOME weights')
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy may do


def replaced(path):
  with atomic.replace(path) as temporary:
    temporary.write_bytes(b'SOME weights')


@pytest.mark.parametrize('change', [in_place, replaced])
def test_changed_weights_of_the_same_size_are_noticed(weights, tmp_path, reads, change):
  start(tmp_path / 'run', weights)
  change(weights)
  assert start(tmp_path / 'run', weights) == sum_of(b'SOME weights')
  assert len(reads) == 2


def test_other_files_and_damage_are_noticed(weights, tmp_path, reads):
  run, other = tmp_path / 'run', tmp_path / 'v'
  other.write_bytes(b'more')
  start(run, weights)
  assert start(run, other) == sum_of(b'more')
  for text in ('{', '[]', '{"file": null}', '{"digest": 3}'):
    (run / MEMORY).write_text(text)
    assert start(run, other) == sum_of(b'more')
  known = json.loads((run / MEMORY).read_text())
  (run / MEMORY).write_text(json.dumps({**known, 'file': {**known['file'], 'bytes': 3}}))
  start(run, other)
  assert len(reads) == 7


def test_what_changed_a_moment_ago_is_not_remembered(weights, tmp_path, monkeypatch):
  monkeypatch.setattr(start_weights, '_SETTLED_SECONDS', 60.0)
  start(tmp_path / 'run', weights)
  assert not (tmp_path / 'run' / MEMORY).exists()


def test_nothing_is_written_before_the_workdir_is_claimed(weights, tmp_path):
  Digests(tmp_path / 'run')(weights)
  assert not (tmp_path / 'run').exists()


def test_objects_are_known_by_their_generation(tmp_path, reads):
  pytest.importorskip('gcsfs', reason='needs the extra [gcs]')
  pytest.importorskip('google_crc32c', reason='needs the extra [test]')
  from gcs_server import GcsServer
  with GcsServer() as service, service.here():
    run, path = (remote.to_path(f'gs://bucket/{name}') for name in ('run', 'w'))
    remote.write_bytes(path, b'some weights')
    assert [start(run, path) for _ in range(2)] == [sum_of(b'some weights')] * 2
    assert len(reads) == 1 and service.data(f'run/{MEMORY}')
    remote.write_bytes(path, b'SOME weights')
    assert start(run, path) == sum_of(b'SOME weights')
