"""Runs that are killed, crowded out or left alone, as processes of their own.

All slow: a process takes seconds to start.  What can be tried in one process is
in test_loop.py.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import resource
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module', name='cache')
def fixture_cache(tmp_path_factory):
  """Compiled programs are kept: what is tested is not the compiler."""
  return tmp_path_factory.mktemp('programs')


@pytest.fixture(name='start')
def fixture_start(cache):
  """start(workdir, *arguments, devices=, before=) -> process of small_run.py."""
  running = []

  def start(workdir, *arguments, devices=1, before=None):
    process = subprocess.Popen(
        [sys.executable, ROOT / 'tests/train/small_run.py', workdir,
         *map(str, arguments)], cwd=ROOT, text=True, preexec_fn=before,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, 'PYTHONPATH': str(ROOT),
             'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
             'JAX_COMPILATION_CACHE_DIR': str(cache),
             'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'})
    running.append(process)
    return process
  yield start
  for process in running:
    process.kill()
    process.wait()


def finish(process, code=0, timeout=120):
  """What it prints until its end."""
  text, _ = process.communicate(timeout=timeout)
  assert process.returncode == code, text
  return text


def metrics(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_killed_at_random_moments(start, tmp_path):
  steps = 400
  finish(start(tmp_path / 'whole', steps))
  workdir, random_ = tmp_path / 'killed', random.Random(0)
  for _ in range(20):
    process, seen = start(workdir, steps), 0
    # somewhere in loading, compiling, training or writing
    limit = random_.choice([1, 1 + random_.randrange(30)])
    while seen < limit:
      line = process.stdout.readline()
      assert line and 'done' not in line, line
      seen += line.startswith(('resumed', 'batch'))
    time.sleep(random_.random() * 0.05)
    process.kill()
    process.communicate()
  assert 'resumed' in finish(start(workdir, steps))
  np.testing.assert_array_equal(np.load(workdir / 'params.npy'),
                                np.load(tmp_path / 'whole' / 'params.npy'))
  assert metrics(workdir) == metrics(tmp_path / 'whole')


def test_a_notice_from_outside(start, tmp_path):
  process = start(tmp_path / 'a', 2000)
  while 'batch 20' not in process.stdout.readline():
    pass
  process.send_signal(signal.SIGTERM)
  text = finish(process)
  assert 'stopped on SIGTERM: a checkpoint of step' in text and 'done' not in text


def test_a_full_disk(start, tmp_path):
  """Files cannot grow beyond a few kilobytes; then there is room again."""
  finish(start(tmp_path / 'whole'))
  limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
  process = start(tmp_path / 'a', before=limit)
  text, _ = process.communicate(timeout=120)
  assert process.returncode != 0
  assert 'a checkpoint cannot be written' in text and 'space' in text, text
  finish(start(tmp_path / 'a'))
  np.testing.assert_array_equal(np.load(tmp_path / 'a' / 'params.npy'),
                                np.load(tmp_path / 'whole' / 'params.npy'))


def port():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return free.getsockname()[1]


def test_two_processes_are_one(start, tmp_path):
  """2 x 2 devices as 1 x 4; test_command_faults.py has one that dies."""
  finish(start(tmp_path / 'one', devices=4))
  where = port()
  pair = [start(tmp_path / 'two', 7, 2, i, where, devices=2) for i in range(2)]
  for process in pair:
    finish(process)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  want = np.load(tmp_path / 'one' / 'params.npy')
  close(np.load(tmp_path / 'two' / 'params.npy'), want)
  for a, b in zip(metrics(tmp_path / 'two'), metrics(tmp_path / 'one'), strict=True):
    close(a['loss'], b['loss'])


def test_a_notice_stops_all_behind_the_same_step(start, tmp_path):
  where = port()
  pair = [start(tmp_path / 'two', 2000, 2, i, where, devices=2) for i in range(2)]
  while 'batch 20' not in pair[0].stdout.readline():
    pass
  pair[1].send_signal(signal.SIGTERM)
  texts = [finish(process) for process in pair]
  said = [next(line for line in text.splitlines() if 'stopped on SIGTERM' in line)
          for text in texts]
  assert said[0] == said[1]
