"""Missing predictions, hosts that each score a part, and damaged or other
versions of the official files.
"""

from __future__ import annotations

import json
import random
import shutil

import pytest
from benchmark_files import DATA, copied, scored

from vlm_compress.data.errors import DataError
from vlm_compress.eval.benchmarks import catalogue, mmbench, pope, scores, seed, video_qa

KEYS = list(catalogue.BENCHMARKS)
MISSING_IS_AN_ERROR = {'gqa', 'vizwiz', 'pope', 'mme'}


def without(given, questions, count):
  """The predictions, `count` fewer; and which ids are gone."""
  gone = [q.id for q in questions.questions if q.id in given][:count]
  return {key: text for key, text in given.items() if key not in gone}, gone


@pytest.mark.parametrize('key', KEYS)
def test_missing_predictions_follow_the_benchmarks_rule(key):
  module = catalogue.BENCHMARKS[key]
  questions, given, whole = scored(key)
  fewer, gone = without(given, questions, 4)
  if key in MISSING_IS_AN_ERROR:
    with pytest.raises(DataError, match=rf'4 of \d+ .*{gone[0]}.*--allow-partial'):
      module.score(questions, fewer)
    return
  found = module.score(questions, fewer)
  assert len(found.results) == len(questions.questions)
  assert found.missing == whole.missing + 4 and not found.partial
  assert all(r.score == 0 for r in found.results if r.question.id in gone)
  wrong = module.score(questions, {**fewer, **dict.fromkeys(gone, '')})
  assert found.value == wrong.value <= whole.value
  assert any(note.startswith(f'warning: {found.missing} of') for note in found.notes)


@pytest.mark.parametrize('key', KEYS)
def test_allow_partial_scores_what_is_there(key):
  questions, given, _ = scored(key)
  fewer, gone = without(given, questions, 4)
  found = catalogue.BENCHMARKS[key].score(questions, fewer, allow_partial=True)
  assert {r.question.id for r in found.results} == set(fewer)
  alone = catalogue.BENCHMARKS[key].score(questions.take(fewer), fewer)
  assert found.rows == alone.rows
  assert found.partial and found.total == len(questions.questions)
  assert any('left out' in note for note in found.notes)


def test_missing_scienceqa_pictures_stay_in_the_denominator():
  _, _, found = scored('scienceqa')
  assert found.row('picture', 'image').n == 40
  assert found.row('picture', 'image, answered').n == 38


def test_parts_without_any_question_of_the_headline_have_n_0():
  questions, given, _ = scored('scienceqa')
  bare = questions.take(q.id for q in questions.questions if not q.image)
  found = catalogue.BENCHMARKS['scienceqa'].score(bare, {
      q.id: given[q.id] for q in bare.questions if q.id in given})
  assert (found.n, found.value) == (0, 0)
  questions, given, _ = scored('mme')
  task = questions.take(q.id for q in questions.questions
                        if q.groups['task'] == 'code_reasoning')
  found = catalogue.BENCHMARKS['mme'].score(task, {q.id: given[q.id]
                                                   for q in task.questions})
  assert found.n == 0 and found.row('', 'cognition').n == 12


def test_partial_circular_and_accuracy_plus_are_over_what_is_there():
  questions, given, _ = scored('mme')
  first = questions.questions[0]
  fewer = {key: text for key, text in given.items() if key != first.id}
  row = catalogue.BENCHMARKS['mme'].score(
      questions, fewer, allow_partial=True).row('task', 'existence')
  both = [q for q in questions.questions if q.groups['task'] == 'existence'
          and q.unit != first.unit]
  assert row.n == len(both) + 1
  whole = catalogue.BENCHMARKS['mme'].score(
      questions.take(q.id for q in both), {q.id: given[q.id] for q in both})
  assert row.numbers['accuracy+'] == whole.row('task', 'existence').numbers['accuracy+']


def test_no_prediction_at_all_and_unknown_ones_are_errors():
  for key in KEYS:
    questions, given, _ = scored(key)
    module = catalogue.BENCHMARKS[key]
    with pytest.raises(DataError, match='no prediction for any question'):
      module.score(questions, {}, allow_partial=True)
    with pytest.raises(DataError, match='1 prediction.s. for questions .*nowhere'):
      module.score(questions, {**given, 'nowhere': 'yes'})


@pytest.mark.parametrize('key', KEYS)
def test_hosts_add_up_exactly(key):
  module = catalogue.BENCHMARKS[key]
  questions, given, whole = scored(key)
  units = sorted({q.unit or q.id for q in questions.questions})
  random.Random(0).shuffle(units)
  parts = []
  for host in range(3):
    mine = questions.take(q.id for q in questions.questions
                          if (q.unit or q.id) in units[host::3])
    parts.append(module.score(mine, {q.id: given[q.id] for q in mine.questions
                                     if q.id in given}))
  assert scores.add_tallies(*(part.tallies for part in parts)) == whole.tallies
  merged = scores.merge(parts, questions, module.summarise)
  assert merged.rows == whole.rows and merged.results == whole.results
  assert (merged.total, merged.missing) == (whole.total, whole.missing)
  with pytest.raises(DataError, match='was scored twice'):
    scores.merge([*parts, parts[1]], questions, module.summarise)


