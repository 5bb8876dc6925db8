"""Rows as data: expansion, positions, slots, padding, splitting, errors."""

from __future__ import annotations

import dataclasses

import core_helpers as helpers
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, NEWLINE, VOCO, Sample, segment

from vlm_compress.config import ConfigError, VisionConfig
from vlm_compress.models.sequence import (
  PAD,
  PREFIX,
  TEXT,
  VISUAL,
  expand_row,
  make_batch,
  split_voco,
)

# Four visual tokens per image, so that rows can be written out.
P = 4
CONFIG = helpers.tiny(vision=VisionConfig(
    image_size=12, patch_size=6, hidden_size=32, intermediate_size=48,
    num_hidden_layers=3, num_attention_heads=4))


def _row(ids, answer=0, turns=()):
  return helpers.row(Sample(tuple(ids), answer, tuple(turns)), CONFIG)


def _check(row, **want):
  for name, values in want.items():
    np.testing.assert_array_equal(row[name], values, err_msg=name)


def test_plain_row():
  _check(_row([BOS, 7, IMAGE, 8, 9, 10], answer=1),
         input_ids=[1, 7, 0, 0, 0, 0, 8, 9, 10],
         token_types=[1, 1, 2, 2, 2, 2, 1, 1, 1],
         positions=np.arange(9), read_positions=np.arange(9),
         image_ids=[0, 0, 1, 1, 1, 1, 0, 0, 0],
         visual_slots=[-1, -1, 0, 1, 2, 3, -1, -1, -1],
         voco_slots=[-1] * 9, turn_ids=[0] * 9,
         # text behind the image that is no answer
         prompt_mask=[0, 0, 0, 0, 0, 0, 1, 1, 0],
         loss_mask=[0, 0, 0, 0, 0, 0, 0, 0, 1])


def test_two_images_without_compression():
  row = _row([BOS, IMAGE, 7, IMAGE, 8])
  _check(row, positions=np.arange(11), read_positions=np.arange(11),
         image_ids=[0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 0],
         visual_slots=[-1, 0, 1, 2, 3, -1, 4, 5, 6, 7, -1],
         prompt_mask=[0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1])


def test_text_only_row():
  _check(_row([BOS, 7, 8], answer=1), token_types=[1, 1, 1],
         positions=[0, 1, 2], image_ids=[0, 0, 0], prompt_mask=[0, 0, 0],
         loss_mask=[0, 0, 1], visual_slots=[-1, -1, -1])


def test_voco_row():
  row = _row([BOS, *segment(2), 8, 9], answer=1)
  _check(row, input_ids=[1, 0, 0, 0, 0, 5, 0, 0, 5, 8, 9],
         token_types=[1, 2, 2, 2, 2, 1, 3, 3, 1, 1, 1],
         positions=np.arange(11), read_positions=np.arange(11),
         image_ids=[PREFIX, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
         voco_slots=[-1] * 6 + [0, 1] + [-1] * 3,
         prompt_mask=[0] * 8 + [1, 1, 0])


def test_second_segment_restarts_behind_bos_and_costs_only_its_voco_tokens():
  row = _row([BOS, *segment(2), 8, *segment(2), 9])
  #                B  v  v  v  v  n  c  c  n  8  | v  v  v  v  n   c   c | n  9
  _check(row,
         positions=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 12, 13],
         read_positions=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9,
                         1, 2, 3, 4, 5, 10, 11, 12, 13],
         image_ids=[-1] + [1] * 7 + [0, 0] + [2] * 7 + [0, 0],
         visual_slots=[-1, 0, 1, 2, 3] + [-1] * 5 + [4, 5, 6, 7] + [-1] * 5,
         voco_slots=[-1] * 6 + [0, 1] + [-1] * 7 + [0, 1] + [-1] * 2)


