"""Every field of RowSpec changes the rows, or the batches made of them."""

from __future__ import annotations

import dataclasses
import io

import core_helpers as helpers
import numpy as np
import pytest

pytest.importorskip('PIL', reason='needs the extra [demo]')

from PIL import Image

from vlm_compress.data import grids
from vlm_compress.data.examples import Example
from vlm_compress.data.rows import RowSpec, plain_collate, row_maker, voco_collate
from vlm_compress.data.templates import get_template
from vlm_compress.data.tokenizer import word_level

VOCO = get_template('voco')
TOKENIZER = word_level([*grids.vocabulary(), VOCO.system, VOCO.user,
                        VOCO.assistant])
CONFIG = helpers.tiny(
    voco=helpers.voco_config(4).voco, voco_token_index=TOKENIZER.vocab_size,
    text=dataclasses.replace(helpers.tiny().text,
                             vocab_size=TOKENIZER.vocab_size))
SPEC = RowSpec(kinds=(('what', 2), ('count', 1)), num_voco_tokens=(2,),
               length=160, text_length=100)
CHANGES = {'template': 'voco', 'kinds': (('what', 1),), 'one_turn': True,
           'independent_turns': False, 'num_voco_tokens': (3,), 'length': 161,
           'text_length': 101, 'bucket_lengths': (60,), 'max_images': 2,
           'image_aspect_ratio': 'crop'}
# Rows that are cut do not have drawn turns.
BASES = {'bucket_lengths': dataclasses.replace(
    SPEC, kinds=(), length=600, text_length=500)}


def picture():
  """A PNG that pad and crop make different squares of."""
  noise = np.random.default_rng(2).integers(0, 255, (20, 40, 3), np.uint8)
  stream = io.BytesIO()
  Image.fromarray(noise).save(stream, 'PNG')
  return stream.getvalue()


def arrays(spec):
  """The arrays of a batch of one row, and of its two-pass form."""
  rng = np.random.default_rng(0)
  cells = grids.sample_cells(rng, min_objects=4, max_objects=8,
                             heldout_share=0.0)
  turns = grids.ask(rng, cells)
  features = np.zeros((1, CONFIG.num_patches, CONFIG.vision.hidden_size))
  example = Example('x', turns, (picture(),))
  row, pixels = (row_maker(spec, TOKENIZER, CONFIG, kind)(
      0, example, np.random.default_rng(1)) for kind in (features, None))
  batch, (split, _) = plain_collate(spec)([row]), voco_collate(
      spec, CONFIG)([row])
  turns = np.zeros(0) if batch.turn_ids is None else batch.turn_ids
  return [batch.input_ids, turns, batch.token_types,
          split.text.input_ids, plain_collate(spec)([pixels]).features]


def test_all_fields_are_here():
  assert set(CHANGES) == {f.name for f in dataclasses.fields(RowSpec)}


@pytest.mark.parametrize('field', CHANGES)
def test_it_changes_something(field):
  base = BASES.get(field, SPEC)
  before = arrays(base)
  after = arrays(dataclasses.replace(base, **{field: CHANGES[field]}))
  assert any(a.shape != b.shape or (a != b).any()
             for a, b in zip(before, after))
  for a, b in zip(before, arrays(base)):
    np.testing.assert_array_equal(a, b)
