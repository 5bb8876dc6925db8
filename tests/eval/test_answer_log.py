"""Questions in shards, and what a killed process leaves of the answers."""

from __future__ import annotations

import dataclasses
import json

import pytest

from vlm_compress.config import ConfigError
from vlm_compress.data.errors import DataError
from vlm_compress.eval.answer_log import ShardLog, in_shards, read_rows, unit_of
from vlm_compress.eval.benchmarks.question import Question


def asked(count: int = 12) -> list[Question]:
  """Two questions a picture, and one pair that is scored together."""
  some = [Question(str(i), 'what', 'what', f'{i // 2}.jpg') for i in range(count)]
  return [*some, *(dataclasses.replace(q, id=f'u{q.id}', unit='pair') for q in some[:5:4])]


def row(question: Question, **fields) -> dict:
  return {'question_id': question.id, 'prediction': 'a cät\n', 'answer_tokens': 1,
          'ended': 'eos', 'visual_tokens': [4, 2], 'text_tokens': 3, 'prompt_tokens': 2,
          'latency_seconds': 0.1, 'latency_rows': 2, 'compiled': False, 'shard': 0, **fields}


def log_of(path, questions) -> ShardLog:
  return ShardLog(path, 3, 16, questions)


@pytest.mark.parametrize('count', [1, 3, 5, 100])
def test_units_stay_together_and_nothing_is_lost(count):
  questions = asked()
  shards = in_shards(questions, count)
  assert sorted(q.id for s in shards for q in s) == sorted(q.id for q in questions)
  assert len(shards) == min(count, 7) and all(shards)  # six pictures and a pair
  home = {}
  for i, shard in enumerate(shards):
    for q in shard:
      assert home.setdefault(unit_of(q), i) == i
    assert shard == sorted(shard, key=questions.index)


def test_a_journal_becomes_the_shard(tmp_path):
  questions = asked(4)[:4]
  log = log_of(tmp_path, questions)
  with log.writing():
    log.add([row(questions[2]), row(questions[0])])
  again = log_of(tmp_path, questions)
  assert [q.id for q in again.open_questions] == ['1', '3'] and not again.finished
  assert again.rows['2']['prediction'] == 'a cät\n' and not again.note
  with again.writing():
    with pytest.raises(ConfigError, match='2 questions have no answer'):
      again.finish()
    again.add([row(questions[3]), row(questions[1])])
    again.finish()
  done = log_of(tmp_path, questions)
  assert done.finished and list(done.rows) == ['0', '1', '2', '3']
  assert [p.name for p in tmp_path.iterdir()] == ['answers-00003-of-00016.jsonl']


@pytest.mark.parametrize('cut', [1, 20, 300])
def test_a_torn_line_is_asked_again(tmp_path, cut):
  questions = asked(4)[:4]
  log = log_of(tmp_path, questions)
  with log.writing():
    log.add([row(q) for q in questions[:3]])
  log.journal.write_bytes(log.journal.read_bytes()[:-cut])
  again = log_of(tmp_path, questions)
  left = {1: 2, 20: 2, 300: 1}[cut]
  assert len(again.rows) == left and 'is torn' in again.note
  assert f'line {left + 1} ' in again.note
  with again.writing():
    again.add([row(q) for q in again.open_questions])
    again.finish()
  assert [json.loads(x)['question_id'] for x in again.path.read_text().splitlines()] == [
      '0', '1', '2', '3']


@pytest.mark.parametrize('line, message', [
    ('{"question_id": ', 'line 2 is no JSON'), ('[1]', 'line 2 is no answer'),
    ('{"question_id": "1"}', 'line 2 is no answer'),
    (json.dumps(row(asked(2)[0])), "line 2: answers question '0' again"),
    (json.dumps(row(asked(2)[0], question_id='x')), "line 2: question 'x' is not of this")])
def test_lines_that_cannot_be_are_named(tmp_path, line, message):
  questions = asked(2)[:2]
  log = log_of(tmp_path, questions)
  log.journal.write_text(f'{json.dumps(row(questions[0]))}\n{line}\n')
  with pytest.raises(DataError, match=f'partial.jsonl: {message}'):
    log_of(tmp_path, questions)


def test_a_finished_file_is_whole(tmp_path):
  questions = asked(2)[:2]
  path = log_of(tmp_path, questions).path
  path.write_text(json.dumps(row(questions[0])) + '\n')
  with pytest.raises(DataError, match='1 of 2 answers are missing'):
    log_of(tmp_path, questions)
  path.write_text(path.read_text() + json.dumps(row(questions[1])))
  with pytest.raises(DataError, match='the last line is torn'):
    read_rows(path)


def test_two_processes_do_not_write_one_shard(tmp_path):
  questions = asked(2)[:2]
  log = log_of(tmp_path, questions)
  with log.writing(), pytest.raises(ConfigError, match='another process answers'):
    with log_of(tmp_path, questions).writing():
      pass


def test_what_another_one_wrote_meanwhile_is_kept(tmp_path):
  questions = asked(3)[:3]
  first, second = (log_of(tmp_path, questions) for _ in range(2))
  with first.writing():
    first.add([row(q) for q in questions[:2]])
  with second.writing():
    assert second.open_questions == [questions[2]]
    second.add([row(questions[2])])
  third, fourth = (log_of(tmp_path, questions) for _ in range(2))
  with third.writing():
    third.finish()
  with pytest.raises(ConfigError, match='has finished this shard'), fourth.writing():
    pass
  assert list(log_of(tmp_path, questions).rows) == ['0', '1', '2']