@pytest.mark.parametrize('key', KEYS)
def test_order_of_predictions_does_not_matter(key):
  questions, given, whole = scored(key)
  pairs = list(given.items())
  random.Random(1).shuffle(pairs)
  assert catalogue.BENCHMARKS[key].score(questions, dict(pairs)) == whole


@pytest.mark.parametrize('key', KEYS)
def test_json_has_every_number_and_question(key):
  _, _, found = scored(key)
  content = json.loads(json.dumps(found.as_json()))
  assert content['headline']['value'] == found.value
  assert content['headline']['n'] == found.n
  assert len(content['per_question']) == len(found.results)
  assert all('n' in row for row in content['rows'])
  whole = content['sums']['']['all']
  assert whole['sum'] == pytest.approx(sum(x['score'] for x in content['per_question']))


# Other versions, damaged files -------------------------------------------


def test_seed_keeps_both_questions_of_an_id_that_occurs_twice(tmp_path):
  root = copied('seed', tmp_path)
  content = json.loads((root / seed.FILE).read_text())
  rows = content['questions']
  rows.append({**rows[0], 'question': 'Is it another one?', 'answer': 'D'})
  (root / seed.FILE).write_text(json.dumps(content))
  questions = seed.read(root)
  first = rows[0]['question_id']
  assert len(questions.questions) == len(rows)
  assert [q.id for q in questions.questions if first in q.aliases] == [
      first, f'{first}#2']
  assert any(first in note for note in questions.notes)
  from vlm_compress.eval.benchmarks import answers, joining
  from vlm_compress.eval.benchmarks.answers import Answer
  given = answers.read(root / 'answers.jsonl')
  both = [Answer('line 1', 'D', (first,), question='Is it another one?'), *given]
  found = joining.join(both, questions)
  assert (found[f'{first}#2'], found[first]) == ('D', given[0].text)
  # Without the question's text they are taken in turn, as they stand.
  plain = [Answer(f'line {i}', text, (first,)) for i, text in enumerate('AD')]
  assert joining.join(plain, questions) == {first: 'A', f'{first}#2': 'D'}
  with pytest.raises(DataError, match='again'):
    joining.join([*plain, plain[0]], questions)


@pytest.mark.parametrize('count, complete', [(2_910, True), (3_000, True), (2_999, False)])
def test_pope_random_has_two_right_sizes_and_says_which(count, complete, tmp_path):
  root = copied('pope', tmp_path)
  rows = [json.dumps({'question_id': i + 1, 'image': 'a.jpg', 'label': 'yes',
                      'text': f'Is there a {i} in the imange?'}) for i in range(count)]
  (root / 'coco/coco_pope_random.json').write_text('\n'.join(rows))
  questions = pope.read(root)
  part = next(p for p in questions.parts if p.name == 'random')
  assert part.complete is complete and part.count == count
  assert any(f'random has {count:,} questions' in note for note in questions.notes)


def test_mmbench_pictures_of_later_files_are_those_of_another_row(tmp_path):
  root = copied('mmbench', tmp_path)
  path = root / 'mmbench_dev_20230712.tsv'
  before = {q.id: q.picture for q in mmbench.read(root).questions}
  lines = path.read_text(encoding='utf-8')
  picture = before['1000284']
  assert picture == before['284'] and lines.count(picture) > 1
  head, tail = lines.split('1000284\t')
  path.write_text(f'{head}1000284\t{tail.replace(picture, "284", 1)}', encoding='utf-8')
  assert {q.id: q.picture for q in mmbench.read(root).questions} == before
  path.write_text(f'{head}1000284\t{tail.replace(picture, "99", 1)}', encoding='utf-8')
  with pytest.raises(DataError, match=r"tsv: line \d+: its image is that of row '99'"):
    mmbench.read(root)


def test_mmbench_texts_that_look_like_nothing_are_texts(tmp_path):
  path = tmp_path / 'x.tsv'
  path.write_text('index\tquestion\thint\tA\tB\tC\tD\tanswer\timage\n'
                  f'1\tq?\t\tNone\tN/A\tnan\t\tC\t{"x" * 80}\n')
  assert mmbench.read(path).questions[0].options == ('None', 'N/A', 'nan')


