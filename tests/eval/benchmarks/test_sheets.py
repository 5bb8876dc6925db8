"""Tables as .xlsx: what is written is read back, and what Excel writes too."""

from __future__ import annotations

import csv
import zipfile

import pytest
from benchmark_files import scored

from vlm_compress.data.errors import DataError
from vlm_compress.eval.benchmarks import answers, joining, mmbench, sheets

TEXTS = ['plain', ' blanks ', 'two\nlines', 'tab\tand "quotes"', '<&> é 中 🙂', '_x0041_',
         '=1+1', 'bell\x07', '']


def test_texts_survive(tmp_path):
  path = tmp_path / 'a.xlsx'
  header = [f'c{i}' for i in range(30)]  # past column Z
  sheets.write(path, [header, *([text] * 30 for text in TEXTS), list(range(30))])
  rows = list(sheets.read_xlsx(path))
  wanted = [text for text in TEXTS if text]  # a row of empty cells is no row
  assert [row['c29'] for _, row in rows[:-1]] == [
      'A' if text == '_x0041_' else text for text in wanted]
  assert rows[-1] == (len(TEXTS) + 2, {f'c{i}': str(i) for i in range(30)})


def make(path, sheet, shared=None):
  """A file as spreadsheet programs write it, cells as given."""
  main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('xl/worksheets/sheet1.xml',
                     f'<worksheet {main}><sheetData>{sheet}</sheetData></worksheet>')
    if shared is not None:
      archive.writestr('xl/sharedStrings.xml', f'<sst {main}>{shared}</sst>')
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


def test_entities_are_refused(tmp_path):
  path = tmp_path / 'a.xlsx'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('xl/worksheets/sheet1.xml',
                     '<!DOCTYPE x [<!ENTITY a "aaaa">]><worksheet/>')
  with pytest.raises(DataError, match='declares entities'):
    list(sheets.read_xlsx(path))


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
