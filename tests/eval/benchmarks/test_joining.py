"""Answer files of other tools give the scores of LLaVA's files; files that
belong elsewhere, or answer twice, are an error with the line.
"""

from __future__ import annotations

import csv
import json

import pytest
from benchmark_files import ANSWERS, DATA, json_lines, predictions, scored, write_lines

from vlm_compress.data.errors import DataError
from vlm_compress.eval.benchmarks import answers, catalogue, joining, sheets

SHORT = 'Answer the question using a single word or phrase.'


def join(path, questions):
  return joining.join(answers.read(path), questions)


def lmms_rows(questions, given, metric):
  """Rows as lmms-eval's --log_samples writes them; `metric` gives what the
  task's metrics keep of a question.
  """
  return [{'doc_id': i, 'target': ''.join(q.answers[:1]), 'filtered_resps': given[q.id],
           'doc_hash': 'x', 'input': f'{q.text.capitalize()}\n{SHORT}', **metric(q)}
          for i, q in enumerate(questions) if q.id in given]


# Benchmark -> what its task's metrics keep in lmms-eval.
LMMS = {
    'gqa': lambda q: {'exact_match': 1.0},
    'vqav2': lambda q: {'submission': {'question_id': int(q.id), 'answer': 'x'}},
    'textvqa': lambda q: {'submission': {'question_id': int(q.id), 'answer': 'x'}},
    'vizwiz': lambda q: {'submission': {'image': q.id, 'answer': 'x'}},
    'mme': lambda q: {'mme_perception_score': {
        'question_id': q.other_ids[0], 'category': q.groups['task'], 'score': 1}},
    'seed': lambda q: {'seed_all': {'pred': 'A', 'question_id': q.aliases[0]}},
    'mmbench': lambda q: {'gpt_eval_score': {'index': int(q.id), 'prediction': 'A'}},
    'activitynet_qa': lambda q: {'gpt_eval_score': {'question_id': q.id}},
}


@pytest.mark.parametrize('key', LMMS)
def test_lmms_eval_samples(key, tmp_path):
  questions, given, _ = scored(key)
  path = write_lines(tmp_path / f'20260101_samples_{key}.jsonl',
                     lmms_rows(questions.questions, given, LMMS[key]))
  assert join(path, questions) == given


def test_lmms_eval_nests_its_answers_in_older_versions(tmp_path):
  questions, given, _ = scored('vizwiz')
  rows = lmms_rows(questions.questions, given, LMMS['vizwiz'])
  rows = [{**row, 'filtered_resps': [[row['filtered_resps']]]} for row in rows]
  assert join(write_lines(tmp_path / 'a.jsonl', rows), questions) == given


def test_lmms_eval_scienceqa_counts_problems_with_a_picture(tmp_path):
  questions, given, scores = scored('scienceqa')
  pictured = [q for q in questions.questions if q.image]
  rows = lmms_rows(pictured, given, lambda q: {'exact_match': 1.0})
  assert join(write_lines(tmp_path / 'a.jsonl', rows), questions) == {
      q.id: given[q.id] for q in pictured if q.id in given}


def test_lmms_eval_pope_as_three_tasks_and_as_one(tmp_path):
  questions, given, _ = scored('pope')
  metric = lambda q: {'pope_accuracy': {'question_id': q.other_ids[0], 'score': 1}}
  rows = []
  for task, category in (('pope_pop', 'popular'), ('pope_random', 'random'),
                         ('pope_adv', 'adversarial')):
    mine = [q for q in questions.questions if q.groups['category'] == category]
    rows += answers.read(write_lines(tmp_path / f'x_samples_{task}.jsonl',
                                     lmms_rows(mine, given, metric)))
  assert joining.join(rows, questions) == given
  whole = write_lines(tmp_path / 'x_samples_pope.jsonl',
                      lmms_rows(questions.questions, given, metric))
  # Without categories only the questions decide: those that two categories
  # share are taken in turn.
  assert join(whole, questions) == given


