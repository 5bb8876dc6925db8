"""Conversations beside the records: the same examples, and no picture is read."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest

pytest.importorskip('PIL', reason='needs the extra [demo]')

import llava_rows  # noqa: E402

from vlm_compress.config import LlavaConfig, TextConfig, VisionConfig  # noqa: E402
from vlm_compress.data import conversations, images  # noqa: E402
from vlm_compress.data.errors import DataError  # noqa: E402
from vlm_compress.data.lengths import row_lengths  # noqa: E402
from vlm_compress.data.llava_json import LlavaJson  # noqa: E402
from vlm_compress.data.prepare import Preparation, prepare  # noqa: E402
from vlm_compress.data.prepared import PreparedSource  # noqa: E402
from vlm_compress.data.rows import RowSpec  # noqa: E402
from vlm_compress.data.tokenizer import word_level  # noqa: E402

WORDS = 'a\u2028 d\u00f6g\x85\n\U0001f600'  # ends of lines to some readers
TOKENIZER = word_level([*llava_rows.WORDS, WORDS])
CONFIG = LlavaConfig(
    vision=VisionConfig(image_size=24, patch_size=6),
    text=TextConfig(vocab_size=TOKENIZER.vocab_size),
    voco_token_index=TOKENIZER.vocab_size)
SPEC = RowSpec(template='vicuna_v1', num_voco_tokens=(0,), max_images=3,
               bucket_lengths=(60, 80, 120))


@pytest.fixture(scope='module', name='made')
def fixture_made(tmp_path_factory):
  """What is prepared: rows of 0, 1, 2 and, in row 20, 3 pictures; one is broken."""
  root = tmp_path_factory.mktemp('conversations')
  source = llava_rows.write(root)
  rows = json.loads(source.read_text())
  rows[20].update(image=['20.jpg', '3b.png', '4.jpg'], conversations=llava_rows.chat(
      ('<image><image>\n<image>' + WORDS, WORDS)))
  rows[7]['image'] = 'none.jpg'
  del rows[2]['id']
  source.write_text(json.dumps(rows))
  what = Preparation(source, root / 'images', root / 'out', shard_mb=0.015,
                     skip_broken=True)
  prepare(what)
  return what


@pytest.fixture(name='again')
def fixture_again(made, tmp_path):
  """The same in a directory of its own."""
  shutil.copytree(made.out, tmp_path / 'out')
  return dataclasses.replace(made, out=tmp_path / 'out')


def older(out):
  """Makes of a data set what was written before there were conversations."""
  shutil.rmtree(out / 'conversations')
  for path in [out / 'manifest.json', *(out / 'shards').iterdir()]:
    about = json.loads(path.read_text())
    for shard in about.get('shards', [about]):
      del shard['conversations']
    path.write_text(json.dumps(about, indent=1, sort_keys='shards' in about))


def test_they_are_the_examples_without_pictures(made):
  prepared = PreparedSource(made.out)
  expected = LlavaJson(made.json_file, made.image_folder, skip_bad_rows=True)
  assert prepared.has_conversations and len(prepared) == len(expected) == 22
  assert len({row['file'] for row in json.loads(
      (made.out / 'manifest.json').read_text())['shards']}) > 2
  for i in range(len(prepared)):
    assert prepared.conversation(i) == expected.conversation(i)
    assert prepared.conversation(i) == dataclasses.replace(
        prepared[i], images=(b'',) * len(prepared[i].images))
  assert prepared.conversation(-1) == expected.conversation(21)
  with pytest.raises(IndexError, match='22 rows'):
    prepared.conversation(22)


@pytest.mark.parametrize('split', ['train[5:17]', 'train[:3]', 'train[20:]',
                                   'train[10%:60%]'])
def test_of_a_part_they_are_those_of_the_part(made, split):
  part = pickle.loads(pickle.dumps(PreparedSource(made.out, split)))
  assert [part.conversation(i).metadata['row'] for i in range(len(part))] == [
      part[i].metadata['row'] for i in range(len(part))]


def measured(source, folder, said=None):
  said = [] if said is None else said
  return row_lengths(source, SPEC, TOKENIZER, CONFIG, frozen=False, fingerprint='a',
                     cache_dir=folder, message=said.append)


def test_lengths_are_the_same_and_no_record_is_read(again, tmp_path, monkeypatch):
  source, said = PreparedSource(again.out), []
  whole = [source[i] for i in range(len(source))]
  expected = measured(whole, tmp_path / 'whole')
  assert set(expected.images) == {0, 1, 2, 3} and len(set(expected.tokens)) > 4
  with monkeypatch.context() as patch:
    def read(*args):
      raise AssertionError('a record is read')
    patch.setattr(PreparedSource, '__getitem__', read)
    found = measured(source, tmp_path / 'found', said)
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  np.testing.assert_array_equal(found.images, expected.images)
  assert not any('older version' in line for line in said)
  older(again.out)
  source = PreparedSource(again.out)
  assert not source.has_conversations
  found = measured(source, tmp_path / 'older', said)
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  assert any('older version' in line and 'prepare-data' in line for line in said)


def content(out):
  return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob('*')
          if p.is_file()}


def test_prepare_data_adds_them_without_a_picture(again, monkeypatch):
  before, known = content(again.out), PreparedSource(again.out).fingerprint
  assert sum(name.startswith('conversations/') for name in before) > 2
  older(again.out)
  with monkeypatch.context() as patch:
    patch.setattr(images, 'read_bytes', None)
    assert prepare(again).num_written == 0
  assert content(again.out) == before
  assert PreparedSource(again.out).fingerprint == known


def test_damage_is_found_and_mended(again):
  before = content(again.out)
  path = sorted((again.out / 'conversations').iterdir())[1]
  path.write_bytes(path.read_bytes()[:-1])
  source = PreparedSource(again.out)
  with pytest.raises(DataError, match=f'{path.name} is damaged.*prepare-data'):
    [source.conversation(i) for i in range(len(source))]
  path.unlink()
  with pytest.raises(DataError, match=f'{path.name} cannot be read.*prepare-data'):
    [source.conversation(i) for i in range(len(source))]
  prepare(again)
  assert content(again.out) == before


def test_an_entry_that_lacks_fields_is_named(again):
  path = again.out / 'manifest.json'
  about = json.loads(path.read_text())
  del about['shards'][1]['conversations']['sha256']
  path.write_text(json.dumps(about))
  with pytest.raises(DataError, match='conversations lack fields'):
    PreparedSource(again.out)


@pytest.mark.parametrize('split, most', [
    ('train', 3), ('train[:10]', 2), ('train[:3]', 1), ('train[19:20]', 3),
    ('train[20:]', 1), ('train[1:2]', 0)])
def test_most_pictures_of_a_row(made, split, most):
  source = PreparedSource(made.out, split)
  assert [len(source[i].images) for i in range(len(source))].count(most) > 0
  assert source.most_pictures() == (most, True)


def test_of_whole_shards_no_file_is_read_for_it(made, monkeypatch):
  monkeypatch.setattr(conversations, '_read', None)
  assert PreparedSource(made.out).most_pictures() == (3, True)


def test_most_pictures_of_older_data(again):
  older(again.out)
  assert PreparedSource(again.out).most_pictures() == (2, False)
  assert PreparedSource(again.out, 'train[:3]').most_pictures() == (0, False)
