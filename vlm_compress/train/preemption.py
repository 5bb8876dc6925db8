"""A machine that is about to be taken away: finish the step, save, and go.

Schedulers announce it by SIGTERM.  With several processes all of them must
stop behind the same step, which jax's coordination service arranges; alone, a
flag is enough.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Preempted(BaseException):
  """Stopped on notice; nothing is lost.

  As KeyboardInterrupt, no error that anybody mends: whoever tries a file again
  after an Exception must not try again after this.
  """


@contextlib.contextmanager
def stops_at_once() -> Iterator[None]:
  """In front of the first step and behind the last one there is nothing to save:
  SIGTERM ends this process of its own there, at whatever line.

  Raises:
    Preempted: SIGTERM came.
  """
  def stop(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise Preempted('stopped on SIGTERM outside of the steps: no step is lost; '
                    'run the same command again to go on')
  before = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class Notice:
  """Listens for SIGTERM while it is entered.

  Attributes:
    alone: there is one process; with several, jax listens.
  """

  def __init__(self, alone: bool):
    self.alone, self._seen, self._before = alone, False, None

  def __enter__(self) -> Notice:
    # Python takes handlers in the main thread only.
    if self.alone and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._see)
    return self

  def __exit__(self, *_) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _see(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self._seen = True

  def reached(self, step: int) -> bool:
    """Whether to stop behind this step; to be asked behind every one."""
    if self.alone:
      return self._seen
    from jax.experimental import multihost_utils  # the command line needs no jax
    return multihost_utils.reached_preemption_sync_point(step)
