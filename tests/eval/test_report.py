"""Grouping, floors, and the three files of a report, on invented rows."""

import base64
import io
import json
import re

import numpy as np
import pytest

from vlm_compress.config import ConfigError
from vlm_compress.eval import floors, tables
from vlm_compress.eval import report as report_lib

ATTRIBUTION = ('Pictures: OpenMoji (https://openmoji.org), CC BY-SA 4.0 '
               '(https://creativecommons.org/licenses/by-sa/4.0/).')


def row(method, accuracy, tokens, *, trained=True, seed=0, n=100, **fields):
  score = {'accuracy': accuracy, 'n': n,
           'ci95': [max(accuracy - 0.02, 0), min(accuracy + 0.02, 1)]}
  return dict(score, method=method, trained=trained, input_visual_tokens=16,
              layer_average_tokens=tokens, prefill_flops=1e6 * tokens,
              kv_bytes=1e3 * tokens, by_kind={'what': dict(score)},
              ratio_to_full=accuracy / 0.9, retention=None, seed=seed, **fields)


def floor_rows(tokens, accuracy=0.5, **fields):
  return [row(name, accuracy, tokens, **fields) for name in floors.NEEDED]


def atp(**fields):
  fields = dict(dict(kept_per_layer=[16, 4, 2], kept_std_per_layer=[0, 1, 0],
                     kept_counts=[[4, 2], [5, 2], [3, 2]]), **fields)
  return row('ATP', 0.85, 4.2, **fields)


ROWS = [row('full', 0.9, 16), atp(), *floor_rows(4.0)]


def png(side=8):
  pytest.importorskip('PIL', reason='needs the extra [demo]')
  from PIL import Image
  buffer = io.BytesIO()
  Image.new('RGB', (side, side), (200, 30, 30)).save(buffer, 'PNG')
  return base64.b64encode(buffer.getvalue()).decode()


def full_report():
  keep = np.eye(4, dtype=int)
  return {
      'rows': ROWS, 'attribution': ATTRIBUTION,
      'config': {'model': {'atp': {'prune_after': [1, 2]}}, 'note': '<i>'},
      'versions': {'jax': '0.10.2'},
      'stages': [{'name': 'ATP', 'seconds': 61.0, 'steps': 10},
                 {'name': 'evaluation', 'seconds': 2.5}],
      'examples': [{'image_png_base64': png(), 'answer': 'a|b',
                    'question': '<script>alert(1)</script>',
                    'predictions': {'full': ' a|b ', 'ATP': '"><img src=x>'},
                    'keep_maps': {'ATP': [keep, keep * 0]},
                    'thresholds': {'ATP': [[0.1, 0.9], [0.2, 0.8]]}}]}


@pytest.fixture(autouse=True)
def small_figures(monkeypatch):
  monkeypatch.setattr(report_lib, 'DPI', 40)


# Grouping and floors --------------------------------------------------------


@pytest.mark.parametrize('method, role', [
    ('full', 'reference'), ('upper bound (UB)', 'reference'),
    ('question only', 'reference'), ('lower bound (LB)', 'bound'),
    ('random', 'floor'), ('average pooling + linear', 'floor'),
    ('uniform grid', 'floor'), ('ATP', 'method'), ('fullness', 'method'),
    ('random walk', 'method')])
def test_roles(method, role):
  assert tables.role_of(method) == role


def test_same_budget():
  assert tables.same_budget(16.0, 17.6) and not tables.same_budget(16.0, 17.7)
  assert tables.same_budget(1.0, 1.5) and not tables.same_budget(1.0, 1.6)


def test_sections_hold_one_budget_each():
  rows = [row('VoCo', 0.7, 1), *floor_rows(1), atp(), row('full', 0.9, 16),
          row('random', 0.6, 4), row('uniform grid', 0.7, 4), *floor_rows(8),
          row('lower bound (LB)', 0.4, 1)]
  parts = tables.sections(rows)
  got = [(part.budget, [entry.method for entry in part.entries])
         for part in parts]
  assert got == [
      (None, ['full']),
      (8, ['random', 'uniform grid', 'average pooling']),
      (4.2, ['ATP', 'uniform grid', 'random']),
      (1, ['VoCo', 'lower bound (LB)', 'random', 'uniform grid',
           'average pooling'])]


