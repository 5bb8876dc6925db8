"""vlm-compress score: numbers with their n, JSON, submissions, one-line errors;
and --check-data, here and in evaluate.
"""

from __future__ import annotations

import json
import shutil
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
  code, out, _ = run(capsys, *own('mmbench'), '--submission', tmp_path / 'new/up.xlsx')
  assert code == 0 and out.startswith(str(tmp_path / 'new/up.xlsx'))
  assert (tmp_path / 'new/up.xlsx').stat().st_size > 0
  said = write_lines(tmp_path / 'vizwiz.jsonl', [
      {'question_id': i, 'text': f'A {i}.'} for i in range(5)])
  words = '--benchmark', 'vizwiz', '--data', DATA, '--predictions', said
  code, *_ = run(capsys, *words, '--split=test', '--submission', tmp_path / 'up.json')
  assert code == 0 and json.loads((tmp_path / 'up.json').read_text())[3] == {
      'image': 'VizWiz_test_00000003.jpg', 'answer': '3'}


@pytest.mark.parametrize('split', ['test', 'test-dev'])
def test_vqav2_is_uploaded_with_every_question_of_test2015(split, capsys, tmp_path):
  rows = [{'question_id': 300000000, 'text': 'The cup.'}, {'question_id': 300001001, 'text': 'No'}]
  words = ('--benchmark', 'vqav2', '--data', DATA, '--split', split, '--predictions',
           write_lines(tmp_path / 'a.jsonl', rows), '--submission', tmp_path / 'up.json')
  code, out, _ = run(capsys, *words)
  assert code == 0 and '6 answers, 4 of them empty' in out
  assert json.loads((tmp_path / 'up.json').read_text()) == [
      {'question_id': key, 'answer': answer} for key, answer in (
          (300000000, 'cup'), (300000001, ''), (300001000, ''), (300001001, 'no'),
          (300002000, ''), (300002001, ''))]


def test_nothing_that_is_read_is_overwritten(capsys, tmp_path):
  shutil.copytree(DATA / 'gqa', tmp_path / 'gqa')
  mine = shutil.copyfile(ANSWERS['gqa'], tmp_path / 'a.jsonl')
  (tmp_path / 'link.jsonl').symlink_to(mine)
  words = '--benchmark', 'gqa', '--data', tmp_path, '--predictions', mine
  for out in (mine, tmp_path / 'link.jsonl', tmp_path / 'gqa/../a.jsonl',
              tmp_path / 'gqa/testdev_balanced_questions.json'):
    before = out.read_bytes()
    code, printed, err = run(capsys, *words, '--out', out)
    assert (code, printed) == (2, '') and 'is a file that is read' in err
    assert out.read_bytes() == before
  assert run(capsys, *words, '--out', tmp_path / 'new.json')[0] == 0
  assert run(capsys, *words, '--out', tmp_path / 'new.json')[0] == 0  # its own, again


