"""What --check-data finds: complete, of another size, damaged, absent."""

from __future__ import annotations

import json
import shutil

import pytest
from benchmark_files import DATA, copied

from vlm_compress.eval.benchmarks import catalogue, check, seed


def found(root, key, split=''):
  """The line of one benchmark."""
  return next(one for one in check.check(root) if (one.benchmark, one.split) == (key, split))


def test_every_benchmark_and_split_has_a_line():
  lines = [(one.benchmark, one.split) for one in check.check(DATA)]
  assert len(set(lines)) == len(lines) == len(catalogue.BENCHMARKS) + 3
  assert {key for key, _ in lines} == set(catalogue.BENCHMARKS)


def test_small_files_are_of_another_size():
  one = found(DATA, 'gqa')
  assert one.state == 'other size'
  assert [str(part) for part in one.parts] == ['questions 152 of 12,578', 'images 40 of 398']
  assert (one.images, one.missing, one.example) == (40, 38, 'images/n100002.jpg')
  assert found(DATA, 'vqav2', 'test-dev').state == 'not there'


def test_complete_damaged_and_without_images(tmp_path):
  folder = tmp_path / 'vizwiz'
  folder.mkdir()
  rows = [{'image': f'{i % 100}.jpg', 'question': 'what?'} for i in range(8000)]
  rows = [{**row, 'image': f'{i}.jpg'} for i, row in enumerate(rows)]
  (folder / 'test.json').write_text(json.dumps(rows))
  one = found(tmp_path, 'vizwiz', 'test')
  assert (one.state, one.images, one.missing) == ('images missing', 8000, 8000)
  assert one.example == 'test/0.jpg'
  assert found(tmp_path, 'vizwiz', 'val').state == 'not there'
  assert found(tmp_path, 'gqa').state == 'not there'
  (folder / 'test').mkdir()
  for row in rows:
    (folder / 'test' / row['image']).write_bytes(b'x')
  assert found(tmp_path, 'vizwiz', 'test').state == 'complete'
  (folder / 'test/17.jpg').write_bytes(b'')  # as a broken download leaves it
  one = found(tmp_path, 'vizwiz', 'test')
  assert (one.state, one.missing, one.example) == ('images missing', 1, 'test/17.jpg')
  (folder / 'test.json').write_text('[{]')
  broken = found(tmp_path, 'vizwiz', 'test')
  assert broken.state == 'damaged' and 'line 1, column' in broken.problem


def test_the_directory_of_one_benchmark_will_do():
  assert found(DATA / 'gqa', 'gqa').parts
  assert found(DATA / 'gqa', 'seed').state == 'not there'


def test_a_directory_that_does_not_exist(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere does not exist'):
    check.check(tmp_path / 'nowhere')


def test_one_bad_benchmark_does_not_hide_the_others(tmp_path, monkeypatch):
  for key in ('mme', 'seed', 'gqa', 'vizwiz'):
    copied(key, tmp_path)
  (tmp_path / 'mme/MME_Benchmark_release_version/count/0009.txt').mkdir()
  monkeypatch.setattr(seed, 'read', lambda root: {}['what nobody has thought of'])
  assert found(tmp_path, 'mme').state == found(tmp_path, 'seed').state == 'damaged'
  assert '0009.txt' in found(tmp_path, 'mme').problem
  assert "KeyError: 'what nobody" in found(tmp_path, 'seed').problem
  assert found(tmp_path, 'gqa').state == found(tmp_path, 'vizwiz', 'val').state == 'other size'


def test_every_table_of_mmbench_has_a_line(tmp_path):
  root = copied('mmbench', tmp_path)
  shutil.copyfile(root / 'mmbench_dev_20230712.tsv', root / 'mmbench_dev_cn.tsv')
  for where in (tmp_path, root):
    lines = [one for one in check.check(where) if one.benchmark == 'mmbench']
    assert [(one.split, one.state, one.notes) for one in lines] == [
        (name, 'other size', (f'file: {name}',))
        for name in ('mmbench_dev_20230712.tsv', 'mmbench_dev_cn.tsv')]


@pytest.mark.parametrize('key', ['msvd_qa', 'msrvtt_qa', 'activitynet_qa'])
def test_of_the_video_sets_only_the_one_that_is_there_is_listed(key):
  states = {one.benchmark: one.state for one in check.check(DATA / key)}
  assert {name for name, state in states.items() if state != 'not there'} == {key}
