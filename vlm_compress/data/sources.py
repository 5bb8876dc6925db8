"""Random-access sources: a prepared data set on disk as Examples.

`open_source` writes the data set on first use (TFDS, array_record) and opens
one split of it.  A source has a length, gives an Example per index, and has
a fingerprint of its content, which names caches made from it.

The SHA-256 of every shard is written beside the data when it is prepared and
checked whenever it is opened, so that a torn, truncated or missing shard is
one clear message and not a wrong number later.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import operator
import os
import sys
import time
from typing import Any

import numpy as np

from vlm_compress.atomic import write_text
from vlm_compress.config import ConfigError, check
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Example, Turn

SOURCES = ('openmoji_grid', 'easy_vqa')
_SHARD_SUMS = 'shards.json'


class TfdsSource:
  """One split of a prepared data set.

  Attributes:
    name: '<data set>/<config>/<version>/<split>', config only if there is one.
    fingerprint: hexadecimal digest of name and content.
    metadata: what the builder says about the data set (names of the objects,
      ...), plus 'attribution': who made the pictures and under what license.
  """

  def __init__(self, builder, split: str):
    import tensorflow_datasets as tfds
    self.metadata = dict(builder.info.metadata or {})
    self.metadata.setdefault('attribution',
                             str(builder.info.redistribution_info.license))
    self._directory = str(builder.data_path)
    shards = _check_shards(builder, split)
    parts = (builder.name, builder.builder_config.name if
             builder.builder_config else '', str(builder.version), split)
    self.name = '/'.join(part for part in parts if part)
    digest = hashlib.sha256(json.dumps([self.name, shards]).encode())
    self.fingerprint = digest.hexdigest()[:16]
    try:
      self._records = builder.as_data_source(
          split=split, decoders={'image': tfds.decode.SkipDecoding()})
    except (ValueError, AssertionError) as error:  # TFDS asserts on 150%
      raise ConfigError(
          f'split={split!r} is not a part of a split; write for example '
          "'train', 'train[:10%]' or 'test[:100]'") from error

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    """Returns example `index`, counted from 0 (negative: from the end).

    Raises:
      IndexError: no such example.
      DataError: the record cannot be read.
    """
    index = operator.index(index)
    if not -len(self) <= index < len(self):
      raise IndexError(f'{self.name} has {len(self)} examples, not {index}')
    try:
      return _to_example(self._records[index % len(self)])
    except Exception as error:  # array_record and protobuf have no one error
      raise DataError(
          f'{self.name}: record {index} in {self._directory} cannot be read '
          f'({type(error).__name__}); {_remedy(self._directory)}') from error


def open_source(name: str, data_dir: str | os.PathLike, split: str, *,
                options: dict[str, Any] | None = None) -> TfdsSource:
  """Opens one split of a data set, writing the data set if it is not there.

  Args:
    name: one of SOURCES.
    data_dir: directory of all data sets; '~' is expanded.
    split: name of the split, or a part of it in TFDS's notation
      ('train[:10%]', 'test[:100]').
    options: settings of the data set, for openmoji_grid the arguments of
      `builders.openmoji_grid.make_config`; easy_vqa has none.

  Returns:
    The source.

  Raises:
    ConfigError: unknown name, option or split, or a package is missing.
    DataError: the files on disk are damaged; names the file and the remedy.
  """
  builder = _builder(name, os.path.expanduser(os.fspath(data_dir)),
                     dict(options or {}))
  if not os.path.isdir(builder.data_path):
    _prepare(builder)
  known = tuple(builder.info.splits)
  if not known:
    raise DataError(f'{builder.data_path}/dataset_info.json is missing; '
                    f'{_remedy(builder.data_path)}')
  check(_base(split) in known and '+' not in split,
        f'{name} has no split {split!r}; use one of {known}')
  return TfdsSource(builder, split)


def _base(split: str) -> str:
  return split.partition('[')[0]


def _remedy(directory) -> str:
  return f'delete {directory} and run again, which rebuilds it'


def _builder(name: str, data_dir: str, options: dict[str, Any]):
  """Makes the TFDS builder; imports TFDS only now, as it takes a second."""
  check(name in SOURCES, f'data set {name!r} is unknown; use one of {SOURCES}')
  if name == 'openmoji_grid':
    from vlm_compress.data.builders import openmoji_grid
    make = openmoji_grid.OpenmojiGrid
    try:
      config = openmoji_grid.make_config(**options)
    except TypeError as error:
      raise ConfigError(f'openmoji_grid: {error}; see make_config in '
                        'data/builders/openmoji_grid.py') from error
    directory = os.path.join(data_dir, name, config.name, str(make.VERSION))
    config = make.builder_configs.get(config.name, config)
  else:
    from vlm_compress.data.builders import easy_vqa
    check(not options, f'easy_vqa has no options; remove {sorted(options)}')
    make, config = easy_vqa.EasyVqa, None
    directory = os.path.join(data_dir, name, str(make.VERSION))
  # TFDS logs a warning for every config that is not in its registry.
  from absl import logging as absl_logging
  logger = absl_logging.get_absl_logger()
  logger.addFilter(_not_custom_config)
  try:
    return make(config=config, data_dir=data_dir, file_format='array_record')
  except ConfigError:
    raise
  except Exception as error:  # errors of json, protobuf and the file system
    if not os.path.isdir(directory):
      raise
    raise DataError(f'{directory}/dataset_info.json cannot be read '
                    f'({type(error).__name__}); {_remedy(directory)}'
                    ) from error
  finally:
    logger.removeFilter(_not_custom_config)


def _not_custom_config(record: logging.LogRecord) -> bool:
  return 'custom data configuration' not in str(record.msg)


def _prepare(builder) -> None:
  """Writes the data set and the sums of its shards."""
  import tensorflow_datasets as tfds
  started = time.time()
  name = builder.info.full_name
  print(f'preparing {name} in {builder.data_path} (once)', file=sys.stderr,
        flush=True)
  tfds.disable_progress_bar()
  # TFDS prints sizes it does not know; ours is the message that helps.
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(
          file_format='array_record',
          download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    _write_sums(builder)
  except OSError as error:
    raise DataError(f'{builder.data_path} cannot be written '
                    f'({error.strerror or error}); free space there or choose '
                    'another data directory') from error
  count = sum(info.num_examples for info in builder.info.splits.values())
  print(f'prepared {count} examples in {time.time() - started:.0f} s',
        file=sys.stderr, flush=True)


def _sha256(path: str) -> str:
  with open(path, 'rb') as stream:
    return hashlib.file_digest(stream, 'sha256').hexdigest()


def _shard_paths(builder, split: str) -> list[str]:
  return [str(path) for path in builder.info.splits[_base(split)].filepaths]


def _write_sums(builder) -> dict[str, str]:
  """Writes {shard file: SHA-256} beside the shards, atomically."""
  directory = str(builder.data_path)
  sums = {os.path.basename(path): _sha256(path)
          for split in builder.info.splits
          for path in _shard_paths(builder, split)}
  write_text(os.path.join(directory, _SHARD_SUMS),
             json.dumps(sums, indent=2, sort_keys=True))
  return sums


def _check_shards(builder, split: str) -> dict[str, str]:
  """Compares the shards of a split with their sums.

  Returns:
    {shard file: SHA-256} of the split.

  Raises:
    DataError: a shard is missing or is not what was written.
  """
  directory = str(builder.data_path)
  paths = _shard_paths(builder, split)
  for path in paths:
    if not os.path.exists(path):
      raise DataError(f'{path} is missing; {_remedy(directory)}')
  sums_path = os.path.join(directory, _SHARD_SUMS)
  try:
    with open(sums_path) as stream:
      sums = json.load(stream)
  except FileNotFoundError:  # prepared by TFDS's own tools: trust it once
    sums = _write_sums(builder)
  except ValueError as error:
    raise DataError(
        f'{sums_path} is damaged; {_remedy(directory)}') from error
  found = {os.path.basename(path): _sha256(path) for path in paths}
  for path in paths:
    if sums.get(os.path.basename(path)) != found[os.path.basename(path)]:
      raise DataError(f'{path} is damaged (its SHA-256 is not the one in '
                      f'{_SHARD_SUMS}); {_remedy(directory)}')
  return found


def _to_example(record: dict[str, Any]) -> Example:
  """Makes an Example from the features of any of our builders."""
  record = dict(record)
  turns = record.pop('turns')
  columns = zip(turns['question'], turns['answer'], turns['kind'],
                turns['heldout'], strict=True)
  return Example(
      example_id=_text(record.pop('picture_id')),
      turns=tuple(Turn(_text(question), _text(answer), _text(kind),
                       bool(heldout))
                  for question, answer, kind, heldout in columns),
      images=(bytes(record.pop('image')),),
      caption=_text(record.pop('caption', b'')),
      metadata={key: _text(value) if isinstance(value, bytes)
                else np.asarray(value) for key, value in record.items()})


def _text(value: bytes | str) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
