"""A pool of processes that do jobs, and end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

from vlm_compress.data.errors import DataError


def run(function: Callable[[Any], Any], jobs: Iterable[Any], workers: int
        ) -> Iterator[Any]:
  """Gives function(job) of every job, in the order in which they are done.

  Jobs are taken from the iterable as processes become free, so that few of
  them are in memory.

  Args:
    function: of a module, so that another process finds it by its name.
    jobs: what it is called with.
    workers: number of processes; 1 calls the function here.

  Raises:
    DataError: a process was killed, for example for want of memory.
    Exception: what the function raises.
  """
  if workers == 1:
    yield from map(function, jobs)
    return
  # A fork would copy the threads of jax and of the bar in an unknown state.
  context = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(workers, mp_context=context,
                                   initializer=_start) as pool:
    pending: set[futures.Future] = set()
    try:
      for job in jobs:
        pending.add(pool.submit(function, job))
        if len(pending) >= 2 * workers:
          done, pending = futures.wait(
              pending, return_when=futures.FIRST_COMPLETED)
          yield from (future.result() for future in done)
      yield from (future.result() for future in futures.as_completed(pending))
    except futures.process.BrokenProcessPool as e:
      raise DataError('a worker process died, perhaps for want of memory; run '
                      'the command again with fewer --workers') from e
    finally:
      for future in pending:
        future.cancel()


def _start() -> None:
  """Ctrl-C is handled by the parent; without a parent there is no more work.

  A killed parent closes nothing, and its workers would wait for jobs for ever.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def follow() -> None:
    parent.join()
    os._exit(1)
  threading.Thread(target=follow, daemon=True).start()
