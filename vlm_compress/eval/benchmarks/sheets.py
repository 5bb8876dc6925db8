"""Tables as .xlsx and .tsv, with the standard library only.

VLMEvalKit writes its answers as .xlsx, and MMBench's server wants one.  Both
hold a single sheet of plain cells, which needs a zip and a little XML and no
package for spreadsheets.  Formats are not looked at, and of a formula the value
that its program kept.
"""

from __future__ import annotations

import collections
import csv
import functools
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO
from xml.etree import ElementTree
from xml.parsers import expat
from xml.sax.saxutils import escape

from vlm_compress import atomic
from vlm_compress.data.errors import DataError
from vlm_compress.eval.benchmarks.question import is_whole

SUFFIXES = ('.xlsx', '.tsv')  # that `write` writes
_MAX_BYTES = 2**26  # of one part of a sheet, unpacked
_MAX_TAG = 2**20  # bytes of a tag or comment, which the parser holds whole
_MAX_DEPTH, _MAX_ELEMENTS = 32, 2**14  # of elements in each other, and in a row
_MAX_CELLS = 256  # of a row; tools write about twenty
_MAX_TEXT = 32_767  # UTF-16 units of a cell in Excel
_CHUNK = 2**16  # bytes
_MAIN = '{http://schemas.openxmlformats.org/spreadsheetml/2006/main}'
_OFFICE = 'http://schemas.openxmlformats.org/officeDocument/2006/relationships'
_PACKAGE = 'http://schemas.openxmlformats.org/package/2006'
_DECLARED = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_KINDS = 'application/vnd.openxmlformats-officedocument.spreadsheetml'
# XML has no place for these (or reads them as another: the carriage return); a
# sheet writes them as _x0007_, and the _ of a text that looks like that as _x005F_
# (ECMA-376, ST_Xstring).
_CONTROL = re.compile('[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff]|'
                      '_(?=x[0-9A-Fa-f]{4}_)')
_ESCAPED = re.compile('_x([0-9A-Fa-f]{4})_')
_FIXED = {
    '[Content_Types].xml': (
        f'<Types xmlns="{_PACKAGE}/content-types">'
        '<Default Extension="rels" ContentType='
        '"application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{_KINDS}.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{_KINDS}.worksheet+xml"/>'
        '</Types>'),
    '_rels/.rels': (
        f'<Relationships xmlns="{_PACKAGE}/relationships"><Relationship Id="rId1" '
        f'Type="{_OFFICE}/officeDocument" Target="xl/workbook.xml"/></Relationships>'),
    'xl/_rels/workbook.xml.rels': (
        f'<Relationships xmlns="{_PACKAGE}/relationships"><Relationship Id="rId1" '
        f'Type="{_OFFICE}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>'),
    'xl/workbook.xml': (
        f'<workbook xmlns="{_MAIN[1:-1]}" xmlns:r="{_OFFICE}"><sheets>'
        '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>'),
}


