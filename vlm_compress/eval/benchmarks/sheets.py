"""Tables as .xlsx and .tsv, with the standard library only.

VLMEvalKit writes its answers as .xlsx, and MMBench's server wants one.  Both
hold a single sheet of plain cells, which needs a zip and a little XML and no
package for spreadsheets.  Formulas and formats are not looked at.
"""

from __future__ import annotations

import csv
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from vlm_compress import atomic
from vlm_compress.data.errors import DataError

_MAX_BYTES = 2**29  # of one part of a sheet, unpacked
_MAIN = '{http://schemas.openxmlformats.org/spreadsheetml/2006/main}'
_OFFICE = 'http://schemas.openxmlformats.org/officeDocument/2006/relationships'
_PACKAGE = 'http://schemas.openxmlformats.org/package/2006'
_DECLARED = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_KINDS = 'application/vnd.openxmlformats-officedocument.spreadsheetml'
# XML has no place for these; a sheet writes them as _x0007_.
_CONTROL = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f]')
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
    DataError: the name ends otherwise.
  """
  if path.suffix not in ('.xlsx', '.tsv'):
    raise DataError(f'{path}: must end in .xlsx or .tsv')
  path.parent.mkdir(parents=True, exist_ok=True)
  with atomic.replace(path) as temporary:
    if path.suffix == '.tsv':
      with open(temporary, 'w', encoding='utf-8', newline='') as stream:
        csv.writer(stream, delimiter='\t', lineterminator='\n').writerows(rows)
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
      text = _CONTROL.sub(lambda m: f'_x{ord(m.group()):04X}_', value.replace('\r\n', '\n'))
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
  sheet; empty cells are ''.

  Raises:
    FileNotFoundError: there is no such file.
    DataError: it is no such file, or damaged.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(f'data file {path} does not exist')
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
      shared = []
      if 'xl/sharedStrings.xml' in names:
        shared = [_text(item) for item in _part(archive, 'xl/sharedStrings.xml')]
      sheets = sorted((name for name in names if re.fullmatch(
          r'xl/worksheets/sheet\d+\.xml', name)), key=lambda name: (len(name), name))
      rows = _part(archive, sheets[0]).iter(f'{_MAIN}row')
      header: dict[int, str] = {}
      for number, row in enumerate(rows, 1):
        number = int(row.get('r', number))
        cells = dict(_cells(row, shared))
        if not header:
          header = {column: name for column, name in cells.items() if name}
        elif cells:
          yield number, {name: cells.get(column, '') for column, name in header.items()}
  except DataError:
    raise
  # zipfile says RuntimeError of an encrypted part, and NotImplementedError of a
  # way of packing that it does not know.
  except (zipfile.BadZipFile, ElementTree.ParseError, ValueError, KeyError,
          IndexError, RuntimeError, NotImplementedError) as e:
    raise DataError(f'{path}: cannot be read as .xlsx ({e}); save it as .csv or '
                    '.tsv') from e


def _part(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
  if archive.getinfo(name).file_size > _MAX_BYTES:
    raise DataError(f'{archive.filename}: {name} is larger than {_MAX_BYTES} bytes; '
                    'save it as .csv or .tsv')
  content = archive.read(name)
  if b'<!DOCTYPE' in content[:1000]:
    raise DataError(f'{archive.filename}: declares entities; save it as .csv or .tsv')
  return ElementTree.fromstring(content)


def _cells(row: ElementTree.Element, shared: Sequence[str]) -> Iterator[tuple[int, str]]:
  """(column from 0, text) of the cells that have one."""
  for position, cell in enumerate(row.iter(f'{_MAIN}c')):
    column = 0
    for letter in re.match('[A-Z]*', cell.get('r', '')).group():
      column = 26 * column + ord(letter) - 64
    kind, value = cell.get('t', 'n'), cell.find(f'{_MAIN}v')
    if kind == 'inlineStr':
      text = _text(cell.find(f'{_MAIN}is'))
    else:
      text = (value.text or '') if value is not None else ''
      if kind == 's' and text:
        text = shared[int(text)]
      elif kind == 'n' and re.fullmatch(r'-?\d+\.0+', text):
        text = text.partition('.')[0]  # a whole number that was kept as a float
    yield column - 1 if column else position, text


def _text(item: ElementTree.Element | None) -> str:
  """The text of a string item; readings of characters (rPh) are no text."""
  if item is None:
    return ''
  runs = [t for child in item if child.tag in (f'{_MAIN}t', f'{_MAIN}r')
          for t in child.iter(f'{_MAIN}t')]
  text = ''.join(run.text or '' for run in runs)
  return _ESCAPED.sub(lambda m: chr(int(m.group(1), 16)), text)
