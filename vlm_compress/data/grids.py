"""Grid pictures and questions about them: 3 x 3 cells, 50 objects.

Every picture follows from (seed, split, index) alone.  Four to eight of the
nine cells hold an object, drawn with its own size, jitter and a light tint
of the ground; the layout is known, so that an analysis can say which visual
tokens carried an answer.

Held-out pairs: each object has exactly one cell (50 of the 450 pairs) where
it never stands in the train and validation splits.  In the test split about
half of the objects stand in their held-out cell, so that a model which only
learned (object, cell) pairs by heart fails there.

Questions and answers are made of the words of `vocabulary()`, separated by
blanks.  Ours; the idea of held-out combinations is that of CLEVR-CoGenT.
"""

from __future__ import annotations

import dataclasses
import functools
import io

import numpy as np
from PIL import Image

from vlm_compress.config import check
from vlm_compress.data import openmoji
from vlm_compress.data.examples import Turn

GRID_SIZE = 3
CELL_NAMES = tuple(f'{row} {column}' for row in ('top', 'middle', 'bottom')
                   for column in ('left', 'middle', 'right'))
NUM_CELLS = len(CELL_NAMES)
NUM_OBJECTS = len(openmoji.OBJECTS)
NUMBER_WORDS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven',
                'eight', 'nine')
NOTHING = 'nothing'
EMPTY = -1  # object id of an empty cell
KINDS = ('what', 'where', 'exists', 'count', 'category', 'caption')
CAPTION_QUESTION = 'name the nine cells'
SPLITS = ('train', 'validation', 'test')

_HELDOUT_SEED = 7      # fixed: the pairs are part of the data set's definition
_TEST_HELDOUT = 0.5    # share of test objects that stand in a held-out cell
_SCALE = (0.62, 0.94)  # longer side of an object, in cells
_TINT = 232            # darkest value of a channel of the ground
_NUM_EXISTS = 3        # questions with answer yes, and as many with no


@dataclasses.dataclass(frozen=True)
class Grid:
  """One picture, what stands where, and the questions about it.

  Attributes:
    picture_id: '<split>-<index>'.
    image: uint8[S, S, 3].
    cells: int32[9], object id per cell in reading order, EMPTY if none.
    boxes: int32[9, 4], left, top, right, bottom of the object in pixels
      (right and bottom exclusive); zeros for an empty cell.
    heldout: bool[9], the (object, cell) pair is held out.
    turns: all questions with answers, the caption last.
  """
  picture_id: str
  image: np.ndarray
  cells: np.ndarray
  boxes: np.ndarray
  heldout: np.ndarray
  turns: tuple[Turn, ...]

  def png(self) -> bytes:
    """Returns the picture as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(self.image).save(stream, 'PNG', compress_level=4)
    return stream.getvalue()


@functools.cache
def _heldout_table() -> np.ndarray:
  order = np.random.default_rng(_HELDOUT_SEED).permutation(NUM_OBJECTS)
  table = np.zeros((NUM_OBJECTS, NUM_CELLS), bool)
  table[order, np.arange(NUM_OBJECTS) % NUM_CELLS] = True
  table.setflags(write=False)
  return table


def heldout_pairs() -> np.ndarray:
  """Returns bool[50, 9]: object o never stands in cell c in training."""
  return _heldout_table()


def sample_cells(rng: np.random.Generator, *, min_objects: int,
                 max_objects: int, heldout_share: float) -> np.ndarray:
  """Draws a layout.

  Args:
    rng: source of randomness.
    min_objects: fewest objects in a picture.
    max_objects: most objects in a picture.
    heldout_share: chance of an object to be one of its cell's held-out ones.

  Returns:
    int32[9], object id per cell or EMPTY.  An object may occur repeatedly.
  """
  cells = np.full(NUM_CELLS, EMPTY, np.int32)
  count = rng.integers(min_objects, max_objects + 1)
  for cell in rng.permutation(NUM_CELLS)[:count]:
    heldout = rng.random() < heldout_share
    choices = np.flatnonzero(heldout_pairs()[:, cell] == heldout)
    cells[cell] = rng.choice(choices)
  return cells


def render(rng: np.random.Generator, cells: np.ndarray,
           image_size: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws a layout.

  Args:
    rng: draws the ground's tint and every object's size and place.
    cells: int32[9].
    image_size: side of the picture in pixels.

  Returns:
    image uint8[S, S, 3] and boxes int32[9, 4] as in Grid.
  """
  tint = tuple(int(v) for v in rng.integers(_TINT, 256, size=3))
  picture = Image.new('RGB', (image_size, image_size), tint)
  boxes = np.zeros((NUM_CELLS, 4), np.int32)
  edges = np.rint(np.linspace(0, image_size, GRID_SIZE + 1)).astype(int)
  for cell in np.flatnonzero(cells != EMPTY):
    row, column = divmod(int(cell), GRID_SIZE)
    width = edges[column + 1] - edges[column]
    height = edges[row + 1] - edges[row]
    size = int(rng.uniform(*_SCALE) * min(width, height))
    sprite = openmoji.draw(int(cells[cell]), size)
    left = int(edges[column] + rng.integers(width - sprite.width + 1))
    top = int(edges[row] + rng.integers(height - sprite.height + 1))
    picture.paste(sprite, (left, top), sprite)
    boxes[cell] = left, top, left + sprite.width, top + sprite.height
  return np.asarray(picture), boxes


