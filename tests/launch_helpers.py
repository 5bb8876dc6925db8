"""Launch scripts run with stand-ins for gcloud, kubectl, Slurm and the rest.

A stand-in writes down its arguments; nothing is created and nothing is trained.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = ('gcloud', 'git', 'kubectl', 'scontrol', 'sleep', 'squeue', 'srun',
            'vlm-compress')
_END, _BETWEEN = '\036', '\037'
_RECORD = r'''#!/bin/bash
line=${0##*/}
for word; do line+=$'\037'$word; done
printf '%s\036' "$line" >>"$RECORD"
'''


class Stage:
  """A folder with stand-ins, and what they were called with.

  Attributes:
    bin: the stand-ins; first in PATH.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder, self.bin = folder, folder / 'bin'
    self._record = folder / 'record'
    self.bin.mkdir()
    for name in PROGRAMS:
      self.program(name, '')

  def program(self, name: str, script: str) -> None:
    """Makes a program that records its arguments and then runs a script."""
    path = self.bin / name
    path.write_text(_RECORD + script + '\n')
    path.chmod(0o755)

  def environment(self, **variables: str) -> dict[str, str]:
    """The environment of the scripts."""
    return {**os.environ, 'PATH': f'{self.bin}:{os.environ["PATH"]}',
            'RECORD': str(self._record), 'TMPDIR': str(self._folder),
            'STAGE': str(self._folder), 'PORT': '29999', 'SLURM_JOB_ID': '7',
            **variables}

  def bash(self, *words: str | pathlib.Path, cwd: pathlib.Path = ROOT,
           **variables: str
           ) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """Runs bash; gives the process and the calls of stand-ins in their order."""
    self._record.write_text('')
    done = subprocess.run(
        ['bash', *words], cwd=cwd, env=self.environment(**variables),
        capture_output=True, text=True, timeout=60, check=False)
    return done, self.calls()

  def launch(self, script: str, *words: str, **variables: str
             ) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """Runs a script of launch/, as `bash` does."""
    return self.bash(ROOT / 'launch' / script, *words, **variables)

  def calls(self) -> list[list[str]]:
    """What stand-ins were called with; temporary folders have one name."""
    calls = self._record.read_text().split(_END)[:-1]
    return [[re.sub(r'/tmp\.\w+', '/scratch', word) for word in
             call.split(_BETWEEN)] for call in calls]
