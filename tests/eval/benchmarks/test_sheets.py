"""Tables as .xlsx: what is written is read back, and what Excel writes too."""

from __future__ import annotations

import contextlib
import csv
import tracemalloc
import zipfile

import pytest
from benchmark_files import scored

from vlm_compress.data.errors import DataError
from vlm_compress.data.records import read_table
from vlm_compress.eval.benchmarks import answers, joining, mmbench, sheets

TEXTS = ['plain', ' blanks ', 'two\nlines', 'tab\tand "quotes"', '<&> é 中 🙂', '_x0041_',
         '=1+1', 'bell\x07', 'a\rb\r\nc', '\ufffe\uffff', 'half \ud83d', '_x0041_x0042_',
         '_x005F_x0041_', '']


def test_texts_survive(tmp_path):
  path = tmp_path / 'a.xlsx'
  header = [f'c{i}' for i in range(30)]  # past column Z
  sheets.write(path, [header, *([text] * 30 for text in TEXTS), list(range(30))])
  rows = list(sheets.read_xlsx(path))
  wanted = [text for text in TEXTS if text]  # a row of empty cells is no row
  assert [row['c29'] for _, row in rows[:-1]] == wanted
  assert rows[-1] == (len(TEXTS) + 2, {f'c{i}': str(i) for i in range(30)})


def test_texts_survive_as_tsv_too(tmp_path):
  whole = [text for text in TEXTS if '\ud83d' not in text]
  sheets.write(tmp_path / 'a.tsv', [['n', 'text'], *([i, x] for i, x in enumerate(whole))])
  assert [row for _, row in read_table(tmp_path / 'a.tsv', '\t')] == [
      {'n': str(i), 'text': text} for i, text in enumerate(whole)]
  with pytest.raises(DataError, match=r"a.tsv: .*half a character, '.ud83d'.*write .xlsx"):
    sheets.write(tmp_path / 'a.tsv', [['half \ud83d']])


def test_texts_that_excel_would_cut_are_refused(tmp_path):
  sheets.write(tmp_path / 'a.xlsx', [['x' * 32_767], ['🙂' * 16_383]])
  for long in ('x' * 32_768, '🙂' * 16_384):  # a 🙂 counts twice
    with pytest.raises(DataError, match='cell B1 .* Excel takes 32,767; write .tsv'):
      sheets.write(tmp_path / 'a.xlsx', [['', long]])
  sheets.write(tmp_path / 'a.tsv', [['x' * 40_000]])


MAIN = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
SHEET = 'xl/worksheets/sheet1.xml'


def make(path, sheet, shared=None):
  """A file as spreadsheet programs write it, cells as given."""
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr(SHEET, f'<worksheet {MAIN}><sheetData>{sheet}</sheetData></worksheet>')
    if shared is not None:
      archive.writestr('xl/sharedStrings.xml', f'<sst {MAIN}>{shared}</sst>')
  return path


def test_shared_strings_formatted_runs_and_gaps(tmp_path):
  path = make(tmp_path / 'a.xlsx', (
      '<row r="1"><c r="A1" t="s"><v>0</v></c><c r="C1" t="s"><v>1</v></c></row>'
      '<row r="4"><c r="A4"><v>17.0</v></c><c r="C4" t="s"><v>2</v></c></row>'
      '<row r="5"><c r="C5" t="str"><f>A4</f><v>x</v></c></row>'),
      '<si><t>index</t></si><si><t>prediction</t></si>'
      '<si><r><t>a </t></r><r><rPr/><t>b</t></r><rPh><t>no</t></rPh></si>')
  assert list(sheets.read_xlsx(path)) == [
      (4, {'index': '17', 'prediction': 'a b'}), (5, {'index': '', 'prediction': 'x'})]


@pytest.mark.parametrize('content', [b'no zip', b''])
def test_other_files_are_refused(content, tmp_path):
  path = tmp_path / 'a.xlsx'
  path.write_bytes(content)
  with pytest.raises(DataError, match='a.xlsx: cannot be read as .xlsx.*save it as .csv'):
    list(sheets.read_xlsx(path))
  with pytest.raises(FileNotFoundError):
    list(sheets.read_xlsx(tmp_path / 'b.xlsx'))


@pytest.mark.parametrize('sheet', ['<row r="1"><c t="s"><v>5</v></c></row>', '<row>'])
def test_damaged_sheets_are_refused(sheet, tmp_path):
  with pytest.raises(DataError, match='cannot be read as .xlsx'):
    list(sheets.read_xlsx(make(tmp_path / 'a.xlsx', sheet, '')))


@pytest.mark.parametrize('encoding, before', [
    ('utf-8', ''), ('utf-8', f'<!-- {"long " * 1000} -->'), ('utf-16', '')])
def test_entities_are_refused(encoding, before, tmp_path):
  path = tmp_path / 'a.xlsx'
  text = (f'<?xml version="1.0" encoding="{encoding}"?>{before}'
          f'<!DOCTYPE x [<!ENTITY a "aaaa">]><worksheet {MAIN}><row><c t="inlineStr"><is>'
          '<t>&a;</t></is></c></row></worksheet>')
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr(SHEET, text.encode(encoding))
  with pytest.raises(DataError, match='a.xlsx: declares entities'):
    list(sheets.read_xlsx(path))


HEADER = '<row r="1"><c r="A1" t="str"><v>index</v></c><c r="B1" t="str"><v>text</v></c></row>'


