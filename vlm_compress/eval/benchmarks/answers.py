"""Answer files of several tools, as one kind of record.

* ours and LLaVA's: JSON lines with `question_id` and `text` (or
  `prediction`, or `pred` of the video scripts, whose `answer` is the truth).
* lmms-eval's `..._samples_<task>.jsonl` (--log_samples): `filtered_resps`, and
  an id only inside a metric; `doc_id` is the place in its data set.
* VLMEvalKit's table: `prediction` beside the columns of its data set, as
  .tsv, .csv, .json or .xlsx; `index` is its own number.

Facts about those formats are in the tools' own sources (lmms_eval's
evaluation_tracker, vlmeval's inference).
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vlm_compress.data.errors import DataError
from vlm_compress.data.records import read_json, read_json_lines, read_table
from vlm_compress.eval.benchmarks import sheets
from vlm_compress.eval.benchmarks.question import is_whole

SUFFIXES = ('.jsonl', '.json', '.tsv', '.csv', '.xlsx')
_TEXTS = ('text', 'prediction', 'pred')
_IDS = ('question_id', 'questionId', 'id')
_QUESTIONS = ('prompt', 'question', 'input')
_IMAGES = ('image', 'image_path', 'imageId')
# lmms-eval asks POPE's categories as tasks, and names files after tasks.
_TASKS = {'pope_adv': 'adversarial', 'pope_pop': 'popular', 'pope_random': 'random'}
_TASK = re.compile(r'samples_(\w+)')


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
  """One row of an answer file.

  Attributes:
    where: file and line, for messages.
    text: what the model said.
    ids: what the row calls its question, the likeliest first.
    index: VLMEvalKit's number of the row, which for MMBench is the id.
    position: place in the tool's data set, from 0, where the row says it.
    question: what was asked, as far as the row says it.
    category: as far as the row says it.
    image: name of the picture without folders and extension, likewise.
  """
  where: str
  text: str
  ids: tuple[str, ...] = ()
  index: str | None = None
  position: int | None = None
  question: str | None = None
  category: str | None = None
  image: str | None = None


def read(path: pathlib.Path) -> list[Answer]:
  """All rows of an answer file.

  Raises:
    DataError: a row is malformed or of no known format; names the line.
    FileNotFoundError: there is no such file.
  """
  found = _TASK.search(path.stem)
  task = _TASKS.get(found.group(1)) if found else None
  answers = [_answer(row, f'{path}: {place}', task) for place, row in _rows(path)]
  if not answers:
    raise DataError(f'{path} holds no answer')
  return answers


def _rows(path: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
  suffix = path.suffix.lower()
  if suffix == '.jsonl':
    yield from ((f'line {n}', row) for n, row in read_json_lines(path))
  elif suffix in ('.tsv', '.csv'):
    table = read_table(path, '\t' if suffix == '.tsv' else ',')
    yield from ((f'line {n}', row) for n, row in table)
  elif suffix == '.xlsx':
    yield from ((f'row {n}', row) for n, row in sheets.read_xlsx(path))
  elif suffix == '.json':
    rows = read_json(path)
    if not isinstance(rows, list):
      raise DataError(f'{path} holds a JSON {type(rows).__name__}; an answer file '
                      'is a list of rows')
    for i, row in enumerate(rows):
      if not isinstance(row, dict):
        raise DataError(f'{path}: row {i}: holds a JSON {type(row).__name__}; it '
                        'must be an object')
      yield f'row {i}', row
  else:
    raise DataError(f'{path}: answer files end in {", ".join(SUFFIXES)}')


def _answer(row: Mapping[str, Any], where: str, task: str | None) -> Answer:
  if 'filtered_resps' in row:
    return _lmms_answer(row, where, task)
  name = next((name for name in _TEXTS if name in row), None)
  if name is None:
    raise DataError(f'{where}: has none of the fields {", ".join(_TEXTS)} and '
                    'filtered_resps; is it an answer file?')
  text = row[name]
  if not isinstance(text, str):
    raise DataError(f'{where}: field {name!r} must be a text, is '
                    f'{type(text).__name__}')
  ids = _ids(row)
  index = row.get('index')
  if not ids and index is None:
    raise DataError(f'{where}: does not say which question it answers: it has '
                    f'none of the fields {", ".join(_IDS)} and index')
  number = str(index) if index is not None else ''
  return Answer(where, text, ids, number or None,
                int(number) if is_whole(number) and not ids else None,
                _first_text(row, _QUESTIONS), _first_text(row, ('category',)), _image(row))


def _lmms_answer(row: Mapping[str, Any], where: str, task: str | None) -> Answer:
  text = row['filtered_resps']
  while isinstance(text, list) and len(text) == 1:  # nested in older versions
    text = text[0]
  if not isinstance(text, str):
    raise DataError(f"{where}: field 'filtered_resps' must be one text; samples of "
                    'likelihood tasks cannot be scored')
  position = row.get('doc_id')
  if not isinstance(position, int):
    raise DataError(f"{where}: field 'doc_id' must be a whole number")
  # The question's id is in older files' `doc`, or in what its metrics keep.
  inner = [value for value in row.values() if isinstance(value, dict)]
  ids = tuple(dict.fromkeys(x for value in inner for x in (*_ids(value), *_index(value))))
  category = next((c for value in inner if (c := _first_text(value, ('category',)))), None)
  image = next((image for value in inner if (image := _image(value))), None)
  return Answer(where, text, ids, None, position, _first_text(row, _QUESTIONS),
                category or task, image)


def _ids(row: Mapping[str, Any]) -> tuple[str, ...]:
  return tuple(str(row[name]) for name in _IDS
               if isinstance(row.get(name), (str, int)) and row[name] != '')


def _index(row: Mapping[str, Any]) -> tuple[str, ...]:
  return (str(row['index']),) if isinstance(row.get('index'), (str, int)) else ()


def _first_text(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
  return next((row[name] for name in names
               if isinstance(row.get(name), str) and row[name]), None)


def _image(row: Mapping[str, Any]) -> str | None:
  name = _first_text(row, _IMAGES)
  return pathlib.PurePosixPath(name).stem if name and len(name) < 1000 else None
