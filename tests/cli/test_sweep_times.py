"""Times of a sweep: who is read when, and what is made of the seconds."""

from __future__ import annotations

import pathlib

import core_helpers as helpers
import pytest
import small_benchmark

from vlm_compress.asking import Checkpoint
from vlm_compress.cli import sweep_times
from vlm_compress.cli.benchmark_run import Job, read
from vlm_compress.config import ConfigError
from vlm_compress.data.errors import DataError


@pytest.fixture(scope='module')
def asked(tmp_path_factory):
  """A model and the questions it is timed with."""
  path = small_benchmark.write_gqa(tmp_path_factory.mktemp('times'))
  small_benchmark.write_model(path / 'voco', helpers.voco_config())
  return Checkpoint(path / 'voco').vlm, read('gqa', path, Job())[0]


def test_lines_take_turns_and_ratios_are_of_a_round(asked, monkeypatch):
  vlm, questions = asked
  order, now = [], [0.0]
  # seconds of a reading, by line and round: the first compiles
  seconds = {'full': [50, 2, 8, 4], 'voco': [90, 4, 4, 2]}

  def answer_batches(vlm, requests, *, method, batch_size, max_new_tokens):
    assert (batch_size, max_new_tokens, len(requests)) == (2, 1, 2)
    now[0] += seconds[method][order.count(method)]
    order.append(method)
    yield [0, 1], []
  monkeypatch.setattr(sweep_times, 'answer_batches', answer_batches)
  lines = [sweep_times.Line(name, vlm, name, '') for name in ('voco', 'full')]
  times = sweep_times.measure(lines, 'full', questions, 2, 3, lambda line: None,
                              lambda: now[0])
  assert order == ['voco', 'full'] * 4
  assert times['full'] == {'seconds': 2.0, 'ratio': 1.0, 'rounds': [1.0, 4.0, 2.0],
                           'questions': 2}
  assert times['voco']['seconds'] == 2.0  # of 2, 2, 1
  assert times['voco']['ratio'] == 0.5  # of 2, 1/2, 1/2; not the medians' ratio


def test_a_batch_has_different_pictures_and_one_length(asked):
  vlm, questions = asked
  some = sweep_times.one_batch(questions, vlm, 3)
  assert len({q.image for q in some}) == 3
  with pytest.raises(ConfigError, match='gqa: only [0-9]+ questions about different'):
    sweep_times.one_batch(questions, vlm, 99)


def test_times_of_other_weights_or_settings_are_not_taken(asked, tmp_path):
  line = lambda reads: sweep_times.Line('a', asked[0], 'full', reads)
  keys = {sweep_times.key([line(reads)], size, repeats)
          for reads, size, repeats in (('w', 2, 3), ('v', 2, 3), ('w', 4, 3), ('w', 2, 5))}
  assert len(keys) == 4
  known = sweep_times.key([line('w')], 2, 3)
  assert sweep_times.read(tmp_path, known) is None
  sweep_times.write(tmp_path, known, {'a': {'seconds': 1.0}})
  assert sweep_times.read(tmp_path, known) == {'a': {'seconds': 1.0}}
  assert sweep_times.read(tmp_path) == {'a': {'seconds': 1.0}}
  assert sweep_times.read(tmp_path, 'other') is None
  (pathlib.Path(tmp_path) / sweep_times.TIMES).write_text('{"lines": ')
  with pytest.raises(DataError, match='times.json is damaged'):
    sweep_times.read(tmp_path, known)
