"""A benchmark's questions: the same answers in any batch, on any device, after any
interruption.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time

import core_helpers as helpers
import jax
import pytest
import small_benchmark

from vlm_compress import api, asking
from vlm_compress.asking import Checkpoint, Settings, ask_shard
from vlm_compress.data.errors import DataError
from vlm_compress.eval import runs
from vlm_compress.eval.answer_log import ShardLog, in_shards
from vlm_compress.eval.methods import method_config
from vlm_compress.vlm import prefill, prepare

TIMES = ('latency_seconds', 'latency_rows', 'compiled')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = small_benchmark.write_gqa(tmp_path_factory.mktemp('asked'))
  small_benchmark.write_model(path / 'atp', helpers.atp_config(sap_lambda=16.0))
  small_benchmark.write_model(path / 'voco', helpers.voco_config())
  return path


def answered(folder, out, model, batch_size, name='', budget=None, devices=1, seed=0):
  """Rows of all questions, without times."""
  checkpoint = model if isinstance(model, Checkpoint) else Checkpoint(
      folder / model, devices=jax.devices()[:devices])
  questions = runs.read_questions('gqa', folder)
  method = method_config(name or model, checkpoint.config, budget)
  rows, shards = {}, in_shards(questions.questions, 2)
  out.mkdir()
  for i, shard in enumerate(shards):
    log = ShardLog(out, i, len(shards), shard)
    ask_shard(checkpoint, method, questions, log, Settings(batch_size, 4, seed))
    rows |= ShardLog(out, i, len(shards), shard).rows
  for row in rows.values():
    assert row['latency_seconds'] > 0 and row['latency_rows'] >= 1
  return {key: {k: v for k, v in row.items() if k not in TIMES}
          for key, row in rows.items()}, checkpoint, questions


@pytest.mark.parametrize('model', [
    pytest.param('atp', marks=pytest.mark.slow), 'voco'])
def test_any_batch_and_any_number_of_devices(folder, tmp_path, model):
  one, checkpoint, questions = answered(folder, tmp_path / 'one', model, 1)
  assert len(one) == len(questions.questions) == 18
  many, spread, _ = answered(folder, tmp_path / 'many', model, 3,
                             devices=4 if model == 'voco' else 2)
  assert many == one
  for replica in spread.replicas:  # each computes where it is
    with replica.here():
      row = prepare(replica.vlm, 'what is this', [], 'full', None)
      assert prefill(replica.vlm, row, 1).logits.devices() == {replica.device}
  assert len({r.device for r in spread.replicas}) == (4 if model == 'voco' else 2)
  vlm = api.load(folder / model)
  for q in questions.questions[::9]:
    alone = api.generate(vlm, q.prompt, [questions.image_path(q)], max_new_tokens=4)
    assert (one[q.id]['prediction'], one[q.id]['answer_tokens'], one[q.id]['ended']) == (
        alone.text, len(alone.token_ids), alone.ended)
    if model == 'atp':
      assert one[q.id]['visual_tokens'] == alone.visual_tokens.tolist()
  assert len({row['prediction'] for row in one.values()}) > 2
  if model == 'atp':
    assert all(row['kept'] == row['visual_tokens'][1:] for row in one.values())
    assert len({tuple(row['kept']) for row in one.values()}) > 2
  else:
    assert all(row['visual_tokens'] == [2] * 4 for row in one.values())


def test_random_tokens_depend_on_seed_and_question_only(folder, tmp_path):
  draw = lambda name, size, seed: answered(
      folder, tmp_path / name, shared, size, 'random', 4, seed=seed)[0]
  shared = Checkpoint(folder / 'voco', devices=jax.devices()[:1])
  one, other = draw('one', 1, 0), draw('other', 5, 0)
  assert one == other and all(row['kept'] == [4] for row in one.values())
  again = draw('again', 5, 1)
  assert {k: r['prediction'] for k, r in again.items()} != {
      k: r['prediction'] for k, r in one.items()}


def test_stopped_and_started_again(folder, tmp_path, monkeypatch):
  whole, checkpoint, questions = answered(folder, tmp_path / 'whole', 'voco', 2)
  method = method_config('voco', checkpoint.config)
  log = ShardLog(tmp_path, 0, 1, questions.questions)
  add, asked, count = ShardLog.add, [], 0

  def stop(self, rows):
    nonlocal count
    count += 1
    if count == 4:
      raise KeyboardInterrupt  # with answers that did not reach the disk
    add(self, rows)
  monkeypatch.setattr(ShardLog, 'add', stop)
  with pytest.raises(KeyboardInterrupt):
    ask_shard(checkpoint, method, questions, log, Settings(2, 4))
  monkeypatch.setattr(ShardLog, 'add', add)
  with open(log.journal, 'ab') as stream:
    stream.write(b'{"question_id": "torn')
  before = [json.loads(line) for line in log.journal.read_text().splitlines()[:-1]]
  assert len(before) == 6
  answer = asking._ask
  monkeypatch.setattr(asking, '_ask', lambda vlm, m, q, window, *more: asked.extend(
      p.question.id for p in window) or answer(vlm, m, q, window, *more))
  log = ShardLog(tmp_path, 0, 1, questions.questions)
  done: list[int] = []
  ask_shard(checkpoint, method, questions, log, Settings(2, 4), done.append)
  assert sum(done) == len(asked) == 12
  assert not set(asked) & {row['question_id'] for row in before}
  rows = ShardLog(tmp_path, 0, 1, questions.questions).rows
  assert all(rows[row['question_id']] == row for row in before)
  assert {k: r['prediction'] for k, r in rows.items()} == {
      k: r['prediction'] for k, r in whole.items()}


def test_pictures_that_are_none_name_their_question(folder, tmp_path):
  bad = small_benchmark.write_gqa(tmp_path)
  (bad / 'gqa/images/3.jpg').write_bytes(b'no picture')
  checkpoint = Checkpoint(folder / 'voco', devices=jax.devices()[:2])
  questions = runs.read_questions('gqa', bad)
  log = ShardLog(tmp_path, 0, 1, questions.questions)
  with pytest.raises(DataError, match="question '3[012]'.*3.jpg"):
    ask_shard(checkpoint, method_config('voco', checkpoint.config), questions, log,
              Settings(4, 4))
  (bad / 'gqa/images/3.jpg').unlink()
  gone = asking.check_pictures(questions)
  assert {q.id for q in gone} == {'30', '31'}
  assert '2 of 18 questions ask about 1 picture(s)' in asking.missing_message(
      questions, gone)


def test_a_word_that_is_unknown_names_its_question(folder, tmp_path):
  checkpoint = Checkpoint(folder / 'voco', devices=jax.devices()[:1])
  questions = runs.read_questions('gqa', folder)
  odd = dataclasses.replace(questions.questions[2], prompt='what is zebra')
  log = ShardLog(tmp_path, 0, 1, [odd])
  with pytest.raises(DataError, match=f"question '{odd.id}'.*zebra"):
    ask_shard(checkpoint, method_config('voco', checkpoint.config), questions, log,
              Settings(4, 4))


@pytest.mark.parametrize('replicas', [1, 2])
def test_what_was_answered_when_another_replica_fails_is_kept(replicas):
  """Window 1 fails while window 0 is being answered; windows 4 to 9 are not begun."""
  failed, asked, kept = threading.Event(), [], []

  def ask(replica, window):
    asked.append(window)
    if window == 1:
      failed.set()
      raise DataError('no picture')
    if replicas == 2 and window == 0:
      failed.wait()
      time.sleep(0.2)
    return [{'window': window}]
  with pytest.raises(DataError, match='no picture'):
    for rows in asking._dealt(['replica'] * replicas, range(10), ask):
      kept += [row['window'] for row in rows]
  assert 0 in kept and set(kept) == set(asked) - {1}
  assert len(asked) < 10


def test_programs_of_the_last_few_methods_are_kept(folder):
  checkpoint = Checkpoint(folder / 'voco', devices=jax.devices()[:1])
  replica, = checkpoint.replicas
  configs = [method_config('random', checkpoint.config, n).config for n in range(1, 7)]
  first = replica.running(configs[0])
  for config in configs[1:4]:
    replica.running(config)
  assert replica.running(configs[0]) is first  # and is now the last one used
  second = replica.running(configs[1])
  for config in configs[4:]:
    replica.running(config)
  assert replica.running(configs[0]) is first and replica.running(configs[1]) is second
  assert replica.running(configs[2]) is not None and len(replica._vlms) == 4
