"""vlm-compress sweep: a small grid, a cell that crashes, floors that lack."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import core_helpers as helpers
import pytest
import small_benchmark

from vlm_compress.asking import Checkpoint
from vlm_compress.cli import __main__ as cli
from vlm_compress.cli import benchmark_run, sweep, sweep_times
from vlm_compress.config import ConfigError
from vlm_compress.data.errors import DataError

ROOT = pathlib.Path(__file__).parents[2]
PAGE = '''
from ml_collections import ConfigDict
def get_config():
  return ConfigDict({
      'checkpoints': {'base': 'FOLDER/voco', 'voco': 'FOLDER/voco', 'atp': ''},
      'methods': (('voco', 'voco', (2,)), ('atp', 'atp', (8, 10))), 'base': 'base',
      'benchmarks': {'gqa': 'FOLDER'}, 'seeds': (0,), 'limit': 0, 'shards': 2,
      'batch_size': 4, 'tensor': 1, 'template': '', 'allow_partial': False,
      'calibrations': {'atp': ''}, 'calibrate_with': '', 'calibrate_data_root': ''})
'''
CELLS = ['base--avg_pool--2--gqa--0', 'base--downsample--2--gqa--0', 'base--full--all--gqa--0',
         'base--lower_bound--2--gqa--0', 'base--random--2--gqa--0',
         'base--uniform--2--gqa--0', 'base--upper_bound--2--gqa--0', 'voco--voco--2--gqa--0']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = small_benchmark.write_gqa(tmp_path_factory.mktemp('sweep'))
  small_benchmark.write_model(path / 'voco', helpers.voco_config())
  small_benchmark.write_model(path / 'atp', helpers.atp_config())
  (path / 'page.py').write_text(PAGE.replace('FOLDER', str(path)))
  return path


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
  monkeypatch.setattr(benchmark_run, 'MAX_NEW_TOKENS', 2)


def words(folder, *more, out='out'):
  return ['sweep', f'--config={folder}/page.py', f'--out={folder / out}', *more]


def test_a_cell_that_crashes_is_listed_and_tried_again(folder, capsys, monkeypatch):
  assert cli.main(words(folder, '--dry-run')) == 0
  said = capsys.readouterr()
  assert said.out.splitlines() == [f'{name}: to do' for name in CELLS]
  assert 'checkpoints.atp names no model' in said.err
  run, ran = benchmark_run.run, []

  def crash(out, *more):
    ran.append(out.name)
    if 'uniform' in out.name:
      raise RuntimeError('out of\nmemory')
    return run(out, *more)
  monkeypatch.setattr(benchmark_run, 'run', crash)
  assert cli.main(words(folder)) == 1
  said = capsys.readouterr()
  assert ran == CELLS
  assert 'failed: base--uniform--2--gqa--0: memory' in said.err
  assert ('no table: report of the sweep: gqa: VoCo at 2 layer-average tokens lacks the '
          'floor rows uniform') in said.err.replace('\n', ' ')
  assert 'retention' not in said.out and not (folder / 'out/table.csv').exists()
  content = json.loads((folder / 'out/rows.json').read_text())
  assert [one['cell'] for one in content['failed']] == ['base--uniform--2--gqa--0']
  assert content['partial']
  assert 'RuntimeError: out of' in content['failed'][0]['error'] and len(content['rows']) == 7
  assert cli.main(words(folder, '--allow-partial')) == 1
  assert 'PARTIAL TABLE' in capsys.readouterr().out
  ran.clear()
  monkeypatch.setattr(benchmark_run, 'run', lambda out, *more: ran.append(out.name) or run(
      out, *more))
  times = lambda: {path.parent.name: path.stat().st_mtime_ns
                   for path in (folder / 'out').rglob('result.json')}
  before = times()
  assert cli.main(words(folder)) == 0
  # All are looked at, and one is asked.
  assert ran == CELLS and set(times().items()) - set(before.items()) == {
      (CELLS[5], times()[CELLS[5]])}
  said = capsys.readouterr().out
  assert 'gqa: GQA accuracy, n = 18' in said and 'VoCo' in said and 'PARTIAL' not in said
  content = json.loads((folder / 'out/rows.json').read_text())
  assert [row['cell'] for row in content['rows']] == CELLS and not content['failed']
  assert not list((folder / 'out').rglob('error.txt'))
  assert len((folder / 'out/table.csv').read_text().splitlines()) == 1 + len(CELLS)
  assert 'VoCo' in (folder / 'out/report.md').read_text()
  full, voco = content['rows'][2], content['rows'][-1]
  assert full['agreement'] == 1.0 and voco['budget'] == voco['layer_average_tokens'] == 2
  assert len(voco['differences']) == 4


def test_cells_of_other_settings_or_weights_are_no_cells_of_the_sweep(
    folder, tmp_path, capsys):
  own = tmp_path / 'model'
  shutil.copytree(folder / 'voco', own)
  words_of = lambda *more: [*words(folder, *more)[:2], f'--out={tmp_path}/out',
                            f'--config.checkpoints.base={own}', *more]
  assert cli.main(words_of()) == 0
  capsys.readouterr()
  assert cli.main(words_of('--config.limit=9')) == 1
  assert 'base--full--all--gqa--0 failed' in capsys.readouterr().err
  content = json.loads((tmp_path / 'out/rows.json').read_text())
  assert len(content['failed']) == len(CELLS) and not content['rows']
  assert 'questions.number: 18 -> 9' in content['failed'][0]['error']
  small_benchmark.write_model(own, helpers.voco_config(), seed=5)  # trained again
  assert cli.main(words_of()) == 1
  content = json.loads((tmp_path / 'out/rows.json').read_text())
  assert [one['cell'] for one in content['failed']] == CELLS[:-1]
  assert 'checkpoint: ' in content['failed'][0]['error']


def test_a_damaged_cell_is_listed_and_the_rest_has_a_table(folder, tmp_path, capsys):
  shutil.copytree(folder / 'out', tmp_path / 'out')
  path = tmp_path / 'out/runs' / CELLS[5] / 'answers.jsonl'
  path.write_text(path.read_text()[:-9])
  assert cli.main([*words(folder)[:2], f'--out={tmp_path}/out', '--allow-partial']) == 1
  said = capsys.readouterr()
  assert f'failed: {CELLS[5]}: ' in said.err and 'answers.jsonl' in said.err
  assert 'PARTIAL TABLE: VoCo at 2' in said.out
  rows = json.loads((tmp_path / 'out/rows.json').read_text())['rows']
  assert len(rows) == len(CELLS) - 1


def test_times_are_measured_in_turn_and_once(folder, tmp_path, capsys, monkeypatch):
  shutil.copytree(folder / 'out', tmp_path / 'out')
  flags = [*words(folder)[:2], f'--out={tmp_path}/out', '--config.batch_size=2']
  page = folder / 'timed.py'
  page.write_text((folder / 'page.py').read_text().replace(
      "'tensor'", "'time_repeats': 2, 'tensor'"))
  flags[1] = f'--config={page}'
  assert cli.main(flags) == 0
  content = json.loads((tmp_path / 'out/rows.json').read_text())
  times = json.loads((tmp_path / 'out/times.json').read_text())['lines']
  assert set(times) == {name.removesuffix('--0') for name in CELLS}
  for row in content['rows']:
    one = times[row['line']]
    assert len(one['rounds']) == 2 and one['questions'] == 2 and one['seconds'] > 0
    assert (row['first_token_seconds'], row['first_token_ratio']) == (
        one['seconds'], one['ratio'])
  assert times['base--full--all--gqa']['ratio'] == 1.0
  table = (tmp_path / 'out/table.csv').read_text().splitlines()
  assert table[0].endswith('first_token_seconds,first_token_ratio') and table[1][-1] != ','
  measured, read = [], sweep_times.measure
  monkeypatch.setattr(sweep_times, 'measure', lambda *a: measured.append(a) or read(*a))
  assert cli.main(flags) == 0 and not measured
  capsys.readouterr()
  flags[-1] = '--config.batch_size=500'  # more than there are pictures
  assert cli.main(flags) == 1 and measured
  assert 'times were not measured: gqa: only ' in capsys.readouterr().err
  content = json.loads((tmp_path / 'out/rows.json').read_text())
  assert not content['failed'] and 'only ' in content['times_failed']
  assert 'No times.' in (tmp_path / 'out/report.html').read_text()
  # Those of the other settings are no times of these.
  assert {row['first_token_seconds'] for row in content['rows']} == {None}
  (tmp_path / 'out/times.json').write_text('{')
  flags[-1] = '--config.batch_size=2'
  assert cli.main(flags) == 1
  content = json.loads((tmp_path / 'out/rows.json').read_text())
  assert 'times.json is damaged' in content['times_failed'] and len(content['rows']) == len(CELLS)


def runner(folder, tmp_path, **fields):
  page = sweep.load_page(f'{folder}/page.py')
  page.checkpoints.atp = str(folder / 'atp')
  for name, value in fields.items():
    page[name] = value
  return page, sweep.Runner(page, tmp_path, print)


def test_budgets_of_atp_are_calibrated_once(folder, tmp_path, monkeypatch):
  page, one = runner(folder, tmp_path, calibrate_with='page.py:atp')
  cells = [c for c in sweep.cells_of(page, print) if c.method == 'atp']
  assert [c.budget for c in cells] == [8, 10]
  calls, model = [], Checkpoint(folder / 'atp')
  known = model.fingerprint

  def calibrate(argv):
    calls.append(argv)
    path = next(a.partition('=')[2] for a in argv if a.startswith('--out='))
    pathlib.Path(path).write_text(json.dumps({
        'fingerprint': known, 'prune_after': [1, 2, 3], 'calibrations': [
            {'target': 8.0, 'shift': 0.25, 'reached': True, 'achieved': 8.1},
            {'target': 10.0, 'shift': -0.5, 'reached': True, 'achieved': 10.0},
            {'target': 9.0, 'shift': 0.1, 'reached': False, 'achieved': 9.9}]}))
  monkeypatch.setattr(sweep.calibrate, 'main', calibrate)
  assert [one._shift(c) for c in cells] == [0.25, -0.5]
  assert len(calls) == 1 and calls[0][-3:] == ['--target-tokens', '8', '10']
  _, none = runner(folder, tmp_path / 'none')
  with pytest.raises(ConfigError, match='which shift gives atp 8 tokens is not known'):
    none._shift(cells[0])
  path, = tmp_path.glob('calibrations/atp-0-*.json')
  with pytest.raises(ConfigError, match='9 tokens were not reached, only 9.9'):
    benchmark_run.calibrated(path, 9.0, model)
  with pytest.raises(ConfigError, match='has the budgets 8, 10, 9, not 12'):
    benchmark_run.calibrated(path, 12.0, model)
  for field, value in (('fingerprint', 'x'), ('prune_after', [2])):
    content = json.loads(path.read_text())
    (tmp_path / 'other.json').write_text(json.dumps(content | {field: value}))
    with pytest.raises(ConfigError, match='calibrated with a model of other weights'):
      benchmark_run.calibrated(tmp_path / 'other.json', 8.0, model)
  (tmp_path / 'other.json').write_text('{"calibrations": []}')
  with pytest.raises(DataError, match='no file of vlm-compress calibrate'):
    benchmark_run.calibrated(tmp_path / 'other.json', 8.0, model)


def test_pages_that_are_none(folder, capsys):
  assert cli.main(['sweep', f'--config={ROOT}/configs/quickstart.py:atp', '--out=x']) == 2
  assert 'no page of a sweep' in capsys.readouterr().err
  assert cli.main(words(folder, '--config.checkpoints.base=', '--dry-run')) == 2
  assert 'name the uncompressed model' in capsys.readouterr().err
  assert cli.main(words(folder, '--config.checkpoints.atp=nowhere', '--dry-run')) == 2
  assert 'nowhere' in capsys.readouterr().err
  for flag, said in (('--config.methods=(("base", "fastv"),)', "methods: ('base', 'fastv')"),
                     ('--config.methods=(("base", "fastv", 16),)', "'fastv', 16) is no"),
                     ('--config.limit=-1', 'limit=-1'), ('--config.shards=0', 'shards=0')):
    assert cli.main(words(folder, flag, '--dry-run')) == 2
    assert said in capsys.readouterr().err
  page = folder / 'misspelt.py'
  page.write_text((folder / 'page.py').read_text().replace("'gqa'", "'gpa'"))
  assert cli.main(['sweep', f'--config={page}', '--out=x', '--dry-run']) == 2
  assert "benchmarks: 'gpa' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize('name', ['tiny', 'llava_7b'])
def test_pages_of_the_repository_load(name):
  page = sweep.load_page(f'{ROOT}/configs/sweeps.py:{name}')
  assert set(benchmark_run.runs.BENCHMARKS) >= set(page.benchmarks)
  known = sweep.load_page(f'{ROOT}/configs/sweeps.py:tiny')
  assert set(page) == set(known)


@pytest.mark.slow
def test_two_processes_are_one(folder, tmp_path):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  assert cli.main(words(folder, out='one')) == 0
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu',
                 'XLA_FLAGS': '--xla_force_host_platform_device_count=1'}
  start = ('import sys; from vlm_compress.cli import __main__ as cli, benchmark_run; '
           'benchmark_run.MAX_NEW_TOKENS = 2; sys.exit(cli.main(sys.argv[1:]))')
  with open(tmp_path / 'log', 'wb') as log:
    both = [subprocess.Popen(
        [sys.executable, '-c', start, *words(folder, out='two'), '--num-processes=2',
         f'--coordinator=localhost:{port}', f'--process-id={i}'],
        env=environment, stdout=log, stderr=subprocess.STDOUT) for i in range(2)]
    codes = [process.wait(timeout=500) for process in both]
  said = (tmp_path / 'log').read_text()
  assert codes == [0, 0], said
  assert said.count('[4 of 4]') == 3  # each its own, and one looks at the other's
  rows = [[{k: v for k, v in row.items() if not k.startswith('latency')}
           for row in json.loads((folder / out / 'rows.json').read_text())['rows']]
          for out in ('one', 'two')]
  assert rows[0] == rows[1]
