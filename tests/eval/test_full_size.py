"""The measurement at full size: its files, what it expects of chance, and that it can fail."""

from __future__ import annotations

import copy
import dataclasses
import json
import random

import full_size
import full_size_end
import full_size_files as files
import numpy as np
import pytest
from full_size_words import agreed, one_right, word, write_answers

from vlm_compress.cli import __main__ as cli
from vlm_compress.eval.benchmarks import catalogue, gqa, mme, vqa_text
from vlm_compress.eval.benchmarks.question import Question
from vlm_compress.eval.result_schema import ANSWER


def test_every_benchmark_has_a_run_and_every_server_of_a_test_split_a_file():
  runs = full_size.RUNS.values()
  assert {run.benchmark for run in runs} == set(catalogue.BENCHMARKS)
  assert {run.benchmark for run in runs if run.upload} == {
      key for key, module in catalogue.BENCHMARKS.items()
      if hasattr(module, 'write_submission')}


@pytest.mark.parametrize('name', [
    'pope', 'mme', 'vizwiz test', 'activitynet_qa', *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ('mmbench', 'textvqa OCR', 'seed video', 'scienceqa', 'gqa'))])
def test_files_have_the_size_of_the_release(name, tmp_path):
  run = full_size.RUNS[name]
  asked, texts = full_size.prepare(run, tmp_path)
  assert len(asked) == len(texts) == run.rows
  lines = (tmp_path / 'answers.jsonl').read_text().splitlines()
  first = json.loads(lines[0])
  assert len(lines) == run.rows and set(ANSWER) < set(first)
  assert (first['question_id'], first['prompt']) == (asked[0][0].id, asked[0][0].prompt)
  assert texts[0] == first['prediction'] and texts[0] in asked[0][1].texts


def test_files_of_another_size_are_refused(tmp_path):
  run = dataclasses.replace(full_size.RUNS['vizwiz'],
                            write=lambda root, rng: files.vizwiz(root, rng, 4_318))
  with pytest.raises(AssertionError, match='questions 4,318 of 4,319'):
    full_size.prepare(run, tmp_path)


@pytest.mark.parametrize('key', ['vqav2', 'textvqa', 'vizwiz', 'gqa', 'msrvtt_qa'])
def test_points_of_an_answer_are_those_that_scoring_gives(key, tmp_path):
  name = key if key != 'msrvtt_qa' else 'video_qa'
  more = (True,) if key == 'msrvtt_qa' else ()
  chances = getattr(files, name)(tmp_path, random.Random(1), 400, *more)
  questions = catalogue.read(key, tmp_path)
  module, seen = catalogue.BENCHMARKS[key], set()
  for number in range(2):  # the first and the last text
    given = {q.id: c.texts[-number] for q, c in zip(questions.questions, chances)}
    found = module.score(questions, given)
    points = [float(r.score) for r in found.results]
    assert points == pytest.approx([c.points[-number] for c in chances])
    seen |= set(points)
  assert len(seen) == (2 if key in ('gqa', 'msrvtt_qa') else 5)


def test_words_mean_nothing_to_normalisers():
  assert [agreed(n) for n in range(6)] == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])
  words = {word(i) for i in range(0, files.PICTURE_BYTES)}
  assert len(words) == files.PICTURE_BYTES
  for text in words:
    assert text == vqa_text.m4c(text) == vqa_text.official(text) == gqa.parse(text)


def asked_of(count, options=0):
  """So many questions of yes or no, or of `options` letters, with ids from 0."""
  texts = tuple('ABCD'[:options]) if options else ('Yes', 'No')
  return [(Question(str(i), '', '', None, options=texts if options else ()),
           one_right(texts, texts[i % 2])) for i in range(count)]


def drawn(value, of, draws=2_000):
  """Mean and standard deviation of `value` of random answers, drawn."""
  rng = np.random.default_rng(0)
  found = [value(rng, of) for _ in range(draws)]
  return np.mean(found), np.std(found)