def test_seeds_are_averaged():
  rows = [row('ATP', 0.80, 4.0), row('ATP', 0.90, 4.2, seed=1)]
  rows[0]['retention'] = rows[1]['retention'] = 0.5
  entry, = tables.sections(rows)[0].entries
  assert entry.accuracy == pytest.approx(0.85)
  assert entry.average_tokens == pytest.approx(4.1)
  assert entry.ci95 == (pytest.approx(0.78), pytest.approx(0.92))
  assert entry.by_kind['what']['accuracy'] == pytest.approx(0.85)
  assert len(entry.rows) == 2 and entry.retention == 0.5
  rows[1]['retention'] = None
  assert tables.sections(rows)[0].entries[0].retention is None


def test_same_seed_or_other_training_is_another_line():
  rows = [row('random', 0.5, 4), row('random', 0.6, 4),
          row('random', 0.4, 4, trained=False)]
  assert [e.accuracy for e in tables.sections(rows)[0].entries] == [
      0.6, 0.5, 0.4]


@pytest.mark.parametrize('floor', list(floors.NEEDED))
def test_a_missing_floor_is_refused(floor):
  rows = [r for r in ROWS if r['method'] != floor]
  with pytest.raises(ConfigError, match=rf'ATP at 4.2 .* floor rows {floor} at'):
    floors.checked_sections(rows, allow_partial=False)
  _, missing = floors.checked_sections(rows, allow_partial=True)
  assert len(missing) == 1


def test_floors_of_another_budget_do_not_count():
  rows = [row('full', 0.9, 16), atp(), *floor_rows(5.0)]
  with pytest.raises(ConfigError, match='random, uniform grid, average pool'):
    floors.checked_sections(rows, allow_partial=False)


def test_pooling_with_a_linear_map_counts_as_pooling():
  rows = [atp(), *floor_rows(4)[:2], row('average pooling + linear', 0.5, 4)]
  assert floors.checked_sections(rows, allow_partial=False)[1] == []


def test_references_and_bounds_need_no_floors():
  rows = [row('full', 0.9, 16), row('lower bound (LB)', 0.4, 1)]
  assert floors.problems(tables.sections(rows)) == []


def test_unequal_numbers_of_questions_are_refused():
  rows = [*ROWS, row('VoCo', 0.8, 4.0, n=50)]
  with pytest.raises(ConfigError, match=r'different numbers.*\[50, 100\]'):
    floors.checked_sections(rows, allow_partial=False)


@pytest.mark.parametrize('change, message', [
    ({'accuracy': 85.0}, 'accuracy=85.0'),
    ({'accuracy': 0.2}, 'accuracy=0.2'),
    ({'prefill_flops': float('nan')}, 'prefill_flops=nan'),
    ({'kv_bytes': None}, 'kv_bytes=None'),
    ({'layer_average_tokens': -1.0}, 'layer_average_tokens=-1')])
def test_impossible_rows_name_the_field(change, message):
  with pytest.raises(ConfigError, match=rf'report row 0 \(ATP\): {message}'):
    tables.sections([{**atp(), **change}])


def test_missing_fields_are_named():
  with pytest.raises(ConfigError, match=r"\['ci95', 'seed'\] are missing"):
    tables.sections([{k: v for k, v in atp().items()
                      if k not in ('ci95', 'seed')}])
  with pytest.raises(ConfigError, match='no result rows'):
    tables.sections([])


def finding(method_accuracy=0.85, floor_accuracy=0.5, trained=True, **fields):
  rows = [row('full', 0.9, 16), row('ATP', method_accuracy, 4.0, **fields),
          *floor_rows(4.0, floor_accuracy, trained=trained)]
  line, = floors.findings(tables.sections(rows))
  return line


def test_findings_name_the_best_floor():
  assert finding() == (
      'ATP: 4 of 16 visual tokens on average, accuracy 85.0 %, 94.4 % of full; '
      'best floor: random 50.0 %.')
  assert finding(floor_accuracy=0.83).endswith(
      '83.0 % (the intervals overlap).')
  assert finding(floor_accuracy=0.87).endswith('87.0 %, the floor is not beaten.')
  assert finding(trained=False).endswith(
      '50.0 % (an untrained floor).')


