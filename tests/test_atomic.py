"""Files are written whole or not at all, and leave nothing else behind."""

from __future__ import annotations

import os
import stat

import pytest

from vlm_compress import atomic
from vlm_compress.train import checkpoint


def test_text_makes_its_directories_and_replaces_an_older_file(tmp_path):
  path = tmp_path / 'a' / 'b' / 'file.txt'
  for text in ('old', 'new \u00fc\n'):
    atomic.write_text(path, text)
    assert path.read_bytes() == text.encode('utf-8')
  assert [p.name for p in path.parent.iterdir()] == ['file.txt']


@pytest.mark.parametrize('failing', ['replace', 'fsync'])
def test_what_fails_on_disk_changes_nothing(failing, tmp_path, monkeypatch):
  path = tmp_path / 'file.txt'
  atomic.write_text(path, 'old')

  def full(*_):
    raise OSError('No space left on device')
  monkeypatch.setattr(os, failing, full)
  with pytest.raises(OSError, match='No space'):
    checkpoint.write_text(path, 'new')
  assert path.read_text() == 'old'
  assert [p.name for p in tmp_path.iterdir()] == ['file.txt']


def test_a_block_that_raises_changes_nothing(tmp_path):
  path = tmp_path / 'file.bin'
  path.write_bytes(b'old')
  with pytest.raises(KeyboardInterrupt), atomic.replace(path) as temporary:
    temporary.write_bytes(b'half')
    assert path.read_bytes() == b'old'
    raise KeyboardInterrupt
  assert path.read_bytes() == b'old'
  assert [p.name for p in tmp_path.iterdir()] == ['file.bin']


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError, SystemExit])
@pytest.mark.parametrize('there', [True, False])
def test_a_directory_that_is_half_full_is_gone(error, there, tmp_path):
  path = tmp_path / 'above' / 'model'
  if there:
    path.mkdir(parents=True)
  with pytest.raises(error), atomic.directory(path) as work:
    assert work.parent == path.parent and work != path
    (work / 'inner').mkdir()
    (work / 'inner/file').write_text('half')
    raise error
  assert path.is_dir() == there and not (there and [*path.iterdir()])
  assert [p.name for p in path.parent.iterdir()] == ['model'] * there


def test_a_directory_appears_whole(tmp_path):
  path = tmp_path / 'model'
  with atomic.directory(path) as work:
    (work / 'file').write_text('all')
    assert not path.exists()
  assert (path / 'file').read_text() == 'all'
  assert [p.name for p in tmp_path.iterdir()] == ['model']
  for taken in (path, path / 'file'):  # nothing is written over
    with pytest.raises(FileExistsError), atomic.directory(taken):
      pytest.fail('entered')
  assert (path / 'file').read_text() == 'all'
  assert [p.name for p in tmp_path.iterdir()] == ['model']


def test_two_writers_do_not_meet(tmp_path):
  path = tmp_path / 'file.bin'
  with atomic.replace(path) as outer, atomic.replace(path) as inner:
    assert outer != inner and outer.parent == inner.parent == tmp_path
    outer.write_bytes(b'outer')
    inner.write_bytes(b'inner')
  assert path.read_bytes() == b'outer'


def test_files_have_the_usual_permissions(tmp_path):
  plain = tmp_path / 'plain'
  plain.write_text('')
  atomic.write_text(tmp_path / 'file', '')
  assert stat.S_IMODE((tmp_path / 'file').stat().st_mode) == stat.S_IMODE(
      plain.stat().st_mode)
