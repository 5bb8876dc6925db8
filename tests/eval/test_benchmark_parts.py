"""The benchmark's small parts: turns, what is waited for, steps, and goals."""

from __future__ import annotations

import itertools
import types

import jax
import numpy as np
import optax
import pytest

from vlm_compress.eval.benchmark import goals, inference, timing, training


def test_cases_take_turns(monkeypatch):
  clock = itertools.count()
  monkeypatch.setattr(timing.time, 'perf_counter', lambda: float(next(clock)))
  ran, rests = [], []
  monkeypatch.setattr(timing.time, 'sleep', rests.append)
  cases = {name: lambda name=name: ran.append(name) for name in 'abc'}
  got = timing.alternate(cases, repeats=11, warmup=1,
                         pause=lambda name: 0.5 * (name == 'b'))
  rounds = [''.join(ran[i:i + 3]) for i in range(0, len(ran), 3)]
  assert len(rounds) == 12 and {''.join(sorted(r)) for r in rounds} == {'abc'}
  assert len(set(rounds)) > 3  # more than the orders of a rotation
  assert {name: len(times) for name, times in got.items()} == {
      'a': 11, 'b': 11, 'c': 11}
  assert set(itertools.chain(*got.values())) == {1.0}
  assert sum(rests) == 6
  assert timing.median_ms([0.1, 0.3, 0.2]) == pytest.approx(200)
  assert timing.spread([0.1, 0.3, 0.2]) == pytest.approx(1.0)


class Result:
  """Writes down that it is waited for."""

  def __init__(self, log):
    self.log = log
    log.append('ran')

  def block_until_ready(self):
    self.log.append('waited')
    return self


def test_results_are_waited_for_before_time_and_memory_are_read(monkeypatch):
  log = []
  says = lambda name, value: lambda: (log.append(name), value)[1]
  with monkeypatch.context() as patch:
    patch.setattr(timing.time, 'perf_counter', says('clock', 0.0))
    timing.alternate({'a': lambda: Result(log)}, repeats=1, warmup=0)
  assert log == ['clock', 'ran', 'waited', 'clock']
  log.clear()
  monkeypatch.setattr(timing.resident, 'now', says('before', 100))
  monkeypatch.setattr(timing.resident, 'restart_peak', says('restart', True))
  monkeypatch.setattr(timing.resident, 'peak', says('peak', 175))
  once = ['before', 'restart', 'ran', 'waited', 'peak']
  assert timing.peak_rise(lambda: Result(log)) == 75 and log == 2 * once
  log.clear()
  timing.peak_rise(lambda: Result(log), long=-1.0)
  assert log == once  # what takes long runs once


def test_decoding_is_an_answer_of_ten_tokens():
  fed, rooms = [], []
  model = types.SimpleNamespace(extend=lambda tokens, state: (
      fed.append((tokens.shape, state)), len(fed))[1])
  case = inference.Case('full', model, lambda room: (
      rooms.append(room), types.SimpleNamespace(logits='logits'))[1],
                        1.0, 1.0, np.ones(1), np.ones(1))
  runs = inference._runs(None, case, 'state', 3)
  assert set(runs) == {('prefill', 'full'), ('decode', 'full')}
  assert runs['prefill', 'full']() == 'logits' and rooms == [10]
  assert runs['decode', 'full']() == 10 and fed == 10 * [((3,), 'state')]


def test_peak_memory_is_seen():
  """64 MB that are gone again; nothing on systems without a mark."""
  rise = timing.peak_rise(lambda: np.ones(8_000_000).sum())
  if rise is None:
    pytest.skip('the kernel has no high-water mark that can be reset')
  assert 50e6 < rise < 200e6
  assert timing.peak_rise(lambda: None) < 20e6


def test_a_step_goes_on_from_its_own_result(monkeypatch):
  monkeypatch.setattr(training, 'init_params', lambda model, key: {'w': jax.numpy.ones(())})
  monkeypatch.setattr(training, 'make_optimizer', lambda recipe: optax.sgd(0.1, 0.5))
  run, _ = training._step(None, lambda params, batch: params['w'] * batch, 2.0)
  # w: 1, then 0.2 less, then 0.3 less (half of the last gradient is added)
  assert [float(run()) for _ in range(3)] == pytest.approx([2.0, 1.6, 1.0])


def test_goals_are_compared_with_what_was_measured():
  def group(**changes):
    values = {'full': (100.0, 10, 1.0), 'ATP 25 %': (40.0, 9, 0.36),
              'ATP 15 %': (30.0, 9, 0.3),
              'VoCo 1': (90.0, 8, 0.9), 'VoCo 1, cached': (9.0, 8, 0.06),
              'transformers, 576 tokens': (120.0, 99, 1.0)} | changes
    return [{'method': name, 'prefill_ms': ms, 'peak_bytes': peak,
             'flop_ratio': flops, 'time_over_flops': ms / 100.0 / flops,
             'prefill_flops': 1000 * flops, 'visual_tokens': 576.0,
             'selector_ms': 1.5 * name.startswith('ATP'),
             'selector_flops': 7.2 * name.startswith('ATP')}
            for name, (ms, peak, flops) in values.items()]
  slow = group(**{'ATP 25 %': (45.0, 11, 0.36), 'ATP 15 %': (28.0, 9, 0.3)})
  lines = list(goals.table({'a': group(), 'b': slow, 'c': slow[:1]}))
  assert [line[2] for line in lines] == [
      '**1.11**', '**2.50**', '**10.00**', '0.060', '**0.050**', '0.0240',
      '**0.90**', '**0.83**']
  assert [line[3] for line in lines] == [
      '1.25', '2.22', '**10.00**', '0.060', '0.054', '0.0240', '1.10',
      '**0.83**']
  assert all(line[4] == '–' for line in lines)
  assert [line[1] for line in lines] == [
      '≤ 1.15', '≥ 2.5', '≥ 5', '≤ 0.052', '≤ 0.05', '≤ 0.02', '≤ 1', '≤ 1']
  missed = [row | {'reached': row['method'] != 'ATP 25 %'} for row in group()]
  lines = list(goals.table({'a': missed}))
  assert [line[2] for line in lines[:3]] == ['–', '–', '**10.00**']
