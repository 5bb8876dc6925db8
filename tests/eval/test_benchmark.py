"""The benchmark: what is timed is what it says, in turns; tables add up."""

from __future__ import annotations

import dataclasses
import itertools
import json

import core_helpers as helpers
import jax
import numpy as np
import pytest

from vlm_compress import presets
from vlm_compress.cli import __main__ as cli
from vlm_compress.cli import benchmark
from vlm_compress.config import AtpConfig
from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.eval import efficiency
from vlm_compress.eval.benchmark import (
  adaptive,
  goals,
  inference,
  report,
  subjects,
  timing,
  training,
)
from vlm_compress.models.llava import PruneOptions
from vlm_compress.models.segments import capacity_ladder

LAYERS, ROWS = 4, 2


@pytest.fixture(scope='module')
def subject():
  """A tiny model in the place of the slice."""
  config = helpers.tiny(
      vision=dataclasses.replace(helpers.tiny().vision, image_size=48),
      atp=AtpConfig(prune_after=(1, 3), target_tokens=64.0, capacities=(
          12, 40)))
  rng = np.random.default_rng(0)
  features = rng.standard_normal(
      (6, config.num_patches, config.vision.hidden_size), np.float32)
  return subjects.Subject(
      'tiny', config, SegmentedModel(config, subjects.random_params(config, rng)),
      features)


@pytest.fixture(scope='module')
def rows(subject):
  return {row['method']: row for row in inference.measure(
      subject, ROWS, repeats=1, shares=(0.5,), voco_tokens=(2,))}


def test_cases_take_turns(monkeypatch):
  clock = itertools.count()
  monkeypatch.setattr(timing.time, 'perf_counter', lambda: float(next(clock)))
  ran, rests = [], []
  monkeypatch.setattr(timing.time, 'sleep', rests.append)
  cases = {name: lambda name=name: ran.append(name) for name in 'abc'}
  got = timing.alternate(cases, repeats=2, warmup=1,
                         pause=lambda name: 0.5 * (name == 'b'))
  assert ''.join(ran) == 'abc' 'bca' 'cab'  # noqa: ISC001
  assert {name: len(times) for name, times in got.items()} == {
      'a': 2, 'b': 2, 'c': 2}
  assert set(itertools.chain(*got.values())) == {1.0}
  assert sum(rests) == 1.5
  assert timing.median_ms([0.1, 0.3, 0.2]) == pytest.approx(200)
  assert timing.spread([0.1, 0.3, 0.2]) == pytest.approx(1.0)


def test_peak_memory_is_seen():
  """64 MB that are gone again; nothing on systems without a mark."""
  rise = timing.peak_rise(lambda: np.ones(8_000_000).sum())
  if rise is None:
    pytest.skip('the kernel has no high-water mark that can be reset')
  assert 50e6 < rise < 200e6
  assert timing.peak_rise(lambda: None) < 20e6


def test_every_method_has_a_row_that_adds_up(subject, rows):
  config = subject.plain
  assert list(rows) == ['full', 'full, visual KV cached', 'ATP 50 %',
                        'random 50 %', 'VoCo 2', 'VoCo 2, cached']
  full, atp, random = (rows[n] for n in ('full', 'ATP 50 %', 'random 50 %'))
  for row in rows.values():
    assert row['prefill_ms'] > 0 and row['decode_ms'] > 0
    assert row['answer_ms'] == pytest.approx(
        row['vision_ms'] + row['prefill_ms'] + 9 * row['decode_ms'])
    assert row['time_ratio'] == row['prefill_ms'] / full['prefill_ms']
    assert row['time_over_flops'] == pytest.approx(
        row['time_ratio'] / row['flop_ratio'])
    assert ('cached' in row['method']) == (row['vision_ms'] == 0)
    assert (row['selector_ms'] > 0) == (row is atp)
  P = config.num_visual_tokens
  assert full['visual_tokens'] == P and full['flop_ratio'] == 1.0
  assert atp['visual_tokens'] == pytest.approx(P / 2, abs=2)
  assert random['visual_tokens'] == pytest.approx(atp['visual_tokens'], abs=1)
  cost = efficiency.prefill_cost(config, np.full(LAYERS, float(P)), 64.0)
  assert full['prefill_flops'] == pytest.approx(float(cost.projector + cost.prefill))
  assert full['kv_bytes'] == LAYERS * (P + 64) * 2 * 2 * 8 * 4
  assert rows['VoCo 2, cached']['flop_ratio'] < 0.65 < rows['VoCo 2']['flop_ratio']
  assert rows['full, visual KV cached']['slots'] == [P + 64]
  assert rows['VoCo 2, cached']['slots'] == [64]
  assert max(random['slots'][1:]) < P + 64 == random['slots'][0]
  assert random['slot_waste'] <= atp['slot_waste'] < 1.5


