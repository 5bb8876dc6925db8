"""An invented LLaVA-format file with pictures: 0, 1 or 2 of them in a row."""

from __future__ import annotations

import json
import pathlib

import numpy as np
from PIL import Image

WORDS = ['what is it', 'where is it', 'a dog', 'top left', 'red', '\n',
         'A chat between a curious user and an artificial intelligence '
         'assistant. The assistant gives helpful, detailed, and polite answers '
         "to the user's questions. USER: ASSISTANT:"]
NUM_ROWS = 23


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
  """Messages of a conversation."""
  return [{'from': who, 'value': text} for question, answer in turns
          for who, text in (('human', question), ('gpt', answer))]


def picture(path: pathlib.Path, seed: int) -> None:
  """Writes noise of a seeded size, JPEG or PNG by its name."""
  rng = np.random.default_rng(seed)
  size = (int(rng.integers(20, 50)), int(rng.integers(20, 50)), 3)
  Image.fromarray(rng.integers(0, 255, size, np.uint8)).save(path)


def rows(count: int = NUM_ROWS) -> list[dict]:
  """Every fifth row is text only, every fifth has two pictures."""
  out = []
  for i in range(count):
    more = (('where is it', 'top left'),) * (i % 4)
    if i % 5 == 1:
      out.append({'id': i, 'conversations': chat(
          ('what is it', 'a dog ' * (1 + i % 3)), *more)})
    elif i % 5 == 3:
      out.append({'id': f'two-{i}', 'image': [f'{i}.jpg', f'{i}b.png'],
                  'conversations': chat(('<image>\n<image>\nwhat is it', 'red'),
                                        *more)})
    else:
      out.append({'id': f'one-{i}', 'image': f'{i}.jpg', 'model': 'm',
                  'conversations': chat(('<image>\nwhat is it', 'a dog'),
                                        *more)})
  return out


def write(root: pathlib.Path, count: int = NUM_ROWS) -> pathlib.Path:
  """Writes root/rows.json and root/images; returns the file."""
  (root / 'images').mkdir(parents=True, exist_ok=True)
  for i, row in enumerate(made := rows(count)):
    names = row.get('image', [])
    for k, name in enumerate([names] if isinstance(names, str) else names):
      picture(root / 'images' / name, 100 * k + i)
  path = root / 'rows.json'
  path.write_text(json.dumps(made))
  return path
