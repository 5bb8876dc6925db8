"""How long every row is, measured once and kept on disk.

Batches by length need all lengths before the first step, and tokenising some
hundred thousand conversations takes minutes.  The file is named by what the
lengths follow from (data, tokenizer, template, settings of rows, visual
tokens of an image), so lengths of something else are never taken by mistake.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlm_compress import atomic, remote
from vlm_compress.config import LlavaConfig, check
from vlm_compress.data import workers as workers_lib
from vlm_compress.data.encode import encode, expanded_length, truncate
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Example, Turn
from vlm_compress.data.progress import progress
from vlm_compress.data.rows import RowSpec, placed, row_limit
from vlm_compress.data.tokenizer import Tokenizer

_FORMAT = 1  # of the file, and of what is measured
_CHUNK = 512  # rows per job


@dataclasses.dataclass(frozen=True)
class RowLengths:
  """Lengths of all rows of a source.

  Attributes:
    tokens: int32[N], visual tokens counted, before a row is cut; where turns
      are drawn or permuted the most that the row can have.
    images: int32[N], images that are left when it is cut.
  """
  tokens: np.ndarray
  images: np.ndarray

  def __len__(self) -> int:
    return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class _Ruler:
  """What rows are measured with."""
  spec: RowSpec
  tokenizer: Tokenizer
  config: LlavaConfig
  frozen: bool

  def measure(self, example: Example) -> tuple[int, int]:
    """(tokens, images) of a row, see RowLengths."""
    config, limit = self.config, row_limit(self.spec, self.config)
    example = placed(example, self.spec, self.frozen)
    tokens, left = 0, len(example.images)
    for turns in _arrangements(example.turns, self.spec):
      row = encode(
          dataclasses.replace(example, turns=turns), self.tokenizer,
          self.spec.template, num_voco_tokens=max(self.spec.num_voco_tokens),
          independent_turns=self.spec.independent_turns,
          image_token_index=config.image_token_index,
          voco_token_index=config.voco_token_index)
      tokens = max(tokens, expanded_length(
          row, config.num_visual_tokens, config.image_token_index))
      if limit is not None:
        row = truncate(row, limit, config.num_visual_tokens,
                       config.image_token_index, config.voco_token_index)
      left = min(left, int((row.input_ids == config.image_token_index).sum()))
    return tokens, left

  def key(self, fingerprint: str, count: int) -> dict[str, Any]:
    """What the lengths follow from."""
    spec, config = self.spec, self.config
    return {'format': _FORMAT, 'data': fingerprint, 'rows': count,
            'tokenizer': self.tokenizer.fingerprint, 'template': spec.template,
            'one_turn': spec.one_turn, 'frozen': self.frozen,
            'independent_turns': spec.independent_turns,
            'num_voco_tokens': max(spec.num_voco_tokens),
            'limit': row_limit(spec, config), 'max_images': spec.max_images,
            'num_visual_tokens': config.num_visual_tokens,
            'placeholders': [config.image_token_index, config.voco_token_index]}


def _arrangements(turns: Sequence[Turn], spec: RowSpec
                  ) -> list[tuple[Turn, ...]]:
  """Turns in all ways that can differ in length.

  Of permuted turns the first alone matters: it has the system text in front.
  """
  turns = tuple(turns)
  if spec.one_turn:
    return [(turn,) for turn in turns]
  if spec.independent_turns:
    return [turns[i:] + turns[:i] for i in range(len(turns))]
  return [turns]


@dataclasses.dataclass(frozen=True)
class _Job:
  ruler: _Ruler
  source: Any
  start: int
  stop: int


def _measure(job: _Job) -> tuple[int, np.ndarray]:
  """(first row, int32[rows, 2])."""
  found, source = [], job.source
  # How many pictures a row has is enough, where they can be left unread.
  example_of = getattr(source, 'conversation', source.__getitem__)
  for index in range(job.start, job.stop):
    try:
      found.append(job.ruler.measure(example_of(index)))
    except DataError as e:
      raise DataError(f'row {index} of {job.source!r}: {e}') from e
  return job.start, np.asarray(found, np.int32)


def row_lengths(source: Any, spec: RowSpec, tokenizer: Tokenizer,
                config: LlavaConfig, *, frozen: bool, fingerprint: str,
                cache_dir: str | os.PathLike[str], workers: int = 1,
                message: Callable[[str], None] | None = None,
                wait_for: Callable[[remote.Path], Any] = lambda path: None
                ) -> RowLengths:
  """Opens the lengths of a source's rows, measuring them if needed.

  Args:
    source: random access to Examples.  Pictures are not read where it has a
      method `conversation`, which gives an Example without their bytes; of a
      prepared data set only if it has conversations beside its records.
    spec: how rows are made; without `kinds`.
    tokenizer, config: of the model.
    frozen: rows have frozen features and not pixels.
    fingerprint: of the source's content.
    cache_dir: directory of the files, local or gs://.
    workers: processes that measure; more than one needs a source that is
      small to send, such as PreparedSource.
    message: called with lines for the user; None prints them to stderr.
    wait_for: called with the file's path before it is looked for: another
      process may have written it.

  Raises:
    DataError: a row cannot be made (it is named), or the file not written.
  """
  check(not spec.kinds, 'rows.kinds draws turns: lengths are not known')
  message = message or (lambda line: print(line, file=sys.stderr, flush=True))
  ruler, count = _Ruler(spec, tokenizer, config, frozen), len(source)
  key = json.dumps(ruler.key(fingerprint, count), sort_keys=True)
  digest = hashlib.sha256(key.encode()).hexdigest()
  path = remote.to_path(cache_dir) / f'lengths-{digest[:16]}.npy'
  wait_for(path)
  table = _read(path, count, message)
  if table is None:
    message(f'measuring {count} rows into {path} (once)')
    if not getattr(source, 'has_conversations', True):
      message('the data were prepared by an older version, with no conversations '
              'beside the records: all pictures are read, too; prepare-data with '
              'the same arguments adds them without writing records anew')
    table = np.zeros((count, 2), np.int32)
    jobs = (_Job(ruler, source, start, min(start + _CHUNK, count))
            for start in range(0, count, _CHUNK))
    with progress('lengths', count) as advance:
      for start, part in workers_lib.run(_measure, jobs, workers):
        table[start:start + len(part)] = part
        advance(len(part))
    _write(path, table)
  return RowLengths(table[:, 0], table[:, 1])


def _read(path: remote.Path, count: int, message) -> np.ndarray | None:
  """The table of a file, None if it has to be made."""
  if not path.exists():
    return None
  try:
    table = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    if table.shape == (count, 2) and table.dtype == np.int32:
      return table
    reason = 'its shape is wrong'
  except (OSError, ValueError, EOFError) as e:
    reason = str(e)
  message(f'warning: {path} cannot be used ({reason}); it is made again')
  return None


def _write(path: remote.Path, table: np.ndarray) -> None:
  failure = ''
  try:
    remote.mkdir(path.parent)
    with atomic.replace(path) as temporary, open(temporary, 'wb') as stream:
      np.save(stream, table, allow_pickle=False)
  except OSError as e:
    failure = e.strerror or str(e)
  if failure:
    raise DataError(f'{path} cannot be written ({failure}); free space there '
                    'or choose another --data-root')
