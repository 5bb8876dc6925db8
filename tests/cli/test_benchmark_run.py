"""vlm-compress evaluate --benchmark and compare: run directories, errors, hosts."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import core_helpers as helpers
import pytest
import small_benchmark
from PIL import Image

from vlm_compress.cli import __main__ as cli
from vlm_compress.eval import runs

ROOT = pathlib.Path(__file__).parents[2]
TIMES = ('latency_seconds', 'latency_rows', 'compiled')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = small_benchmark.write_gqa(tmp_path_factory.mktemp('run'))
  small_benchmark.write_model(path / 'voco', helpers.voco_config())
  return path


def words(folder, out, *more, data=None, method='voco'):
  return ['evaluate', '--benchmark=gqa', f'--data={data or folder}', f'--method={method}',
          f'--checkpoint={folder / "voco"}', f'--out={out}', '--max-new-tokens=3',
          '--shards=4', '--batch-size=2', *more]


def environment():
  return {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu',
          'XLA_FLAGS': '--xla_force_host_platform_device_count=1'}


def same(a: pathlib.Path, b: pathlib.Path) -> None:
  """Whether two runs have the same answers and numbers, times aside."""
  answers = [[{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in
              (run / runs.ANSWERS).read_text().splitlines()] for run in (a, b)]
  assert answers[0] == answers[1]
  numbers = [{k: v for k, v in json.loads((run / runs.RESULTS).read_text()).items()
              if not k.startswith('latency')} for run in (a, b)]
  assert numbers[0] == numbers[1]
  assert (a / runs.CONFIG).read_text() == (b / runs.CONFIG).read_text()


@pytest.fixture(scope='module')
def finished(folder):
  """An uninterrupted run; half of its answers are the right ones."""
  out = folder / 'first'
  assert cli.main(words(folder, out)) == 0
  rows = [json.loads(x) for x in (out / runs.ANSWERS).read_text().splitlines()]
  small_benchmark.write_gqa(folder, {r['question_id']: r['prediction'].rstrip('.').lower()
                                     for r in rows[::2]})
  assert cli.main(words(folder, folder / 'whole')) == 0
  return folder / 'whole'


def test_a_run_has_its_numbers_and_is_not_run_twice(folder, finished, capsys):
  result = json.loads((finished / runs.RESULTS).read_text())
  assert result['n'] == result['n_benchmark'] == 18 and not result['partial']
  assert result['value'] == pytest.approx(100 * result['accuracy'])
  assert result['sums']['']['all'] == {'sum': 18 * result['accuracy'], 'n': 18}
  assert 0 < result['value_ci95'][0] < result['value'] < result['value_ci95'][1] < 100
  assert result['layer_average_tokens'] == result['input_visual_tokens'] == 2
  assert result['by_kind']['structural: query']['n'] == 9
  kept = sorted(finished.glob('answers-*'))
  assert [p.name for p in kept] == [f'answers-0000{i}-of-00004.jsonl' for i in range(4)]
  times = [p.stat().st_mtime_ns for p in kept]
  capsys.readouterr()
  assert cli.main(words(folder, finished, '--batch-size=5')) == 0  # changes no answer
  said = capsys.readouterr()
  assert 'finished already' in said.err and '(0-100, rule official, n = 18)' in said.out
  assert times == [p.stat().st_mtime_ns for p in kept]
  assert runs.load(finished).scores.value == pytest.approx(result['value'])


@pytest.mark.parametrize('more, message', [
    (['--max-new-tokens=5'], 'max_new_tokens: 3 -> 5'),
    (['--limit=4'], 'questions.number: 18 -> 4'),
    (['--method=lower_bound', '--budget=1'], 'num_voco_tokens: 2 -> 1'),
    (['--seed=3'], 'seed: 0 -> 3')])
def test_another_configuration_is_refused(folder, finished, capsys, more, message):
  assert cli.main(words(folder, finished, *more)) == 2
  error = capsys.readouterr().err
  assert 'belongs to another run' in error and message in error


def test_replaced_pictures_and_tokenizers_are_noticed(folder, tmp_path, capsys):
  data = small_benchmark.write_gqa(tmp_path / 'data')
  model = tmp_path / 'model'
  shutil.copytree(folder / 'voco', model)
  again = words(folder, tmp_path / 'run', '--limit=2', f'--checkpoint={model}', data=data)
  assert cli.main(again) == cli.main(again) == 0
  picture = data / 'gqa/images/0.jpg'
  Image.new('RGB', (40, 40)).save(picture, format='PNG')
  capsys.readouterr()
  assert cli.main(again) == 2
  assert 'questions.pictures: ' in capsys.readouterr().err
  shutil.rmtree(tmp_path / 'run')
  assert cli.main(again) == 0
  path = model / 'tokenizer.json'
  path.write_text(path.read_text() + '\n')
  assert cli.main(again) == 2
  assert 'tokenizer: ' in capsys.readouterr().err


def test_arguments_that_do_not_fit(folder, tmp_path, capsys):
  def refused(*more, **fields):
    assert cli.main(words(folder, tmp_path / 'x', *more, **fields)) == 2
    assert not (tmp_path / 'x').exists()
    return capsys.readouterr().err
  assert 'has no splits' in refused('--benchmark=gqa:val')
  assert 'unknown; use one of' in refused('--benchmark=gpa')
  assert 'no ATP modules' in refused(method='atp')
  assert 'needs a budget' in refused(method='random')
  assert 'made for 1 to 2' in refused('--budget=3')
  assert 'belongs to method atp' in refused('--threshold-shift=1')
  assert '--rule=x: gqa has official' in refused('--rule=x')
  assert 'no place beside' in refused('--num-voco-tokens=1')
  assert 'video(s) that are not there' in refused(
      '--benchmark=msvd_qa', data=ROOT / 'tests/eval/benchmarks/data')
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full/notes.txt').touch()
  assert cli.main(words(folder, tmp_path / 'full')) == 2
  assert 'no run of evaluate' in capsys.readouterr().err


def test_missing_pictures(folder, tmp_path, capsys):
  data = small_benchmark.write_gqa(tmp_path / 'data')
  (data / 'gqa/images/2.jpg').unlink()
  assert cli.main(words(folder, tmp_path / 'x', data=data)) == 2
  error = capsys.readouterr().err
  assert '4 of 18 questions ask about 1 picture(s)' in error and '2.jpg' in error
  assert '--allow-partial' in error and not (tmp_path / 'x').exists()
  assert cli.main(words(folder, tmp_path / 'x', '--allow-partial', data=data)) == 0
  lines = capsys.readouterr().out.splitlines()
  assert 'n = 14 of 18, partial' in lines[0]
  assert all('(n = ' in line for line in lines if line.startswith('  '))
  assert 'note: partial: 14 of 18 questions' in lines


def test_no_question_left_is_said(folder, tmp_path, capsys):
  data = small_benchmark.write_gqa(tmp_path / 'data')
  for path in (data / 'gqa/images').iterdir():
    path.unlink()
  assert cli.main(words(folder, tmp_path / 'x', '--allow-partial', data=data)) == 2
  assert 'no question is left to ask' in capsys.readouterr().err


def test_compare(folder, finished, tmp_path, capsys):
  lower = folder / 'lower1'
  assert cli.main(words(folder, lower, '--budget=1')) == 0
  capsys.readouterr()
  out = tmp_path / 'c.json'
  assert cli.main(['compare', str(finished), str(lower), f'--out={out}']) == 0
  found, said = json.loads(out.read_text()), capsys.readouterr().out
  rows = [[json.loads(x) for x in (run / runs.ANSWERS).read_text().splitlines()]
          for run in (finished, lower)]
  gap = sum(a['score'] - b['score'] for a, b in zip(*rows)) / 18
  same_answers = sum(a['parsed'] == b['parsed'] for a, b in zip(*rows)) / 18
  assert found['difference']['mean'] == pytest.approx(gap)
  assert found['agreement']['mean'] == pytest.approx(same_answers) and found['n'] == 18
  assert f'difference: {100 * gap:+.2f} [' in said
  low, high = found['difference']['ci95']
  assert low < gap < high
  assert cli.main(words(folder, tmp_path / 'part', '--limit=5')) == 0
  assert cli.main(['compare', str(finished), str(tmp_path / 'part')]) == 2
  assert '18 and 5 questions, 13 of them not in both' in capsys.readouterr().err
  assert cli.main(['compare', str(finished), str(folder)]) == 2
  assert 'no finished run' in capsys.readouterr().err
  # what a run keeps can be scored like anybody's file
  assert cli.main(['score', '--benchmark=gqa', f'--data={folder}',
                   f'--predictions={finished / runs.ANSWERS}']) == 0
  value = json.loads((finished / runs.RESULTS).read_text())['value']
  assert f'GQA accuracy: {value:.2f}' in capsys.readouterr().out


def start(arguments, log):
  return subprocess.Popen([sys.executable, '-m', 'vlm_compress.cli', *arguments],
                          env=environment(), stdout=log, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_killed_at_any_moment(folder, finished, tmp_path):
  """kill -9 as soon as there are so many answers, three times; then to the end."""
  out = tmp_path / 'killed'
  count = lambda: sum(len(p.read_bytes().splitlines()) for p in out.glob('answers-*'))
  with open(tmp_path / 'log', 'wb') as log:
    for _ in range(3):
      before = count()
      process = start(words(folder, out), log)
      while process.poll() is None and count() <= before:
        time.sleep(0.02)
      process.send_signal(signal.SIGKILL)
      process.wait()
      assert count() > before
    assert start(words(folder, out), log).wait() == 0, (tmp_path / 'log').read_text()
  same(out, finished)


@pytest.mark.slow
def test_two_processes_are_one(folder, finished, tmp_path):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  out = tmp_path / 'two'
  with open(tmp_path / 'log', 'wb') as log:
    both = [start(words(folder, out, f'--coordinator=localhost:{port}',
                        '--num-processes=2', f'--process-id={i}'), log) for i in range(2)]
    codes = [process.wait(timeout=500) for process in both]
  said = (tmp_path / 'log').read_text()
  assert codes == [0, 0], said
  same(out, finished)
  done = [line for line in said.splitlines() if line.endswith('is done')]
  assert len(done) == 4 and said.count('result: ') == 1