def test_findings_prefer_paired_differences():
  pair = {'mean': 0.02, 'ci95': [0.01, 0.03]}
  got = finding(floor_accuracy=0.83, differences={'random': pair})
  assert got.endswith('83.0 %, difference +2.0 points [+1.0, +3.0].')
  pair = {'mean': 0.02, 'ci95': [-0.01, 0.03]}
  got = finding(floor_accuracy=0.83, differences={'random': pair})
  assert got.endswith('[-1.0, +3.0], within noise.')
  # Paired with the trained floor: says nothing about the training-free one.
  got = finding(0.85, 0.83, trained=False, differences={'random': pair})
  assert got.endswith('(the intervals overlap).')


def test_quantities():
  assert tables.quantity(1.25e9, 'FLOP') == '1.25 GFLOP'
  assert tables.quantity(524288, 'B') == '524 kB'
  assert tables.quantity(0.0, 'B') == '0 B'
  assert tables.percent(0.9812) == '98.1 %'


# Files ----------------------------------------------------------------------


def test_json_keeps_what_was_given(tmp_path):
  paths = report_lib.write_report(full_report(), tmp_path)
  got = json.loads(paths['json'].read_text())
  assert got['rows'] == ROWS and got['partial'] == []
  assert got['examples'][0]['keep_maps']['ATP'][0] == np.eye(4).tolist()
  assert sorted(p.name for p in tmp_path.iterdir()) == [
      'report.html', 'report.json', 'report.md']


def test_html_stands_alone_and_escapes(tmp_path):
  html = report_lib.write_report(full_report(), tmp_path)['html'].read_text()
  assert "default-src 'none'" in html
  sources = re.findall(r'(?:src|srcset|data|action)\s*=\s*["\']?([^"\'> ]*)',
                       html)
  assert len([s for s in sources if s.startswith('data:image/png')]) == 3
  # What is left is the reply, escaped: text and no tag.
  assert [s for s in sources if not s.startswith('data:')] == ['x&gt;</td']
  assert '<script' not in html and '&lt;script&gt;alert(1)' in html
  assert '<img src=x>' not in html and '@import' not in html
  assert not re.search(r'<(link|iframe|object|base)\b|url\(', html)
  assert re.findall(r'href="([^"]*)"', html) == [
      'https://openmoji.org', 'https://creativecommons.org/licenses/by-sa/4.0/']
  assert '&lt;i&gt;' in html


def test_html_shows_the_numbers(tmp_path):
  html = report_lib.write_report(full_report(), tmp_path)['html'].read_text()
  line = re.search(r'<tr class="method">.*?</tr>', html).group(0)
  for text in ('ATP', '4.2', '4.2 MFLOP', '4.2 kB', '85.0 %', '83.0 – 87.0',
               '94.4 %', '>100<'):
    assert text in line, text
  assert html.count('<tr class="floor">') == 6  # Main table and by kind.
  assert '1 min 01 s' in html and '2.5 s' in html and '1 min 04 s' in html
  assert 'class="t right">✓ ' in html and 'class="t wrong">✗ ' in html
  assert 'model.atp.prune_after' in html and '0.10.2' in html


def test_figures_are_pictures(tmp_path):
  html = report_lib.write_report(full_report(), tmp_path)['html'].read_text()
  sizes = []
  from PIL import Image
  for data in re.findall(r'data:image/png;base64,([^"]*)"', html):
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert np.asarray(image.convert('L')).std() > 5  # Not blank.
    sizes.append(image.size)
  # 40 pixels an inch: accuracy, kept tokens, picture and two modules.
  assert sizes == [(384, 184), (384, 216), (216, 94)]


def test_markdown_tables_are_whole(tmp_path):
  text = report_lib.write_report(full_report(), tmp_path)['md'].read_text()
  for block in re.findall(r'(?:^\|.*\n)+', text, re.M):
    bars = {len(re.findall(r'(?<!\\)\|', line)) for line in block.splitlines()}
    assert len(bars) == 1, block
  assert '| **ATP** | trained | 16 | 4.2 |' in text
  assert '| *random* |' in text and r'a\|b' in text
  assert '| ATP, 4.2 tokens on average | after layer 1 | 4.0 | 0.8 |' in text
  assert 'CC BY-SA 4.0' in text