def test_turns_start_over_where_the_shared_tokens_end():
  row = _row([BOS, IMAGE, 7, 8, 9, 10, 11], turns=[0, 0, 0, 1, 1, 2, 2])
  _check(row, turn_ids=[0] * 6 + [1, 1, 2, 2],
         positions=[0, 1, 2, 3, 4, 5, 6, 7, 6, 7])


def test_turn_that_goes_back_to_shared_is_refused():
  with pytest.raises(ConfigError, match='shared tokens must come first'):
    _row([BOS, 7, 8], turns=[0, 1, 0])


@pytest.mark.parametrize('ids,part', [
    ([BOS, VOCO, IMAGE], 'before the first image'),
    # the two passes compress an image behind BOS and nothing else
    ([BOS, 7, *segment(1), 8], 'directly behind BOS'),
    ([*segment(1), 8], 'directly behind BOS'),
    ([BOS, IMAGE, 7, *segment(1)], 'not for every image'),
    ([BOS, *segment(1), IMAGE, 7], 'not for every image')])
def test_voco_tokens_without_their_image(ids, part):
  with pytest.raises(ConfigError, match=part):
    _row(ids)


def test_rows_longer_than_the_model_are_refused():
  config = dataclasses.replace(CONFIG, text=dataclasses.replace(
      CONFIG.text, max_position_embeddings=8))
  expand = lambda ids: expand_row(ids, [False] * len(ids), [0] * len(ids),
                                  config)
  assert expand([BOS, IMAGE, 7, 8, 9])['positions'].max() == 7
  with pytest.raises(ConfigError, match='9 positions.*embeddings=8'):
    expand([BOS, IMAGE, 7, 8, 9, 10])
  # Positions count, not tokens: packed turns share theirs.
  ids = [BOS, IMAGE, 7, 8, 9, 10]
  row = expand_row(ids, [False] * 6, [0, 0, 1, 1, 2, 2], config)
  assert len(row['positions']) == 9 and row['positions'].max() == 6


def test_fields_of_different_length_are_refused():
  with pytest.raises(ValueError):
    expand_row([BOS, 7], [False], [0, 0], CONFIG)


@pytest.mark.parametrize('pad_left', [False, True])
def test_batch_pads_with_neutral_values(pad_left):
  samples = [Sample((BOS, IMAGE, 7, 8), 1, seed=1), Sample((BOS, 9), seed=2)]
  batch = helpers.batch(samples, CONFIG, length=9, num_images=2,
                        pad_left=pad_left)
  for b, sample in enumerate(samples):
    row = helpers.row(sample, CONFIG)
    size = len(row['input_ids'])
    span = slice(9 - size, 9) if pad_left else slice(0, size)
    rest = np.ones(9, bool)
    rest[span] = False
    for name, values in row.items():
      np.testing.assert_array_equal(getattr(batch, name)[b, span], values)
    assert (batch.token_types[b, rest] == PAD).all()
    assert not batch.valid[b, rest].any() and batch.valid[b, span].all()
    for name in ('visual_slots', 'voco_slots'):
      assert (getattr(batch, name)[b, rest] == -1).all()
    for name in ('loss_mask', 'prompt_mask', 'image_ids'):
      assert not getattr(batch, name)[b, rest].any()
  np.testing.assert_array_equal(batch.image_valid,
                                [[True, False], [False, False]])
  np.testing.assert_array_equal(batch.features[0, 0],
                                helpers.features(samples[0], CONFIG)[0])
  assert not batch.features[0, 1].any() and not batch.features[1].any()


def test_truncation_cuts_at_the_end_only_when_allowed():
  sample = Sample((BOS, IMAGE, 7, 8, 9), 2)
  with pytest.raises(ConfigError, match='row 0 has 8 tokens.*have 7'):
    helpers.batch([sample], CONFIG, length=7, num_images=1)
  batch = make_batch([helpers.row(sample, CONFIG)],
                     [helpers.features(sample, CONFIG)], length=7,
                     num_images=1, truncate=True)
  full = helpers.row(sample, CONFIG)
  for name, values in full.items():
    np.testing.assert_array_equal(getattr(batch, name)[0], values[:7])


