"""Conversion of a checkpoint much larger than the memory that it may take.

  pytest -m slow tests/convert/test_memory.py -s -n 0

Sources are bfloat16, written sparse (zeros, which take no disk); the result of
the first and its export take 4.1 GB of disk each, that of the second 5.3 GB.
The probe is the peak resident memory of the command's own process, mapped
files included.
"""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
import sys
import time
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_compress.config import LlavaConfig, TextConfig, VisionConfig
from vlm_compress.config_values import to_dict
from vlm_compress.convert import files, from_hf, hf_config, to_hf
from vlm_compress.convert.rules import TO_OURS
from vlm_compress.convert.tensors import INDEX, TensorFiles, TensorWriter

# 4.1 GB: 24 layers of a decoder as wide as a 1.5B one.
CONFIG = LlavaConfig(
    param_dtype='bfloat16', image_token_index=31999,
    vision=VisionConfig(),
    text=TextConfig(vocab_size=32000, hidden_size=2048, intermediate_size=8192,
                    num_hidden_layers=24, num_attention_heads=16,
                    num_key_value_heads=16))
NUM_SHARDS = 12
PROBE = '''
import sys
from vlm_compress import resident
from vlm_compress.cli import __main__ as cli
code = cli.main(sys.argv[1:])
print('peak', resident.peak())
sys.exit(code)
'''


def sparse_checkpoint(root: pathlib.Path, config: LlavaConfig = CONFIG,
                      shards: int = NUM_SHARDS) -> tuple[int, int]:
  """Writes root/source in shards; bytes of all tensors and of the largest."""
  ours, source = root / 'ours', root / 'source'
  ours.mkdir()
  source.mkdir()
  TensorWriter(ours / files.WEIGHTS, {
      path: (shape, 'bfloat16') for path, shape in
      from_hf.parameter_shapes(config).items()})
  (ours / files.CONFIG).write_text(json.dumps(to_dict(config)))
  plan = to_hf.make_plan(ours)  # its names and shapes are all that is used
  names = [f'model-{i:05}.safetensors' for i in range(shards)]
  home = {key: names[i % shards] for i, key in enumerate(plan.specs)}
  for name in names:
    TensorWriter(source / name, {key: spec for key, spec in plan.specs.items()
                                 if home[key] == name})
  (source / INDEX).write_text(json.dumps({'weight_map': home}))
  (source / 'config.json').write_text(json.dumps(hf_config.to_hf(plan.config)))
  sizes = [2 * math.prod(shape) for shape, _ in plan.specs.values()]
  return sum(sizes), max(sizes)


def peak_of(*argv) -> int:
  """Bytes that a command takes at its peak."""
  done = subprocess.run(
      [sys.executable, '-c', PROBE, *argv], capture_output=True, text=True,
      check=True, cwd=pathlib.Path(__file__).parents[2])
  return int(done.stdout.rpartition('peak ')[2])


@pytest.mark.parametrize('stored,written', [
    ('bfloat16', 'float32'), ('float32', 'bfloat16'), ('float32', 'float32')])
@pytest.mark.parametrize('move', ['same', 'transpose'])
def test_a_tensor_is_cast_piece_by_piece(stored, written, move, tmp_path,
                                         monkeypatch):
  monkeypatch.setattr('vlm_compress.convert.tensors._BLOCK', 2 ** 18)
  rng = np.random.default_rng(0)
  theirs = rng.normal(size=(3000, 1001)).astype(jnp.dtype(stored))
  value = TO_OURS[move](theirs)
  path = tmp_path / 'a.safetensors'
  writer = TensorWriter(path, {
      'a': (value.shape, written), 'b': ((2, *value.shape), written),
      'c': ((len(value) + 2, *value.shape[1:]), written)})
  tracemalloc.start()
  writer.write('a', value)
  writer.write('b', value, 1)
  writer.write('b', value, 0)
  writer.write_rows('c', value)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  writer.close()
  assert peak < 2 ** 20 < theirs.nbytes / 5
  tensors, want = TensorFiles(path), value.astype(jnp.dtype(written))
  for got in (tensors.read('a'), *tensors.read('b'), tensors.read('c')[:-2]):
    np.testing.assert_array_equal(got, want)
  assert not tensors.read('c')[-2:].any()


def test_rows_that_do_not_fit_are_refused(tmp_path):
  writer = TensorWriter(tmp_path / 'a', {'a': ((3, 2), 'float32')})
  for shape in ((4, 2), (2, 3), (2,)):
    with pytest.raises(ValueError, match='a: '):
      writer.write_rows('a', np.zeros(shape, np.float32))


@pytest.mark.slow
def test_peak_memory_with_another_dtype(tmp_path):
  """One tensor is nearly all; it becomes twice as large."""
  total, largest = sparse_checkpoint(tmp_path, LlavaConfig(
      param_dtype='bfloat16', image_token_index=5, vision=VisionConfig(
          num_hidden_layers=1, hidden_size=64, num_attention_heads=4),
      text=TextConfig(vocab_size=160000, hidden_size=4096, intermediate_size=64,
                      num_hidden_layers=1, num_attention_heads=4,
                      num_key_value_heads=4)), shards=1)
  for dtype in ('float32', 'float16'):
    peak = peak_of('convert', f'--from={tmp_path / "source"}',
                   f'--to={tmp_path / dtype}', f'--dtype={dtype}')
    print(f'{total / 1e9:.2f} GB to {dtype}, largest tensor '
          f'{largest / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB')
    assert peak <= 3 * largest + 1e9
    (tmp_path / dtype / files.WEIGHTS).unlink()


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_checkpoint(tmp_path):
  total, largest = sparse_checkpoint(tmp_path)
  assert total > 4e9
  started = time.perf_counter()
  peak = peak_of('convert', f'--from={tmp_path / "source"}',
                 f'--to={tmp_path / "to"}')
  print(f'checkpoint {total / 1e9:.2f} GB in {NUM_SHARDS} shards, largest '
        f'tensor {largest / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, bound '
        f'{(3 * largest + 1e9) / 1e6:.0f} MB, '
        f'{time.perf_counter() - started:.0f} s')
  assert (tmp_path / 'to/model.safetensors').stat().st_size > total
  assert peak <= 3 * largest + 1e9
  peak = peak_of('export', f'--from={tmp_path / "to"}',
                 f'--to={tmp_path / "back"}')
  print(f'export: peak {peak / 1e6:.0f} MB')
  assert peak <= 3 * largest + 1e9
