"""What --check-data finds: complete, of another size, damaged, absent."""

from __future__ import annotations

import json

import pytest
from benchmark_files import DATA

from vlm_compress.eval.benchmarks import catalogue, check


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
  assert found(DATA, 'vqav2', 'test').state == 'not there'


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
    (folder / 'test' / row['image']).touch()
  assert found(tmp_path, 'vizwiz', 'test').state == 'complete'
  (folder / 'test.json').write_text('[{]')
  broken = found(tmp_path, 'vizwiz', 'test')
  assert broken.state == 'damaged' and 'line 1, column' in broken.problem


def test_the_directory_of_one_benchmark_will_do():
  assert found(DATA / 'gqa', 'gqa').parts
  assert found(DATA / 'gqa', 'seed').state == 'not there'


def test_a_directory_that_does_not_exist(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere does not exist'):
    check.check(tmp_path / 'nowhere')