def test_images_and_placeholders_must_agree():
  two = helpers.row(Sample((BOS, IMAGE, 7, IMAGE)), CONFIG)
  images = np.zeros((2, P, 32), np.float32)
  make = lambda row, images, n: make_batch([row], [images], length=12,
                                           num_images=n)
  make(two, images, 2)
  with pytest.raises(ConfigError, match='has 2 images, but batches have 1'):
    make(two, images, 1)
  with pytest.raises(ConfigError, match='placeholder'):
    make(two, images[:0], 2)
  with pytest.raises(ConfigError, match=r'row 0 has 2 image placeholder.* 1 image'):
    make(two, images[:1], 2)


def test_split_voco_takes_segments_apart():
  samples = [Sample((BOS, *segment(2), 8, *segment(2), 9), 1, seed=3),
             Sample((BOS, *segment(2), 11, 12, 13), 2, seed=4),
             Sample((BOS, 14), seed=5)]
  batch = helpers.batch(samples, CONFIG, length=20, num_images=2)
  got = split_voco(batch, CONFIG, 6)
  assert got.segment_ids == (BOS, 0, 0, 0, 0, NEWLINE, 0, 0)
  np.testing.assert_array_equal(got.voco_positions,
                                [[[6, 7], [10, 11]], [[6, 7], [0, 0]],
                                 [[0, 0], [0, 0]]])
  np.testing.assert_array_equal(
      got.text.input_ids, [[5, 8, 5, 9, 0, 0], [5, 11, 12, 13, 0, 0],
                           [BOS, 14, 0, 0, 0, 0]])
  np.testing.assert_array_equal(
      got.text.positions, [[8, 9, 12, 13, 0, 0], [8, 9, 10, 11, 0, 0],
                           [0, 1, 0, 0, 0, 0]])
  np.testing.assert_array_equal(got.text.loss_mask.sum(1), [1, 2, 0])
  assert not (got.text.token_types == VISUAL).any()
  assert (got.text.token_types[:2, :4] == TEXT).all()
  np.testing.assert_array_equal(got.text.image_valid, batch.image_valid)


def test_split_voco_does_not_depend_on_padding():
  samples = [Sample((BOS, *segment(1), 8, 9), 1), Sample((BOS, 14))]
  left, right = (split_voco(helpers.batch(
      samples, CONFIG, length=15, num_images=1, pad_left=side), CONFIG, 5)
                 for side in (True, False))
  for field in dataclasses.fields(right.text):
    np.testing.assert_array_equal(getattr(left.text, field.name),
                                  getattr(right.text, field.name))
  assert left.segment_ids == right.segment_ids


@pytest.mark.parametrize('samples,length,part', [
    ([Sample((BOS, *segment(1), 8)), Sample((BOS, *segment(2), 8))], 5,
     'must agree'),
    ([Sample((BOS, *segment(1), 8)),
      Sample((BOS, IMAGE, 6, VOCO, NEWLINE, 8))], 5, 'must agree'),
    ([Sample((BOS, 8))], 5, 'at least one image'),
    ([Sample((BOS, *segment(1), 8, 9))], 2, 'text_length=2')])
def test_split_voco_errors(samples, length, part):
  batch = helpers.batch(samples, CONFIG, length=15, num_images=1)
  with pytest.raises(ConfigError, match=part):
    split_voco(batch, CONFIG, length)


def test_target_right_behind_the_voco_tokens_is_not_lost_silently():
  """The two-pass text has no token that could predict it."""
  ids = (BOS, IMAGE, NEWLINE, VOCO, 8, 9)
  batch = helpers.batch([Sample(ids, answer=2)], CONFIG, length=15,
                        num_images=1)
  with pytest.raises(ConfigError, match='directly behind VoCo tokens'):
    split_voco(batch, CONFIG, 5)
