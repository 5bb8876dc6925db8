"""Conversion of a checkpoint much larger than the memory that it may take.

  pytest -m slow tests/convert/test_memory.py -s -n 0

The source is bfloat16 in shards, written sparse (zeros, which take no disk);
the
result and its export take 4.1 GB of disk each.  The probe is the peak
resident memory of the command's own process, mapped files included.
"""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
import sys
import time

import pytest

from vlm_compress.config import LlavaConfig, TextConfig, VisionConfig, to_dict
from vlm_compress.convert import files, from_hf, hf_config, to_hf
from vlm_compress.convert.tensors import INDEX, TensorWriter

# 4.1 GB: 24 layers of a decoder as wide as a 1.5B one.
CONFIG = LlavaConfig(
    param_dtype='bfloat16', image_token_index=31999,
    vision=VisionConfig(),
    text=TextConfig(vocab_size=32000, hidden_size=2048, intermediate_size=8192,
                    num_hidden_layers=24, num_attention_heads=16,
                    num_key_value_heads=16))
NUM_SHARDS = 12
PROBE = '''
import resource, sys
from vlm_compress.cli import __main__ as cli
code = cli.main(sys.argv[1:])
print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
'''


def sparse_checkpoint(root: pathlib.Path) -> tuple[int, int]:
  """Writes root/source in shards; bytes of all tensors and of the largest."""
  ours, source = root / 'ours', root / 'source'
  ours.mkdir()
  source.mkdir()
  TensorWriter(ours / files.WEIGHTS, {
      path: (shape, 'bfloat16') for path, shape in
      from_hf.parameter_shapes(CONFIG).items()})
  (ours / files.CONFIG).write_text(json.dumps(to_dict(CONFIG)))
  plan = to_hf.make_plan(ours)  # its names and shapes are all that is used
  names = [f'model-{i:05}.safetensors' for i in range(NUM_SHARDS)]
  home = {key: names[i % NUM_SHARDS] for i, key in enumerate(plan.specs)}
  for name in names:
    TensorWriter(source / name, {key: spec for key, spec in plan.specs.items()
                                 if home[key] == name})
  (source / INDEX).write_text(json.dumps({'weight_map': home}))
  (source / 'config.json').write_text(json.dumps(hf_config.to_hf(plan.config)))
  sizes = [2 * math.prod(shape) for shape, _ in plan.specs.values()]
  return sum(sizes), max(sizes)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_checkpoint(tmp_path):
  total, largest = sparse_checkpoint(tmp_path)
  assert total > 4e9
  started = time.perf_counter()
  done = subprocess.run(
      [sys.executable, '-c', PROBE, 'convert', f'--from={tmp_path / "source"}',
       f'--to={tmp_path / "to"}'], capture_output=True, text=True, check=True,
      cwd=pathlib.Path(__file__).parents[2])
  peak = int(done.stdout.rpartition('peak ')[2])
  print(f'checkpoint {total / 1e9:.2f} GB in {NUM_SHARDS} shards, largest '
        f'tensor {largest / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, bound '
        f'{(3 * largest + 1e9) / 1e6:.0f} MB, '
        f'{time.perf_counter() - started:.0f} s')
  assert (tmp_path / 'to/model.safetensors').stat().st_size > total
  assert peak <= 3 * largest + 1e9
  done = subprocess.run(
      [sys.executable, '-c', PROBE, 'export', f'--from={tmp_path / "to"}',
       f'--to={tmp_path / "back"}'], capture_output=True, text=True, check=True,
      cwd=pathlib.Path(__file__).parents[2])
  peak = int(done.stdout.rpartition('peak ')[2])
  print(f'export: peak {peak / 1e6:.0f} MB')
  assert peak <= 3 * largest + 1e9