def test_mmbench_with_several_files_wants_one(tmp_path):
  root = copied('mmbench', tmp_path)
  shutil.copyfile(root / 'mmbench_dev_20230712.tsv', root / 'b.tsv')
  with pytest.raises(DataError, match='several .tsv files.*b.tsv.*--data'):
    mmbench.read(root)
  assert mmbench.read(root / 'b.tsv').notes == ('file: b.tsv',)


def test_videos_come_in_both_shapes(tmp_path):
  rows = json.loads((DATA / 'msrvtt_qa/test_qa.json').read_text())
  (tmp_path / 'test_q.json').write_text(json.dumps([
      {'video_name': f'video{r["video_id"]}', 'question': r['question'],
       'question_id': r['id']} for r in rows]))
  (tmp_path / 'test_a.json').write_text(json.dumps([
      {'answer': r['answer'], 'question_id': r['id']} for r in reversed(rows)]))
  other = video_qa.read(tmp_path, 'msrvtt_qa')
  _, given, whole = scored('msrvtt_qa')
  assert video_qa.score(other, given).value == whole.value
  assert other.questions[0].image == whole.results[0].question.image
  (tmp_path / 'test_a.json').write_text('[]')
  with pytest.raises(DataError, match='question 0: id .* has no answer in test_a.json'):
    video_qa.read(tmp_path, 'msrvtt_qa')


def test_videos_are_found_whatever_their_extension(tmp_path):
  root = copied('activitynet_qa', tmp_path)
  first = video_qa.read(root, 'activitynet_qa').questions[0]
  assert first.image == 'videos/v_vid00-_xY.mp4'
  (root / 'videos').mkdir()
  (root / 'videos/v_vid00-_xY.webm').touch()
  assert video_qa.read(root, 'activitynet_qa').questions[0].image.endswith('.webm')
  msvd = video_qa.read(DATA, 'msvd_qa').questions[0]
  assert msvd.image == 'videos/clip1300_5_15.avi'


