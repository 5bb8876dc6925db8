"""Rows with pixels, rows that are cut, and the lengths of rows."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest

pytest.importorskip('PIL', reason='needs the extra [demo]')

import core_helpers as helpers  # noqa: E402
import llava_rows  # noqa: E402

from vlm_compress.config import ConfigError  # noqa: E402
from vlm_compress.data import images, lengths  # noqa: E402
from vlm_compress.data.encode import EncodedRow, encode, expanded_length, truncate  # noqa: E402
from vlm_compress.data.errors import DataError  # noqa: E402
from vlm_compress.data.examples import Example, Turn  # noqa: E402
from vlm_compress.data.llava_json import LlavaJson  # noqa: E402
from vlm_compress.data.prepare import Preparation, prepare  # noqa: E402
from vlm_compress.data.prepared import PreparedSource  # noqa: E402
from vlm_compress.data.rows import (  # noqa: E402
  RowSpec,
  plain_collate,
  row_maker,
  voco_collate,
)
from vlm_compress.data.tokenizer import word_level  # noqa: E402
from vlm_compress.models.sequence import VISUAL, VOCO  # noqa: E402

TOKENIZER = word_level(llava_rows.WORDS)
VOCO_ID = TOKENIZER.vocab_size
CONFIG = helpers.tiny(
    voco=helpers.voco_config(2).voco, voco_token_index=VOCO_ID,
    text=dataclasses.replace(helpers.tiny().text, vocab_size=VOCO_ID))
P, SIZE = CONFIG.num_visual_tokens, CONFIG.vision.image_size
CHAT = RowSpec(template='vicuna_v1', independent_turns=False, length=160,
               max_images=2)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  root = tmp_path_factory.mktemp('rows')
  return LlavaJson(llava_rows.write(root), root / 'images')


def rows_of(source, spec, indices):
  maker = row_maker(spec, TOKENIZER, CONFIG, None)
  return [maker(i, source[i], np.random.default_rng(i)) for i in indices]


@pytest.mark.parametrize('mode', ['pad', 'crop'])
def test_batch_of_none_one_and_two_pictures(source, mode):
  spec = dataclasses.replace(CHAT, image_aspect_ratio=mode)
  indices = [0, 1, 3, 7]  # one picture, text only, two, one
  batch = plain_collate(spec)(rows_of(source, spec, indices))
  assert batch.features.dtype == np.uint8
  assert batch.features.shape == (4, 2, SIZE, SIZE, 3)
  np.testing.assert_array_equal(
      batch.image_valid, [[1, 0], [0, 0], [1, 1], [1, 0]])
  for b, i in enumerate(indices):
    for k in range(2):
      expected = np.zeros((SIZE, SIZE, 3), np.uint8)
      if k < len(source[i].images):
        expected = images.clip_pixels(images.decode(source[i].images[k]), SIZE,
                                      mode)
      np.testing.assert_array_equal(batch.features[b, k], expected)
  counts = (batch.token_types == VISUAL).sum(1)
  np.testing.assert_array_equal(counts, [P, 0, 2 * P, P])
  assert batch.turn_ids is None and batch.loss_mask.any(1).all()


def test_text_only_batch_keeps_its_shape(source):
  batch = plain_collate(CHAT)(rows_of(source, CHAT, [1, 6]))
  assert batch.features.shape == (2, 2, SIZE, SIZE, 3)
  assert batch.features.dtype == np.uint8 and not batch.image_valid.any()


def png():
  from PIL import Image
  stream = io.BytesIO()
  Image.new('RGB', (8, 8), (9, 9, 9)).save(stream, 'PNG')
  return stream.getvalue()


def visual_starts(example, spec):
  row = row_maker(spec, TOKENIZER, CONFIG, None)(
      0, example, np.random.default_rng(0))
  types = row.tokens['token_types'] == VISUAL
  return np.flatnonzero(np.diff(types.astype(int), prepend=0) == 1)


def test_pictures_of_a_conversation_stay_with_their_questions():
  example = Example('x', (Turn('what is it', 'red'),
                          Turn('<image>\nwhere is it', 'top left')), (png(),))
  late, front = visual_starts(example, CHAT), visual_starts(
      example, dataclasses.replace(CHAT, one_turn=True))
  assert late[0] > front[0]


def test_too_many_pictures_name_the_row(source):
  spec = dataclasses.replace(CHAT, max_images=1)
  with pytest.raises(DataError, match="'two-3' has 2 pictures.*max_images=1"):
    rows_of(source, spec, [3])


def test_damaged_picture_names_the_row():
  example = Example('x', (Turn('<image>what is it', 'red'),), (b'nothing',))
  with pytest.raises(DataError, match="'x': picture 1"):
    row_maker(CHAT, TOKENIZER, CONFIG, None)(0, example,
                                             np.random.default_rng(0))


# Cutting ---------------------------------------------------------------------

IMAGE = -200


def cut(ids, limit, num_visual=4):
  ids = np.asarray(ids, np.int32)
  row = EncodedRow(ids, ids > 5, np.zeros_like(ids))
  found = truncate(row, limit, num_visual, IMAGE, 99)
  assert len(found.loss_mask) == len(found.turn_ids) == len(found)
  assert expanded_length(found, num_visual, IMAGE) <= limit
  return found.input_ids.tolist()


@pytest.mark.parametrize('limit, kept', [
    (12, 6), (11, 5), (10, 4), (9, 3), (8, 2), (6, 2), (5, 2), (4, 1), (1, 1)])
def test_cut_never_inside_an_image(limit, kept):
  ids = [1, IMAGE, IMAGE, 7, 8, 9]  # end at 1, 5, 9, 10, 11, 12 tokens
  assert cut(ids, limit) == ids[:kept]


@pytest.mark.parametrize('limit, kept', [
    (17, 11), (16, 10), (15, 9), (14, 5), (12, 5), (9, 5), (8, 5), (7, 1), (5, 1)])
def test_cut_never_inside_a_compression_segment(limit, kept):
  ids = [1, IMAGE, 5, 99, 99, IMAGE, 5, 99, 99, 7, 8]
  # end at 1, 5,   6, 7,  8,  12,    13, 14, 15, 16, 17 tokens
  assert cut(ids, limit) == ids[:kept]


def test_row_longer_than_the_longest_bucket_is_cut(source):
  spec = dataclasses.replace(CHAT, bucket_lengths=(40, 70), length=1)
  long = Example('x', (Turn('<image>what is it', 'a dog'),
                       Turn('<image>where is it', 'red ' * 30)), (png(),) * 2)
  row = row_maker(spec, TOKENIZER, CONFIG, None)(0, long,
                                                 np.random.default_rng(0))
  whole = row_maker(CHAT, TOKENIZER, CONFIG, None)(0, long,
                                                   np.random.default_rng(0))
  size = len(row.tokens['input_ids'])
  assert size <= 70 < len(whole.tokens['input_ids'])
  for name, values in row.tokens.items():
    np.testing.assert_array_equal(values, whole.tokens[name][:size])
  batch = plain_collate(spec)([row], 70)
  assert (batch.token_types == VISUAL).sum() == P
  assert batch.image_valid.tolist() == [[True, False]]
  with pytest.raises(ConfigError, match='bucket_lengths.*takes 17 tokens'):
    row_maker(dataclasses.replace(spec, bucket_lengths=(17,)), TOKENIZER,
              CONFIG, None)(0, long, np.random.default_rng(0))


# VoCo in buckets --------------------------------------------------------------


def test_voco_batches_in_buckets(source):
  spec = RowSpec(template='voco', independent_turns=False, length=1,
                 text_length=95, num_voco_tokens=(2,), max_images=2,
                 bucket_lengths=(110, 120))
  rows = rows_of(source, spec, [0, 3])
  for length in (110, 120):
    split, teacher = voco_collate(spec, CONFIG)(rows, length)
    assert teacher is None
    assert split.text.input_ids.shape == (2, min(95, length - P - 2))
    assert split.voco_positions.shape == (2, 2, 2)
    assert split.text.features.dtype == np.uint8
    batch = plain_collate(spec)(rows, length)
    assert (batch.token_types == VOCO).sum(1).tolist() == [2, 4]


# Lengths -----------------------------------------------------------------------


SPECS = {
    'chat': CHAT,
    'cut': dataclasses.replace(CHAT, bucket_lengths=(60, 80)),
    'one': dataclasses.replace(CHAT, one_turn=True),
    'free': dataclasses.replace(CHAT, independent_turns=True),
    'voco': dataclasses.replace(CHAT, template='voco', num_voco_tokens=(2,))}


def measured(source, spec, folder, **kwargs):
  return lengths.row_lengths(
      source, spec, TOKENIZER, CONFIG, **{
          'frozen': False, 'fingerprint': 'f', 'cache_dir': folder,
          'message': lambda line: None, **kwargs})


@pytest.mark.parametrize('name', SPECS)
def test_lengths_are_those_of_the_rows(source, tmp_path, name):
  spec = SPECS[name]
  found = measured(source, spec, tmp_path)
  seen = np.zeros(len(source), int)
  maker = row_maker(dataclasses.replace(spec, bucket_lengths=()), TOKENIZER,
                    CONFIG, None)
  for epoch in range(24 if name in ('one', 'free') else 1):
    for i in range(len(source)):
      row = maker(i, source[i], np.random.default_rng([epoch, i]))
      seen[i] = max(seen[i], len(row.tokens['input_ids']))
  np.testing.assert_array_equal(found.tokens, seen)
  counts = [len(source[i].images) for i in range(len(source))]
  if name == 'cut':
    assert (found.tokens > 80).any() and (found.images <= counts).all()
  else:
    np.testing.assert_array_equal(found.images, counts)


def test_length_of_permuted_turns_is_the_most_they_can_have(tiny_bpe, tmp_path):
  # behind an answer 'ba' takes one more token than in front, 'ab' does not
  example = Example('x', (Turn('ba', 'a'), Turn('ab', 'a')), (png(),))
  spec = RowSpec(template='short')
  maker = row_maker(spec, tiny_bpe, CONFIG, None)
  seen = [len(maker(0, example, np.random.default_rng(i)).tokens['input_ids'])
          for i in range(20)]
  found = lengths.row_lengths(
      [example], spec, tiny_bpe, CONFIG, frozen=False, fingerprint='',
      cache_dir=tmp_path, message=lambda line: None)
  assert found.tokens.tolist() == [max(seen)] and min(seen) == max(seen) - 1


def test_lengths_are_measured_once_per_setting(source, tmp_path, monkeypatch):
  first = measured(source, CHAT, tmp_path)
  calls = []
  monkeypatch.setattr(lengths, 'encode', lambda *args, **kwargs: (
      calls.append(1), encode(*args, **kwargs))[1])
  again = measured(source, CHAT, tmp_path)
  assert not calls and (again.tokens == first.tokens).all()
  others = [dict(spec=SPECS['one']), dict(spec=SPECS['cut']),
            dict(spec=dataclasses.replace(CHAT, template='voco')),
            dict(fingerprint='g')]
  for changes in others:
    before = len(calls)
    measured(source, changes.pop('spec', CHAT), tmp_path, **changes)
    assert len(calls) > before
  assert len(list(tmp_path.glob('*.npy'))) == 1 + len(others)


def test_pictures_are_not_read_for_lengths(source, tmp_path, monkeypatch):
  want, spec = measured(source, CHAT, tmp_path / 'a'), SPECS['cut']
  bare = source.conversation(3)
  assert bare.images == (b'', b'')
  assert dataclasses.replace(bare, images=source[3].images) == source[3]

  def read(folder, name):
    raise AssertionError(f'{name} is read')
  monkeypatch.setattr(images, 'read_bytes', read)
  again = measured(source, CHAT, tmp_path / 'b')
  assert (again.tokens == want.tokens).all() and (again.images == want.images).all()
  assert measured(source, spec, tmp_path / 'b').images.max() == 2


def test_another_process_may_have_written_lengths(source, tmp_path, monkeypatch):
  first = measured(source, CHAT, tmp_path / 'a')
  monkeypatch.setattr(lengths, '_measure', None)  # nothing is measured here

  def arrive(path):
    path.parent.mkdir()
    path.write_bytes((tmp_path / 'a' / path.name).read_bytes())
  again = measured(source, CHAT, tmp_path / 'b', wait_for=arrive)
  assert (again.tokens == first.tokens).all()


def test_a_damaged_file_of_lengths_is_made_again(source, tmp_path):
  first, said = measured(source, CHAT, tmp_path), []
  path = next(tmp_path.glob('*.npy'))
  path.write_bytes(path.read_bytes()[:-8])
  again = measured(source, CHAT, tmp_path, message=said.append)
  assert (again.tokens == first.tokens).all() and 'warning' in said[0]


def test_a_row_that_cannot_be_made_is_named(source, tmp_path):
  with pytest.raises(DataError, match='row 3 of .*two-3'):
    measured(source, dataclasses.replace(CHAT, max_images=1), tmp_path)
  with pytest.raises(DataError, match='row 0 of .*exactly one'):
    measured([Example('x', (Turn('what is it', 'red'),))], CHAT, tmp_path,
             frozen=True)
  assert not list(tmp_path.iterdir())


def test_several_processes_measure_the_same(source, tmp_path, monkeypatch):
  root = tmp_path / 'made'
  file = llava_rows.write(root)
  prepare(Preparation(file, root / 'images', root / 'out', shard_mb=0.02))
  monkeypatch.setattr(lengths, '_CHUNK', 6)
  found = measured(PreparedSource(root / 'out'), CHAT, tmp_path / 'a', workers=2)
  alone = measured(source, CHAT, tmp_path / 'b')
  assert (found.tokens == alone.tokens).all()
  assert (found.images == alone.images).all()
