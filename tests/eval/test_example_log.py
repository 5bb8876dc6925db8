"""Which questions become examples, and the file they are kept in."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_compress.data.errors import DataError
from vlm_compress.eval import example_log
from vlm_compress.eval.benchmarks.question import Question


def questions(count, per_picture=2):
  return [Question(f'q{i}', 'what', 'what', f'{i // per_picture}.jpg') for i in range(count)]


def row(**fields):
  return {'question_id': 'q', 'text': 'what', 'picture': None, 'prune_after': [],
          'keep': [], 'attribution': '', **fields}


def test_examples_are_spread_and_one_a_picture():
  ids = lambda found: [q.id for q in found]
  assert ids(example_log.chosen(questions(20), 3)) == ['q0', 'q6', 'q12']
  assert ids(example_log.chosen(questions(5), 9)) == ['q0', 'q2', 'q4']
  blind = [Question('t', 'what', 'what', None)]
  assert ids(example_log.chosen(blind + questions(2), 9)) == ['q0']
  assert example_log.chosen(blind, 9) == []


def test_masks_come_back(tmp_path):
  keep = np.zeros((2, 9), bool)
  keep[0, [0, 5]] = keep[1, 5] = True
  texts = example_log.masks_to_text(keep)
  assert texts == ['100001000', '000001000']
  example_log.write(tmp_path, [row(keep=texts)])
  found = example_log.read(tmp_path)
  assert (example_log.masks(found['q']) == keep.reshape(2, 3, 3)).all()
  assert example_log.masks(row()).shape[0] == 0


@pytest.mark.parametrize('text', ['10', '1002', '10x1'])
def test_masks_that_are_none_are_refused(text):
  with pytest.raises(DataError, match="question 'q' is no square of 0 and 1"):
    example_log.masks(row(keep=[text]))


@pytest.mark.parametrize('line, said', [
    ('{"question_id"', 'line 2 is no JSON'), ('3', 'line 2 is no JSON'),
    ('{"question_id": "a"}', 'line 2 has no text, picture, prune_after, keep')])
def test_damaged_lines_are_named(tmp_path, line, said):
  path = example_log.write(tmp_path, [row()])
  path.write_text(path.read_text() + line + '\n')
  with pytest.raises(DataError, match=said):
    example_log.read(tmp_path)


def test_no_file_is_no_example_and_a_bad_picture_is_named(tmp_path):
  assert example_log.read(tmp_path) == {}
  assert example_log.picture(row()) is None
  with pytest.raises(DataError, match="picture of question 'q' is no base64"):
    example_log.picture(row(picture='&&'))