def test_lmms_eval_pope_task_with_questions_that_all_categories_have(tmp_path):
  questions, given, _ = scored('pope')
  same = {(q.other_ids, q.image, q.text) for q in questions.questions
          if q.groups['category'] == 'adversarial'}
  mine = [q for q in questions.questions if q.groups['category'] == 'popular'
          and (q.other_ids, q.image, q.text) in same]
  assert mine
  metric = lambda q: {'pope_accuracy': {'question_id': q.other_ids[0], 'score': 1}}
  path = write_lines(tmp_path / 'x_samples_pope_pop.jsonl', lmms_rows(mine, given, metric))
  assert join(path, questions) == {q.id: given[q.id] for q in mine}


def test_a_misspelt_word_of_one_pope_release_is_the_same_question(tmp_path):
  questions, given, _ = scored('pope')
  rows = [{**row, 'prompt': row['prompt'].replace('image', 'imange')}
          for row in json_lines(ANSWERS['pope'])]
  assert join(write_lines(tmp_path / 'a.jsonl', rows), questions) == given


def vlmevalkit_rows(questions, given):
  """Rows as VLMEvalKit's tables have them."""
  return [{'index': q.id if q.picture else str(i), 'question': q.text,
           'category': q.groups.get('category', ''),
           **({'image_path': q.image} if q.image else {}),
           'prediction': given[q.id]}
          for i, q in enumerate(questions) if q.id in given]


def write_table(path, rows):
  """The rows in the format of the name."""
  if path.suffix == '.json':
    path.write_text(json.dumps(rows))
  elif path.suffix == '.xlsx':
    sheets.write(path, [list(rows[0]), *(list(row.values()) for row in rows)])
  else:
    with open(path, 'w', newline='', encoding='utf-8') as stream:
      table = csv.DictWriter(stream, rows[0], quoting=csv.QUOTE_ALL,
                             delimiter=',' if path.suffix == '.csv' else '\t')
      table.writeheader()
      table.writerows(rows)
  return path


@pytest.mark.parametrize('suffix', ['.tsv', '.csv', '.json', '.xlsx'])
@pytest.mark.parametrize('key', ['mmbench', 'gqa', 'vizwiz', 'pope'])
def test_vlmevalkit_tables(key, suffix, tmp_path):
  questions, given, _ = scored(key)
  path = write_table(tmp_path / f'model_{key}{suffix}',
                     vlmevalkit_rows(questions.questions, given))
  assert join(path, questions) == given


def test_vlmevalkit_mme_asks_its_own_way(tmp_path):
  questions, given, _ = scored('mme')
  rows = [{**row, 'category': q.groups['task'],
           'question': f'{row["question"]} Please answer yes or no.'}
          for row, q in zip(vlmevalkit_rows(questions.questions, given),
                            questions.questions, strict=True)]
  assert join(write_table(tmp_path / 'a.tsv', rows), questions) == given


def test_vlmevalkit_pope_has_one_row_for_a_question_of_several_categories(tmp_path):
  questions, given, _ = scored('pope')
  once = {(q.image, q.text, q.groups['category']): q for q in questions.questions}
  given = {q.id: given[q.id] for q in once.values()}
  questions = questions.take(given)
  rows = {}
  for q, row in zip(questions.questions, vlmevalkit_rows(questions.questions, given),
                    strict=True):
    same = rows.setdefault((q.image, q.text, given[q.id]), row)
    if same is not row:
      same['category'] += f',{row["category"]}'
  assert len(rows) < len(given)
  path = write_table(tmp_path / 'a.tsv', list(rows.values()))
  assert join(path, questions) == given


def test_ours_and_lists_of_rows(tmp_path):
  questions, given, _ = scored('gqa')
  rows = [{'question_id': key, 'prediction': text} for key, text in given.items()]
  assert join(write_lines(tmp_path / 'a.jsonl', rows), questions) == given
  official = [{'questionId': key, 'prediction': text} for key, text in given.items()]
  (tmp_path / 'a.json').write_text(json.dumps(official))
  assert join(tmp_path / 'a.json', questions) == given


def test_voco_prompts_without_line_breaks_are_recognised(tmp_path):
  questions, given, _ = scored('vizwiz')
  rows = [{**row, 'prompt': row['prompt'].replace('\n', '')}
          for row in json_lines(ANSWERS['vizwiz'])]
  assert join(write_lines(tmp_path / 'a.jsonl', rows), questions) == given


