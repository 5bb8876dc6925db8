"""The drawn causal mask, literally."""

from __future__ import annotations

import numpy as np

from vlm_compress.nn.masks import causal_mask, same_group


def drawing(text: str) -> np.ndarray:
  """'1 . / 1 1' -> bool[2, 2]."""
  return np.array([[c == '1' for c in line.split()]
                   for line in text.strip().split('\n')])


def test_groups_as_drawn():
  got = causal_mask(np.ones((1, 4), bool), np.array([[0, 0, 1, 2]]))
  np.testing.assert_array_equal(got[0], drawing('''
      1 . . .
      1 1 . .
      1 1 1 .
      1 1 . 1'''))


def test_ordinary_row_is_causal():
  got = causal_mask(np.ones((2, 3), bool), np.zeros((2, 3), int))
  for mask in got:
    np.testing.assert_array_equal(mask, drawing('''
      1 . .
      1 1 .
      1 1 1'''))


def test_padding_is_no_key_on_either_side():
  valid = np.array([[False, True, True], [True, True, False]])
  got = causal_mask(valid, np.zeros((2, 3), int))
  np.testing.assert_array_equal(got[0], drawing('''
      . . .
      . 1 .
      . 1 1'''))
  np.testing.assert_array_equal(got[1], drawing('''
      1 . .
      1 1 .
      1 1 .'''))


def test_group_that_goes_on_later():
  got = causal_mask(np.ones((1, 5), bool), np.array([[0, 1, 2, 1, 2]]))
  np.testing.assert_array_equal(got[0], drawing('''
      1 . . . .
      1 1 . . .
      1 . 1 . .
      1 1 . 1 .
      1 . 1 . 1'''))


def test_same_group_between_different_lengths():
  got = same_group(np.array([[1, 2]]), np.array([[0, 1, 2]]))
  np.testing.assert_array_equal(got[0], drawing('''
      1 1 .
      1 . 1'''))