def test_minimal_report(tmp_path):
  paths = report_lib.write_report({'rows': [row('full', 0.9, 16)]}, tmp_path)
  html = paths['html'].read_text()
  assert 'Tokens kept' not in html and 'Pictures' not in html
  assert html.count('data:image/png') == 1


def test_refused_report_writes_nothing(tmp_path):
  with pytest.raises(ConfigError, match='lacks the floor rows'):
    report_lib.write_report({**full_report(), 'rows': ROWS[:3]}, tmp_path)
  with pytest.raises(ConfigError, match='attribution is empty'):
    report_lib.write_report({**full_report(), 'attribution': ' '}, tmp_path)
  with pytest.raises(ConfigError, match='report.json: Out of range'):
    report_lib.write_report({'rows': ROWS, 'config': {'x': float('nan')}},
                            tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_partial_report_says_so_everywhere(tmp_path):
  paths = report_lib.write_report({'rows': ROWS[:3]}, tmp_path,
                                  allow_partial=True)
  reason = 'lacks the floor rows uniform grid, average pooling'
  assert reason in json.loads(paths['json'].read_text())['partial'][0]
  assert 'PARTIAL TABLE' in paths['md'].read_text()
  html = paths['html'].read_text()
  assert 'Partial table.' in html and reason in html


def test_bad_picture_is_named_and_numbers_are_kept(tmp_path):
  report = full_report()
  report['examples'][0]['image_png_base64'] = base64.b64encode(b'no').decode()
  with pytest.raises(ConfigError, match='example 0: image_png_base64 is no PNG'):
    report_lib.write_report(report, tmp_path)
  assert json.loads((tmp_path / 'report.json').read_text())['rows'] == ROWS


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  (tmp_path / 'report.json').write_text('old')

  def full_disk(*_):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr('os.replace', full_disk)
  with pytest.raises(OSError, match='No space'):
    report_lib.write_report({'rows': ROWS}, tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ['report.json']
  assert (tmp_path / 'report.json').read_text() == 'old'


def test_kept_percentiles_by_hand():
  parts = tables.sections([atp(), atp(seed=1, kept_counts=[[8, 1]])])
  got = report_lib.kept_percentiles(parts, [])
  # 3, 4, 5, 8 of both seeds; 2, 2, 2, 1 after the second module.
  assert got[0][1:5] == ('module 1', '5.0', '1.9', '4')
  assert got[1][1:5] == ('module 2', '1.8', '0.4', '2')


def test_module_labels():
  assert report_lib.module_labels(
      {'config': {'a': {'b': {'prune_after': (4, 14)}}}}) == [
          'after layer 4', 'after layer 14']
  assert report_lib.module_labels({'config': {'a': 1}}) == []


# Terminal -------------------------------------------------------------------


def test_plain_table_is_aligned():
  file = io.StringIO()
  report_lib.print_table(ROWS, file=file)
  lines = file.getvalue().splitlines()
  ends = {re.search(r'\d\d\.\d %', line).end() for line in lines[1:]
          if line.startswith('  ')}
  assert len(ends) == 1
  assert lines[0].split()[:2] == ['method', 'training']
  assert lines[-1].startswith('ATP: 4.2 of 16 visual tokens')
  assert '\x1b' not in file.getvalue()


def test_partial_table_on_the_terminal():
  with pytest.raises(ConfigError, match='floor rows'):
    report_lib.print_table(ROWS[:2], file=io.StringIO())
  file = io.StringIO()
  report_lib.print_table(ROWS[:2], allow_partial=True, file=file)
  assert 'PARTIAL TABLE: ATP at 4.2' in file.getvalue()


@pytest.mark.parametrize('columns', ['80', '160'])
def test_terminal_table(columns, monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True
  monkeypatch.setenv('COLUMNS', columns)
  monkeypatch.setenv('TERM', 'xterm')
  file = Terminal()
  report_lib.print_table(ROWS, file=file)
  text = re.sub(r'\x1b\[[0-9;]*m', '', file.getvalue())
  assert text != file.getvalue()  # Styled.
  assert max(map(len, text.splitlines())) <= int(columns)
  assert ('prefill' in text) == (columns == '160')
  for method in ('full', 'ATP', 'random', 'uniform grid', 'average pooling'):
    assert re.search(rf'{method}.* \d\d\.\d %', text), method
