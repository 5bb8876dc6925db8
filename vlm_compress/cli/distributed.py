"""Several processes as one run: flags, start, and what is said when one dies."""

from __future__ import annotations

import argparse
import os
import sys

import jax

from vlm_compress.cli.arguments import number
from vlm_compress.config import ConfigError, check

_HEARTBEAT = 30  # seconds without a sign of life until a process counts as dead
_DETAILS = ('coordinator', 'num_processes', 'process_id')


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that `start` reads."""
  group = parser.add_argument_group(
      'several processes (hosts); each runs the same command')
  group.add_argument('--distributed', action='store_true',
                     help='find the others from the environment: TPU metadata, '
                     'Slurm, Kubernetes or Open MPI')
  group.add_argument('--coordinator', metavar='HOST:PORT',
                     help='of process 0, where nothing says so')
  group.add_argument('--num-processes', type=number(int, 1), metavar='N')
  group.add_argument('--process-id', type=number(int, 0), metavar='I')


def start(args: argparse.Namespace) -> None:
  """Joins the other processes; alone, it does nothing.

  Raises:
    ConfigError: some of the three details, but not all; or the others are not
      found.
  """
  given = [name for name in _DETAILS if getattr(args, name) is not None]
  flags = ', '.join(f'--{name.replace("_", "-")}' for name in _DETAILS)
  check(len(given) in (0, len(_DETAILS)), f'{flags} belong together; give all '
        'of them, or --distributed alone')
  if not given and not args.distributed:
    return
  if given:
    check(args.process_id < args.num_processes, f'--process-id={args.process_id}'
          f': less than --num-processes={args.num_processes}')
  # Of a CPU without an accelerator; others have their own.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  details = {'coordinator_address': args.coordinator,
             'num_processes': args.num_processes,
             'process_id': args.process_id} if given else {}
  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT, **details)
  except (RuntimeError, ValueError) as error:
    raise ConfigError(
        'the other processes are not found '
        f'({str(error).strip().splitlines()[0]}); name them: {flags}') from error


def is_one_of_several() -> bool:
  """Whether other processes have been joined."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def leave(code: int) -> None:
  """Ends this process of several at once, with a line; alone, it does nothing.

  What went wrong has been said.  The others cannot be waited for: one of them
  may be gone.
  """
  if not is_one_of_several():
    return
  print(f'process {jax.process_index()} of {jax.process_count()} stops, and the '
        'others with it. If one of them died, start all again: the run goes on '
        'from its newest checkpoint', file=sys.stderr, flush=True)
  os._exit(code)
