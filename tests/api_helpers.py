"""A whole tiny model in memory, CLIP tower and tokenizer included."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import numpy as np

from vlm_compress import api
from vlm_compress.convert.processor import Processor
from vlm_compress.data.examples import Turn
from vlm_compress.data.tokenizer import word_level
from vlm_compress.models.llava import Llava, init_params

TOKENIZER = word_level(
    'what is this on the left right side a cat dog red blue .'.split())


# What no question can be, and words of the message.
NO_PROMPTS = ((5, 'prompt=5: give a question'), (None, 'prompt=None: give a q'),
              (['what'], r"prompt=\['what'\]: give a question"),
              ([Turn(5)], 'prompt=.*give a question'),
              ([Turn('what', None)], 'prompt=.*give a question'),
              ([], 'no turn'),
              ([Turn('what', 'a cat')], 'last turn of the prompt has an answer'))


def make(config, seed=1, tokenizer=TOKENIZER, **text) -> api.Vlm:
  """A model with random weights; fields of `text` replace the config's."""
  config = dataclasses.replace(
      config, voco_token_index=tokenizer.vocab_size, text=dataclasses.replace(
          config.text, vocab_size=tokenizer.vocab_size, **text))
  shapes = nn.unbox(jax.eval_shape(
      lambda key: init_params(Llava(config), key, with_vision=True),
      jax.random.key(0)))
  rng = np.random.default_rng(seed)
  def draw(path, x):  # thresholds stay near their start, norms near one
    scale = 0.05 if path[0].key == 'atp' else 0.35
    return np.float32(scale * rng.normal(size=x.shape) +
                      (path[-1].key in ('weight', 'scale')))
  return api.Vlm(config, jax.tree.map_with_path(draw, shapes), tokenizer,
                 Processor('short'), 'dir')