# File, what is replaced, by what, and the message.
DAMAGED = [
    ('gqa', 'testdev_balanced_questions.json', '"isBalanced":true', '"isBalanced":"yes"',
     "question '201000000': field 'isBalanced' must be true or false, is str"),
    ('gqa', 'testdev_balanced_questions.json', '"imageId":"n100000"',
     '"imageId":"../../etc/passwd"', 'outside the data root'),
    ('gqa', 'testdev_balanced_questions.json', '"201000013":{', '"201000000":{',
     "the key '201000000' occurs twice"),
    ('vqav2', 'v2_mscoco_val2014_annotations.json', '"question_id":1000000',
     '"question_id":1', 'question 0: id 1000000 has no entry in v2_mscoco_val2014'),
    ('vqav2', 'v2_OpenEnded_mscoco_val2014_questions.json', '"question_id":1000001',
     '"question_id":1000000', "the question '1000000' occurs twice"),
    ('textvqa', 'TextVQA_0.5.1_val.json', '"image_id":"003a8ae2ef43b901"',
     '"image_id":"/etc/x"', 'has no OCR tokens'),
    ('vizwiz', 'val.json', '"image":"VizWiz_val_00000001.jpg"', '"image":"../../a.jpg"',
     'outside the data root'),
    ('pope', 'coco/coco_pope_popular.json', '"label": "no"', '"label": "nope"',
     "line 2: field 'label' is 'nope'"),
    ('pope', 'coco/coco_pope_random.json', '"question_id": 2,', '"question_id": 1,',
     "the question 'random/1' occurs twice"),
    ('scienceqa', 'problems.json', '"answer":2', '"answer":7', 'is none of its choices'),
    ('scienceqa', 'pid_splits.json', '"test":["3"', '"test":["../../3"',
     "problem '../../3' of the test split"),
    ('mme', 'MME_Benchmark_release_version/count/0001.txt', '\tYes', ' Yes',
     'line 2: must be a question, a tab, and Yes or No'),
    ('mmbench', 'mmbench_dev_20230712.tsv', 'index\tquestion', 'id\tquestion',
     'line 1: no column index'),
    ('mmbench', 'mmbench_dev_20230712.tsv', '\nfor picture 0?"\t', '\nfor picture 0?"\t\t',
     'line 2: 15 fields where the header has 14'),
    ('seed', 'SEED-Bench.json', '"data_id":"1454426_2591111986"', '"data_id":"../../x"',
     'outside the data root'),
    ('seed', 'SEED-Bench.json', '"question_type_id":1}', '"question_type_id":77}',
     'question 0: data_type'),
    ('msvd_qa', 'test_qa.json', '"video_id":1300', '"video_id":"1300"',
     "'video_id' must be a whole number, is str"),
    ('msvd_qa', 'youtube_mapping.txt', 'clip1300_5_15', '../../../clip',
     'outside the data root'),
    ('activitynet_qa', 'test_a.json', '"type":5', '"type":19', 'type 19 is unknown'),
    ('activitynet_qa', 'test_a.json', '"type":5', '"type":"x"', 'type x is unknown'),
    ('activitynet_qa', 'test_a.json', '"question_id":"v_vid28-_xY_3"',
     '"question_id":"v_vid04-_xY_3"', "answer 1: the id 'v_vid04-_xY_3' occurs twice"),
    ('msrvtt_qa', 'test_qa.json', '"category_id":0', '"category_id":[0]',
     "'category_id' must be a whole number or a text, is list"),
    ('msvd_qa', 'youtube_mapping.txt', 'clip1301_5_15 vid1301', 'clip1301_5_15 vid1300',
     'line 2: vid1300 was another clip above'),
    ('msvd_qa', 'youtube_mapping.txt', 'clip1301_5_15 vid1301', 'clip1301_5_15',
     'line 2: must be a clip and vid<id>'),
    ('msvd_qa', 'youtube_mapping.txt', 'clip1301_5_15 vid1301', 'clip1301_5_15 vid1301 x',
     'line 2: must be a clip and vid<id>'),
    ('msvd_qa', 'youtube_mapping.txt', 'clip1301_5_15', 'clip\udcff', 'is not UTF-8'),
    ('gqa', 'testdev_balanced_questions.json', '"semantic":[{', '"semantic":["select",{',
     "question '201000000': field 'semantic' must hold objects"),
    ('gqa', 'testdev_balanced_questions.json', '"semantic":[{', '"semantic":5,"was":[{',
     "'semantic' must be a list, is int"),
    ('gqa', 'testdev_balanced_questions.json', '"groups":{', '"groups":[1],"was":{',
     "'groups' must be an object, is list"),
    ('gqa', 'testdev_balanced_questions.json', '"global":"table"', '"global":["table"]',
     "'global' must be a text, is list"),
    ('vqav2', 'v2_mscoco_val2014_annotations.json', '"question_id":1000001',
     '"question_id":1000000', 'the id 1000000 occurs twice'),
    ('vqav2', 'v2_mscoco_val2014_annotations.json', '"answers":[{',
     '"answers":[{"answer":"x","answer_id":11},{', 'annotation 0: 11 answers; VQA has 10'),
    ('textvqa', 'TextVQA_0.5.1_val.json', '"answers":["nous les gosses",', '"answers":[',
     'question 0: 9 answers; TextVQA has 10'),
    ('textvqa', 'llava_textvqa_val_v051_ocr.jsonl', 'sign number 1?\\nReference OCR',
     'sign number 0?\\nReference OCR', 'line 2: the image 003a8ae2ef43b901 has other OCR'),
    ('vizwiz', 'val.json', '"answers":[{', '"answers":[],"was":[{',
     "question 0: field 'answers' is empty"),
    ('scienceqa', 'pid_splits.json', '"test":["3"', '"test":[[1],"3"',
     "field 'test' must hold ids as texts, has [1]"),
    ('scienceqa', 'problems.json', '"hint":"Figure: pond', '"hint":5,"was":"Figure: pond',
     "problem '3': field 'hint' must be a text, is int"),
    ('scienceqa', 'problems.json', '"image":"image.png"', '"image":1',
     "problem '3': field 'image' must be a text, is int"),
    ('seed', 'SEED-Bench.json', '"choice_a":"One"', '"choice_a":NaN',
     'question 0: a choice is no finite number'),
    ('seed', 'SEED-Bench.json', '"Scene Understanding":1', '"Scene Understanding":{}',
     "question_type: field 'Scene Understanding' must be a whole number, is dict"),
    ('mmbench', 'mmbench_dev_20230712.tsv', '\n200\t', '\n²\t', "index '²' is no whole number"),
    ('mmbench', 'mmbench_dev_20230712.tsv', '\n200\t', f'\n{"2" * 6000}\t',
     'is no whole number'),
    ('mme', 'MME_Benchmark_release_version/count/0001.txt', '\tNo\n', '\tNo\n\n\n#\n',
     'line 4: must be a question, a tab, and Yes or No'),
]


@pytest.mark.parametrize('key, name, old, new, message', DAMAGED)
def test_damaged_files_are_refused(key, name, old, new, message, tmp_path):
  path = copied(key, tmp_path) / name
  text = path.read_text(encoding='utf-8')
  assert old in text
  path.write_text(text.replace(old, new, 1), encoding='utf-8', errors='surrogateescape')
  with pytest.raises(DataError) as caught:
    catalogue.read(key, tmp_path)
  assert message in str(caught.value)
  assert '\n' not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize('key', KEYS)
def test_missing_files_are_named(key, tmp_path):
  with pytest.raises(FileNotFoundError, match=str(tmp_path)):
    catalogue.read(key, tmp_path)
  with pytest.raises(FileNotFoundError, match='nowhere'):
    catalogue.read(key, tmp_path / 'nowhere')