def test_errors_of_f1_are_those_of_draws():
  def value(rng, n):
    yes, no = (rng.random(n // 2) < 0.5).sum(), (rng.random(n // 2) < 0.5).sum()
    return 100 * 2 * yes / (yes + no + n / 2)
  one = full_size.f1(asked_of(3 * 600))[0]
  mean, error = drawn(value, 600)
  assert one.value == pytest.approx(mean, abs=0.1)
  assert one.error == pytest.approx(error / 3 ** 0.5, rel=0.05)  # of three


def test_errors_of_perception_are_those_of_draws():
  def value(rng, counts):
    total = 0.0
    for count in counts:
      right = rng.random((count // 2, 2)) < 0.5
      total += 100 * (right.mean() + right.all(1).mean())
    return total
  one = full_size.perception([])[0]
  mean, error = drawn(value, list(mme.PERCEPTION.values()))
  assert one.value == 750 == pytest.approx(mean, abs=2)
  assert one.error == pytest.approx(error, rel=0.05) and one.n == 2114


def test_errors_of_passes_are_binomial():
  circular, vanilla, rows = full_size.circular(asked_of(8, 2) + [
      (Question('1000001', '', '', None, options=('a', 'b')), one_right(('A', 'B'), 'A'))])
  assert (circular.value, vanilla.value, rows.value) == (25, 50, 50)
  assert (circular.n, vanilla.n, rows.n) == (8, 8, 9)
  assert circular.error == pytest.approx(100 * (0.25 * 0.75 / 8) ** 0.5)
  assert rows.error == pytest.approx(50 / 3)


@pytest.fixture(scope='module')
def scored(tmp_path_factory):
  """What `score` writes of POPE's random answers, and what is expected."""
  root = tmp_path_factory.mktemp('pope')
  run = full_size.RUNS['pope']
  asked, _ = full_size.prepare(run, root)
  assert cli.main(full_size.command(run, root)[2:]) == 0
  return json.loads((root / 'scores.json').read_text()), run.expect(asked)


def test_random_answers_score_what_chance_gives(scored):
  assert full_size.differences(scored[0], 9_000, scored[1]) == []


@pytest.mark.parametrize('change, said', [
    (lambda f: f['sums']['']['all'].update(n=8_910), '8,910 questions were scored'),
    (lambda f: f['per_question'].pop(), '9,000 questions were scored'),
    (lambda f: f['rows'][0].update(accuracy=53.0), 'mean: accuracy is 53.000; chance is 50.0'),
    (lambda f: f['rows'][0].update(accuracy=float('nan')), 'mean: accuracy is nan'),
    (lambda f: f['rows'][0].update(n=3_000), 'mean: F1 is over 3,000, not 9,000'),
    (lambda f: f['headline'].update(value=50.0), 'the headline is'),
    (lambda f: f['headline'].update(n=3_000), 'the headline is'),
])
def test_other_numbers_are_found(scored, change, said):
  found = copy.deepcopy(scored[0])
  change(found)
  assert said in '; '.join(full_size.differences(found, 9_000, scored[1]))


def test_an_upload_must_have_every_answer_in_its_place(tmp_path):
  path = tmp_path / 'upload.json'
  path.write_text(json.dumps([{'question_id': 7, 'answer': 'a'}, {'image': 'x', 'answer': 'b'}]))
  check = full_size.upload_differences
  assert check(path, ['7', 'x'], ['a', 'b']) == []
  assert check(path, ['7'], ['a']) == ['upload.json has 2 answers, not 1']
  assert '1 answers differ' in check(path, ['7', 'x'], ['a', 'c'])[0]
  assert '2 answers differ' in check(path, ['x', '7'], ['b', 'a'])[0]


def test_a_measured_process_has_its_own_peak_and_must_succeed():
  block = np.ones(400 * 2 ** 20, np.uint8)
  found = full_size.measure(['-c', full_size.PROBE, '--version'])
  assert 0 < found['peak_bytes'] < len(block) / 2
  assert 0 < found['cpu_seconds'] and 0 < found['seconds']
  with pytest.raises(AssertionError, match='--benchmark is needed'):
    full_size.measure(['-c', full_size.PROBE, 'score'])


@pytest.mark.parametrize('value', [75.0, 75.5])
def test_the_end_of_evaluate_must_give_the_number_of_score(value, tmp_path, monkeypatch):
  monkeypatch.setattr(full_size, 'measure',  # here instead of in a process of its own
                      lambda words: {'seconds': 1.0 + full_size_end.main(words[1:])})
  run = dataclasses.replace(full_size.RUNS['gqa'], rows=200)
  files.gqa(tmp_path, random.Random(2), run.rows)
  questions = catalogue.read('gqa', tmp_path).questions
  asked = [(q, one_right(('Yes', 'No'), 'yes')) for q in questions]
  texts = [q.answers[0] if i % 4 else 'xx' for i, q in enumerate(questions)]
  if value == 75.0:
    found = full_size.finish(run, tmp_path, asked, texts, {'value': value})['evaluate']
    assert found['value_ci95'][0] < value < found['value_ci95'][1]
    assert found['seconds'] == 1
  else:
    with pytest.raises(AssertionError, match=r'result.json has 75.0 .* not .*75\.5'):
      full_size.finish(run, tmp_path, asked, texts, {'value': value})


def test_the_table():
  lines = full_size.table({'runs': [
      {'name': 'a', 'rows': 4_377, 'value': 1.866, 'expected': 2.549, 'standard_error': 0.42,
       'seconds': 1.25, 'cpu_seconds': 0.5, 'peak_bytes': 2 ** 29,
       'evaluate': {'seconds': 60.04, 'cpu_seconds': 70, 'peak_bytes': 2 ** 30}},
      {'name': 'b test', 'rows': 8_000, 'upload': 'up.json', 'seconds': 2, 'cpu_seconds': 1,
       'peak_bytes': 0}]
      }).splitlines()
  assert lines[0] == '| ' + ' | '.join(full_size.COLUMNS) + ' |'
  assert lines[2:] == ['| a | 4,377 | 1.87 | 2.55 ± 0.42 | 1.2 | 0.5 | 0.50 | 60.0 | 70.0 | 1.00 |',
                       '| b test | 8,000 | `up.json` |  | 2.0 | 1.0 | 0.00 |  |  |  |']


def test_an_unknown_run_is_one_line(capsys):
  assert full_size.main(['--only', 'pope,vqa']) == 2
  said = capsys.readouterr().err
  assert said.startswith('error: no run is called vqa; there are gqa, vqav2,')
  assert said.count('\n') == 1


def test_answers_and_questions_must_be_as_many(tmp_path):
  with pytest.raises(ValueError):
    write_answers(tmp_path / 'a.jsonl', [('1', 'what?')], ['a', 'b'])


@pytest.mark.slow
def test_two_benchmarks_in_full(tmp_path, capsys):
  out = tmp_path / 'full.json'
  assert full_size.main(['--only', 'pope,mmbench', '--out', str(out)]) == 0
  found = json.loads(out.read_text())
  said = capsys.readouterr()
  assert said.out.strip() == full_size.table(found) and said.err == ''
  assert [row['rows'] for row in found['runs']] == [9_000, 4_377]
  for row in found['runs']:
    for one in (row, row['evaluate']):
      assert 2 ** 20 < one['peak_bytes'] < 1.5 * full_size.GIB and 0 < one['cpu_seconds'] < 60
