"""LLaVA-format JSON: what is read, what is refused and with which words."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from vlm_compress.data.encode import encode
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Turn
from vlm_compress.data.llava_json import LlavaJson, pair_turns

CHAT = [{'from': 'human', 'value': '<image>\nwhat is it'},
        {'from': 'gpt', 'value': 'a dog'}]
TEXT_CHAT = [{'from': 'human', 'value': 'what'},
             {'from': 'gpt', 'value': 'a dog'}]


@pytest.fixture
def make(tmp_path, llava_files):
  """Writes rows (or raw text) and opens them; a.jpg and b/c.jpg exist."""
  picture = (llava_files / 'gqa/images/2370799.jpg').read_bytes()
  folder = tmp_path / 'images'
  (folder / 'b').mkdir(parents=True)
  (folder / 'a.jpg').write_bytes(picture)
  (folder / 'b/c.jpg').write_bytes(picture)
  (folder / 'empty.jpg').write_bytes(b'')
  (folder / 'cut.jpg').write_bytes(picture[:len(picture) // 2])

  def open_rows(rows, **kwargs):
    path = tmp_path / 'data.json'
    if isinstance(rows, bytes):
      path.write_bytes(rows)
    else:
      path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return LlavaJson(path, folder, **kwargs)
  return open_rows


def row(image='a.jpg', chat=CHAT, **extra):
  return {'id': 'x', 'image': image, 'conversations': chat, **extra}


def test_instruct_file(llava_files):
  source = LlavaJson(llava_files / 'llava_v1_5_mix665k.json', llava_files,
                     verify_images=True)
  assert len(source) == 8 and source.skipped == []
  first = source[0]
  assert first.example_id == '000000033471'
  assert first.turns == (
      Turn('<image>\nWhat colour is the bus?', 'The bus is white and red.'),
      Turn('What is on its back?', 'An advertisement.'))
  assert first.images == (
      (llava_files / 'coco/train2017/000000033471.jpg').read_bytes(),)
  assert first.metadata == {
      'id': '000000033471', 'row': 0,
      'image': ['coco/train2017/000000033471.jpg']}


def test_text_only_rows_and_first_assistant_message(llava_files):
  source = LlavaJson(llava_files / 'llava_v1_5_mix665k.json', llava_files)
  haiku, dropped = source[np.int64(6)], source[-1]
  assert haiku.images == () and haiku.metadata['model'] == ''
  assert haiku.turns[1] == Turn('Again', 'Old pond.')
  assert dropped.turns == (Turn('Hello', 'Hi!'),)
  with pytest.raises(IndexError):
    source[8]


def test_pretraining_file(llava_files):
  source = LlavaJson(llava_files / 'blip_laion_cc_sbu_558k.json',
                     llava_files / 'pretrain_images')
  assert [e.turns[0].answer for e in (source[0], source[1])] == [
      'a soft mattress on a wooden bed', 'a cake with blue icing']


def test_copy_for_a_worker_is_the_same(llava_files):
  source = LlavaJson(llava_files / 'llava_v1_5_mix665k.json', llava_files)
  copy = pickle.loads(pickle.dumps(source))
  assert repr(copy) == repr(source) and ' at 0x' not in repr(source)
  assert copy[3] == source[3]


@pytest.mark.parametrize('row_id, example_id', [
    (17, '17'), ('s', 's'), (None, 'None'), (1.5, '1.5'), (['a', 1], "['a', 1]")])
def test_ids_of_any_type(make, row_id, example_id):
  source = make([row(id=row_id), row(id=row_id)])
  assert [source[i].example_id for i in (0, 1)] == [example_id] * 2
  assert source[1].metadata['id'] == row_id


def test_row_without_id_has_its_number(make):
  rows = [row(), {'conversations': TEXT_CHAT}]
  assert make(rows)[1].example_id == '1'


def test_several_images(make, word_tokenizer):
  chat = [{'from': 'human', 'value': '<image><image>\nwhat is it'}, CHAT[1]]
  example = make([row(['a.jpg', 'b/c.jpg'], chat)])[0]
  assert len(example.images) == 2
  ids = encode(example, word_tokenizer, 'short').input_ids
  assert (ids == -200).sum() == 2


@pytest.mark.parametrize('image', [None, []])
def test_no_image_is_text_only(make, image):
  assert make([row(image, TEXT_CHAT)])[0].images == ()


def test_last_question_without_answer_is_dropped(make):
  chat = [*CHAT, {'from': 'human', 'value': 'and now?'}]
  assert len(make([row(chat=chat)])[0].turns) == 1


@pytest.mark.parametrize('text, message', [
    ('[{"id": 1,\n "image": }]', r'data.json: line 2, column 11: malformed'),
    ('', 'line 1, column 1: malformed JSON'),
    ('{"a": 1}', 'holds a JSON dict; it must be a list'),
    ('[]', 'has no usable row'),
    ('[3]', 'row 0: is a JSON int; it must be an object'),
    ('[{"id": "x", "image": "a.jpg", "image": "b.jpg"}]',
     "the key 'image' occurs twice in the object that begins with 'id': \"x\""),
    (b'[{"id": "\xff"}]', 'byte 9 is not UTF-8'),
    ('[' * 100_000, 'nested too deeply'),
])
def test_broken_files(make, text, message):
  with pytest.raises(DataError, match=message):
    make(text)


def message(sender, value):
  return {'from': sender, 'value': value}


@pytest.mark.parametrize('bad, error', [
    (row('none.jpg'), r"row 1 \(id 'x'\): image .*none.jpg is missing"),
    (row('empty.jpg'), 'empty.jpg is empty'),
    (row('b'), 'image .*b is missing'),
    (row('../data.json'), 'outside the data root'),
    (row('b/../../data.json'), 'outside the data root'),
    (row('/etc/passwd'), 'outside the data root'),
    (row('a\0.jpg'), 'outside the data root'),
    (row(''), "field 'image' holds ''"),
    (row(7), "field 'image' holds 7"),
    (row(['a.jpg', None]), "field 'image' holds None"),
    (row(chat=TEXT_CHAT), "0 <image> marker.* but 1 path"),
    (row(None), "1 <image> marker.* but 0 path"),
    (row(['a.jpg', 'a.jpg']), "1 <image> marker.* but 2 path"),
    (row(chat=[CHAT[0], message('gpt', '<image>')]), 'an answer contains'),
    (row(images=['a.jpg']), "field 'images' is not part of this format"),
    ({'id': 'x', 'video': 'v.mp4', 'conversations': TEXT_CHAT}, "field 'video'"),
    (row(chat=None), "field 'conversations' must be a list"),
    (row(chat=[]), "field 'conversations' must be a list"),
    (row(chat=['hi']), r'conversations\[0\] must be an object'),
    (row(chat=[message('user', 'q'), CHAT[1]]), "'from' is 'user'"),
    (row(chat=[message('human', 3), CHAT[1]]), "'value' must be a text, is int"),
    (row(chat=[*CHAT, CHAT[1]]), r"conversations\[2\] is from 'gpt'; turns must"),
    (row(chat=[CHAT[1], CHAT[1], CHAT[0]]), r"conversations\[1\] is from 'gpt'"),
    (row(chat=CHAT[:1]), 'no question with an answer'),
])
def test_wrong_rows(make, bad, error):
  with pytest.raises(DataError, match=error) as caught:
    make([row(), bad])
  assert 'data.json: row 1' in str(caught.value)
  assert '\n' not in str(caught.value)
  # Asked to, the source leaves the row out and says so.
  source = make([row(), bad, row()], skip_bad_rows=True)
  assert len(source) == 2 and source[1].metadata['row'] == 2
  assert [s.row for s in source.skipped] == [1]
  assert 'data.json: row 1' in source.skipped[0].reason


def test_broken_image_is_found_when_asked_to(make):
  assert len(make([row('cut.jpg')])) == 1
  with pytest.raises(DataError, match='row 0.*cut.jpg.*damaged or cut off'):
    make([row('cut.jpg')], verify_images=True)
  source = make([row('cut.jpg'), row()], verify_images=True,
                skip_bad_rows=True)
  assert len(source) == 1 and 'cut.jpg' in source.skipped[0].reason


def test_nothing_left_names_the_first_reason(make):
  with pytest.raises(DataError, match='no usable row.*none.jpg is missing'):
    make([row('none.jpg')], skip_bad_rows=True)


def test_image_that_disappears_later(make, tmp_path):
  source = make([row()])
  (tmp_path / 'images/a.jpg').unlink()
  with pytest.raises(DataError, match=r"row 0 \(id 'x'\): .*a.jpg"):
    source[0]


def test_missing_file_or_folder(tmp_path, llava_files):
  with pytest.raises(FileNotFoundError, match='data file .*none.json'):
    LlavaJson(tmp_path / 'none.json', tmp_path)
  with pytest.raises(FileNotFoundError, match='image folder .*none does not'):
    LlavaJson(llava_files / 'llava_v1_5_mix665k.json', tmp_path / 'none')


def test_pair_turns_keeps_markers_and_newlines():
  assert pair_turns(CHAT) == (Turn('<image>\nwhat is it', 'a dog'),)
