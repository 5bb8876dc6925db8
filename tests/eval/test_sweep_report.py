"""The report of a sweep, on directories with invented numbers."""

from __future__ import annotations

import base64
import html as html_lib
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import sweep_directories as directories
from PIL import Image

from vlm_compress.config import ConfigError
from vlm_compress.data.errors import DataError
from vlm_compress.eval import figures, sweep_figures, sweep_tables
from vlm_compress.eval import report as report_lib
from vlm_compress.eval.sweep_report import FOLDER, write_report


@pytest.fixture(autouse=True)
def small_figures(monkeypatch):
  monkeypatch.setattr(report_lib, 'DPI', 40)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A whole sweep with one run that failed, and its report."""
  sweep = directories.whole(tmp_path_factory.mktemp('sweep') / 'out')
  sweep.failed = [{'cell': 'atp--atp--4--gqa--0', 'error': 'Traceback\nValueError: <b>no'}]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report_lib, 'DPI', 40)
    paths = write_report(sweep.write())
  return sweep, paths, paths['html'].read_text(), paths['md'].read_text()


def table_rows(html):
  """Texts of the cells of all table rows."""
  plain = lambda cell: html_lib.unescape(re.sub(r'<[^>]*>', '', cell))
  return [[plain(cell) for cell in re.findall(r'<t[dh][^>]*>(.*?)</t[dh]>', row)]
          for row in re.findall(r'<tr[^>]*>(.*?)</tr>', html)]


def with_start(rows, *texts):
  return [row for row in rows if row[0].startswith(texts)]


def test_numbers_are_in_the_tables(written):
  rows = table_rows(written[2])
  full, atp = (next(r for r in rows if r[0] == name and len(r) == 12)
               for name in ('full', 'ATP'))
  average = written[0].rows[1]['layer_average_tokens']
  assert full == ['full', '16.0', '16', '16 GFLOP', '16 kB', '260 ms 1.00 × full',
                  '60.0 [58.0, 62.0]', '100.0 %', '–', '87.5 % [80.0, 92.5]', '40', '1']
  assert atp[1:3] == [f'{average:.1f}', '16'] and atp[6:8] == ['58.0 [56.0, 60.0]', '96.7 %']
  mme = [r for r in rows if r[0] == 'ATP' and len(r) == 12][1]
  assert mme[6] == '1160.0 [1120.0, 1200.0]'
  voco = next(r for r in rows if r[0] == 'VoCo' and len(r) == 12)
  assert voco[7:9] == ['75.0 %', '0.750']


def test_seeds_have_a_mean_and_a_spread(written):
  row, = [r for r in table_rows(written[2]) if r[0].startswith('random (cut after 1, 3, 6)')
          and len(r) == 12 and r[6].startswith('46.0')]
  assert row[6] == '46.0 [42.0, 50.0]' and row[-1] == '3 44.0 – 48.0'


def test_differences_are_in_the_scale_of_the_benchmark(written):
  rows = [r for r in table_rows(written[2]) if r[0].startswith('ATP') and len(r) == 4]
  assert [r[1:] for r in rows] == [
      ['+8.0 [+7.0, +9.0]', '+10.0 [+9.0, +11.0]', '+0.5 [-0.5, +1.5] no difference shown'],
      ['+160.0 [+140.0, +180.0]', '+200.0 [+180.0, +220.0]',
       '+10.0 [-10.0, +30.0] no difference shown']]


def test_findings_name_the_best_floor_and_its_difference(written):
  text = written[3]
  assert 'best floor: uniform grid (cut after 1, 3, 6) 50.0, difference +8.0 points' in text
  assert ('retention 0.750; best floor: uniform grid (cut before layer 1) 46.0, the floor '
          'is not beaten') in text
  assert 'best floor: uniform grid (cut after 1, 3, 6) 1000.0, difference +160.0 points' in text


def test_floors_stand_apart_and_lines_of_one_method_are_told_apart(written):
  html = written[2]
  names = re.findall(r'<tr class="floor"><td class=t>(?:<i[^>]*></i>)?([^<]*)', html)
  assert {'uniform grid (cut after 1, 3, 6)', 'random (cut before layer 1)',
          'average pooling', 'image downsampling', 'random (cut after 1, 3, 6)',
          'uniform grid (cut before layer 1)'} == {name.strip() for name in names}
  assert '<small>floor, training-free</small>' in html
  assert '| *average pooling floor, training-free* |' in written[3]


def test_overview_averages_over_benchmarks(written):
  rows = [r for r in table_rows(written[2]) if len(r) == 6]
  assert rows[0][2:] == ['GQA accuracy', 'MME perception', 'of full, mean',
                         'retention, mean']
  assert with_start(rows, 'VoCo') == [
      ['VoCo', '2', '45.0 [43.0, 47.0]', '900.0 [860.0, 940.0]', '75.0 %', '0.750']]


def test_failed_runs_are_listed(written):
  for text in written[2:]:
    assert 'atp--atp--4--gqa--0' in text
  assert 'ValueError: &lt;b&gt;no' in written[2] and 'Traceback' not in written[2]
  assert '**FAILED RUNS.** 1 of the sweep' in written[3]


def test_html_stands_alone_and_escapes(written):
  html = written[2]
  assert "default-src 'none'" in html and 'alert(&quot;x&quot;)' in html
  assert not re.search(r'<(script|link|iframe|object|base|i>)', html)
  assert 'is &lt;i&gt;this&lt;/i&gt; number 0?' in html and 'obj &lt;b&gt;' in html
  assert not re.search(r'https?://|url\(|@import', html)
  images = re.findall(r'<img src="([^"]*)"[^>]* alt="([^"]+)"', html)
  assert len(images) == html.count('<img') == 12
  assert all(url.startswith('data:image/') for url, _ in images)


def test_figures_are_pictures_and_in_both(written):
  _, paths, html, text = written
  files = re.findall(rf'!\[.*\]\({FOLDER}/([^)]*)\)', text)
  assert sorted(files) == sorted(p.name for p in (paths['md'].parent / FOLDER).iterdir())
  assert {f.removeprefix('gqa-official-') for f in files if f.startswith('gqa')} == {
      'tokens.png', 'latency.png', 'kinds.png', 'kept.png', 'example1-1.jpeg',
      'example2-1.jpeg'}
  inside = [base64.b64decode(data) for data in re.findall(r'base64,([^"]*)"', html)]
  assert inside == [(paths['md'].parent / FOLDER / name).read_bytes() for name in files]
  for data in inside:
    assert np.asarray(Image.open(io.BytesIO(data)).convert('L')).std() > 5


def test_examples_show_all_answers_and_whether_they_are_right(written):
  html = written[2]
  second = html[html.index('number 20?'):]
  second = second[:second.index('</article>')]
  assert 'Answer: yes / yeah' in second and second.count('class="t wrong">✗ yes') == 15
  first = html[html.index('number 0?'):html.index('number 20?')]
  assert '✗ voco says &lt;script&gt;' in first
  assert '| random (cut after 1, 3, 6), 6.5 tokens | ✗ | yes | seed 0 |' in written[3]


def test_kept_counts_are_those_of_the_answers(written):
  sweep, _, _, text = written
  counts = sweep.entering('atp', 6.0, directories.CUTS, 0)[:, list(directories.CUTS)]
  line = next(line for line in text.splitlines() if '| after layer 3 |' in line)
  p50, p90, p99 = np.percentile(counts[:, 1], (50, 90, 99))
  assert line.endswith(f'| {counts[:, 1].mean():.1f} | {counts[:, 1].std():.1f} | '
                       f'{p50:.0f} | {p90:.0f} | {p99:.0f} |')


def test_markdown_tables_are_whole(written):
  for block in re.findall(r'(?:^\|.*\n)+', written[3], re.M):
    bars = {len(re.findall(r'(?<!\\)\|', line)) for line in block.splitlines()}
    assert len(bars) == 1, block
  assert r'\<script\>alert' in written[3] and not re.search(
      r'(?<!\\)<script', written[3])


# What is refused ------------------------------------------------------------


def test_missing_floor_is_refused_and_nothing_written(tmp_path):
  sweep = directories.small(tmp_path)
  del sweep.rows[-1]
  home = sweep.write()
  with pytest.raises(ConfigError, match='gqa: VoCo at 2 layer-average tokens lacks the '
                     'floor rows random'):
    write_report(home)
  assert sorted(p.name for p in home.iterdir()) == ['rows.json', 'runs']
  paths = write_report(home, allow_partial=True)
  assert 'Partial tables.' in paths['html'].read_text()
  assert 'lacks the floor rows random' in paths['md'].read_text()


def test_partial_runs_have_n_beside_the_number(tmp_path):
  sweep = directories.Sweep(tmp_path)
  sweep.add('full', 0.6, partial=True)
  paths = write_report(sweep.write())
  html = paths['html'].read_text()
  assert '<td>40 <small>partial</small></td>' in html
  assert 'gqa: 40 of 200 questions were asked.' in html and 'All benchmarks' not in html


def test_other_numbers_of_questions_are_refused(tmp_path):
  sweep = directories.small(tmp_path)
  sweep.rows[2]['n'] = 39
  with pytest.raises(ConfigError, match=r'different numbers of questions \[39, 40\]'):
    write_report(sweep.write())


def test_nulls_are_dashes(tmp_path):
  sweep = directories.Sweep(tmp_path)
  sweep.add('full', 0.6, first_token_seconds=None, ratio_to_full=None, agreement=None,
            agreement_ci95=None)
  row, = [r for r in table_rows(write_report(sweep.write())['html'].read_text())
          if r[0] == 'full' and len(r) == 12]
  assert row[5] == '–' and row[7:10] == ['–', '–', '–']


def test_what_is_missing_or_damaged_is_named(tmp_path):
  with pytest.raises(ConfigError, match=r'rows.json is missing: .* no directory of'):
    write_report(tmp_path)
  home = directories.Sweep(tmp_path / 'empty').write()
  with pytest.raises(ConfigError, match='has no row'):
    write_report(home)
  sweep = directories.small(tmp_path / 'small')
  home = sweep.write()
  (home / 'runs' / sweep.rows[1]['cell'] / 'answers.jsonl').unlink()
  with pytest.raises(DataError, match='voco--voco--2--gqa--0/answers.jsonl is missing'):
    write_report(home)
  (home / 'runs' / sweep.rows[0]['cell'] / 'config.json').unlink()
  with pytest.raises(DataError, match='base--full--all--gqa--0/config.json is missing'):
    write_report(home)
  del sweep.rows[0]['n']
  sweep.write()
  with pytest.raises(ConfigError, match=r'field\(s\) n are missing'):
    write_report(home)


def test_old_figures_go_and_counts_that_differ_are_said(tmp_path):
  sweep = directories.Sweep(tmp_path)
  sweep.add('full', 0.6)
  sweep.add('atp', 0.5, budget=6.0, places=directories.CUTS)
  home = sweep.write()
  (home / FOLDER).mkdir()
  (home / FOLDER / 'old.png').write_bytes(b'')
  path = home / 'runs' / sweep.rows[1]['cell'] / 'examples.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  rows[0]['keep'][2] = '0' * 16
  path.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
  text = write_report(home, allow_partial=True)['md'].read_text()
  assert not (home / FOLDER / 'old.png').exists()
  # Once above the picture and once as what is read in its place.
  assert text.count('kept when it was answered: ') == 2


# Figures --------------------------------------------------------------------


def test_latency_figure_has_the_times(tmp_path):
  sweep = directories.small(tmp_path)
  bench, = sweep_tables.benches(sweep.rows, False)
  figure = report_lib.new_figure(6, 4)
  sweep_figures.draw_latency(figure, bench)
  ax, = figure.axes
  points = {(round(float(x), 3), round(float(y), 1)) for line in ax.lines
            for x, y in zip(line.get_xdata(), line.get_ydata())}
  assert {(0.26, 60.0), (0.12, 50.0), (0.12, 40.0)} <= points
  assert ax.get_xlim()[0] == 0


def test_heat_map_is_white_at_the_full_model(tmp_path):
  bench, = sweep_tables.benches(directories.small(tmp_path).rows, False)
  columns = sweep_figures.kind_columns(bench)
  assert [e.method for e in columns] == ['full', 'VoCo']
  ax = report_lib.new_figure(6, 4).subplots()
  sweep_figures.draw_kinds(ax, columns, ['structural: verify'])
  (full, voco), = ax.images[0].get_array()
  assert (full == 1).all() and voco[0] > voco[2]
  assert [t.get_text() for t in ax.texts] == ['60.0', '50.0']


def test_accuracy_figure_is_in_points(tmp_path):
  sweep = directories.Sweep(tmp_path)
  sweep.add('full', 0.6, benchmark='mme')
  figure = report_lib.new_figure(6, 4)
  bench, = sweep_tables.benches(sweep.rows, False)
  figures.draw_accuracy(figure, bench.parts, ylabel='points', most=bench.most)
  assert [t.get_text() for t in figure.axes[0].texts] == ['full  1200.0']


# In a browser ---------------------------------------------------------------


@pytest.mark.skipif(not shutil.which('chromium'), reason='needs chromium on PATH')
@pytest.mark.parametrize('width', [500, 1280])
def test_page_has_its_place_in_a_browser(written, tmp_path, width):
  """Nothing is wider than the window, all pictures are shown, the page is long."""
  probe = ('<script>addEventListener("load", () => { const d = document; '
           'd.body.dataset.probe = [d.documentElement.scrollWidth, innerWidth, '
           'd.body.scrollHeight, [...d.images].filter(i => i.naturalWidth > 50).length, '
           'd.images.length].join(" "); })</script>')
  # The copy may run a script, which the report itself may not.
  page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', '', written[2])
  (tmp_path / 'page.html').write_text(page.replace('</body>', f'{probe}</body>'))
  done = subprocess.run(
      ['chromium', '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic',
       '--no-first-run', '--disable-background-networking', '--disable-component-update',
       '--disable-sync', f'--user-data-dir={tmp_path / "profile"}', '--dump-dom',
       f'--window-size={width},2000', (tmp_path / 'page.html').as_uri()],
      capture_output=True, text=True, timeout=120, check=True)
  found = re.search(r'data-probe="([^"]*)"', done.stdout)
  assert found, done.stderr[-500:]
  wide, window, high, shown, images = map(int, found.group(1).split())
  assert window == width and wide <= window
  assert high > 4000 and shown == images == 12
