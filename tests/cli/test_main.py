"""The command line: dispatch, help, and one line for each kind of mistake."""

from __future__ import annotations

import errno
import os
import pathlib
import subprocess
import sys

import pytest

import vlm_compress
from vlm_compress.cli import __main__ as cli
from vlm_compress.config import ConfigError
from vlm_compress.data.errors import DataError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def command(monkeypatch):
  """Replaces `train` by a function that raises or returns what it is given."""
  def install(result):
    def run(argv):
      run.argv = argv
      if isinstance(result, BaseException):
        raise result
      return result
    monkeypatch.setitem(cli.COMMANDS, 'train', run)
    return run
  return install


def stderr_line(capsys) -> str:
  """The only line on stderr; stdout must be empty."""
  captured = capsys.readouterr()
  assert captured.out == ''
  assert captured.err.endswith('\n') and captured.err.count('\n') == 1
  return captured.err.strip()


@pytest.mark.parametrize('word', ['--help', '-h', 'help'])
def test_help_lists_every_command_on_one_line(word, capsys):
  assert cli.main([word]) == 0
  lines = capsys.readouterr().out.splitlines()
  for name, function in cli.COMMANDS.items():
    assert [l for l in lines if l.split()[:1] == [name]] == [
        l for l in lines if l.strip().startswith(f'{name} ')]
    assert '\n' not in function.__doc__
    assert sum(function.__doc__ in line for line in lines) == 1
  assert max(map(len, lines)) <= 80


def test_commands_are_the_documented_ones():
  assert set(cli.COMMANDS) == {'quickstart', 'train', 'evaluate', 'generate',
                               'compress', 'calibrate', 'benchmark', 'study',
                               'convert', 'export', 'prepare-data',
                               'compile', 'score', 'compare', 'sweep'}


def test_without_a_command_the_usage_goes_to_stderr(capsys):
  assert cli.main([]) == 2
  captured = capsys.readouterr()
  assert captured.out == '' and captured.err.startswith('usage: ')


def test_version(capsys):
  assert cli.main(['--version']) == 0
  assert capsys.readouterr().out == f'vlm-compress {vlm_compress.__version__}\n'


def test_arguments_and_exit_code_pass_through(command):
  run = command(7)
  assert cli.main(['train', '--config=a.py', 'b']) == 7
  assert run.argv == ['--config=a.py', 'b']


def test_arguments_of_the_process_are_the_default(command, monkeypatch):
  run = command(0)
  monkeypatch.setattr(sys, 'argv', ['vlm-compress', 'train', 'x'])
  assert cli.main() == 0 and run.argv == ['x']


@pytest.mark.parametrize('word, hint', [
    ('trian', 'did you mean train?'),
    ('quick-start', 'did you mean quickstart?'),
    ('zzz', 'use one of quickstart, train, evaluate, compare, sweep, score, generate, '
     'compress, calibrate, benchmark, study, convert, export, prepare-data, '
     'compile'),
])
def test_unknown_command_gets_a_suggestion(word, hint, capsys):
  assert cli.main([word]) == 2
  assert stderr_line(capsys) == f'error: unknown command {word!r}: {hint}'


@pytest.mark.parametrize('error, line', [
    (ConfigError('atp.scores=1:\n  use both'), 'atp.scores=1: use both'),
    (DataError('a.json: row 3 has no answer'), 'a.json: row 3 has no answer'),
    (FileNotFoundError(errno.ENOENT, 'No such file or directory', 'x/cfg.py'),
     'x/cfg.py: No such file or directory'),
    (FileNotFoundError('no checkpoint in w'), 'no checkpoint in w'),
    (PermissionError(errno.EACCES, 'Permission denied', 'w/log'),
     'w/log: Permission denied'),
    (NotADirectoryError(errno.ENOTDIR, 'Not a directory', 'w/x'),
     'w/x: Not a directory'),
    (FileExistsError(errno.EEXIST, 'File exists', 'w'),
     'w is a file where a directory is needed: remove it or name another '
     'directory'),
    (OSError(errno.EROFS, 'Read-only file system', 'w/log'),
     'w/log: Read-only file system'),
])
def test_mistakes_of_the_user_become_one_line(error, line, command, capsys):
  command(error)
  assert cli.main(['train']) == 2
  assert stderr_line(capsys) == f'error: {line}'