def test_a_place_that_cannot_be_written_is_an_error_before_scoring(capsys, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('x')
  monkeypatch.setattr(catalogue, 'read', None)
  code, out, err = run(capsys, *own('gqa'), '--out', tmp_path / 'file/new/out.json')
  assert (code, out) == (2, '') and f'{tmp_path}/file is no directory' in err
  code, _, err = run(capsys, *own('mmbench'), '--submission', tmp_path / 'up.csv')
  assert code == 2 and 'must end in .xlsx or .tsv' in err


@pytest.mark.parametrize('prompt, said', [
    ('q?\nReference OCR token: \nAnswer the question using a single word or phrase.',
     'with OCR tokens'),
    ('q?\nAnswer the question using a single word or phrase.', 'without OCR tokens'),
    ('q?', 'unknown whether with OCR tokens'), (None, 'unknown whether with OCR tokens')])
def test_textvqa_says_whether_prompts_had_ocr_tokens(prompt, said, capsys, tmp_path):
  rows = json.loads((DATA / 'textvqa/TextVQA_0.5.1_val.json').read_text())['data']
  answers = [{'question_id': row['question_id'], 'text': 'x'} for row in rows]
  if prompt is not None:
    answers = [{**a, 'prompt': prompt.replace('q?', row['question'])}
               for a, row in zip(answers, rows, strict=True)]
  path = write_lines(tmp_path / 'a.jsonl', answers)
  words = '--benchmark', 'textvqa', '--data', DATA, '--predictions'
  _, out, _ = run(capsys, *words, path, '--out', tmp_path / 'out.json')
  assert out.startswith(f'TextVQA accuracy, {said}: ')
  assert 'are asked with OCR tokens here' not in out
  assert json.loads((tmp_path / 'out.json').read_text())['headline']['metric'].endswith(said)
  _, out, _ = run(capsys, *words, ANSWERS['textvqa'])
  assert out.startswith('TextVQA accuracy, with and without OCR tokens: ')


def test_names_that_look_like_marks_are_printed_as_they_are(capsys, tmp_path):
  shutil.copytree(DATA / 'seed', tmp_path / 'seed')
  path = tmp_path / 'seed/SEED-Bench.json'
  path.write_text(path.read_text().replace('Scene Understanding', '[/b]Scene [red]x'))
  code, out, _ = run(capsys, '--benchmark', 'seed', '--data', tmp_path, '--predictions',
                     ANSWERS['seed'])
  assert code == 0 and ' [/b]Scene [red]x ' in out


def test_numbers_over_something_else_have_their_own_n(capsys, tmp_path):
  rows = json_lines(ANSWERS['mme'])
  existence = [row for row in rows if '/existence/' in f'/{row["question_id"]}']
  path = write_lines(tmp_path / 'a.jsonl', existence[:3])
  words = '--benchmark', 'mme', '--data', DATA, '--allow-partial', '--predictions'
  _, out, _ = run(capsys, *words, path)
  line = next(line for line in out.splitlines() if ' existence ' in line)
  assert line.split()[:3] == ['task', 'existence', '3'] and line.rstrip().endswith('(n = 1)')
  path = write_lines(tmp_path / 'a.jsonl', existence[:1])
  _, out, _ = run(capsys, *words, path)
  assert out.startswith('MME perception: – (points, at most 2000, rule official, n = 0')
  table = out.split('note: ')[0]
  assert 'accuracy' in table and 'accuracy+' not in table and ' 0.00 ' not in table
  rows = json_lines(ANSWERS['mmbench'])
  second = [row for row in rows if int(row['question_id']) > 1_000_000][:2]
  path = write_lines(tmp_path / 'b.jsonl', [rows[0], *second])
  _, out, _ = run(capsys, '--benchmark', 'mmbench', *words[2:], path)
  line = next(line for line in out.splitlines() if line.split()[:1] == ['all'])
  assert line.rstrip().endswith('(n = 1)') and line.split()[1] in '23'


def test_seed_over_images_only_says_so(capsys, tmp_path):
  rows = [r for r in json_lines(ANSWERS['seed']) if not str(r['question_id']).startswith('v')]
  path = write_lines(tmp_path / 'a.jsonl', rows)
  words = '--benchmark', 'seed', '--data', DATA, '--predictions', path
  assert run(capsys, *words)[1].startswith('SEED-Bench accuracy, all (images and videos): ')
  assert run(capsys, *words, '--allow-partial')[1].startswith(
      'SEED-Bench accuracy, images only: ')


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
    ((*own('vizwiz'), '--submission', 'x.json'), 'vizwiz takes test, not val; say so with'),
    ((*own('vqav2'), '--split', 'val', '--submission', 'x.json'),
     'vqav2 takes test and test-dev, not val'),
    (('--benchmark', 'msvd_qa', '--data', DATA / 'activitynet_qa', '--predictions',
      ANSWERS['activitynet_qa']), 'holds questions of activitynet_qa (see question 0); the '),
    (('--benchmark', 'activitynet_qa', '--data', DATA / 'msrvtt_qa', '--predictions',
      ANSWERS['msrvtt_qa']), 'holds questions of msrvtt_qa'),
    (('--benchmark', 'msvd_qa', '--data', DATA / 'msrvtt_qa', '--predictions',
      ANSWERS['msvd_qa']), 'holds questions of msrvtt_qa'),
    (('--benchmark', 'msrvtt_qa', '--data', DATA / 'msvd_qa', '--predictions',
      ANSWERS['msvd_qa']), 'holds questions of msvd_qa'),
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
  assert 'vqav2 test-dev: data file' in out


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
