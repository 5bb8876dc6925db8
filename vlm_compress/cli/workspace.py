"""Data, features and tokenizer of a run, opened once and shared by commands."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vlm_compress.config import LlavaConfig, check, from_dict
from vlm_compress.data.examples import Example
from vlm_compress.data.features import cached_features
from vlm_compress.data.llava_json import LlavaJson
from vlm_compress.data.sources import open_source
from vlm_compress.data.tokenizer import Tokenizer, load, word_level

Message = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """Which data a run uses.

  Attributes:
    name: data set, see data/sources.py; or 'llava_json' with one picture a
      row, whose splits are files of that format.
    options: settings of the data set, as (name, value) pairs; of llava_json
      the image_folder.
    image_size: side of the pictures for the vision tower, in pixels.
    train_split, test_split: in TFDS's notation.
    tokenizer: path of a tokenizer.json; '' builds a word-level one.
  """
  name: str = 'openmoji_grid'
  options: tuple[tuple[str, Any], ...] = ()
  image_size: int = 128
  train_split: str = 'train'
  test_split: str = 'test'
  tokenizer: str = ''


@dataclasses.dataclass(frozen=True)
class Split:
  """Examples of a split with their frozen vision features.

  Attributes:
    examples: random access.
    features: features[i] is float16[P, Dv] of example i.
    attribution: to be shown with the pictures.
  """
  examples: Any
  features: Any
  attribution: str

  def __len__(self) -> int:
    return len(self.examples)

  def take(self, count: int) -> list[Example]:
    """The first examples."""
    return [self.examples[i] for i in range(min(count, len(self.examples)))]


def encoder() -> tuple[Callable[[np.ndarray], np.ndarray], str]:
  """The frozen EfficientNet-Lite0 and a fingerprint of its weights."""
  from vlm_compress.convert.efficientnet import load_efficientnet_lite0
  from vlm_compress.models.efficientnet import extract_features
  params = load_efficientnet_lite0()
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return (lambda pixels: np.asarray(extract_features(params, pixels)),
          f'efficientnet_lite0-{digest.hexdigest()[:16]}')


def open_split(spec: DataSpec, split: str, root: pathlib.Path,
               message: Message) -> Split:
  """Opens a split, building the data set and its features if needed.

  Args:
    spec: the data.
    split: in TFDS's notation.
    root: data sets go to root/data, features to root/features.
    message: called with lines for the user.
  """
  options = dict(spec.options)
  if spec.name == 'llava_json':
    source = LlavaJson(split, **options)
    data = hashlib.sha256(pathlib.Path(split).read_bytes()).hexdigest()
    attribution = ''
  else:
    source = open_source(spec.name, root / 'data', split, options=options)
    data = source.fingerprint
    attribution = source.metadata.get('attribution', '')
  encode, fingerprint = encoder()
  features = cached_features(
      source, encode, f'{fingerprint}-{data}',
      root / 'features', spec.image_size, 100, message=message)
  return Split(source, features, attribution)


def tokenizer_for(spec: DataSpec, examples: Any) -> Tokenizer:
  """The run's tokenizer.json, or a word-level tokenizer of the data set.

  Args:
    spec: the data; spec.tokenizer names a file, '' builds one.
    examples: the training split; its words become the vocabulary.
  """
  if spec.tokenizer:
    return load(spec.tokenizer)
  if spec.name == 'openmoji_grid':  # the test split has no other words
    from vlm_compress.data import grids
    return word_level(grids.vocabulary())
  check(spec.name == 'easy_vqa', f'data.name={spec.name!r} needs '
        'data.tokenizer, the path of a tokenizer.json')
  turns = [t for i in range(len(examples)) for t in examples[i].turns]
  return word_level([t.question for t in turns] + [t.answer for t in turns])


def model_config(fields: dict[str, Any], tokenizer: Tokenizer) -> LlavaConfig:
  """A model config whose vocabulary is the tokenizer's.

  The placeholder of a VoCo token is the id behind the last word: it is never
  looked up in the embedding.
  """
  fields = {**fields, 'voco_token_index': tokenizer.vocab_size,
            'text': {**fields['text'], 'vocab_size': tokenizer.vocab_size}}
  return from_dict(fields)
