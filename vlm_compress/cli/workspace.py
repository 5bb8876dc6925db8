"""Data, features and tokenizer of a run, opened once and shared by commands."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vlm_compress import remote
from vlm_compress.config import LlavaConfig, VisionConfig, check
from vlm_compress.config_values import from_dict
from vlm_compress.convert.roles import ROLES
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Example
from vlm_compress.data.features import cached_features
from vlm_compress.data.llava_json import LlavaJson
from vlm_compress.data.prepared import PreparedSource
from vlm_compress.data.sources import open_source
from vlm_compress.data.tokenizer import Tokenizer, load, word_level
from vlm_compress.train.shapes import reads_pixels

Message = Callable[[str], None]
LLAVA_OPTIONS = ('image_folder', 'skip_bad_rows', 'verify_images')
PREPARED_OPTIONS = ('directory', 'verify')
# Data set -> its options, and the one that it cannot do without.
_OPTIONS = {'llava_json': (LLAVA_OPTIONS, 'image_folder', 'the folder that the '
                           'image paths of its rows are relative to'),
            'prepared': (PREPARED_OPTIONS, 'directory', 'a directory that '
                         'vlm-compress prepare-data wrote')}


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """Which data a run uses.

  Attributes:
    name: data set, see data/sources.py; or 'llava_json', whose splits are
      files of that format; or 'prepared', a directory of `vlm-compress
      prepare-data`.  Frozen features need one picture a row.
    options: settings of the data set, as (name, value) pairs; of llava_json
      the image_folder and the other LLAVA_OPTIONS; of prepared the directory,
      local or gs://, and whether to verify all of its shards at the start.
    image_size: side of the pictures for the vision tower, in pixels.
    train_split, test_split: in TFDS's notation.
    tokenizer: path of a tokenizer.json, local or gs://; '' builds a word-level
      one.
  """
  name: str = 'openmoji_grid'
  options: tuple[tuple[str, Any], ...] = ()
  image_size: int = 128
  train_split: str = 'train'
  test_split: str = 'test'
  tokenizer: str = ''

  def __post_init__(self):
    check(self.image_size >= 1, f'data.image_size={self.image_size}: at least '
          '1 pixel')
    for name in ('name', 'train_split', 'test_split'):
      check(bool(getattr(self, name)), f'data.{name} is empty')
    if self.name in _OPTIONS:
      known, needed, what = _OPTIONS[self.name]
      options = dict(self.options)
      unknown = sorted(set(options) - set(known))
      check(not unknown, f'data.options: {self.name} has no option {unknown}; '
            f'it has {known}')
      check(isinstance(options.get(needed), str),
            f'data.options.{needed} is missing: {self.name} needs {what}')


@dataclasses.dataclass(frozen=True)
class Split:
  """Examples of a split, with their frozen vision features if there are any.

  Attributes:
    examples: random access.
    features: features[i] is float16[P, Dv] of example i; None where the tower
      reads pixels.
    attribution: to be shown with the pictures.
    fingerprint: of the examples' content.
    lengths: directory for the lengths of rows.
  """
  examples: Any
  features: Any
  attribution: str
  fingerprint: str = ''
  lengths: remote.Path = pathlib.Path('lengths')

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


def check_tower(spec: DataSpec, vision: VisionConfig, where: str,
                pixels: bool = False) -> None:
  """Whether a model can read the frozen features of the data, or its pixels.

  Args:
    spec: the data.
    vision: the model's tower.
    where: names the model in the message.
    pixels: a tower that reads pixels is allowed.

  Raises:
    ConfigError: another tower, or pictures of another size.
  """
  check(vision.model_type == 'efficientnet_lite0' or
        pixels and reads_pixels(vision),
        f'{where}: vision.model_type={vision.model_type!r}, but frozen '
        'features are made by EfficientNet-Lite0; set '
        'vision.model_type="efficientnet_lite0"')
  check(spec.image_size == vision.image_size,
        f'data.image_size={spec.image_size}, but {where} has '
        f'vision.image_size={vision.image_size}; they must be the same')


def open_llava_json(path: str, options: dict[str, Any], message: Message,
                    frozen: bool = True) -> tuple[LlavaJson, str]:
  """A LLaVA-format file and its fingerprint.

  The fingerprint covers the file, the options, and size and time of every
  picture, so that the features of other pictures are not taken for theirs.

  Raises:
    DataError: frozen, and a row does not have exactly one picture.
  """
  source = LlavaJson(path, **options)
  if source.skipped:
    message(f'warning: {len(source.skipped)} row(s) are left out; the first: '
            f'{source.skipped[0].reason}')
  digest = hashlib.sha256(pathlib.Path(path).read_bytes())
  options = options | {'image_folder': os.path.abspath(source.image_folder)}
  digest.update(json.dumps(sorted(options.items())).encode())
  for index in range(len(source)):
    paths = source.image_paths(index)
    if frozen and len(paths) != 1:
      raise DataError(
          f'{source.row_name(index)} has {len(paths)} pictures; frozen features '
          'hold exactly one picture per row for now: leave text-only rows and '
          'rows with several pictures out of the file')
    for picture in paths:
      stat = picture.stat()
      digest.update(f'{picture} {stat.st_size} {stat.st_mtime_ns}\n'.encode())
  return source, digest.hexdigest()


def open_prepared(split: str, options: dict[str, Any], frozen: bool
                  ) -> PreparedSource:
  """A directory that prepare-data wrote.

  Raises:
    DataError: frozen, and rows do not have exactly one picture.
  """
  source = PreparedSource(options['directory'], split,
                          verify=bool(options.get('verify', False)))
  others = source.counts['text_only'] + source.counts['several_pictures']
  if frozen and others:
    raise DataError(
        f'{source.name}: {source.counts["text_only"]} rows are text only and '
        f'{source.counts["several_pictures"]} have several pictures; frozen '
        'features hold exactly one picture per row: prepare a file without '
        'those rows')
  return source


def open_split(spec: DataSpec, split: str, root: remote.Path,
               message: Message, vision: VisionConfig | None = None) -> Split:
  """Opens a split, building the data set and its features if needed.

  Args:
    spec: the data.
    split: in TFDS's notation.
    root: data sets go to root/data, features to root/features, lengths of
      rows to root/lengths.  On gs:// only where lengths are all there is.
    message: called with lines for the user.
    vision: the model's tower; no features are made for one that reads pixels.
      None is a tower with frozen features.

  Raises:
    ConfigError: the data set or its features need a local root.
    DataError: of the data.
  """
  options = dict(spec.options)
  frozen = vision is None or not reads_pixels(vision)
  lengths = root / 'lengths'
  local = not frozen and spec.name in _OPTIONS or not remote.is_remote(root)
  check(local, f'{root}: data sets and features are made on a local disk; name '
        'a folder there with --data-root')
  if spec.name == 'llava_json':
    source, data = open_llava_json(split, options, message, frozen)
    attribution = ''
  elif spec.name == 'prepared':
    source = open_prepared(split, options, frozen)
    data, attribution = source.fingerprint, ''
  else:
    source = open_source(spec.name, root / 'data', split, options=options)
    data = source.fingerprint
    attribution = source.metadata.get('attribution', '')
  if not frozen:
    return Split(source, None, attribution, data, lengths)
  encode, fingerprint = encoder()
  features = cached_features(
      source, encode, f'{fingerprint}-{data}',
      root / 'features', spec.image_size, 100, message=message)
  return Split(source, features, attribution, data, lengths)


def tokenizer_for(spec: DataSpec, examples: Any) -> Tokenizer:
  """The run's tokenizer.json, or a word-level tokenizer of the data set.

  Args:
    spec: the data; spec.tokenizer names a file, '' builds one.
    examples: the training split; its words become the vocabulary.
  """
  if spec.tokenizer:
    path = remote.to_path(spec.tokenizer)
    check(not remote.is_remote(path) or remote.exists(path),
          f'data.tokenizer={path} does not exist')
    with remote.local_copy(path.parent, (path.name, ROLES)) as folder:
      return load(folder / path.name)
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
  return sized_config(fields, tokenizer.vocab_size)


def sized_config(fields: dict[str, Any], vocab_size: int) -> LlavaConfig:
  """A model config with a vocabulary of that size; see `model_config`."""
  fields = {**fields, 'voco_token_index': vocab_size,
            'text': {**fields['text'], 'vocab_size': vocab_size}}
  return from_dict(fields)
