"""Prepared data as a source: equal to the file, and damage is found."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest

pytest.importorskip('PIL', reason='needs the extra [demo]')

import llava_rows  # noqa: E402
from etils import epath  # noqa: E402

from vlm_compress import remote  # noqa: E402
from vlm_compress.config import ConfigError  # noqa: E402
from vlm_compress.data import manifest  # noqa: E402
from vlm_compress.data.errors import DataError  # noqa: E402
from vlm_compress.data.llava_json import LlavaJson  # noqa: E402
from vlm_compress.data.prepare import Preparation, prepare  # noqa: E402
from vlm_compress.data.prepared import PreparedSource  # noqa: E402


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """(JSON file, directory of the data set); shards have a middle."""
  root = tmp_path_factory.mktemp('made')
  source = llava_rows.write(root)
  patch = pytest.MonkeyPatch()
  patch.setattr(manifest, 'EDGE', 100)
  prepare(Preparation(source, root / 'images', root / 'out', shard_mb=0.015))
  yield source, root / 'out'
  patch.undo()


@pytest.fixture
def copy(made, tmp_path):
  shutil.copytree(made[1], tmp_path / 'copy')
  return tmp_path / 'copy'


def shard_paths(directory):
  return sorted(directory.glob('*.array_record-*'))


def test_examples_are_those_of_the_file(made):
  source, directory = made
  expected = LlavaJson(source, source.parent / 'images')
  prepared = PreparedSource(directory, verify=True)
  assert len(shard_paths(directory)) > 2
  assert len(prepared) == len(expected) == llava_rows.NUM_ROWS
  for i in range(len(expected)):
    assert prepared[i] == expected[i]
  assert prepared[-1] == expected[-1]
  assert prepared.counts['text_only'] == 5
  with pytest.raises(IndexError, match='23 rows'):
    prepared[23]


def test_copy_for_another_process_is_the_same(made):
  prepared = PreparedSource(made[1])
  prepared[0]  # opens a reader, which cannot be sent
  again = pickle.loads(pickle.dumps(prepared))
  assert again[7] == prepared[7] and again.fingerprint == prepared.fingerprint
  assert len(pickle.dumps(prepared)) < 10_000


def test_parts_of_the_split(made):
  whole = PreparedSource(made[1])
  part = PreparedSource(made[1], 'train[5:17]')
  assert [part[i].metadata['row'] for i in range(len(part))] == list(range(5, 17))
  assert len(PreparedSource(made[1], 'train[:50%]')) in (11, 12)
  assert part.fingerprint != whole.fingerprint


@pytest.mark.parametrize('split', ['test', 'train[:150%]', 'train+train',
                                   'train[3:3]', 'train[:x]'])
def test_wrong_splits(made, split):
  with pytest.raises(ConfigError, match=r"split"):
    PreparedSource(made[1], split)


def test_fingerprint_follows_the_content(made, tmp_path):
  source = llava_rows.write(tmp_path)
  options = dict(shard_mb=0.015)
  same = tmp_path / 'same'
  prepare(Preparation(source, tmp_path / 'images', same, **options))
  assert PreparedSource(same).fingerprint == PreparedSource(
      made[1]).fingerprint
  llava_rows.picture(tmp_path / 'images/0.jpg', 999)
  other = tmp_path / 'other'
  prepare(Preparation(source, tmp_path / 'images', other, **options))
  assert PreparedSource(other).fingerprint != PreparedSource(same).fingerprint


def flip(path, place):
  data = bytearray(path.read_bytes())
  data[place] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize('damage, words', [
    (lambda d: flip(shard_paths(d)[1], 50), ['00001', 'edges']),
    (lambda d: flip(shard_paths(d)[1], -50), ['00001', 'edges']),
    (lambda d: shard_paths(d)[2].unlink(), ['00002', 'is missing']),
    (lambda d: shard_paths(d)[0].write_bytes(b'x'), ['00000', 'has 1 bytes']),
    (lambda d: (d / 'manifest.json').unlink(), ['manifest.json', 'missing']),
    (lambda d: (d / 'manifest.json').write_text('{'), ['manifest.json', 'JSON']),
    (lambda d: (d / 'manifest.json').write_text('{"format": 9}'), ['format']),
    (lambda d: (d / 'manifest.json').write_text('{"format": 1}'), ['fields']),
    (lambda d: (d / 'dataset_info.json').unlink(), ['dataset_info.json']),
    (lambda d: (d / 'features.json').write_text('{"a'), ['features.json'])])
def test_damage_is_found_when_it_is_opened(copy, damage, words):
  damage(copy)
  with pytest.raises(DataError) as caught:
    PreparedSource(copy)
  message = str(caught.value)
  assert all(word in message for word in (*words, 'prepare-data')), message


def test_damage_between_the_edges_is_found_when_it_is_read(copy):
  path = shard_paths(copy)[0]
  flip(path, path.stat().st_size // 2)
  prepared = PreparedSource(copy)
  with pytest.raises(DataError, match='SHA-256'):
    PreparedSource(copy, verify=True)
  with pytest.raises(DataError, match='record . cannot be read.*prepare-data'):
    for i in range(10):
      prepared[i]


def test_metadata_of_other_data_is_found(copy):
  path = copy / 'dataset_info.json'
  info = json.loads(path.read_text())
  lengths = info['splits'][0]['shardLengths']
  lengths[0], lengths[1] = str(int(lengths[0]) - 1), str(int(lengths[1]) + 1)
  path.write_text(json.dumps(info))
  with pytest.raises(DataError, match='different data sets'):
    PreparedSource(copy)


def test_no_directory(tmp_path):
  with pytest.raises(FileNotFoundError, match='none'):
    PreparedSource(tmp_path / 'none')
  with pytest.raises(DataError, match='prepare-data'):
    PreparedSource(tmp_path)


def test_remote_disk_that_cannot_be_reached(monkeypatch):
  def unreachable(path):
    raise RuntimeError('no credentials\nand much more')
  monkeypatch.setattr(type(epath.Path('gs://bucket')), 'exists', unreachable)
  with pytest.raises(remote.RemoteError, match='cannot be read .RuntimeError: no '
                     r'credentials\); check') as caught:
    PreparedSource('gs://bucket/data')
  assert caught.value.filename == 'gs://bucket/data/manifest.json'


def test_a_disk_that_does_not_give_a_record_is_not_damage(copy):
  prepared = PreparedSource(copy)
  shard_paths(copy)[0].unlink()
  with pytest.raises(DataError, match='record 0 cannot be read .*No such file.*'
                     'run again') as caught:
    prepared[0]
  assert 'prepare-data' not in str(caught.value)
