"""Times of a sweep: who is read when, and what is made of the seconds."""

from __future__ import annotations

import dataclasses
import pathlib
import types

import core_helpers as helpers
import numpy as np
import pytest
import small_benchmark

from vlm_compress.asking import Checkpoint
from vlm_compress.batches import Request, answer_batches, ready_batch
from vlm_compress.cli import sweep_times
from vlm_compress.cli.benchmark_run import Job, read
from vlm_compress.config import ConfigError
from vlm_compress.data.errors import DataError
from vlm_compress.eval.benchmarks.question import Question
from vlm_compress.eval.methods import method_config


@pytest.fixture(scope='module')
def asked(tmp_path_factory):
  """A model and the questions it is timed with."""
  path = small_benchmark.write_gqa(tmp_path_factory.mktemp('times'))
  small_benchmark.write_model(path / 'voco', helpers.voco_config())
  return Checkpoint(path / 'voco').vlm, read('gqa', path, Job())[0]


def test_ratios_are_of_a_round(asked, monkeypatch):
  vlm, questions = asked
  read, seconds = [], {'full': [2.0, 8.0, 4.0], 'voco': [4.0, 4.0, 2.0]}

  def ready_batch(vlm, requests, method):
    assert len({id(r.images[0]) for r in requests}) == len(requests) == 2
    assert [r.row_id for r in requests] == [0, 1]
    return lambda: read.append(method) or types.SimpleNamespace(logits=0.0)

  def alternate(runs, repeats):
    assert read == ['voco', 'full'] and repeats == 3  # all are compiled before
    for name, run in runs.items():  # a name's run is its own
      run()
      assert read[-1] == name
    return seconds
  monkeypatch.setattr(sweep_times, 'ready_batch', ready_batch)
  monkeypatch.setattr(sweep_times, 'alternate', alternate)
  lines = [sweep_times.Line(name, vlm, name, '') for name in ('voco', 'full')]
  times = sweep_times.measure(lines, 'full', questions, 2, 3, lambda line: None)
  assert times['full'] == {'seconds': 2.0, 'ratio': 1.0, 'rounds': [1.0, 4.0, 2.0],
                           'questions': 2}
  assert times['voco']['seconds'] == 2.0  # of 2, 2, 1
  assert times['voco']['ratio'] == 0.5  # of 2, 1/2, 1/2; not the medians' ratio


@pytest.mark.parametrize('name, budget', [
    ('full', None), ('voco', 2), ('upper_bound', 2), ('random', 4), ('avg_pool', 4)])
def test_what_is_timed_is_what_is_asked(asked, name, budget):
  """The logits of a ready batch, by each question's own."""
  vlm, questions = asked
  method = method_config(name, vlm.config, budget)
  other = dataclasses.replace(vlm, config=method.config)
  some = sweep_times.one_batch(questions, vlm, 3)
  requests = [Request(q.prompt, list(sweep_times.pictures(questions, q, 1)), i)
              for i, q in enumerate(some)]
  got = ready_batch(other, requests, method.runs_as)().logits
  for i, request in enumerate(requests):
    alone = ready_batch(other, [request], method.runs_as)().logits
    np.testing.assert_allclose(got[i], alone[0], rtol=1e-5, atol=5e-5)
    (_, (answer,)), = answer_batches(other, [request], method=method.runs_as, batch_size=1,
                                     max_new_tokens=1)
    assert answer.token_ids in ([int(got[i].argmax())], [])
  long = Request('what is this is this what is a dog is it blue ' * 12, requests[0].images)
  with pytest.raises(ConfigError, match='rows of several shapes'):
    ready_batch(other, [*requests, long], method.runs_as)


def test_a_batch_has_different_pictures_and_one_length(asked):
  vlm, questions = asked
  bare = Question('x', 'what is this', 'what is this', None, answers=('yes',))
  mixed = dataclasses.replace(questions, questions=(bare, *questions.questions))
  some = sweep_times.one_batch(mixed, vlm, 3)
  assert len({q.image for q in some}) == 3 and None not in {q.image for q in some}
  assert len({len(q.prompt.split()) for q in some}) == 1
  assert len({len(q.prompt.split()) for q in mixed.questions}) > 1
  with pytest.raises(ConfigError, match='gqa: only [0-9]+ questions about different'):
    sweep_times.one_batch(mixed, vlm, 7)


def test_times_of_other_weights_or_settings_are_not_taken(asked, tmp_path):
  line = lambda reads: sweep_times.Line('a', asked[0], 'full', reads)
  keys = {sweep_times.key([line(reads)], size, repeats)
          for reads, size, repeats in (('w', 2, 3), ('v', 2, 3), ('w', 4, 3), ('w', 2, 5))}
  assert len(keys) == 4
  known = sweep_times.key([line('w')], 2, 3)
  assert sweep_times.read(tmp_path, known) is None
  sweep_times.write(tmp_path, known, {'a': {'seconds': 1.0}})
  assert sweep_times.read(tmp_path, known) == {'a': {'seconds': 1.0}}
  assert sweep_times.read(tmp_path, 'other') is None
  (pathlib.Path(tmp_path) / sweep_times.TIMES).write_text('{"lines": ')
  with pytest.raises(DataError, match='times.json is damaged'):
    sweep_times.read(tmp_path, known)
