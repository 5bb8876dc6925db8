"""Which questions are asked: a fair draw from the turns of every example."""

from __future__ import annotations

import collections

import numpy as np

from vlm_compress.data import grids
from vlm_compress.data.examples import Example
from vlm_compress.eval.evaluator import questions_of

PER_KIND = {'what': 3, 'caption': 1, 'exists': 1, 'count': 1, 'category': 1}


def layouts(count):
  """Examples of the test split, without their pictures."""
  examples = []
  for index in range(count):
    rng = np.random.default_rng([0, 2, index])
    cells = grids.sample_cells(rng, min_objects=4, max_objects=8,
                               heldout_share=grids._TEST_HELDOUT)
    examples.append(Example(example_id=str(index), images=(b'',),
                            turns=grids.ask(rng, cells)))
  return examples


def test_the_draw_is_fair():
  examples = layouts(300)
  asked = questions_of(examples, PER_KIND)
  assert asked == questions_of(examples, PER_KIND)
  assert len(asked) == 300 * 7
  of = lambda kind: [q.turn for q in asked if q.turn.kind == kind]
  places = collections.Counter(t.question for t in of('what'))
  assert len(places) == grids.NUM_CELLS
  assert min(places.values()) > 0.75 * 100 and max(places.values()) < 1.25 * 100
  answers = collections.Counter(t.answer for t in of('exists'))
  assert 0.4 < answers['yes'] / 300 < 0.6
  assert len({t.question for t in of('count')}) > 3
  assert len({t.question for t in of('category')}) == grids.NUM_CELLS


def test_held_out_pairs_come_first():
  for example in layouts(40):
    first = questions_of([example], {'what': 2})
    held = sum(t.heldout for t in example.turns if t.kind == 'what')
    assert sum(q.turn.heldout for q in first) == min(held, 2)
    everything = questions_of([example], {'what': 99})
    assert len(everything) == sum(t.kind == 'what' for t in example.turns)
