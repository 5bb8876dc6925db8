"""`vlm-compress train` on two processes, one of which dies; one goes on alone."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import core_helpers as helpers
import llava_rows
import numpy as np
import pytest

from vlm_compress.cli import __main__ as cli
from vlm_compress.convert import files
from vlm_compress.data import tokenizer as tokenizer_lib

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
STEPS = 60


@pytest.fixture(name='start')
def fixture_start(tmp_path):
  """start(workdir, *flags, devices=) -> process of `vlm-compress train`."""
  running = []

  def start(workdir, *flags, devices):
    log = open(tmp_path / f'log{len(running)}', 'w+', encoding='utf-8')
    process = subprocess.Popen(
        [sys.executable, '-m', 'vlm_compress.cli', 'train', '--no-tensorboard',
         f'--config={ROOT}/configs/llava_7b.py:tiny_instruct',
         f'--workdir={workdir}', f'--config.data.tokenizer={tmp_path}/tokenizer.json',
         '--config.init_from=', '--config.rows.bucket_lengths=(128, 256)',
         f'--config.train.steps={STEPS}', *flags],
        cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu',
             'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
             'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'programs'),
             'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'})
    running.append((process, log))
    return process
  yield start
  for process, log in running:
    process.kill()
    process.wait()
    log.close()


def two(start, workdir):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    where = f'--coordinator=localhost:{free.getsockname()[1]}'
  return [start(workdir, where, '--num-processes=2', f'--process-id={i}', devices=2)
          for i in range(2)]


def losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return {line['step']: line['loss'] for line in map(json.loads, lines)}


def test_a_dead_peer_and_one_that_goes_on_alone(start, tmp_path):
  rows = [row for row in json.loads(llava_rows.write(tmp_path, 40).read_text())
          if not str(row['id']).startswith('two-')]
  (tmp_path / 'rows.json').write_text(json.dumps(rows))
  tokenizer_lib.word_level(llava_rows.WORDS).save(tmp_path / 'tokenizer.json')
  assert cli.main(['prepare-data', f'--json={tmp_path}/rows.json',
                   f'--images={tmp_path}/images',
                   f'--out={tmp_path}/data/llava_v1_5_mix665k']) == 0
  assert start(tmp_path / 'whole', devices=4).wait(240) == 0

  workdir = tmp_path / 'run'
  pair = two(start, workdir)
  until = time.monotonic() + 240
  while not (workdir / 'checkpoints' / '12').exists():
    assert all(p.poll() is None for p in pair) and time.monotonic() < until
    time.sleep(0.01)
  pair[1].kill()
  since = time.monotonic()
  assert pair[0].wait(60) != 0 and time.monotonic() - since < 60
  text = (tmp_path / 'log1').read_text()
  # Ours where a collective fails first, else that of jax's service.
  assert ('start all again' in text or
          'This most likely indicates that another task died' in text), text

  assert start(workdir, devices=4).wait(240) == 0
  assert 'resumed at step' in (tmp_path / 'log3').read_text()
  got, want = losses(workdir), losses(tmp_path / 'whole')
  assert got.keys() == want.keys() and max(got) == STEPS
  for step, loss in want.items():
    np.testing.assert_allclose(got[step], loss, rtol=1e-4)
  ours, others = (helpers.flat(files.load_params(path / 'model'))
                  for path in (workdir, tmp_path / 'whole'))
  for path, want in others.items():
    np.testing.assert_allclose(ours[path], want, rtol=1e-3, atol=1e-4)
