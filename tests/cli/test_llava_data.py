"""A LLaVA-format file as training data: batches, features, mistakes."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

pytest.importorskip('PIL', reason='needs the extra [demo]')

from PIL import Image  # noqa: E402

from vlm_compress.cli import stage as stage_lib  # noqa: E402
from vlm_compress.cli import workspace  # noqa: E402
from vlm_compress.cli.quickstart_config import get_config  # noqa: E402
from vlm_compress.config import ConfigError  # noqa: E402
from vlm_compress.data import tokenizer as tokenizer_lib  # noqa: E402
from vlm_compress.data.errors import DataError  # noqa: E402
from vlm_compress.data.rows import image_in_front  # noqa: E402

WORDS = ['what is it', 'where is it', 'which color', 'a dog', 'top left',
         'red', '\n']


def chat(*turns):
  return [{'from': who, 'value': text} for question, answer in turns
          for who, text in (('human', question), ('gpt', answer))]


ROWS = [
    {'id': 'first', 'image': '0.png', 'conversations': chat(
        ('<image>\nwhat is it', 'a dog'), ('where is it', 'top left'),
        ('which color', 'red'))},
    {'id': 'last', 'image': '1.png', 'conversations': chat(
        ('what is it', 'a dog'), ('which color', 'red'),
        ('where is it\n<image>', 'top left'))},
    {'id': 'one', 'image': '2.png', 'conversations': chat(
        ('<image>\nwhich color', 'red'))},
]


@pytest.fixture
def made(tmp_path, monkeypatch):
  """(rows) -> path of a JSON file; three pictures and a fake encoder."""
  (tmp_path / 'images').mkdir()
  for i in range(3):
    Image.new('RGB', (20, 10), (80 * i, 0, 0)).save(
        tmp_path / 'images' / f'{i}.png')
  tokenizer_lib.word_level(WORDS).save(tmp_path / 'tokenizer.json')
  calls = []

  def encode(pixels):
    calls.append(len(pixels))
    mean = pixels.astype(np.float32).mean((1, 2, 3))[:, None, None]
    return np.broadcast_to(mean, (len(pixels), 64, 112))
  monkeypatch.setattr(workspace, 'encoder', lambda: (encode, 'fake'))

  def write(rows):
    path = tmp_path / 'data.json'
    path.write_text(json.dumps(rows))
    return path
  write.calls = calls
  return write


def stage_of(path, name='instruct', **rows):
  config = get_config(name)
  config.data.update(name='llava_json', train_split=str(path),
                     tokenizer=str(path.parent / 'tokenizer.json'))
  config.data.options = {'image_folder': str(path.parent / 'images')}
  config.rows.kinds = {}
  config.rows.update(num_voco_tokens=(0, 2), **rows)
  config.train.batch_size = 6
  return stage_lib.bridge(config)


def opened(stage, root):
  return workspace.open_split(stage.data, stage.data.train_split, root,
                              lambda line: None)


@pytest.mark.parametrize('rows', [
    {}, {'independent_turns': False}, {'one_turn': True}])
def test_batches_do_not_depend_on_which_turn_has_the_marker(
    made, tmp_path, rows):
  stage = stage_of(made(ROWS), **rows)
  split = opened(stage, tmp_path)
  tokenizer = workspace.tokenizer_for(stage.data, split.examples)
  config = workspace.model_config(stage.model, tokenizer)
  batches = stage_lib.stage_batches(stage, config, split, tokenizer)
  means = set()
  for _ in range(4):
    batch = next(batches)
    visual = np.asarray(batch.token_types) == 2
    assert visual.sum(1).tolist() == [64] * 6
    # the picture is in front of all turns: seen by each of them
    turns = batch.turn_ids  # None: all of a row see each other
    assert turns is None or not np.asarray(turns)[visual].any()
    first_target = np.argmax(np.asarray(batch.loss_mask), 1)
    last_visual = visual.shape[1] - 1 - np.argmax(visual[:, ::-1], 1)
    assert (last_visual < first_target).all()
    means |= {round(float(m), 1) for m in np.asarray(batch.features).mean(
        (1, 2, 3))}
  assert len(means) == 3  # all rows came


def test_marker_is_taken_out_of_every_turn(made, tmp_path):
  split = opened(stage_of(made(ROWS)), tmp_path)
  assert [t.question for t in image_in_front(split.examples[1]).turns] == [
      'what is it', 'which color', 'where is it']


@pytest.mark.parametrize('bad, words', [
    ({'id': 'text', 'conversations': chat(('what is it', 'a dog'))},
     ["row 3 (id 'text')", '0 pictures', 'text-only']),
    ({'id': 'two', 'image': ['0.png', '1.png'], 'conversations': chat(
        ('<image> <image> what is it', 'a dog'))},
     ["row 3 (id 'two')", '2 pictures', 'exactly one'])])
def test_rows_without_exactly_one_picture_are_refused_at_once(
    made, tmp_path, bad, words):
  stage = stage_of(made([*ROWS, bad]))
  with pytest.raises(DataError) as caught:
    opened(stage, tmp_path)
  assert all(word in str(caught.value) for word in words), caught.value
  assert made.calls == []  # before any picture is encoded


def test_features_are_made_again_when_a_picture_or_the_folder_changes(
    made, tmp_path):
  stage = stage_of(made(ROWS))
  path = lambda: opened(stage, tmp_path).features.path
  before = path()
  assert path() == before and len(made.calls) == 1
  Image.new('RGB', (20, 10), (9, 9, 9)).save(tmp_path / 'images' / '1.png')
  changed = path()
  assert changed != before and len(made.calls) == 2
  stat = (tmp_path / 'images' / '2.png').stat()  # same size, other time
  os.utime(tmp_path / 'images' / '2.png', ns=(0, stat.st_mtime_ns + 10**9))
  assert path() not in (before, changed)
  (tmp_path / 'images').rename(tmp_path / 'moved')
  count = len(made.calls)
  moved = workspace.DataSpec(**{
      **stage.data.__dict__,
      'options': (('image_folder', str(tmp_path / 'moved')),)})
  workspace.open_split(moved, moved.train_split, tmp_path, lambda line: None)
  assert len(made.calls) == count + 1


@pytest.mark.parametrize('options, words', [
    ({}, ['image_folder', 'missing']),
    ({'image_folder': 3}, ['image_folder']),
    ({'image_folder': 'x', 'folder': 'y'}, ["['folder']", 'skip_bad_rows'])])
def test_options_are_checked(options, words):
  with pytest.raises(ConfigError) as caught:
    workspace.DataSpec(name='llava_json', options=tuple(options.items()))
  assert all(word in str(caught.value) for word in words), caught.value


def test_rows_left_out_are_reported(made, tmp_path):
  path = made([*ROWS, {'id': 'gone', 'image': 'no.png', 'conversations': chat(
      ('<image>\nwhat is it', 'a dog'))}])
  said = []
  source, _ = workspace.open_llava_json(
      str(path), {'image_folder': str(tmp_path / 'images'),
                  'skip_bad_rows': True}, said.append)
  assert len(source) == 3
  assert len(said) == 1 and 'gone' in said[0] and '1 row' in said[0]