@pytest.mark.parametrize('cells, message', [
    ('<c r="B7"><f>A1+1</f></c>', 'row 7, cell B7: has a formula and no value'),
    ('<c r="B7" t="e"><v>#N/A</v></c>', "row 7, cell B7: has the error '#N/A'"),
    ('<c r="B7" t="q"><v>1</v></c>', "row 7, cell B7: has a value of the unknown kind 'q'"),
    ('<c r="B7" t="s"><v>-1</v></c>', "row 7, cell B7: has a value of the unknown kind 's'"),
    ('<c r="A7"><v>1</v></c><c r="A7"><v>2</v></c>', 'row 7: has a cell twice'),
    ('<c><v>1</v></c>' * 257, 'row 7: .* more than 256 cells'),
])
def test_cells_that_cannot_be_read_are_named(cells, message, tmp_path):
  path = make(tmp_path / 'a.xlsx', f'{HEADER}<row r="7">{cells}</row>',
              '<si><t>x</t></si>')
  with pytest.raises(DataError, match=f'a.xlsx: {message}.*save it as .csv'):
    list(sheets.read_xlsx(path))


def test_truth_and_cells_without_a_place(tmp_path):
  path = make(tmp_path / 'a.xlsx', HEADER + (
      '<row r="2"><c t="n"><v>1</v></c><c t="b"><v>1</v></c></row>'
      '<row r="3"><c r="B3" t="b"><v>0</v></c><c><v>5</v></c></row>'
      '<row r="4"><c r="B4" t="str"><f>A4</f><v>a_x000D_b</v></c></row>'))
  assert [row['text'] for _, row in sheets.read_xlsx(path)] == ['TRUE', 'FALSE', 'a\rb']


def test_a_column_named_twice_is_refused(tmp_path):
  sheets.write(tmp_path / 'a.xlsx', [['index', 'prediction', 'prediction'], [1, 'a', 'b']])
  with pytest.raises(DataError, match="row 1: names the column 'prediction' twice"):
    list(sheets.read_xlsx(tmp_path / 'a.xlsx'))


@pytest.mark.parametrize('packing', [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA,
                                     zipfile.ZIP_BZIP2, zipfile.ZIP_STORED])
def test_every_damage_is_an_error_that_names_the_file(packing, tmp_path):
  path = tmp_path / 'a.xlsx'
  rows = ''.join(f'<row r="{i}"><c><v>{i * 7919 % 1000}</v></c></row>' for i in range(1, 400))
  with zipfile.ZipFile(path, 'w', packing) as archive:
    archive.writestr(SHEET, f'<worksheet {MAIN}><sheetData>{HEADER}{rows}</sheetData>'
                     '</worksheet>')
  whole = path.read_bytes()
  refused = 0
  for at in range(0, len(whole), max(1, len(whole) // 150)):
    for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1:],
                    whole[:at] + bytes(40) + whole[at + 40:]):
      path.write_bytes(damaged)
      try:
        list(sheets.read_xlsx(path))
      except DataError as e:
        assert str(e).startswith(f'{path}: ')
        refused += 1
  assert refused > 300


@pytest.mark.parametrize('sheet', [
    '<row>' + '<c><v>1</v></c>' * 4_000_000 + '</row>',  # one row
    '<row/>' * 150_000,  # very many
    '<x>' * 8_000_000,  # in each other
    f'<x a="{" " * 30_000_000}"/>',  # a long tag
    '<x/>' * 150_000,  # beside the rows
    '<row/>' * 12_000_000,  # a large part
], ids=['cells', 'rows', 'depth', 'tag', 'others', 'size'])
def test_a_small_file_does_not_unpack_into_gigabytes(sheet, tmp_path):
  path = make(tmp_path / 'a.xlsx', HEADER + sheet)
  assert path.stat().st_size < 300_000
  tracemalloc.start()
  try:
    with contextlib.suppress(DataError):
      list(sheets.read_xlsx(path))
    assert tracemalloc.get_traced_memory()[1] < 10e6
  finally:
    tracemalloc.stop()


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'a.xlsx'
  sheets.write(path, [['a'], ['b']])
  before = path.read_bytes()
  with pytest.raises(AttributeError):
    sheets.write(path, [['a'], [object()]])
  assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
  with pytest.raises(DataError, match='must end in .xlsx or .tsv'):
    sheets.write(tmp_path / 'a.csv', [])


@pytest.mark.parametrize('suffix', ['.xlsx', '.tsv'])
def test_mmbench_submission(suffix, tmp_path):
  questions, given, scores = scored('mmbench')
  path = tmp_path / f'new/up{suffix}'
  said = mmbench.write_submission(path, questions, given)
  assert '157 rows, 2 of them without a prediction' in said
  if suffix == '.tsv':
    with open(path, encoding='utf-8', newline='') as stream:
      rows = list(csv.DictReader(stream, delimiter='\t'))
  else:
    rows = [row for _, row in sheets.read_xlsx(path)]
  assert list(rows[0]) == ['index', 'question', 'A', 'B', 'C', 'D', 'prediction',
                           'answer', 'split']
  assert (rows[0]['index'], rows[0]['split'], rows[0]['D']) == ('200', 'dev', '')
  again = joining.join(answers.read(path), questions)
  assert {key: text for key, text in again.items() if text} == {
      key: text for key, text in given.items() if text}
  assert mmbench.score(questions, again).value == scores.value
