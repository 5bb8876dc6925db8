"""Every number of the official scorers comes out: totals, types, questions."""

from __future__ import annotations

import json
import math

import pytest
from benchmark_files import expected, scored

from vlm_compress.eval.benchmarks import mmbench, pope, vizwiz, vqa_text, vqav2


def near(value: float) -> object:
  """Equal but for the last bits, which depend on the order of a sum."""
  return pytest.approx(value, rel=1e-13, abs=1e-12)


def points(scores) -> dict[str, float]:
  """Score per question."""
  return {r.question.id: float(r.score) for r in scores.results}


def by_group(scores, group: str, column: str = 'accuracy') -> dict[str, float]:
  """{name: rounded number} of the rows of a group."""
  return {r.name: round(r.numbers[column], 2) for r in scores.rows if r.group == group}


def test_gqa():
  want = expected('gqa')
  _, _, scores = scored('gqa')
  assert scores.value == near(want['accuracy_exact'])
  assert scores.n == len(want['per_question'])
  assert {r.question.id: r.score for r in scores.results} == want['per_question']
  assert {r.question.id: r.parsed for r in scores.results} == want['predictions']
  assert by_group(scores, 'kind') == {'open': want['open'], 'binary': want['binary']}
  apart = scores.row('', 'distribution').numbers['chi-square / 100']
  assert round(apart, 2) == want['distribution']
  for name, group in (('structural type', 'structural'), ('semantic type', 'semantic'),
                      ('steps number', 'steps'), ('words number', 'words')):
    assert {r.name: [round(r.numbers['accuracy'], 2), r.n] for r in scores.rows
            if r.group == group} == want['detail'][f'Accuracy / {name}']


@pytest.mark.parametrize('rule, name', [
    ('llava', 'llava_pipeline'), ('raw', 'raw_text_to_official'),
    ('llava-2017', 'llava_pipeline_2017_code')])
def test_vqav2(rule, name):
  want = expected('vqav2')[name]
  _, _, scores = scored('vqav2', rule=rule)
  assert round(scores.value, 2) == want['overall']
  assert by_group(scores, 'answer type') == want['perAnswerType']
  assert by_group(scores, 'question type') == want['perQuestionType']
  assert {key: round(100 * value, 2) for key, value in points(scores).items()
          } == want['per_question']


def test_vqav2_submission(tmp_path):
  questions, given, _ = scored('vqav2')
  said = vqav2.write_submission(tmp_path / 'up.json', questions, given)
  assert json.loads((tmp_path / 'up.json').read_text()) == expected('vqav2')['upload']
  assert '199 answers, 5 of them empty' in said


def test_textvqa():
  want = expected('textvqa')
  _, _, scores = scored('textvqa')
  assert scores.value == near(want['accuracy'])
  assert points(scores) == {key: near(value)
                            for key, value in want['per_question'].items()}


def test_vizwiz():
  want = expected('vizwiz')
  questions, given, scores = scored('vizwiz')
  assert scores.value == near(want['official_exact'])
  assert by_group(scores, 'answer type') == want['official_per_answer_type']
  assert points(scores) == {key: near(value)
                            for key, value in want['per_question'].items()}
  _, _, kinder = scored('vizwiz', rule='both-sides')
  assert kinder.value == near(want['both_sides_normalised'])


def test_vizwiz_submission(tmp_path):
  questions, given, _ = scored('vizwiz')
  vizwiz.write_submission(tmp_path / 'up.json', questions, given)
  assert json.loads((tmp_path / 'up.json').read_text()) == expected('vizwiz')['upload']


def test_pope():
  want = expected('pope')
  _, _, scores = scored('pope')
  assert scores.value == near(100 * want['mean_f1'])
  assert scores.row('', 'mean').numbers['accuracy'] == near(100 * want['mean_accuracy'])
  for category in ('adversarial', 'popular', 'random'):
    row = scores.row('category', category)
    assert row.n == want[category]['n']
    for column, name in (('F1', 'f1'), ('accuracy', 'accuracy'), ('recall', 'recall'),
                         ('precision', 'precision'), ('yes ratio', 'yes_ratio')):
      assert row.numbers[column] == near(100 * want[category][name]), (category, name)
    mine = [r for r in scores.results if r.question.groups['category'] == category]
    assert pope.confusion(mine) == tuple(want[category][name]
                                         for name in ('TP', 'FP', 'TN', 'FN'))


def test_scienceqa():
  want = expected('scienceqa')
  _, _, scores = scored('scienceqa')
  assert scores.value == near(want['img_accuracy_all_image_questions'])
  assert scores.n == want['img_count_all']
  whole, upstream = scores.row('', 'all'), scores.row('picture', 'image, answered')
  assert (whole.numbers['accuracy'], whole.n) == (near(want['accuracy']), want['total'])
  assert (upstream.numbers['accuracy'], upstream.n) == (
      near(want['img_accuracy_official']), want['img_count_official'])
  assert {r.question.id: 'ABCDE'.find(r.parsed) if r.parsed else -1
          for r in scores.results} == want['per_question']
  assert sum(r.score for r in scores.results) == want['correct']


