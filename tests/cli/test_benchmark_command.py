"""vlm-compress benchmark: what has been measured is not measured again."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest

pytest.importorskip('PIL', reason='needs the extra [demo]')

from vlm_compress.cli import __main__ as cli
from vlm_compress.cli import benchmark
from vlm_compress.convert import efficientnet
from vlm_compress.data import grids
from vlm_compress.eval.benchmark import (
  adaptive,
  inference,
  report,
  subjects,
  torch_reference,
  training,
)
from vlm_compress.models import efficientnet as tower

TRAINED = {'method': 'plain model', 'dtype': 'float32', 'batch': 2, 'step_ms': 1.0,
           'spread': 0.0, 'temp_bytes': 1, 'peak_bytes': 1, 'time_ratio': 1.0,
           'memory_ratio': 1.0}


class Bench:
  """Invented measurements, which write down what was asked for.

  `left` of them are made; the next one is interrupted.
  """

  def __init__(self, patch):
    self.made, self.measured, self.outside, self.left = [], [], [], 99
    patch.setattr(inference, 'measure', self.inference)
    patch.setattr(adaptive, 'measure', self.adaptive)
    patch.setattr(subjects, 'slice_of_7b', lambda layers, dtype, count: self.make(
        subjects.slice_name(layers), dtype, count))
    patch.setattr(subjects, 'small', lambda directory, features: self.make(
        subjects.SMALL, 'float32', len(features)))
    patch.setattr(report, 'write', lambda found, directory: [])
    patch.setattr(grids, 'make_grid', lambda *args, **options: (
        types.SimpleNamespace(image=np.zeros((8, 8, 3)))))
    patch.setattr(efficientnet, 'load_efficientnet_lite0', lambda: 'tower')
    patch.setattr(tower, 'extract_features', lambda params, pixels: pixels[:, 0, 0])
    patch.setattr(torch_reference, 'available', lambda: None)
    patch.setattr(torch_reference, 'build', lambda subject: 'torch')
    patch.setattr(torch_reference, 'Reference', lambda *args: args)

  def make(self, name, dtype, count):
    self.made.append((name, dtype, count))
    plain = types.SimpleNamespace(num_visual_tokens=64)
    return types.SimpleNamespace(name=name, dtype=dtype, plain=plain)

  def note(self, *what):
    if not self.left:
      raise KeyboardInterrupt
    self.left -= 1
    self.measured.append(what)

  def inference(self, subject, num_rows, *, repeats, shares, voco_tokens, encode,
                outside, tick):
    assert repeats == 2 and shares == (0.25, 0.15) and voco_tokens == (1, 8)
    assert (encode is None) == (subject.name != subjects.SMALL)
    assert encode is None or len(encode(num_rows)) == num_rows
    self.note(subject.name, subject.dtype, num_rows)
    self.outside.append({name: args[2:] for name, args in outside.items()})
    return [{'subject': subject.name, 'dtype': subject.dtype, 'batch': num_rows}]

  def adaptive(self, subject, *, share, batch_size, repeats, tick):
    assert (share, batch_size, repeats) == (0.25, 4, 2)
    self.note(subject.name, subject.dtype, 'queue')
    return {'subject': subject.name}


@pytest.fixture
def bench(monkeypatch):
  return Bench(monkeypatch)


def run(out, *words):
  return cli.main(['benchmark', '--repeats=2', f'--out={out}', *words])


SLICE = subjects.slice_name(8)
QUICK = [('quickstart', 'float32', 1), ('quickstart', 'float32', 4),
         ('quickstart', 'float32', 'queue')]
SLICES = [(SLICE, 'float32', 1), (SLICE, 'float32', 4), (SLICE, 'float32', 'queue'),
          (SLICE, 'bfloat16', 1), (SLICE, 'bfloat16', 4)]


@pytest.mark.parametrize('done', range(len(QUICK + SLICES) + 1))
def test_an_interrupted_run_goes_on(bench, tmp_path, done):
  words = ['--part=quickstart', '--part=slice']
  bench.left = done
  whole = done == len(QUICK + SLICES)
  assert run(tmp_path, *words) == (0 if whole else 130)
  assert bench.measured == (QUICK + SLICES)[:done]
  bench.left, bench.made = 99, []
  assert run(tmp_path, *words) == 0
  assert bench.measured == QUICK + SLICES
  missing = {key[:2] for key in (QUICK + SLICES)[done:]}
  assert {made[:2] for made in bench.made} == missing  # no other model is made
  assert len(bench.made) == len(missing)
  assert {made[2] for made in bench.made} <= {64, 8}
  found = json.loads((tmp_path / 'benchmark.json').read_text())
  assert [len(found[kind]) for kind in ('inference', 'adaptive', 'training')] == [
      6, 2, 0]


def test_what_else_is_asked_for_is_added(bench, tmp_path):
  assert run(tmp_path, '--part=slice', '--dtype=bfloat16', '--batch=2') == 0
  assert run(tmp_path, '--part=slice', '--batch=2', '--batch=1') == 0
  assert run(tmp_path, '--part=slice', '--layers=9', '--dtype=bfloat16',
             '--batch=2') == 0
  assert bench.measured == [
      (SLICE, 'bfloat16', 2), (SLICE, 'float32', 2), (SLICE, 'float32', 1),
      (SLICE, 'float32', 'queue'), (SLICE, 'bfloat16', 1),
      (subjects.slice_name(9), 'bfloat16', 2)]


def test_the_outside_reference_is_there_or_left_out(bench, tmp_path, monkeypatch,
                                                    capsys):
  words = ['--part=slice', '--dtype=bfloat16', '--batch=1']
  assert run(tmp_path / 'a', *words) == 0
  assert bench.outside.pop() == {'transformers, 64 tokens': (1, 64),
                                 'transformers, 16 tokens': (1, 16)}
  monkeypatch.setattr(torch_reference, 'available', lambda: 'torch is not installed')
  assert run(tmp_path / 'b', *words) == 2 and len(bench.measured) == 1
  message = capsys.readouterr().err
  assert 'torch is not installed' in message and '[parity]' in message
  assert run(tmp_path / 'b', '--no-torch', *words) == 0
  assert bench.outside == [{}]


def test_the_part_training_and_other_settings(tmp_path, monkeypatch, capsys):
  calls = []
  monkeypatch.setattr(training, 'measure',
                      lambda *args: calls.append(args) or [TRAINED])
  command = ['benchmark', '--part=training', f'--out={tmp_path}']
  assert cli.main(command) == cli.main(command) == 0
  assert len(calls) == 1 and (tmp_path / 'benchmark.md').exists()
  kept = json.loads((tmp_path / 'benchmark.json').read_text())
  assert kept['training'] == [TRAINED]
  with monkeypatch.context() as patch:
    patch.setattr(benchmark, '_code_hash', lambda: 'of other sources')
    assert cli.main(command) == 2
  message = capsys.readouterr().err
  assert 'measured in another setting' in message and 'of other sources' in message
  kept['setting']['cores'] = 999
  (tmp_path / 'benchmark.json').write_text(json.dumps(kept))
  assert cli.main(command) == 2
  assert 'measured in another setting' in capsys.readouterr().err
  (tmp_path / 'benchmark.json').write_text('{"a": 1}')
  assert cli.main(command) == 2
  assert 'no result of this command' in capsys.readouterr().err


def test_every_source_is_part_of_the_setting(tmp_path, monkeypatch):
  package = tmp_path / 'package'
  for name in ('cli/benchmark.py', 'nn/rope.py'):
    (package / name).parent.mkdir(parents=True, exist_ok=True)
    (package / name).write_text(f'"""{name}."""\n')
  monkeypatch.setattr(benchmark, '__file__', str(package / 'cli' / 'benchmark.py'))
  seen = [benchmark._code_hash()]
  (package / 'nn' / 'rope.py').write_text('x = 1\n')
  seen.append(benchmark._code_hash())
  (package / 'nn' / 'rope.py').rename(package / 'nn' / 'ropes.py')
  seen.append(benchmark._code_hash())
  (package / 'notes.txt').write_text('no source')
  assert benchmark._code_hash() == seen[-1]
  assert len(set(seen)) == 3 and all(np.char.isalnum(seen))
