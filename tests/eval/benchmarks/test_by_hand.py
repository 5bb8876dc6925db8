"""Rules and sizes of the releases, on cases made by hand: what the invented files
do not hold, and so would not notice.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from benchmark_files import DATA, copied, scored

from vlm_compress.data.errors import DataError
from vlm_compress.eval.benchmarks import (
  answers,
  catalogue,
  gqa,
  mmbench,
  mme,
  pope,
  scienceqa,
  scores,
  seed,
  video_qa,
  vizwiz,
)
from vlm_compress.eval.benchmarks.question import Part, Question, QuestionSet

COUNTS = {
    ('gqa', None): {'questions': (12_578,), 'images': (398,)},
    ('vqav2', None): {'questions': (214_354,)},
    ('vqav2', 'test'): {'questions': (447_793,)},
    ('textvqa', None): {'questions': (5_000,)},
    ('vizwiz', None): {'questions': (4_319,)},
    ('vizwiz', 'test'): {'questions': (8_000,)},
    ('pope', None): {'adversarial': (3_000,), 'random': (3_000, 2_910), 'popular': (3_000,)},
    ('scienceqa', None): {'questions': (4_241,), 'with image': (2_017,)},
    ('mme', None): {'questions': (2_374,), 'images': (1_187,)},
    ('mmbench', None): {'rows': (4_377, 4_329), 'questions': (1_176, 1_164)},
    ('seed', None): {'image': (14_233,), 'video': (5_009,)},
    ('msvd_qa', None): {'questions': (13_157,)},
    ('msrvtt_qa', None): {'questions': (72_821,)},
    ('activitynet_qa', None): {'questions': (8_000,)},
}


@pytest.mark.parametrize('key, split', COUNTS)
def test_official_counts(key, split):
  parts = catalogue.read(key, DATA, split).parts
  assert {part.name: part.official for part in parts} == COUNTS[key, split]
  assert {key for key, _ in COUNTS} == set(catalogue.BENCHMARKS)
  for name, official in COUNTS[key, split].items():
    assert all(Part(name, n, official).complete for n in official)
    assert not Part(name, official[0] + 1, official).complete


def one(question: Question, benchmark: str) -> QuestionSet:
  """A set of a single question."""
  return QuestionSet(benchmark, DATA, DATA, (question,))


# POPE ----------------------------------------------------------------------


def test_pope_where_everything_is_denied_has_f1_0():
  questions, _, _ = scored('pope')
  found = pope.score(questions, {q.id: 'No' for q in questions.questions})
  assert found.value == 0
  for category in pope.CATEGORIES:
    row = found.row('category', category)
    labels = [q.answers[0] for q in questions.questions if q.groups['category'] == category]
    assert row.numbers == {'F1': 0, 'precision': 0, 'recall': 0, 'yes ratio': 0,
                           'accuracy': pytest.approx(100 * labels.count('no') / len(labels))}


def test_pope_files_may_lie_in_the_directory_itself(tmp_path):
  for path in (DATA / 'pope/coco').iterdir():
    shutil.copy(path, tmp_path)
  assert pope.read(tmp_path).questions == pope.read(DATA).questions


# MMBench -------------------------------------------------------------------


@pytest.mark.parametrize('text', [
    "Sorry, I can't help with images of people yet.", "I can't process this file.",
    "I'm sorry, but without the image provided", 'Cannot determine the answer'])
def test_mmbench_refusals_are_wrong_whatever_letter_follows(text):
  assert mmbench.infer(f'{text} B', ['red', 'blue']) == 'Z'
  assert mmbench.infer(f'{text[1:]} B', ['red', 'blue']) == 'B'


def test_mmbench_z_and_answers_that_failed():
  assert mmbench.infer('it is Z', ['red', 'blue']) == 'Z'
  assert mmbench.infer('it is Z or A', ['red', 'blue']) == 'A'
  assert mmbench.infer('it is Z or A or B', ['red', 'grey']) is None
  assert mmbench.infer('Failed to obtain answer via API B', ['x' * 30, 'y']) is None
  assert mmbench.infer('Failed to obtain answer via API', ['x' * 30, 'answer']) == 'B'


@pytest.mark.parametrize('mark', '.()[],:;!*#{}')
def test_mmbench_marks_around_a_letter_are_blanks(mark):
  long = ['a long option text', 'another long option text']
  assert mmbench.infer(f'x{mark}B{mark}y', long) == 'B'
  assert mmbench.infer('x-B-y', long) is None and mmbench.infer('x/B/y', long) is None


def test_mmbench_phrase_names_a_letter_of_the_row_in_any_case():
  long = ['a long option text', 'another long option text']
  assert mmbench.infer('the Correct  answer is **b** for me as it seems so', long) == 'B'
  assert mmbench.infer('answer is d', [*long, *long]) == 'D'
  assert mmbench.infer('answer is d', long) is None
  assert mmbench.infer('answer is e', [*long, *long]) is None


def test_mmbench_2023_takes_an_a_in_a_long_text_for_an_article():
  assert mmbench.infer_2023('A it is', ['red', 'blue']) == 'A'
  assert mmbench.infer_2023('A it is now', ['red', 'blue']) is None
  assert mmbench.infer_2023('A it is now blue', ['red', 'blue']) == 'B'
  assert mmbench.infer_2023('B it is now', ['red', 'blue']) == 'B'


def table(path, rows):
  """A file of MMBench: (index, answer) with five columns of options."""
  lines = ['index\tquestion\thint\tA\tB\tC\tD\tE\tanswer\timage']
  lines += [f'{index}\tq?\t\tred\tblue\tgrey\tpink\tblack\t{answer}\t{"x" * 80}'
            for index, answer in rows]
  path.write_text('\n'.join(lines) + '\n')
  return mmbench.read(path)


def test_mmbench_passes_are_a_million_apart(tmp_path):
  questions = table(tmp_path / 'a.tsv', [(150_000, 'A'), (50_000, 'A'), (1_150_000, 'B'),
                                         (999_999, 'A'), (2_150_000, 'C')])
  assert [q.unit for q in questions.questions] == ['150000', '50000', '150000', '999999',
                                                   '150000']
  found = mmbench.score(questions, {'150000': 'A', '50000': 'A', '1150000': 'B',
                                    '999999': 'A', '2150000': 'A'})
  assert found.n == 3 and found.value == pytest.approx(200 / 3)
  assert found.row('', 'all').numbers['vanilla'] == 100


def test_mmbench_has_four_options_and_asks_cn_files_in_chinese(tmp_path):
  questions = table(tmp_path / 'mmbench_dev_CN.tsv', [(1, 'D')]).questions
  assert questions[0].options == ('red', 'blue', 'grey', 'pink')
  assert questions[0].prompt.splitlines()[-1] == '请直接回答选项字母。'
  english = table(tmp_path / 'encn.tsv', [(1, 'D')]).questions[0].prompt
  assert english.endswith("Answer with the option's letter from the given choices directly.")
  with pytest.raises(DataError, match="4 options and the answer 'E'"):
    table(tmp_path / 'a.tsv', [(1, 'E')])


# MME -----------------------------------------------------------------------


SIZES = {'existence': 60, 'count': 60, 'position': 60, 'color': 60, 'posters': 294,
         'celebrity': 340, 'scene': 400, 'landmark': 400, 'artwork': 400, 'OCR': 40,
         'commonsense_reasoning': 140, 'numerical_calculation': 40, 'text_translation': 40,
         'code_reasoning': 40}


def test_mme_of_the_size_of_the_release_is_complete(tmp_path):
  for task, size in SIZES.items():
    (tmp_path / task).mkdir()
    for i in range(size // 2):
      (tmp_path / task / f'{i}.txt').write_text(
          'Is it? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n')
  questions = mme.read(tmp_path)
  assert all(part.complete for part in questions.parts) and not questions.notes
  assert [part.count for part in questions.parts] == [2_374, 1_187]
  perfect = mme.score(questions, {q.id: q.answers[0] for q in questions.questions})
  assert [perfect.row('', name).numbers['score'] for name in (
      'perception', 'cognition', 'total')] == [2000, 800, 2800]
  assert [perfect.row('', name).n for name in ('perception', 'cognition', 'total')] == [
      2_114, 260, 2_374]
  (tmp_path / 'OCR/0.txt').unlink()
  questions = mme.read(tmp_path)
  assert questions.notes == ('not the size of the release: OCR',)
  assert not any(part.complete for part in questions.parts)


@pytest.mark.parametrize('text, official, lenient', [
    ('...yes', 'other', 'yes'), ('Y.', 'other', 'yes'), (' n', 'other', 'no'),
    ('.no.', 'no', 'no'), ('    No', 'other', 'no'), ('ye.s', 'other', 'yes')])
def test_mme_rules_differ_in_blanks_full_stops_and_initials(text, official, lenient):
  assert (mme.parse(text), mme.parse(text, 'lmms-eval')) == (official, lenient)


def test_mme_images_have_the_extension_that_is_there(tmp_path):
  root = copied('mme', tmp_path) / mme.DIRECTORY
  for name in ('count/0001.png', 'scene/images/img0_a.JPEG'):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(b'x')
  images = {q.image for q in mme.read(tmp_path).questions}
  assert {'count/0001.png', 'count/0002.jpg', 'scene/images/img0_a.JPEG'} <= images
  (root / 'count/0002.txt').write_text('Is it? Please answer yes or no.\tYes\n')
  with pytest.raises(DataError, match='0002.txt: has 1 questions; MME has two an image'):
    mme.read(tmp_path)


def test_mme_accuracy_plus_is_over_images_with_both_answers():
  questions, given, _ = scored('mme')
  first, second, third, *_ = questions.questions
  right = {q.id: q.answers[0] for q in (first, second, third)}
  row = mme.score(questions, right, allow_partial=True).row('task', 'existence')
  assert (row.n, row.n_of) == (3, {'accuracy+': 1}) and row.numbers['score'] == 200
  found = mme.score(questions, {third.id: right[third.id]}, allow_partial=True)
  assert found.row('task', 'existence').numbers == {'accuracy': 100}
  assert found.n == 0 and found.as_json()['headline']['value'] is None


# The others ----------------------------------------------------------------


@pytest.mark.parametrize('text, index', [
    ('The answer is E.', 4), ('The answer is F.', -1), ('The answer is E', -1),
    ('The answer is A. The answer is F.', -1), ('The answer is b.', -1)])
def test_scienceqa_sentences_name_any_letter_once(text, index):
  assert scienceqa.parse(text, 5) == index


def test_vizwiz_questions_are_capitalised_as_python_does(tmp_path):
  (tmp_path / 'test.json').write_text(json.dumps([
      {'image': 'a.jpg', 'question': 'what Is THIS? a BOX'}]))
  assert vizwiz.read(tmp_path, 'test').questions[0].prompt.startswith('What is this? a box\n')


def test_video_answers_are_compared_in_the_same_form():
  question = Question('1', 'whose?', '', None, answers=("man's",))
  for text, normalised, exact in (("man's", 100, 100), ("The man's.", 100, 0), ('man', 0, 0)):
    found = video_qa.score(one(question, 'msvd_qa'), {'1': text})
    row = found.row('', 'all')
    assert row.numbers == {'normalised': normalised, 'exact': exact}
    assert found.tallies['']['all'].mean == normalised / 100
    typed = dataclasses.replace(question, groups={'type': 'color'})
    found = catalogue.BENCHMARKS['activitynet_qa'].score(
        one(typed, 'activitynet_qa'), {'1': text})
    assert found.row('', 'free').numbers == row.numbers and found.value == exact


@pytest.mark.parametrize('operation, argument, steps', [
    ('choose name', 'cup|table', 1), ('query', 'name', 1), ('exist', '?', 1),
    ('choose color', 'red|blue', 2), ('query', 'color', 2), ('verify color', 'red', 2)])
def test_gqa_steps_leave_out_what_the_official_count_does(operation, argument, steps):
  program = [{'operation': 'select', 'argument': 'cup (1)'},
             {'operation': operation, 'argument': argument}]
  assert gqa._steps(program) == steps


def test_gqa_distribution_counts_the_questions_in_groups():
  question = Question('1', 'q?', '', None, answers=('red',), groups={
      'structural': 'query', 'global': 'color'})
  plain = dataclasses.replace(question, id='2', groups={'structural': 'query'})
  found = gqa.score(QuestionSet('gqa', DATA, DATA, (question, plain)), {'1': 'red', '2': 'x'})
  assert found.row('', 'distribution').n == 1 and found.n == 2


def test_seed_headline_of_hosts_that_had_one_kind_each():
  questions, given, whole = scored('seed')
  parts = []
  for kind in ('image', 'video'):
    mine = questions.take(q.id for q in questions.questions if q.groups['data'] == kind)
    parts.append(seed.score(mine, {q.id: given[q.id] for q in mine.questions
                                   if q.id in given}))
    assert parts[-1].headline.metric == f'SEED-Bench accuracy, {kind}s only'
  results = [r for part in parts for r in part.results]
  merged = scores.merge(parts, questions, seed.summarise, seed.headline(results))
  assert merged.headline == whole.headline and merged.value == whole.value


def test_an_index_of_other_digits_is_no_place(tmp_path):
  path = tmp_path / 'a.json'
  path.write_text(json.dumps([{'index': index, 'prediction': 'x'}
                              for index in ('3', '²', '٣', '9' * 6000)]))
  assert [answer.position for answer in answers.read(path)] == [3, None, None, None]