def test_mme():
  want = expected('mme')
  _, _, scores = scored('mme')
  assert scores.value == near(want['perception'])
  for name in ('perception', 'cognition', 'total'):
    assert scores.row('', name).numbers['score'] == near(want[name])
  assert {r.name for r in scores.rows if r.group == 'task'} == set(want['per_task'])
  for task, value in want['per_task'].items():
    numbers = scores.row('task', task).numbers
    assert numbers['score'] == near(value)
    assert numbers['accuracy'] == near(want['acc_per_task'][task]['acc'])
    assert numbers['accuracy+'] == near(want['acc_per_task'][task]['acc_plus'])


# The report's short names of l2-categories.
SHORT = {'coarse_perception': 'CP', 'relation_reasoning': 'RR',
         'finegrained_perception (instance-level)': 'FP-S'}


@pytest.mark.parametrize('column, name', [('circular', 'circular'),
                                          ('vanilla', 'vanilla_first_pass')])
def test_mmbench(column, name):
  want = expected('mmbench')[name]
  _, _, scores = scored('mmbench')
  assert scores.row('', 'all').numbers[column] == near(100 * want['overall'])
  assert scores.n == want['n']
  found = {SHORT.get(r.name, r.name): r.numbers[column] / 100 for r in scores.rows
           if r.group}
  report = {key: value for key, value in want['report'].items()
            if key not in ('Overall', 'split')}
  assert found == {key: near(value) for key, value in report.items()}
  if column == 'circular':
    assert mmbench.circular(scores.results) == want['per_question']
  else:
    assert {r.question.id: r.score for r in scores.results
            if int(r.question.id) < 1_000_000} == want['per_question']


def test_mmbench_rows_and_letters():
  want = expected('mmbench')
  _, _, scores = scored('mmbench')
  rows = scores.row('', 'all rows')
  assert (rows.numbers['vanilla'], rows.n) == (
      near(100 * want['vanilla_all_rows']['overall']), want['vanilla_all_rows']['n'])
  assert {r.question.id: r.score for r in scores.results
          } == want['vanilla_all_rows']['per_question']
  assert {r.question.id: r.parsed for r in scores.results} == want['inferred_vlmevalkit']
  report = want['vanilla_all_rows']['report']
  means = {name: tally.mean for group in ('', 'l2-category', 'category')
           for name, tally in scores.tallies[group].items()}
  assert {SHORT.get(name, {'all': 'Overall'}.get(name, name)): near(mean)
          for name, mean in means.items()} == {
              name: value for name, value in report.items() if name != 'split'}


def test_mmbench_other_rules():
  want = expected('mmbench')
  _, _, old = scored('mmbench', rule='2023')
  matcher = want['matcher_2023_prefetch_only']
  assert old.value == near(100 * matcher['circular'])
  assert old.row('', 'all').numbers['vanilla'] == near(100 * matcher['vanilla_first_pass'])
  assert {r.question.id: r.parsed for r in old.results} == matcher['inferred']
  _, _, strict = scored('mmbench', rule='strict')
  letter = want['strict_letter']
  assert strict.value == near(100 * letter['circular'])
  assert strict.row('', 'all').numbers['vanilla'] == near(100 * letter['vanilla_first_pass'])
  assert strict.row('', 'all rows').numbers['vanilla'] == near(
      100 * letter['vanilla_all_rows'])


def test_seed():
  want = expected('seed')
  _, _, scores = scored('seed')
  assert scores.value == near(want['all'])
  for kind in ('image', 'video'):
    assert scores.row('data', kind).numbers['accuracy'] == near(want[kind])
  assert {r.question.id: r.score for r in scores.results} == want['per_question']
  kinds = by_group(scores, 'type')
  assert len(kinds) == 12 and kinds == {name: want['printed'][name] for name in kinds}


@pytest.mark.parametrize('key', ['msvd_qa', 'msrvtt_qa'])
def test_video_qa(key):
  want = expected(key)
  _, _, scores = scored(key)
  assert scores.value == near(100 * want['normalised'])
  assert scores.row('', 'all').numbers['exact'] == near(100 * want['raw'])
  assert {r.question.id: r.score for r in scores.results
          } == want['per_question_normalised']


def test_activitynet_qa():
  _, _, scores = scored('activitynet_qa')
  assert scores.value == near(100 * expected('activitynet_qa')['raw']['all'])
  assert scores.headline.metric == 'ActivityNet-QA exact match, official (no GPT judge)'
  names = ('motion', 'spatial relation', 'temporal relation', 'yes/no', 'color',
           'object', 'location', 'number', 'other')
  for column, part in (('normalised', 'normalised'), ('exact', 'raw')):
    want = expected('activitynet_qa')[part]
    assert scores.row('', 'all').numbers[column] == near(100 * want['all'])
    assert scores.row('', 'free').numbers[column] == near(100 * want['free'])
    assert [scores.row('type', name).numbers[column] for name in names] == [
        near(100 * want['per_type'][str(i)]) for i in range(9)]


def test_headlines_that_are_means_are_their_tallies():
  for key in ('gqa', 'vqav2', 'textvqa', 'vizwiz', 'seed', 'msvd_qa', 'activitynet_qa'):
    _, _, scores = scored(key)
    assert scores.value == near(100 * scores.tallies['']['all'].mean), key
    assert math.isfinite(scores.value) and scores.tallies['']['all'].count == scores.n


def test_soft_accuracy_is_the_table_of_its_paper():
  assert [float(vqa_text.soft_accuracy('x', ['x'] * n + ['y'] * (10 - n)))
          for n in range(6)] == [0, 0.3, 0.6, 0.9, 1, 1]