def answer(cells: np.ndarray, kind: str, subject: int | str | None) -> str:
  """Answers one question from a layout.

  Args:
    cells: int32[9].
    kind: one of KINDS.
    subject: cell index (what, category), object id (where, exists), category
      name or None for all objects (count), None (caption).
  """
  if kind == 'what':
    return _name(cells[subject])
  if kind == 'category':
    return openmoji.OBJECTS[cells[subject]].category if (
        cells[subject] != EMPTY) else NOTHING
  if kind == 'where':
    found = np.flatnonzero(cells == subject)
    return CELL_NAMES[found[0]] if found.size else NOTHING
  if kind == 'exists':
    return 'yes' if np.any(cells == subject) else 'no'
  if kind == 'count':
    return NUMBER_WORDS[sum(
        subject in (None, openmoji.OBJECTS[item].category)
        for item in cells[cells != EMPTY])]
  return ' '.join(_name(item) for item in cells)


def _name(object_id: int) -> str:
  return NOTHING if object_id == EMPTY else openmoji.NAMES[object_id]


def question(kind: str, subject: int | str | None) -> str:
  """Words the question; arguments as in `answer`."""
  if kind == 'what':
    return f'what is at {CELL_NAMES[subject]} ?'
  if kind == 'category':
    return f'what category is at {CELL_NAMES[subject]} ?'
  if kind == 'where':
    return f'where is the {openmoji.NAMES[subject]} ?'
  if kind == 'exists':
    name = openmoji.NAMES[subject]
    return f'is there {"an" if name[0] in "aeiou" else "a"} {name} ?'
  if kind == 'count':
    return f'how many {subject or "object"}s ?'
  return CAPTION_QUESTION


def ask(rng: np.random.Generator, cells: np.ndarray) -> tuple[Turn, ...]:
  """Makes all questions about a layout.

  what: every object and one empty cell (so 'nothing' is about 1 in 7);
  where: every object that occurs once; exists: three present and as many
  absent objects; count: all objects and each category; category: every
  object; caption: the nine cells in reading order.

  A turn is held out if its answer depends on held-out pairs, that is, if it
  would be another one with the objects of those pairs taken away.

  Args:
    rng: picks the empty cell and the objects asked for.
    cells: int32[9].

  Returns:
    The turns, ordered by kind as in KINDS.
  """
  occupied = np.flatnonzero(cells != EMPTY)
  present, counts = np.unique(cells[occupied], return_counts=True)
  absent = np.setdiff1d(np.arange(NUM_OBJECTS), present)
  empty = rng.permutation(np.flatnonzero(cells == EMPTY))[:1]
  num_exists = min(_NUM_EXISTS, present.size)
  subjects = [('what', cell) for cell in np.sort(np.append(occupied, empty))]
  subjects += [('where', item) for item in present[counts == 1]]
  asked = np.append(rng.permutation(present)[:num_exists],
                    rng.permutation(absent)[:num_exists])
  subjects += [('exists', item) for item in rng.permutation(asked)]
  subjects += [('count', item) for item in (None, *openmoji.CATEGORIES)]
  subjects += [('category', cell) for cell in occupied]
  subjects += [('caption', None)]
  known = np.where(_heldout_cells(cells), EMPTY, cells)
  turns = []
  for kind, subject in subjects:
    text = answer(cells, kind, subject)
    turns.append(Turn(question=question(kind, subject), answer=text,
                      kind=kind, heldout=text != answer(known, kind, subject)))
  return tuple(turns)


def _heldout_cells(cells: np.ndarray) -> np.ndarray:
  """Returns bool[9]: the cell's object stands in its held-out cell."""
  return (cells != EMPTY) & heldout_pairs()[cells, np.arange(NUM_CELLS)]


def make_grid(split: str, index: int, *, seed: int = 0, image_size: int = 128,
              min_objects: int = 4, max_objects: int = 8) -> Grid:
  """Makes picture number `index` of a split.

  Args:
    split: 'train', 'validation' or 'test'; only test has held-out pairs.
    index: number of the picture, from 0.
    seed: of the whole data set.
    image_size: side of the picture in pixels.
    min_objects: fewest objects in a picture.
    max_objects: most objects in a picture, at most 8.

  Returns:
    The Grid, the same for the same arguments.

  Raises:
    ConfigError: unknown split or impossible numbers.
  """
  check(split in SPLITS, f'split={split!r} is unknown; use one of {SPLITS}')
  check(image_size >= 48, f'image_size={image_size} is too small for '
        'recognisable objects; use 48 px or more')
  check(1 <= min_objects <= max_objects < NUM_CELLS,
        f'min_objects={min_objects}, max_objects={max_objects}: need '
        f'1 <= min_objects <= max_objects <= {NUM_CELLS - 1}')
  rng = np.random.default_rng([seed, SPLITS.index(split), index])
  cells = sample_cells(
      rng, min_objects=min_objects, max_objects=max_objects,
      heldout_share=_TEST_HELDOUT if split == 'test' else 0.0)
  image, boxes = render(rng, cells, image_size)
  return Grid(picture_id=f'{split}-{index:06d}', image=image, cells=cells,
              boxes=boxes, heldout=_heldout_cells(cells),
              turns=ask(rng, cells))


def vocabulary() -> list[str]:
  """Returns every word of the questions and answers, sorted."""
  texts = [CAPTION_QUESTION, NOTHING, 'yes', 'no', *NUMBER_WORDS[:NUM_CELLS],
           *openmoji.NAMES, *openmoji.CATEGORIES, *CELL_NAMES,
           question('what', 0), question('category', 0), question('count', None)]
  texts += [question(kind, item) for kind in ('where', 'exists')
            for item in range(NUM_OBJECTS)]
  texts += [question('count', name) for name in openmoji.CATEGORIES]
  return sorted({word for text in texts for word in text.split()})
