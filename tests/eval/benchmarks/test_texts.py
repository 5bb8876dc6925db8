"""Parsers and normalisers, text by text, and prompts as LLaVA asks them."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from benchmark_files import DATA, cases, json_lines

from vlm_compress.data.errors import DataError
from vlm_compress.eval.benchmarks import (
  catalogue,
  gqa,
  mmbench,
  mme,
  pope,
  scienceqa,
  textvqa,
  vizwiz,
  vqa_text,
)


def differences(name, function, column):
  """Cases where the function says something else."""
  rows = cases(name)
  assert len(rows) > 5
  return [(row, said) for row in rows if (said := function(row)) != row[column]]


def test_vqa_normalisers():
  assert not differences('vqa_text', lambda c: vqa_text.official(c['text']), 'official')
  assert not differences('vqa_text', lambda c: vqa_text.m4c(c['text']), 'm4c')


def test_gqa_text():
  assert not differences('gqa_text', lambda c: gqa.parse(c['text']), 'prediction')


def test_pope_parse():
  assert not differences('pope_parse', lambda c: pope.parse(c['text']), 'answer')


def test_mme_parse():
  assert not differences('mme_parse', lambda c: mme.parse(c['text']), 'official')
  assert not differences('mme_parse', lambda c: mme.parse(c['text'], 'lmms-eval'),
                         'lmms_eval')


def test_scienceqa_parse():
  assert not differences(
      'sqa_parse', lambda c: scienceqa.parse(c['text'], c['n_choices']), 'index')


def test_mmbench_infer():
  assert not differences('mmbench_infer', lambda c: mmbench.infer(
      c['prediction'], list(c['choices'].values())), 'inferred')


# Benchmark -> LLaVA's question file.
LLAVA = {'gqa': 'llava_gqa_testdev_balanced.jsonl', 'vqav2': 'llava_questions.jsonl',
         'textvqa': textvqa.LLAVA_FILE, 'vizwiz': 'llava_val.jsonl',
         'pope': 'llava_pope_test.jsonl', 'mme': 'llava_mme.jsonl',
         'seed': 'llava-seed-bench.jsonl'}


@pytest.mark.parametrize('key', LLAVA)
def test_prompts_are_those_of_llavas_question_files(key):
  rows = json_lines(DATA / key / LLAVA[key])
  questions = catalogue.read(key, DATA).questions
  assert len(questions) == len(rows) > 50
  by_name = {(q.prompt, name): q for q in questions for name in (q.aliases or (q.id,))}
  for row in rows:
    question = by_name[row['text'], str(row['question_id'])]
    # LLaVA names images without the folder that its scripts are given.
    stem = row['image'].rpartition('.')[0] if key == 'mme' else row['image']
    assert question.image.rpartition(stem)[1], (question.image, row['image'])


def test_scienceqa_prompts():
  rows = json.loads((DATA / 'scienceqa/llava_test_CQM-A.json').read_text())
  questions = {q.id: q for q in catalogue.read('scienceqa', DATA).questions}
  assert set(questions) == {row['id'] for row in rows}
  for row in rows:
    question = questions[row['id']]
    text = row['conversations'][0]['value'].replace('<image>', '').strip()
    assert question.prompt == f'{text}\n{scienceqa.LETTER}'
    assert question.image == (f'images/test/{row["image"]}' if 'image' in row else None)
    assert question.answers == (row['conversations'][1]['value'],)


def test_mmbench_prompts_are_those_of_the_answer_file():
  questions = {q.id: q for q in catalogue.read('mmbench', DATA).questions}
  for row in json_lines(DATA / 'mmbench/answers.jsonl'):
    question = questions[str(row['question_id'])]
    assert question.prompt == f'{row["prompt"]}\n{mmbench.LETTER}'
    assert list(question.options) == row['options']


def test_mmbench_asks_a_chinese_file_in_chinese(tmp_path):
  shutil.copyfile(DATA / 'mmbench/mmbench_dev_20230712.tsv',
                  tmp_path / 'mmbench_dev_cn_20231003.tsv')
  question = catalogue.read('mmbench', tmp_path).questions[0]
  assert question.prompt.endswith(f'\n{mmbench.LETTER_CN}')


def test_textvqa_prompts_with_tokens_of_rosetta_and_without(tmp_path):
  shutil.copyfile(DATA / 'textvqa' / textvqa.FILE, tmp_path / textvqa.FILE)
  bare = textvqa.read(tmp_path)
  assert bare.notes[0].startswith('questions are not asked with OCR tokens here')
  assert bare.questions[0].prompt == (
      'What is written on sign number 0?\nAnswer the question using a single word '
      'or phrase.')
  rows = [{'image_id': q.aliases[0], 'ocr_tokens': ['STOP', 'a, b'] if i else []}
          for i, q in enumerate(bare.questions[::2])]
  (tmp_path / textvqa.OCR_FILE).write_text(json.dumps({'data': rows}))
  first, _, third = textvqa.read(tmp_path).questions[:3]
  assert first.prompt == ('What is written on sign number 0?\nReference OCR token: \n'
                          'Answer the question using a single word or phrase.')
  assert third.prompt.split('\n')[1] == 'Reference OCR token: STOP, a, b'
  assert textvqa.read(tmp_path, ocr=False).questions == bare.questions
  (tmp_path / textvqa.OCR_FILE).write_text(json.dumps({'data': rows[1:]}))
  with pytest.raises(DataError, match='question 0: image 003a8ae2ef43b901 has no OCR'):
    textvqa.read(tmp_path)


def test_vizwiz_test_has_no_answers_and_says_so():
  questions = vizwiz.read(DATA, 'test')
  assert questions.questions[0].prompt == (
      f'What is this, number 0?\n{vizwiz.UNANSWERABLE}\n{vizwiz.SHORT_ANSWER}')
  with pytest.raises(DataError, match='not public.*--submission'):
    vizwiz.score(questions, {questions.questions[0].id: 'x'})


def test_vizwiz_compares_the_official_form_with_humans_as_stored():
  questions = vizwiz.read(DATA).take(['VizWiz_val_00000000.jpg'])
  question = dataclasses.replace(questions.questions[0], answers=("man's",) * 10)
  one = dataclasses.replace(questions, questions=(question,))
  assert vizwiz.score(one, {question.id: "The man's"}).value == 100
  assert vizwiz.score(one, {question.id: "The man's"}, rule='both-sides').value == 100
  stored = dataclasses.replace(one, questions=(
      dataclasses.replace(question, answers=('Red.',) * 10),))
  assert vizwiz.score(stored, {question.id: 'Red.'}).value == 0
  assert vizwiz.score(stored, {question.id: 'Red.'}, rule='both-sides').value == 100


def test_mmbench_letter_counts_within_the_last_words_only():
  options = ['a long option text', 'another long option text']
  assert mmbench.infer('B is right you see', options) is None
  assert mmbench.infer('so B is right yes', options) == 'B'
