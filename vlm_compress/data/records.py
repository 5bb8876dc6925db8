"""Rows of JSON, JSON-lines and delimited files; every mistake names its line.

Pure Python, so that a file can be looked at without any other library.
"""

from __future__ import annotations

import collections
import csv
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vlm_compress.data.errors import DataError

_MAX_FIELD = 2**28  # characters; MMBench keeps whole pictures in a field
_TOO_LONG = 'a number has too many digits; correct it or copy the file again'


def read_json(path: str | os.PathLike,
              each: Callable[[dict[str, Any]], Any] = lambda value: value) -> Any:
  """The content of a JSON file.

  Args:
    path: the file.
    each: what takes the place of an object, inner ones first; large files need
      not be held whole.

  Raises:
    FileNotFoundError: there is no such file.
    DataError: it is no JSON, an object has a key twice, or a number has thousands
      of digits.
  """
  with _open(path) as stream:
    try:
      return json.load(stream, object_pairs_hook=lambda pairs: each(_unique_keys(pairs)))
    except json.JSONDecodeError as e:
      raise DataError(f'{path}: line {e.lineno}, column {e.colno}: malformed '
                      f'JSON ({e.msg}); correct the file or copy it again'
                      ) from e
    except UnicodeDecodeError as e:
      raise DataError(_not_utf8(path, e)) from e
    except RecursionError as e:
      raise DataError(f'{path}: malformed JSON (nested too deeply)') from e
    except DataError as e:
      raise DataError(f'{path}: {e}') from e
    except ValueError as e:  # int() of a text with very many digits
      raise DataError(f'{path}: line {_many_digits(path)}: {_TOO_LONG}') from e


def read_json_lines(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
  """(line number from 1, object) for every line that is not blank.

  Raises:
    FileNotFoundError: there is no such file.
    DataError: a line is no JSON object.
  """
  with _open(path, newline='\n') as stream:
    try:
      for number, line in enumerate(stream, 1):
        if line.strip():
          yield number, _json_line(path, number, line)
    except UnicodeDecodeError as e:
      raise DataError(_not_utf8(path, e)) from e


def _json_line(path: str | os.PathLike, number: int, line: str) -> dict[str, Any]:
  try:
    value = json.loads(line, object_pairs_hook=_unique_keys)
  except json.JSONDecodeError as e:
    raise DataError(f'{path}: line {number}, column {e.colno}: malformed JSON '
                    f'({e.msg}); correct the line, or copy the file again if '
                    'it was cut off') from e
  except RecursionError as e:
    raise DataError(f'{path}: line {number}: nested too deeply') from e
  except DataError as e:
    raise DataError(f'{path}: line {number}: {e}') from e
  except ValueError as e:  # int() of a text with very many digits
    raise DataError(f'{path}: line {number}: {_TOO_LONG}') from e
  if not isinstance(value, dict):
    raise DataError(f'{path}: line {number}: holds a JSON '
                    f'{type(value).__name__}; it must be an object')
  return value


def read_table(path: str | os.PathLike, delimiter: str
               ) -> Iterator[tuple[int, dict[str, str]]]:
  """(line number from 1 where the row begins, column -> text) for every row.

  Fields may be quoted and then hold delimiters, quotes and line breaks; a text
  such as None or N/A is that text, only the empty one is nothing.

  Raises:
    FileNotFoundError: there is no such file.
    DataError: no header, a column twice, or a row of another length.
  """
  before = csv.field_size_limit(_MAX_FIELD)
  with _open(path, newline='') as stream:
    try:
      reader = csv.reader(stream, delimiter=delimiter, strict=True)
      header = next(reader, [])
      if len(set(header)) < len(header) or not any(header):
        raise DataError(f'{path}: line 1: must name the columns, each once')
      line = reader.line_num + 1
      for row in reader:
        if row and len(row) != len(header):
          raise DataError(f'{path}: line {line}: {len(row)} fields where the '
                          f'header has {len(header)}; correct the row or copy '
                          'the file again')
        if row:
          yield line, dict(zip(header, row))
        line = reader.line_num + 1
    except csv.Error as e:
      raise DataError(f'{path}: line {reader.line_num}: malformed row ({e}); '
                      'correct it or copy the file again') from e
    except UnicodeDecodeError as e:
      raise DataError(_not_utf8(path, e)) from e
    finally:
      csv.field_size_limit(before)


def _open(path: str | os.PathLike, newline: str | None = None):
  if not os.path.isfile(path):
    raise FileNotFoundError(f'data file {path} does not exist')
  return open(path, encoding='utf-8-sig', newline=newline)


def _not_utf8(path: str | os.PathLike, error: UnicodeDecodeError) -> str:
  return f'{path}: byte {error.start} is not UTF-8; save the file as UTF-8'


def _many_digits(path: str | os.PathLike) -> int:
  """The first line, from 1, with a number that int() refuses; 1 if there is none."""
  number = re.compile(f'[0-9]{{{sys.get_int_max_str_digits() + 1}}}')
  with _open(path) as stream:
    return next((n for n, line in enumerate(stream, 1) if number.search(line)), 1)


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
  """dict(pairs), but a key that occurs twice is an error, not the last."""
  pairs = list(pairs)
  result = dict(pairs)
  if len(result) < len(pairs):
    counts = collections.Counter(k for k, _ in pairs)
    key = next(k for k, count in counts.items() if count > 1)
    shown = json.dumps(pairs[0][1])[:60]
    raise DataError(f'the key {key!r} occurs twice in the object that begins '
                    f'with {pairs[0][0]!r}: {shown}; keep one of them')
  return result