def test_cached_rows_read_what_uncached_ones_compute(subject):
  """The full model's cache: the same logits as the whole row at once."""
  found = {c.method: c for c in inference.cases(subject, ROWS, (), (2,))}
  whole = subjects._batch(subject, subject.plain, [
      subjects.BOS, subject.plain.image_token_index, subjects.NEWLINE] +
      [subjects.WORD] * (subjects.NUM_TEXT - 2), ROWS)
  want = subject.model.prefill(whole, None).logits
  helpers.close(found['full, visual KV cached'].prefill(0).logits, want)
  helpers.close(found['VoCo 2, cached'].prefill(0).logits,
                found['VoCo 2'].prefill(0).logits)


def test_the_selector_does_what_the_modules_do(subject):
  case = next(c for c in inference.cases(subject, ROWS, (0.5,), ())
              if c.method.startswith('ATP'))
  out = inference.selector(subject, case, ROWS)()
  slots = case.prefill(0).slots
  assert [o[0].x.shape[1] for o in out] == slots[1:]
  assert all(np.isfinite(o[2].state.redundancy).all() for o in out)


def test_queue_of_prompts(subject):
  found = adaptive.measure(subject, share=0.5, batch_size=2, repeats=1)
  kept = np.asarray(found['kept'])
  assert kept.shape == (6, 2) and (kept[:, 1] <= kept[:, 0]).all()
  assert found['ladder'] == list(capacity_ladder(subject.atp))
  assert found['achieved'] == pytest.approx(
      (64 + 2 * kept[:, 0].mean() + kept[:, 1].mean()) / 4)
  waste = {name: mode['waste'] for name, mode in found['modes'].items()}
  assert 1.0 <= waste['alone'] <= waste['regrouped'] <= waste['batch']
  json.dumps(found)


def test_training_rows():
  config = training.config_of(64, 3)
  config = dataclasses.replace(config, vision=dataclasses.replace(
      config.vision, image_size=56, hidden_size=32, num_attention_heads=4))
  rows = training.measure(config, 1, 1)
  assert [r['method'] for r in rows][0] == training.PLAIN and len(rows) == 4
  assert all(r['step_ms'] > 0 and r['temp_bytes'] > 0 for r in rows)
  assert rows[0]['time_ratio'] == rows[0]['memory_ratio'] == 1.0
  losses = [float(jax.jit(loss)(helpers._fresh(model, 0), batch))
            for model, loss, batch in training._methods(config, 1).values()]
  assert np.isfinite(losses).all()
  # two passes and the masked pass are the same loss
  assert losses[1] == pytest.approx(losses[2], abs=1e-5)
  assert abs(losses[0] - losses[1]) > 1e-4


def test_slices_have_the_widths_of_7b(monkeypatch):
  """Without the gigabytes: no parameters are drawn."""
  seen = []
  monkeypatch.setattr(subjects, 'random_params', lambda config, rng: None)
  monkeypatch.setattr(subjects, 'SegmentedModel',
                      lambda config, params: seen.append(config))
  made = subjects.slice_of_7b(8, 'bfloat16', 2)
  assert made.features.shape == (2, 576, 1024) and seen == [made.atp]
  text, whole = made.plain.text, presets.preset('llava_1_5_7b').text
  assert text == dataclasses.replace(whole, num_hidden_layers=8)
  assert made.plain.vision == presets.preset('llava_1_5_7b').vision
  assert made.atp.atp.prune_after == (1, 3, 6)


def test_random_tokens_pay_for_no_selector(subject):
  """The compiler's count of the first segment: that of its layer alone."""
  def flops(selector):
    counts = {} if selector == 'adaptive' else {'fixed_counts': (8, 4)}
    config = dataclasses.replace(subject.atp, atp=AtpConfig(
        prune_after=(1, 3), selector=selector, target_tokens=64.0, **counts))
    model = subject.model.with_config(config)
    state = model.prefill(subjects.prompt_batch(subject, 1), PruneOptions())
    assert len(state.slots) == 3
    run, = (program for key, program in model.programs._compiled.items()
            if key[0][:3] == ('run', 0, 1))
    return run.cost_analysis()['flops']
  random, uniform, adaptive = map(flops, ('random', 'uniform', 'adaptive'))
  assert random == pytest.approx(uniform, rel=0.01) and random < 0.9 * adaptive


