"""The VoCo mask: the drawn matrix, and our extensions, literally."""

from __future__ import annotations

import jax
import numpy as np

from vlm_compress.compress.voco import hidden_from_text, voco_mask
from vlm_compress.nn.attention import attention

# One letter per token: B BOS of a row with VoCo tokens, v visual, n newline of
# a segment, c VoCo, t text, p padding; digits give the image.


def _row(tokens: str, turns=None):
  """Arguments of voco_mask for a row such as 'B0 v1 n1 c1 t0'."""
  kinds = [t[0] for t in tokens.split()]
  images = [-1 if t[0] == 'B' else int(t[1]) for t in tokens.split()]
  array = lambda x: np.array([x])
  return dict(valid=array([k != 'p' for k in kinds]),
              is_voco=array([k == 'c' for k in kinds]),
              is_visual=array([k == 'v' for k in kinds]),
              image_ids=array(images),
              turn_ids=array(turns or [0] * len(kinds)))


def _drawing(text: str) -> np.ndarray:
  return np.array([[c == '1' for c in line.split()]
                   for line in text.strip().split('\n')])


def _check(row, text, **kwargs):
  np.testing.assert_array_equal(voco_mask(**row, **kwargs)[0], _drawing(text))


def test_the_drawn_matrix():
  _check(_row('v1 v1 c1 c1 t0 t0'), '''
      1 . . . . .
      1 1 . . . .
      1 1 1 . . .
      1 1 1 1 . .
      . . 1 1 1 .
      . . 1 1 1 1''')


def test_full_layout_hides_bos_and_newline_as_the_released_code():
  _check(_row('B0 v1 v1 n1 c1 t0 t0'), '''
      1 . . . . . .
      1 1 . . . . .
      1 1 1 . . . .
      1 1 1 1 . . .
      1 1 1 1 1 . .
      . . . . 1 1 .
      . . . . 1 1 1''')


def test_text_sees_prefix_hides_visual_tokens_only():
  _check(_row('B0 v1 v1 n1 c1 t0 t0'), '''
      1 . . . . . .
      1 1 . . . . .
      1 1 1 . . . .
      1 1 1 1 . . .
      1 1 1 1 1 . .
      1 . . 1 1 1 .
      1 . . 1 1 1 1''', text_sees_prefix=True)


def test_two_images_do_not_see_each_other_nor_text():
  _check(_row('B0 v1 c1 t0 v2 n2 c2 t0'), '''
      1 . . . . . . .
      1 1 . . . . . .
      1 1 1 . . . . .
      . . 1 1 . . . .
      1 . . . 1 . . .
      1 . . . 1 1 . .
      1 . . . 1 1 1 .
      . . 1 1 . . 1 1''')


def test_text_only_row_is_causal():
  _check(_row('t0 t0 t0'), '''
      1 . .
      1 1 .
      1 1 1''')


def test_packed_turns_share_the_compressed_image():
  _check(_row('B0 v1 c1 t0 t0 t0 t0', turns=[0, 0, 0, 1, 1, 2, 2]), '''
      1 . . . . . .
      1 1 . . . . .
      1 1 1 . . . .
      . . 1 1 . . .
      . . 1 1 1 . .
      . . 1 . . 1 .
      . . 1 . . 1 1''')


def test_padding_on_both_sides():
  _check(_row('p0 v1 c1 t0 p0'), '''
      . . . . .
      . 1 . . .
      . 1 1 . .
      . . 1 1 .
      . . 1 1 .''')


def test_row_of_padding_gives_no_nan_forward_or_backward():
  mask = voco_mask(**_row('p0 p0 p0'))
  assert not mask.any()
  x = np.random.default_rng(0).normal(size=(1, 3, 2, 4)).astype(np.float32)
  total = lambda q: attention(q, q, q, mask).sum()
  value, grad = jax.value_and_grad(total)(x)
  assert np.isfinite(value) and np.isfinite(grad).all()


def test_hidden_from_text():
  row = _row('B0 v1 n1 c1 t0')
  args = row['is_voco'], row['is_visual'], row['image_ids']
  np.testing.assert_array_equal(hidden_from_text(*args, False)[0],
                                [1, 1, 1, 0, 0])
  np.testing.assert_array_equal(hidden_from_text(*args, True)[0],
                                [0, 1, 0, 0, 0])
