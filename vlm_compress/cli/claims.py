"""Which run a workdir belongs to: its settings, and what its data hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

from vlm_compress import remote
from vlm_compress.atomic import write_text
from vlm_compress.cli.together import appears
from vlm_compress.cli.workspace import Message
from vlm_compress.config import ConfigError, check
from vlm_compress.train.checkpoint import claim_workdir

CONTENT = 'data_fingerprint'  # in config.json: what the data hold


def claim(workdir: remote.Path, settings: dict[str, Any], content: str,
          allow_change: bool = False) -> list[str]:
  """Marks a directory as a run's, by its settings and what its data hold.

  One that was marked before data were part of it is taken to have had these.

  Args:
    workdir, settings, allow_change: see `claim_workdir`.
    content: fingerprint of the data.

  Returns:
    Lines for the user.

  Raises:
    ConfigError: it is another run's, or this one's on other data.
  """
  mark, known = workdir / 'config.json', {**settings, CONTENT: content}
  older = mark.exists() and f'"{CONTENT}"' not in mark.read_text()
  try:
    changes = claim_workdir(workdir, settings if older else known, allow_change)
  except ConfigError as error:
    raise ConfigError(str(error) + (
        f'. {CONTENT} says that rows or pictures of the data are others than '
        'when it began' if CONTENT in str(error) else '')) from error
  lines = [f'config changed: {change}' for change in changes]
  if older:
    write_text(mark, json.dumps(known, indent=1, sort_keys=True))
    lines.append(f'{mark} did not say which data the run began with; it goes on '
                 'with these, and from now on they must stay the same')
  return lines


def claim_together(workdir: remote.Path, settings: Callable[[], dict[str, Any]],
                   content: str, allow_change: bool, message: Message) -> None:
  """Marks a directory as this run's; every process must see the mark.

  Args:
    workdir, content, allow_change: see `claim`.
    settings: called by the first process only.
    message: called with lines for the user.

  Raises:
    ConfigError: it is another run's, or on a disk of one host of several.
  """
  if jax.process_index() == 0:
    for line in claim(workdir, settings(), content, allow_change):
      message(line)
  multihost_utils.sync_global_devices('the workdir is claimed')
  check(appears(workdir / 'config.json'), f'--workdir={workdir}: process {jax.process_index()} '
        'does not see what process 0 wrote there; name a folder on a disk that '
        'all hosts share')
