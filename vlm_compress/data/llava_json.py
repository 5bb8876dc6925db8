"""Examples from a LLaVA-format JSON file and a folder of images.

The format of LLaVA's training sets (blip_laion_cc_sbu_558k,
llava_v1_5_mix665k): a list of objects with `id`, `conversations` and, unless
text only, `image`, a path below the image folder:

  {"id": "17", "image": "coco/17.jpg", "conversations": [
     {"from": "human", "value": "<image>\\nWhat is it?"},
     {"from": "gpt", "value": "A dog."}]}

Every row is checked when the file is opened, because a mistake found after
hours of training is expensive; images are read when an example is asked for.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import pathlib
from typing import Any, SupportsIndex

from vlm_compress.data import images
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Example, Turn
from vlm_compress.data.records import read_json
from vlm_compress.data.templates import IMAGE_MARKER

_HUMAN, _ASSISTANT = 'human', 'gpt'
# Keys of related formats that would silently become text-only rows.
_FOREIGN_KEYS = ('images', 'video', 'videos')


@dataclasses.dataclass(frozen=True)
class SkippedRow:
  """A row that was left out: its place in the file (from 0) and why."""
  row: int
  reason: str


@dataclasses.dataclass(frozen=True)
class LlavaRow:
  """A checked row.

  Attributes:
    index: its place in the file, from 0.
    row_id: its `id`, of any JSON type; the index where it has none.
    names: paths of its images, relative to the image folder.
    turns: the conversation.
    extra: its other fields.
  """
  index: int
  row_id: Any
  names: tuple[str, ...]
  turns: tuple[Turn, ...]
  extra: dict[str, Any]


class LlavaJson:
  """Random access to a LLaVA-format dataset: len(source), source[i].

  Attributes:
    skipped: the rows left out, [] unless `skip_bad_rows`.
  """

  def __init__(self, path: str | os.PathLike[str],
               image_folder: str | os.PathLike[str], *,
               skip_bad_rows: bool = False, verify_images: bool = False):
    """Reads and checks the file.

    Args:
      path: the JSON file.
      image_folder: what image paths are relative to.  Paths that leave it are
        refused; links inside it are followed (datasets are often linked in).
      skip_bad_rows: leave out rows with missing images or other mistakes and
        list them in `skipped`, instead of refusing the file.
      verify_images: decode every image now, which takes a while, so
        that broken pictures are found before training.

    Raises:
      FileNotFoundError: there is no such file or folder.
      DataError: the file is no such JSON, or a row is wrong.
    """
    self.path = os.fspath(path)
    self.image_folder = os.fspath(image_folder)
    if not os.path.isdir(self.image_folder):
      raise FileNotFoundError(
          f'image folder {self.image_folder} does not exist')
    self.skipped: list[SkippedRow] = []
    self._rows: list[LlavaRow] = []
    for index, raw in enumerate(read_rows(self.path)):
      try:
        row = check_row(index, raw)
        for name in row.names:
          self._check_image(name, verify_images)
        self._rows.append(row)
      except DataError as e:
        reason = f'{self._where(index, raw)}: {e}'
        if not skip_bad_rows:
          raise DataError(reason) from e
        self.skipped.append(SkippedRow(index, reason))
    if not self._rows:
      raise DataError(f'{self.path} has no usable row'
                      + (f'; the first of {len(self.skipped)} skipped: '
                         f'{self.skipped[0].reason}' if self.skipped else ''))

  def __len__(self) -> int:
    return len(self._rows)

  def __repr__(self) -> str:
    # Grain keeps it in a checkpoint and compares it when it resumes.
    return (f'LlavaJson({self.path!r}, {self.image_folder!r}, '
            f'rows={len(self)}, skipped={len(self.skipped)})')

  def __getitem__(self, index: SupportsIndex) -> Example:
    """The example, its images read from disk.

    Raises:
      IndexError: index is out of range.
      DataError: an image disappeared since the check.
    """
    row = self._rows[operator.index(index)]
    try:
      return self._example(row, tuple(images.read_bytes(self.image_folder, name)
                                      for name in row.names))
    except DataError as e:
      raise DataError(f'{self.row_name(index)}: {e}') from e

  def conversation(self, index: SupportsIndex) -> Example:
    """The example with pictures of no bytes: no file is read."""
    row = self._rows[operator.index(index)]
    return self._example(row, (b'',) * len(row.names))

  def most_pictures(self) -> tuple[int, bool]:
    """Pictures of the row that has most; True: that is known exactly."""
    return max(len(row.names) for row in self._rows), True

  def _example(self, row: LlavaRow, pictures: tuple[bytes, ...]) -> Example:
    metadata = {**row.extra, 'id': row.row_id, 'row': row.index,
                'image': list(row.names)}
    return Example(example_id=str(row.row_id), turns=row.turns,
                   images=pictures, metadata=metadata)

  def image_paths(self, index: SupportsIndex) -> tuple[pathlib.Path, ...]:
    """The image files of an example, without reading them."""
    row = self._rows[operator.index(index)]
    return tuple(images.resolve_path(self.image_folder, name)
                 for name in row.names)

  def row_name(self, index: SupportsIndex) -> str:
    """File, row and id of an example, for messages."""
    row = self._rows[operator.index(index)]
    return f'{self.path}: row {row.index} (id {row.row_id!r})'

  def _where(self, index: int, raw: Any) -> str:
    row_id = f' (id {raw["id"]!r})' if isinstance(raw, dict) and 'id' in raw \
        else ''
    return f'{self.path}: row {index}{row_id}'

  def _check_image(self, name: str, verify: bool) -> None:
    path = images.resolve_path(self.image_folder, name)
    try:
      size = path.stat().st_size if path.is_file() else -1
    except OSError as e:
      raise DataError(f'image {path} cannot be reached ({e.strerror}); check '
                      'its permissions, or pass skip_bad_rows') from e
    if size <= 0:
      raise DataError(f'image {path} is {"missing" if size else "empty"}; '
                      'fetch it again, or pass skip_bad_rows')
    if verify:
      images.load(self.image_folder, name)


def pair_turns(conversations: Any) -> tuple[Turn, ...]:
  """Turns of a row's `conversations`.

  As LLaVA does, a first message that is not from the human is dropped; then
  human and assistant must alternate.  A last question without an answer
  teaches nothing and is dropped too.

  Args:
    conversations: list of {"from": "human" | "gpt", "value": text}.

  Raises:
    DataError: it is not such a list.
  """
  if not isinstance(conversations, list) or not conversations:
    raise DataError("field 'conversations' must be a list of "
                    '{"from", "value"} objects that is not empty')
  for i, message in enumerate(conversations):
    if not isinstance(message, dict):
      raise DataError(f'conversations[{i}] must be an object with the fields '
                      "'from' and 'value'")
    if message.get('from') not in (_HUMAN, _ASSISTANT):
      raise DataError(f"conversations[{i}]: field 'from' is "
                      f"{message.get('from')!r}; it must be 'human' or 'gpt'")
    if not isinstance(message.get('value'), str):
      raise DataError(f"conversations[{i}]: field 'value' must be a text, is "
                      f"{type(message.get('value')).__name__}")
  first = 0 if conversations[0]['from'] == _HUMAN else 1
  messages = conversations[first:]
  for i, message in enumerate(messages):
    expected = _ASSISTANT if i % 2 else _HUMAN
    if message['from'] != expected:
      raise DataError(f'conversations[{first + i}] is from '
                      f"{message['from']!r}; turns must alternate, "
                      f'{expected!r} is due')
  if len(messages) < 2:
    raise DataError('conversations hold no question with an answer')
  return tuple(Turn(question['value'], answer['value']) for question, answer
               in zip(messages[::2], messages[1::2], strict=False))


def read_rows(path: str) -> list[Any]:
  """The rows of a JSON file, unchecked.

  Raises:
    FileNotFoundError: there is no such file.
    DataError: it is no JSON list.
  """
  rows = read_json(path)
  if not isinstance(rows, list):
    raise DataError(f'{path} holds a JSON {type(rows).__name__}; '
                    'it must be a list of rows')
  return rows


def check_row(index: int, raw: Any) -> LlavaRow:
  """A row whose fields, image paths and `<image>` markers are right.

  Args:
    index: its place in the file, from 0.
    raw: an element of what `read_rows` gives.

  Raises:
    DataError: something is wrong with it; the message does not say where.
  """
  if not isinstance(raw, dict):
    raise DataError(f'is a JSON {type(raw).__name__}; it must be an object '
                    "with the fields 'id' and 'conversations'")
  for key in _FOREIGN_KEYS:
    if key in raw:
      raise DataError(f'field {key!r} is not part of this format; '
                      "images belong in 'image'")
  turns = pair_turns(raw.get('conversations'))
  names = _image_names(raw.get('image'))
  markers = sum(t.question.count(IMAGE_MARKER) for t in turns)
  if markers != len(names):
    raise DataError(f'{markers} {IMAGE_MARKER} marker(s) in the questions but '
                    f"{len(names)} path(s) in 'image'; there must be one "
                    'marker for every image')
  if names and any(IMAGE_MARKER in t.answer for t in turns):
    raise DataError(f'an answer contains {IMAGE_MARKER}; '
                    'only questions may carry images')
  extra = {k: v for k, v in raw.items()
           if k not in ('id', 'image', 'conversations')}
  return LlavaRow(index, raw.get('id', index), names, turns, extra)


def _image_names(value: Any) -> tuple[str, ...]:
  """The paths of field `image`: none, one, or a list."""
  names = [] if value is None else value if isinstance(value, list) else [value]
  for name in names:
    if not isinstance(name, str) or not name:
      raise DataError(f"field 'image' holds {name!r}; it must be a path "
                      'relative to the image folder, or a list of them')
  return tuple(names)
