"""The peak of resident memory is this program's own."""

import subprocess
import sys

import numpy as np

from vlm_compress import resident

LARGE = 600 * 2 ** 20


def test_a_program_does_not_start_at_the_peak_of_its_parent():
  block = np.ones(LARGE, np.uint8)
  assert resident.peak() >= LARGE
  child = subprocess.run(
      [sys.executable, '-c',
       'from vlm_compress import resident; print(resident.peak())'],
      capture_output=True, text=True, check=True)
  assert 0 < int(child.stdout) < LARGE / 2
  del block


def test_the_peak_starts_again():
  if not resident.restart_peak():
    return  # not Linux: nothing starts again, and callers are told
  before = resident.now()
  block = np.ones(LARGE // 6, np.uint8)
  del block
  assert LARGE // 6 * 0.9 <= resident.peak() - before <= LARGE // 2
  assert resident.restart_peak()
  assert resident.peak() - before <= LARGE // 12