def write(path: pathlib.Path, rows: Sequence[Sequence[str | int]]) -> None:
  """Writes a table, atomically: .xlsx, or .tsv.

  Raises:
    DataError: the name ends otherwise, or the format has no way to write a text.
  """
  if path.suffix not in SUFFIXES:
    raise DataError(f'{path}: must end in {" or ".join(SUFFIXES)}')
  path.parent.mkdir(parents=True, exist_ok=True)
  with atomic.replace(path) as temporary:
    if path.suffix == '.tsv':
      with open(temporary, 'w', encoding='utf-8', newline='') as stream:
        try:
          table = csv.writer(stream, delimiter='\t', lineterminator='\n',
                             quoting=csv.QUOTE_NONNUMERIC)
          table.writerows(rows)
        except UnicodeEncodeError as e:
          raise DataError(f'{path}: a text has half a character, {e.object[e.start]!a}, '
                          'which .tsv cannot hold; write .xlsx') from e
    else:
      with zipfile.ZipFile(temporary, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, text in _FIXED.items():
          archive.writestr(name, _DECLARED + text)
        body = ''.join(_row(number, cells) for number, cells in enumerate(rows, 1))
        archive.writestr('xl/worksheets/sheet1.xml', (
            f'{_DECLARED}<worksheet xmlns="{_MAIN[1:-1]}"><sheetData>{body}'
            '</sheetData></worksheet>'))


def _row(number: int, cells: Sequence[str | int]) -> str:
  out = []
  for column, value in enumerate(cells):
    place = f'{_letters(column)}{number}'
    if isinstance(value, int):
      out.append(f'<c r="{place}"><v>{value}</v></c>')
    elif value:
      if len(value.encode('utf-16-le', 'surrogatepass')) > 2 * _MAX_TEXT:
        raise DataError(f'cell {place} of the table has {len(value):,} characters, and Excel takes '
                        f'{_MAX_TEXT:,}; write .tsv')
      text = _CONTROL.sub(lambda m: f'_x{ord(m.group()):04X}_', value)
      out.append(f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">'
                 f'{escape(text)}</t></is></c>')
  return f'<row r="{number}">{"".join(out)}</row>'


def _letters(column: int) -> str:
  """0 -> A, 26 -> AA."""
  name = ''
  column += 1
  while column:
    column, rest = divmod(column - 1, 26)
    name = chr(65 + rest) + name
  return name


def read_xlsx(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, str]]]:
  """(row number, column -> text) for the rows below the header of the first
  sheet; empty cells are '', truth is TRUE or FALSE.

  A row is read at a time, so that no more than a row and the shared texts are held.

  Raises:
    FileNotFoundError: there is no such file.
    DataError: it is no such file, is damaged or very large, or has a cell without
      a value that could be read.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(f'data file {path} does not exist')
  with open(path, 'rb') as stream:
    try:
      yield from _rows(stream)
    except DataError as e:
      raise DataError(f'{path}: {e}; save it as .csv or .tsv') from e
    # zipfile says RuntimeError of an encrypted part or an unknown way of packing, and
    # of damaged ones what the way of packing says, OSError without a name among it.
    except (zipfile.BadZipFile, expat.ExpatError, ValueError, KeyError, IndexError,
            RuntimeError, EOFError, OSError, zlib.error) as e:
      raise DataError(f'{path}: cannot be read as .xlsx ({e}); save it as .csv or '
                      '.tsv') from e


def _rows(stream: BinaryIO) -> Iterator[tuple[int, dict[str, str]]]:
  with zipfile.ZipFile(stream) as archive:
    names = archive.namelist()
    shared = []
    if 'xl/sharedStrings.xml' in names:
      shared = [_text(item) for item in _items(archive, 'xl/sharedStrings.xml', 'si')]
    sheets = sorted((name for name in names if re.fullmatch(
        r'xl/worksheets/sheet[0-9]+\.xml', name)), key=lambda name: (len(name), name))
    header: dict[int, str] = {}
    for number, row in enumerate(_items(archive, sheets[0], 'row'), 1):
      number = int(row.get('r', number))
      cells = _cells(row, number, shared)
      if not header:
        header = {column: name for column, name in cells.items() if name}
        twice = [name for name, n in collections.Counter(header.values()).items() if n > 1]
        if twice:
          raise DataError(f'row {number}: names the column {twice[0]!r} twice')
      elif cells:
        yield number, {name: cells.get(column, '') for column, name in header.items()}


def _items(archive: zipfile.ZipFile, name: str, tag: str) -> Iterator[ElementTree.Element]:
  """The elements `tag` of a part, each when it has ended; nothing else is kept.

  A part of a few kilobytes can unpack to gigabytes, and a tree of elements takes
  tens of times the size of its text: sizes are limited before and while reading.
  """
  info = archive.getinfo(name)
  if info.file_size > _MAX_BYTES:
    raise DataError(f'{name} is larger than {_MAX_BYTES} bytes')
  if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise DataError(f'{name} is packed in a way that .xlsx does not have')
  parser = expat.ParserCreate(namespace_separator='}')
  parser.buffer_text = True
  items = _Items(f'{_MAIN}{tag}')
  parser.StartElementHandler, parser.EndElementHandler = items.start, items.end
  parser.CharacterDataHandler = items.text
  parser.StartDoctypeDeclHandler = items.doctype
  fed = 0
  with archive.open(info) as part:
    while chunk := part.read(_CHUNK):
      parser.Parse(chunk)
      fed += len(chunk)
      if fed - parser.CurrentByteIndex > _MAX_TAG:
        raise DataError(f'{name} has a tag of more than {_MAX_TAG} bytes')
      yield from items.done
      items.done.clear()
  parser.Parse(b'', True)
  yield from items.done


class _Items:
  """Makes trees of the elements `tag` from what a parser comes across."""

  def __init__(self, tag: str):
    self.tag = tag
    self.done: list[ElementTree.Element] = []
    self.builder: ElementTree.TreeBuilder | None = None
    self.depth = self.begun = self.count = 0

  def doctype(self, *_) -> None:
    raise DataError('declares entities')

  def start(self, name: str, attributes: dict[str, str]) -> None:
    self.depth += 1
    if self.builder is None and f'{{{name}' == self.tag:
      self.builder, self.begun, self.count = ElementTree.TreeBuilder(), self.depth, 0
    if self.builder is not None:
      self.builder.start(f'{{{name}', attributes)
      self.count += 1
    if self.depth > _MAX_DEPTH or self.count > _MAX_ELEMENTS:
      raise DataError('a row or text has too many parts for a table of answers')

  def text(self, text: str) -> None:
    if self.builder is not None:
      self.builder.data(text)

  def end(self, name: str) -> None:
    if self.builder is not None:
      self.builder.end(f'{{{name}')
      if self.depth == self.begun:
        self.done.append(self.builder.close())
        self.builder = None
    self.depth -= 1


def _cells(row: ElementTree.Element, number: int, shared: Sequence[str]) -> dict[int, str]:
  """Column from 0 -> text, of the cells that have one."""
  cells: dict[int, str] = {}
  column = -1
  for cell in row.iter(f'{_MAIN}c'):
    place = re.fullmatch('([A-Z]{1,3})[0-9]+', cell.get('r', ''))
    column += 1  # without a place, a cell is behind the one before
    if place:
      column = functools.reduce(lambda n, letter: 26 * n + ord(letter) - 64,
                                place.group(1), 0) - 1
    if column in cells or len(cells) == _MAX_CELLS:
      raise DataError(f'row {number}: has a cell twice, or more than {_MAX_CELLS} cells')
    where = f'row {number}, cell {_letters(column)}{number}'
    cells[column] = _value(cell, where, shared)
  return cells


def _value(cell: ElementTree.Element, where: str, shared: Sequence[str]) -> str:
  kind, value = cell.get('t', 'n'), cell.find(f'{_MAIN}v')
  if kind == 'inlineStr':
    return _text(cell.find(f'{_MAIN}is'))
  text = (value.text or '') if value is not None else ''
  if value is None and cell.find(f'{_MAIN}f') is not None:
    raise DataError(f'{where}: has a formula and no value')
  if kind == 'e':
    raise DataError(f'{where}: has the error {text!r} and no value')
  if kind == 'b' and text in ('', '0', '1'):
    return {'': '', '0': 'FALSE', '1': 'TRUE'}[text]
  if kind == 's' and (not text or is_whole(text)):
    return shared[int(text)] if text else ''
  if kind == 'n' and re.fullmatch(r'-?[0-9]+\.0+', text):
    return text.partition('.')[0]  # a whole number that was kept as a float
  if kind not in ('n', 'str', 'd'):
    raise DataError(f'{where}: has a value of the unknown kind {kind!r}, {text[:20]!r}')
  return _unescaped(text) if kind == 'str' else text


def _text(item: ElementTree.Element | None) -> str:
  """The text of a string item; readings of characters (rPh) are no text."""
  if item is None:
    return ''
  runs = [t for child in item if child.tag in (f'{_MAIN}t', f'{_MAIN}r')
          for t in child.iter(f'{_MAIN}t')]
  return _unescaped(''.join(run.text or '' for run in runs))


def _unescaped(text: str) -> str:
  return _ESCAPED.sub(lambda m: chr(int(m.group(1), 16)), text)
