"""Several processes of one run on one disk: who goes first, what the others see."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm_compress import remote

_NETWORK_DISK_SECONDS = 30  # until a file of another host is seen, at most
Made = TypeVar('Made')


def first_alone(what: str, make: Callable[[], Made]) -> Made:
  """What `make` gives on every process; the first is done before others begin.

  So that what it leaves on a shared disk is there for them.

  Args:
    what: names the point at which they meet, such as 'the data are prepared'.
    make: called once.
  """
  first = jax.process_index() == 0
  if not first:
    multihost_utils.sync_global_devices(what)
  made = make()
  if first:
    multihost_utils.sync_global_devices(what)
  return made


def appears(path: remote.Path) -> bool:
  """Whether a file is there, or comes to be seen within the time that a shared
  disk may take to show what another host has written.
  """
  latest = time.monotonic() + _NETWORK_DISK_SECONDS
  while not path.exists() and time.monotonic() < latest:
    time.sleep(0.5)
  return path.exists()


def agreed(answer: bool) -> bool:
  """The first process's answer, for all: they must not take different ways."""
  return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))
