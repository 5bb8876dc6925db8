"""Reading JSON, JSON lines and tables: every mistake names its line."""

from __future__ import annotations

import csv
import time

import pytest

from vlm_compress.data.errors import DataError
from vlm_compress.data.records import read_json, read_json_lines, read_table


def write(tmp_path, text):
  path = tmp_path / 'file'
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return path


def test_json_lines_skip_blank_lines_and_count_them(tmp_path):
  path = write(tmp_path, '\ufeff{"a": 1}\n\n  \n{"a": "x\\u2028y"}\r\n{"a": "\u2028"}')
  assert list(read_json_lines(path)) == [
      (1, {'a': 1}), (4, {'a': 'x\u2028y'}), (5, {'a': '\u2028'})]


@pytest.mark.parametrize('text, message', [
    ('{"a": 1}\n{"a": ', 'line 2, column 7: malformed JSON'),
    ('{"a": 1}\n\n[1]', 'line 3: holds a JSON list; it must be an object'),
    ('{"a": 1, "a": 2}', "line 1: the key 'a' occurs twice"),
    (b'{"a": "\xff"}', 'is not UTF-8'),
    ('[' * 100_000, 'line 1: nested too deeply'),
])
def test_mistakes_in_json_lines(text, message, tmp_path):
  path = write(tmp_path, text)
  with pytest.raises(DataError) as caught:
    list(read_json_lines(path))
  assert str(caught.value).startswith(f'{path}: ') and message in str(caught.value)


def test_tables_hold_quotes_line_breaks_and_long_fields(tmp_path):
  long = 'x' * 200_000  # csv's own limit is 131,072
  path = write(tmp_path, f'a\tb\n"1\n2"\t"say ""x"""\n\n5" tall\t{long}\n')
  limit = csv.field_size_limit()
  assert list(read_table(path, '\t')) == [
      (2, {'a': '1\n2', 'b': 'say "x"'}), (5, {'a': '5" tall', 'b': long})]
  assert csv.field_size_limit() == limit


@pytest.mark.parametrize('text, message', [
    ('a,b\n1,2\n3', 'line 3: 1 fields where the header has 2'),
    ('a,b\n"1\n2",3,4\n', 'line 2: 3 fields'),
    ('a,a\n', 'line 1: must name the columns, each once'),
    ('', 'line 1: must name the columns'),
    ('a,b\n1,"2', 'line 2: malformed row'),
    (b'a\n\xff', 'is not UTF-8'),
])
def test_mistakes_in_tables(text, message, tmp_path):
  path = write(tmp_path, text)
  with pytest.raises(DataError) as caught:
    list(read_table(path, ','))
  assert str(caught.value).startswith(f'{path}: ') and message in str(caught.value)


def test_missing_files(tmp_path):
  for read in (read_json, read_json_lines, lambda path: read_table(path, ',')):
    with pytest.raises(FileNotFoundError, match='nothing does not exist'):
      list(read(tmp_path / 'nothing'))


def test_numbers_with_thousands_of_digits_are_named(tmp_path):
  long = '7' * 6000  # int() takes 4,300
  path = write(tmp_path, f'{{"a": 1}}\n{{"a": {long}}}')
  with pytest.raises(DataError, match='line 2: a number has too many digits') as caught:
    list(read_json_lines(path))
  assert str(caught.value).startswith(f'{path}: ') and len(str(caught.value)) < 300
  path = write(tmp_path, f'[1,\n2,\n-{long}]')
  with pytest.raises(DataError, match='line 3: a number has too many digits') as caught:
    read_json(path)
  assert str(caught.value).startswith(f'{path}: ')


def test_a_key_that_occurs_twice_among_very_many_is_found_at_once(tmp_path):
  rows = ', '.join(f'"{i}": 1' for i in range(200_000))
  path = write(tmp_path, f'{{{rows}, "x": 2, "199999": 3, "x": 4}}')
  start = time.perf_counter()
  with pytest.raises(DataError, match="the key '199999' occurs twice"):
    read_json(path)
  assert time.perf_counter() - start < 20  # counting each key again takes an hour