def test_order_of_answers_does_not_matter(tmp_path):
  for key in ('textvqa', 'mme', 'mmbench', 'pope'):
    questions, given, scores = scored(key)
    back = write_lines(tmp_path / f'{key}.jsonl', json_lines(ANSWERS[key])[::-1])
    again = join(back, questions)
    assert again == given
    assert catalogue.BENCHMARKS[key].score(questions, again) == scores


@pytest.mark.parametrize('key', catalogue.BENCHMARKS)
def test_answers_of_another_benchmark_are_an_error(key):
  questions = catalogue.read(key, DATA)
  for other, path in ANSWERS.items():
    if other != key and {other, key} != {'msvd_qa', 'msrvtt_qa'}:
      with pytest.raises(DataError, match=r'answers.jsonl|pred.jsonl: line 1: '):
        join(path, questions)


def test_an_id_that_exists_with_another_question_is_an_error(tmp_path):
  questions, given, _ = scored('vizwiz')
  rows = json_lines(ANSWERS['vizwiz'])
  rows[7]['prompt'] = 'Is this another benchmark?\n' + SHORT
  path = write_lines(tmp_path / 'a.jsonl', rows)
  with pytest.raises(DataError, match=r"a.jsonl: line 8: asks 'Is this another "
                     r"benchmark.*id '7'.*is 'What is this, number 7\?'"):
    join(path, questions)


@pytest.mark.parametrize('key', ['gqa', 'mme', 'textvqa', 'pope', 'mmbench'])
def test_a_question_answered_twice_is_an_error_with_both_lines(key, tmp_path):
  questions = catalogue.read(key, DATA)
  rows = json_lines(ANSWERS[key])
  path = write_lines(tmp_path / 'a.jsonl', [*rows, rows[2]])
  with pytest.raises(DataError, match=rf'line {len(rows) + 1}: answers question .* '
                     r'again; the first answer is in .*line 3$'):
    join(path, questions)


def test_answers_that_the_official_scorer_leaves_out_are_fine(tmp_path):
  questions, given, _ = scored('gqa')
  extra = sorted(questions.ignored)[0]
  path = write_lines(tmp_path / 'a.jsonl', [
      {'question_id': extra, 'text': 'yes'},
      *({'question_id': key, 'text': text} for key, text in given.items())])
  assert join(path, questions) == given


@pytest.mark.parametrize('text, message', [
    ('{"question_id": 1, "text": "a"', 'line 1, column 31: malformed JSON'),
    ('[1]', 'line 1: holds a JSON list'),
    ('{"question_id": 1, "text": 3}', "line 1: field 'text' must be a text, is int"),
    ('{"question_id": 1}', 'line 1: has none of the fields text, prediction, pred'),
    ('{"text": "a"}', 'line 1: does not say which question it answers'),
    ('{"question_id": 1, "question_id": 2}', "line 1: the key 'question_id' occurs twice"),
    ('{"doc_id": "1", "filtered_resps": "a"}', "'doc_id' must be a whole number"),
    ('{"doc_id": 1, "filtered_resps": [[1, 2]]}', 'likelihood tasks cannot be scored'),
    ('', 'holds no answer'),
])
def test_malformed_rows_are_named(text, message, tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text(text)
  with pytest.raises(DataError) as caught:
    answers.read(path)
  assert str(caught.value).startswith(str(path)) and message in str(caught.value)


def test_files_of_unknown_kinds_and_missing_ones(tmp_path):
  with pytest.raises(DataError, match='answer files end in .jsonl, .json'):
    answers.read(tmp_path / 'a.txt')
  with pytest.raises(FileNotFoundError, match='a.tsv does not exist'):
    answers.read(tmp_path / 'a.tsv')
  (tmp_path / 'a.json').write_text('{"index": {"0": 1}}')
  with pytest.raises(DataError, match='a list of rows'):
    answers.read(tmp_path / 'a.json')


def test_fixture_answers_are_complete_where_that_is_meant():
  assert {key: len(catalogue.read(key, DATA).questions)
          - len(predictions(key, catalogue.read(key, DATA)))
          for key in catalogue.BENCHMARKS} == {
              **dict.fromkeys(catalogue.BENCHMARKS, 0), 'vqav2': 5, 'scienceqa': 4,
              'mmbench': 2, 'seed': 3}
