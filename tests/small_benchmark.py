"""GQA with six small pictures, and tiny models that can read its questions."""

from __future__ import annotations

import json
import pathlib

import numpy as np
from api_helpers import make
from PIL import Image

from vlm_compress import api
from vlm_compress.data.tokenizer import word_level
from vlm_compress.eval.benchmarks.question import SHORT_ANSWER

ASKED = ('what is this', 'is this a red cat on the left side', 'what is a dog',
         'is it blue')
WORDS = word_level([*ASKED, f'{SHORT_ANSWER} yes no cat right'])
NUM_PICTURES = 6


def write_gqa(root: pathlib.Path, answers: dict[str, str] | None = None) -> pathlib.Path:
  """Questions and pictures below root/gqa; `answers` replaces 'yes'."""
  folder = root / 'gqa' / 'images'
  folder.mkdir(parents=True, exist_ok=True)
  rng, rows = np.random.default_rng(3), {}
  for picture in range(NUM_PICTURES):
    Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(
        folder / f'{picture}.jpg', format='PNG')  # without losses
    for number in range(2 + picture % 3):
      key, text = f'{picture}{number}', ASKED[(picture + number) % len(ASKED)]
      rows[key] = {'isBalanced': True, 'question': text, 'imageId': str(picture),
                   'answer': (answers or {}).get(key, 'yes'), 'types': {
                       'structural': 'query' if 'what' in text else 'verify',
                       'semantic': 'obj'}}
  path = root / 'gqa' / 'testdev_balanced_questions.json'
  path.write_text(json.dumps(rows))
  return root


def write_model(directory: pathlib.Path, config, **kwargs) -> pathlib.Path:
  """A model directory with random weights."""
  api.save(make(config, tokenizer=WORDS, **kwargs), directory)
  return directory