@pytest.mark.parametrize('argv, words', [
    (['train'], ['--config', '--workdir', 'required']),
    (['train', '--config=no.py', '--workdir=w', '--confg=1'],
     ['no.py', 'does not exist']),
    (['evaluate', '--config=x.py'], ['--checkpoint', 'required']),
    (['evaluate', '--config=x.py', '--checkpoint=c', '--method=vocoo'],
     ['--method', 'vocoo']),
    (['evaluate', '--config=x.py', '--checkpoint=c', '--num-voco-tokens=0'],
     ['--num-voco-tokens', "'0'", '>= 1']),
    (['evaluate', '--config=x.py', '--checkpoint=c', '--seed=-1'],
     ['--seed', '>= 0']),
    (['generate'], ['--prompt', '--interactive', 'required', '--help']),
    *[(['generate', '--image=i', '--prompt=p', flag], words) for flag, words in
      [('--max-new-tokens=0', ['--max-new-tokens', '>= 1']),
       ('--max-new-tokens=2.5', ["'2.5'", 'a whole number']),
       ('--top-p=0', ['--top-p', '> 0 and <= 1']),
       ('--top-p=1.5', ['--top-p', '> 0 and <= 1']),
       ('--temperature=-1', ['--temperature', '>= 0']),
       ('--temperature=nan', ['--temperature', "'nan'"]),
       ('--num-voco-tokens=0', ['--num-voco-tokens', '>= 1']),
       ('--imag', ['--imag'])]],
    (['convert', '--from=a', '--llm=b', '--to=c'], ['not allowed with']),
    (['convert', '--llm=a', '--to=c'], ['--vision']),
    (['convert', '--from=a', '--to=c'], ['a is no directory']),
    (['export', '--from=a', '--to=c'], ['a/config.json', 'does not exist']),
    (['export', '--from=a', '--to=c', '--format=gguf'], ['gguf', 'hf']),
    (['generate', '--image=i', '--prompt=p', '--seed=9999999999'], ['--seed']),
    (['generate', '--image=i', '--prompt=p'],
     ['quickstart/atp/model', 'config.json']),  # the default checkpoint
])
def test_mistakes_in_arguments_are_one_line_without_usage(
    argv, words, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.main(argv) == 2
  line = stderr_line(capsys)
  assert 'usage' not in line and all(word in line for word in words), line


def test_help_of_a_command_shows_its_usage(capsys):
  with pytest.raises(SystemExit) as caught:
    cli.main(['generate', '--help'])
  assert caught.value.code == 0
  assert capsys.readouterr().out.startswith('usage: vlm-compress generate')


@pytest.mark.parametrize('error, argv, where', [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'w/ckpt'), [], 'w/ckpt'),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
     ['--workdir', 'w1'], 'w1'),
    (OSError(errno.EDQUOT, 'quota'), ['--workdir=w2', '--seed=1'], 'w2'),
    (ValueError('UNKNOWN: write: No space left on device [code 28]'),
     ['--workdir'], 'the working directory'),
])
def test_full_disk_names_the_place_and_the_remedy(error, argv, where, command,
                                                  capsys):
  command(error)
  assert cli.main(['train', *argv]) == 2
  line = stderr_line(capsys)
  assert line.startswith(
      f'error: no space left on device while writing {where}: ')
  assert 'free some space' in line and '--workdir' in line


def test_full_disk_is_found_behind_another_error(command, capsys):
  error = RuntimeError('could not save')
  error.__cause__ = OSError(errno.ENOSPC, 'full', 'w/ckpt')
  command(error)
  assert cli.main(['train']) == 2
  assert 'w/ckpt' in stderr_line(capsys)


def test_missing_package_names_its_extra(command, capsys):
  command(ModuleNotFoundError("No module named 'PIL.Image'", name='PIL.Image'))
  assert cli.main(['train']) == 2
  line = stderr_line(capsys)
  assert 'pillow' in line and "pip install -e '.[demo]'" in line


def test_extras_named_in_messages_exist_in_setup():
  text = (ROOT / 'setup.py').read_text()
  for package, extra in cli.EXTRAS.values():
    block = text.split(f'\n{extra.upper().replace("-", "_")} = [')[1]
    assert f"'{package}" in block.split('\n]')[0], (package, extra)


@pytest.mark.parametrize('error', [
    ValueError('a bug'), OSError(errno.EIO, 'disk broken'),
    ModuleNotFoundError("No module named 'nonsense'", name='nonsense'),
    ModuleNotFoundError('no name')])
def test_bugs_keep_their_traceback(error, command):
  command(error)
  with pytest.raises(type(error)) as caught:
    cli.main(['train'])
  assert caught.value is error


def test_interrupt_is_130(command, capsys):
  command(KeyboardInterrupt())
  assert cli.main(['train']) == 130
  assert stderr_line(capsys) == 'interrupted'


def test_exit_of_a_command_passes_through(command):
  command(SystemExit(2))
  with pytest.raises(SystemExit):
    cli.main(['train'])


def test_runs_as_a_module_and_help_needs_no_jax():
  blocked = 'import sys; sys.modules["jax"] = None; '
  done = subprocess.run(
      [sys.executable, '-c', blocked + 'import runpy; '
       'sys.argv = ["vlm-compress", "--help"]; '
       'runpy.run_module("vlm_compress.cli", run_name="__main__")'],
      cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('usage: ')