def test_compressing_runs_the_last_layer_for_its_keys_only(subject):
  """VoCo's formula against the compiler's count of what is served."""
  config = subject.voco(2)
  model = subject.model.with_config(config)
  batch = subjects.voco_batch(subject, 1, 2)
  model.compress(batch.text.features, batch.segment_ids, 2)
  run, = (program for key, program in model.programs._compiled.items()
          if key[0][0] == 'compress')
  parts = [efficiency.voco_cost(config, 0.0, num_voco_tokens=2, keys_only=k)
           for k in (True, False)]
  ours, whole = (float(p.projector + p.decoder_dense) for p in parts)
  counted = run.cost_analysis()['flops']
  assert whole > 1.1 * ours and 0.85 < counted / ours < 1.25


def test_report_of_all_parts(subject, rows, tmp_path):
  found = {'inference': list(rows.values()), 'training': [
      {'method': 'plain model', 'dtype': 'float32', 'batch': 1, 'step_ms': 10.0,
       'spread': 0.1, 'temp_bytes': 10, 'peak_bytes': None, 'time_ratio': 1.0,
       'memory_ratio': 1.0}],
      'adaptive': [adaptive.measure(subject, share=0.5, batch_size=2, repeats=1)]}
  paths = report.write(found, tmp_path)
  assert [p.name for p in paths] == ['benchmark.md', 'benchmark.png',
                                     'benchmark_slots.png']
  text = paths[0].read_text()
  assert 'tiny, float32, batch 2' in text and '| ATP 50 % |' in text
  assert 'regrouped, 2' in text and 'Training, float32, batch 1' in text
  assert all(p.read_bytes()[:4] == b'\x89PNG' for p in paths[1:])


def test_goals_are_compared_with_what_was_measured():
  def group(**changes):
    values = {'full': (100.0, 10, 1.0), 'ATP 25 %': (40.0, 9, 0.36),
              'VoCo 1': (90.0, 8, 0.9), 'VoCo 1, cached': (9.0, 8, 0.06),
              'transformers, 576 tokens': (120.0, 99, 1.0)} | changes
    return [{'method': name, 'prefill_ms': ms, 'peak_bytes': peak,
             'flop_ratio': flops, 'time_over_flops': ms / 100.0 / flops,
             'visual_tokens': 576.0} for name, (ms, peak, flops) in values.items()]
  slow = group(**{'ATP 25 %': (45.0, 11, 0.36)})
  lines = list(goals.table({'a': group(), 'b': slow, 'c': slow[:1]}))
  assert [line[2] for line in lines] == [
      '**1.11**', '**2.50**', '**10.00**', '0.060', '**0.90**', '**0.83**']
  assert [line[3] for line in lines] == [
      '1.25', '2.22', '**10.00**', '0.060', '1.10', '**0.83**']
  assert all(line[4] == '–' for line in lines)
  assert [line[1] for line in lines][:2] == ['≤ 1.15', '≥ 2.5']


def test_goals_name_methods_that_are_measured(subject):
  # a quarter is below the floor of this one
  names = {case.method for case in inference.cases(
      subject, 1, (0.5,), benchmark.VOCO_TOKENS)}
  assert {goals.FULL, goals.PRUNED.replace('25', '50'), goals.COMPRESSED,
          goals.CACHED} <= names
  assert '25' in goals.PRUNED and 0.25 in benchmark.SHARES


def test_what_a_cached_picture_saves_depends_on_the_text():
  savings = [report.voco_savings(n) for n in (16, 32, 64)]
  assert savings == sorted(savings, reverse=True)
  # a layer's cost is nearly linear in its tokens
  assert savings == pytest.approx(
      [1 - (n - 2) / (576 + n) for n in (16, 32, 64)], abs=0.01)


def test_command_goes_on_with_what_is_missing(tmp_path, monkeypatch, capsys):
  calls = []
  row = {'method': 'plain model', 'dtype': 'float32', 'batch': 2, 'step_ms': 1.0,
         'spread': 0.0, 'temp_bytes': 1, 'peak_bytes': 1, 'time_ratio': 1.0,
         'memory_ratio': 1.0}
  monkeypatch.setattr(training, 'measure',
                      lambda *args: calls.append(args) or [row])
  command = ['benchmark', '--part=training', f'--out={tmp_path}']
  assert cli.main(command) == cli.main(command) == 0
  assert len(calls) == 1 and (tmp_path / 'benchmark.md').exists()
  kept = json.loads((tmp_path / 'benchmark.json').read_text())
  assert kept['training'] == [row]
  kept['setting']['cores'] = 999
  (tmp_path / 'benchmark.json').write_text(json.dumps(kept))
  assert cli.main(command) == 2
  assert 'measured in another setting' in capsys.readouterr().err
  (tmp_path / 'benchmark.json').write_text('{"a": 1}')
  assert cli.main(command) == 2
  assert 'no result of this command' in capsys.readouterr().err
