"""vlm-compress score: numbers with their n, JSON, submissions, one-line errors;
and --check-data, here and in evaluate.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from benchmark_files import ANSWERS, DATA, expected, json_lines, write_lines

from vlm_compress.cli import __main__ as cli
from vlm_compress.eval.benchmarks import catalogue


def run(capsys, *words):
  """Exit code, stdout, stderr of `score` with these words."""
  code = cli.main(['score', *map(str, words)])
  captured = capsys.readouterr()
  return code, captured.out, captured.err


def own(key):
  return '--benchmark', key, '--data', DATA, '--predictions', ANSWERS[key]


@pytest.mark.parametrize('key', catalogue.BENCHMARKS)
def test_every_benchmark_prints_its_numbers_with_n(key, capsys, tmp_path):
  code, out, err = run(capsys, *own(key), '--out', tmp_path / 'new/out.json')
  assert (code, err) == (0, '')
  content = json.loads((tmp_path / 'new/out.json').read_text())
  head = content['headline']
  first = out.splitlines()[0]
  assert f'{head["value"]:.2f} ({head["scale"]}' in first
  assert first.startswith(head['metric']) and f'n = {head["n"]}' in first
  for row in content['rows']:
    line = next(line for line in out.splitlines()[1:] if f' {row["name"]} ' in line)
    assert f' {row["n"]:,} ' in line


def test_numbers_are_the_official_ones(capsys):
  _, out, _ = run(capsys, *own('vqav2'), '--rule', 'llava-2017')
  assert out.startswith('VQAv2 accuracy: 50.85 (0-100, rule llava-2017, n = 199)')
  assert expected('vqav2')['llava_pipeline_2017_code']['overall'] == 50.85
  assert 'warning: 5 of 199 questions have no prediction' in out


def test_partial_answers(capsys, tmp_path):
  path = write_lines(tmp_path / 'a.jsonl', json_lines(ANSWERS['gqa'])[:7])
  words = '--benchmark', 'gqa', '--data', DATA / 'gqa', '--predictions', path
  code, out, err = run(capsys, *words)
  assert (code, out, err.count('\n')) == (2, '', 1)
  assert '145 of 152 questions' in err and '--allow-partial' in err
  code, out, _ = run(capsys, *words, '--allow-partial')
  assert code == 0 and 'n = 7, partial)' in out.splitlines()[0]


def test_several_files_are_one(capsys, tmp_path):
  rows = json_lines(ANSWERS['pope'])
  parts = [write_lines(tmp_path / f'{i}.jsonl', rows[i::3]) for i in range(3)]
  _, whole, _ = run(capsys, *own('pope'))
  _, out, _ = run(capsys, '--benchmark', 'pope', '--data', DATA, '--predictions', *parts)
  assert out == whole


def test_submissions(capsys, tmp_path):
  for key, name in (('vqav2', 'up.json'), ('vizwiz', 'up.json'), ('mmbench', 'up.xlsx')):
    code, out, _ = run(capsys, *own(key), '--submission', tmp_path / key / name)
    assert code == 0 and out.startswith(str(tmp_path / key / name))
    assert (tmp_path / key / name).stat().st_size > 0


@pytest.mark.parametrize('words, message', [
    ((), '--benchmark is needed'),
    (('--benchmark', 'gqa'), '--predictions is needed'),
    (('--benchmark', 'coco'), 'invalid choice'),
    ((*own('gqa'), '--split', 'val'), 'gqa has no splits to choose from'),
    ((*own('vizwiz'), '--split', 'train'), 'vizwiz has val, test'),
    ((*own('mme'), '--rule', 'kind'), 'mme has official, lmms-eval'),
    ((*own('gqa'), '--submission', 'x.json'), 'gqa has no evaluation server'),
    ((*own('vizwiz'), '--submission', 'x.json', '--out', 'y'), 'leave out --out'),
    ((*own('gqa'), '--out', DATA), 'is a directory; name a file in it'),
    (('--benchmark', 'gqa', '--data', DATA, '--predictions', ANSWERS['seed']),
     'answers.jsonl: line 1: id'),
    (('--benchmark', 'gqa', '--data', DATA / 'seed', '--predictions', ANSWERS['gqa']),
     'see "Benchmarks" in the README'),
    (('--benchmark', 'gqa', '--data', DATA, '--predictions', 'nothing.jsonl'),
     'nothing.jsonl does not exist'),
    (('--check-data', 'nothing'), 'data directory nothing does not exist'),
    ((*own('vizwiz'), '--split', 'test'), 'is no question'),
])
def test_mistakes_are_one_line(words, message, capsys):
  code, out, err = run(capsys, *words)
  assert code == 2 and out == ''
  assert err.startswith('error: ') and err.count('\n') == 1 and message in err


def test_check_data(capsys):
  code, out, err = run(capsys, '--check-data', DATA)
  assert (code, err) == (0, '')
  for key in catalogue.BENCHMARKS:
    assert any(line.split()[:1] == [key] for line in out.splitlines()), key
  assert 'gqa: 38 image file(s) missing, the first is images/n100002.jpg' in out
  assert 'vqav2 test: data file' in out


def test_evaluate_check_data_says_the_same(capsys):
  _, wanted, _ = run(capsys, '--check-data', DATA)
  assert cli.main(['evaluate', f'--check-data={DATA}']) == 0
  assert capsys.readouterr().out == wanted
  assert cli.main(['evaluate', '--config=a.py']) == 2
  assert 'the following arguments are required: --checkpoint' in capsys.readouterr().err


def test_scoring_imports_no_model_library():
  script = ('import sys; from vlm_compress.cli.__main__ import main; '
            f'main(["score", "--benchmark", "gqa", "--data", {str(DATA)!r}, '
            f'"--predictions", {str(ANSWERS["gqa"])!r}]); '
            'assert not {"jax", "torch", "tensorflow", "flax", "PIL"} & set(sys.modules)')
  subprocess.run([sys.executable, '-c', script], check=True, capture_output=True,
                 timeout=100)
