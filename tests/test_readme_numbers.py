"""README's tables say what the rows in results/ say."""

from __future__ import annotations

import json
import pathlib
import re

import full_size

from vlm_compress.cli.train import load_page
from vlm_compress.eval import compile_report, report
from vlm_compress.eval.benchmark import report as benchmark_report

ROOT = pathlib.Path(__file__).parents[1]


def test_the_table_is_the_reports(tmp_path):
  rows = json.loads((ROOT / 'results/quickstart/report.json').read_text())
  text = (ROOT / 'README.md').read_text()
  table = text.partition('<!-- quickstart table: begin')[2].partition(
      '<!-- quickstart table: end')[0]
  shown = [[cell.strip() for cell in line.strip('|').split('|')]
           for line in table.splitlines() if line.startswith('| ')]
  paths = report.write_report(rows, tmp_path, allow_partial=True)
  made = paths['md'].read_text().partition('| method')[2]
  made = [[cell.strip() for cell in line.strip('|').split('|')]
          for line in made.splitlines() if line.startswith('| ')]
  made = {(cells[0], cells[1], cells[3]): cells[4:10]
          for cells in made if len(cells) > 9}
  checked = 0
  for cells in shown[2:]:
    if len(cells) == 9 and cells[2]:  # no heading of a budget
      want = made[cells[0], cells[1], cells[2]]
      assert cells[3:] == want
      checked += 1
  assert checked == len(rows['rows'])


def test_the_performance_tables_are_the_benchmarks():
  found = json.loads((ROOT / 'results/benchmark/benchmark.json').read_text())
  made = benchmark_report.markdown(found)
  assert (ROOT / 'results/benchmark/benchmark.md').read_text() == made
  shown = (ROOT / 'README.md').read_text().partition(
      '<!-- tables: begin -->')[2].partition('<!-- tables: end')[0].strip()
  assert shown == made.strip() and len(found['inference']) >= 20


def test_other_runs_of_the_benchmark_have_their_table():
  found = sorted((ROOT / 'results').glob('benchmark_*/benchmark.json'))
  assert found
  for path in found:
    made = benchmark_report.markdown(json.loads(path.read_text()))
    assert path.with_suffix('.md').read_text() == made
    assert str(path.with_suffix('.md').relative_to(ROOT)) in (
        ROOT / 'README.md').read_text()


def test_the_compile_table_is_that_of_the_reports():
  founds = [json.loads(path.read_text()) for path in sorted(
      (ROOT / 'results/compile').glob('*/compile.json'))]
  shown = (ROOT / 'README.md').read_text().partition(
      '<!-- compile table: begin -->')[2].partition('<!-- compile table: end')[0]
  assert shown.strip() == compile_report.summary(founds).strip() and len(founds) >= 4
  for path in (ROOT / 'results/compile').glob('*/compile.json'):
    page = path.with_name('compile.md').read_text()
    assert page == compile_report.markdown(json.loads(path.read_text())), path


def test_the_sweep_table_is_that_of_the_report():
  report = (ROOT / 'results/sweep/report.md').read_text()
  shown = (ROOT / 'README.md').read_text().partition(
      '<!-- sweep table: begin (from results/sweep/report.md) -->')[2].partition(
          '<!-- sweep table: end')[0].strip()
  assert shown.startswith('| method |')
  # Whole sections of the report's table, so that no method stands without its floors.
  table = next(part for part in report.split('\n\n') if part.startswith('| method | tokens'))
  sections = lambda text: re.split(r'\n(?=\| \*\*(?:References|Budget))', text)
  whole = sections(table)
  assert sections(shown)[:2] == whole[:2] and len(sections(shown)) >= 4
  assert all(section in whole for section in sections(shown))
  rows = json.loads((ROOT / 'results/sweep/rows.json').read_text())
  page = load_page(f'{ROOT}/configs/sweeps.py:tiny')
  assert not rows['failed'] and len(rows['rows']) >= 40
  for row in rows['rows']:  # of one seed a line is that row
    if row['method'] in ('FastV', 'DivPrune') and row['budget'] in (24, 16, 8):
      low, high = (100 * x for x in row['ci95'])
      assert f'{100 * row["accuracy"]:.1f} \\[{low:.1f}, {high:.1f}\\]' in shown
  assert set(page.methods[i][1] for i in range(len(page.methods))) <= {
      row['method_key'] for row in rows['rows']}


def test_the_table_of_full_sizes_is_that_of_its_file():
  found = json.loads((ROOT / 'results/full_size.json').read_text())
  shown = (ROOT / 'README.md').read_text().partition(
      '<!-- full size: begin -->')[2].partition('<!-- full size: end')[0].strip()
  assert shown == full_size.table(found)
  assert [row['name'] for row in found['runs']] == list(full_size.RUNS)
  assert [row['rows'] for row in found['runs']] == [r.rows for r in full_size.RUNS.values()]
