"""Launch scripts: syntax, dry runs, and what they hand to gcloud.

gcloud and vlm-compress are replaced by a script that writes down its
arguments, so nothing is created and nothing is trained.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from vlm_compress.cli import study
from vlm_compress.cli.train import load_module, load_page, override

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / 'launch').glob('*.sh'))
ARGUMENTS = {
    'tpu_create.sh': ['vm', 'zone-a'],
    'tpu_setup.sh': ['vm', 'zone-a'],
    'tpu_run.sh': ['vm', 'zone-a', 'configs/quickstart.py:instruct', 'runs/a',
                   'gs://b/w', '--config.train.seed=1'],
    'sweep_seeds.sh': ['runs'],
}
pytestmark = pytest.mark.skipif(shutil.which('bash') is None,
                                reason='bash is not installed')


@pytest.fixture
def launch(tmp_path):
  """Runs a script with recorded stand-ins for gcloud and vlm-compress.

  Gives (process, commands): commands are the argument lists that the
  stand-ins were called with.
  """
  record = tmp_path / 'record'
  fake = '#!/bin/sh\n{ basename "$0"; for a; do printf "%s\\0" "$a"; done; } '
  for name in ('gcloud', 'vlm-compress'):
    path = tmp_path / name
    path.write_text(f'{fake}> {shlex.quote(str(record))}.$$\n')
    path.chmod(0o755)

  def run(script, *arguments):
    for old in tmp_path.glob('record.*'):
      old.unlink()
    done = subprocess.run(
        ['bash', ROOT / 'launch' / script, *arguments], cwd=ROOT,
        env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}',
             'TMPDIR': str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=False)
    commands = []
    for path in tmp_path.glob('record.*'):
      program, _, rest = path.read_text().partition('\n')
      commands.append([program, *rest.split('\0')[:-1]])
    return done, sorted(commands)
  return run


def test_every_script_is_tested():
  assert set(SCRIPTS) == set(ARGUMENTS)


@pytest.mark.parametrize('script', SCRIPTS)
def test_script_follows_the_rules(script):
  path = ROOT / 'launch' / script
  subprocess.run(['bash', '-n', path], check=True)
  lines = path.read_text().splitlines()
  assert len(lines) < 60
  assert lines[0] == '#!/usr/bin/env bash' and 'set -euo pipefail' in lines
  assert f'#   launch/{script} [--dry-run]' in '\n'.join(lines[:6])
  assert path.stat().st_mode & 0o100, 'not executable'


@pytest.mark.parametrize('script', SCRIPTS)
def test_dry_run_prints_and_runs_nothing(script, launch):
  done, commands = launch(script, '--dry-run', *ARGUMENTS[script])
  assert done.returncode == 0, done.stderr
  assert commands == []
  program = 'vlm-compress' if script == 'sweep_seeds.sh' else 'gcloud'
  assert program in done.stdout


@pytest.mark.parametrize('script', ['tpu_create.sh', 'tpu_run.sh',
                                    'sweep_seeds.sh'])
def test_dry_run_shows_what_is_run(script, launch):
  shown, _ = launch(script, '--dry-run', *ARGUMENTS[script])
  done, commands = launch(script, *ARGUMENTS[script])
  assert done.returncode == 0, done.stderr
  assert commands and commands == sorted(
      shlex.split(line) for line in shown.stdout.splitlines())


@pytest.mark.parametrize('script', SCRIPTS)
def test_without_arguments_the_usage_is_shown(script, launch):
  done, commands = launch(script)
  assert done.returncode == 2 and commands == []
  assert f'launch/{script}' in done.stderr and '#!/' not in done.stderr


def test_create_passes_type_and_runtime(launch):
  _, commands = launch('tpu_create.sh', 'vm', 'z', 'v6e-4', 'image')
  assert commands == [['gcloud', 'compute', 'tpus', 'tpu-vm', 'create', 'vm',
                       '--zone=z', '--accelerator-type=v6e-4',
                       '--version=image']]


def test_run_trains_on_one_host_and_copies_the_result(launch):
  _, commands = launch('tpu_run.sh', 'vm', 'z', 'configs/a.py:tiny', 'runs/a b',
                       'gs://b/w/', '--config.atp.prune_after=(2, 4)')
  (command,) = commands
  assert '--worker=0' in command
  remote = command[-1].removeprefix('--command=')
  change, train, copy = remote.split(' && ')
  assert change == 'cd vlm_compress'
  assert shlex.split(train) == [
      '../vlm_env/bin/vlm-compress', 'train', '--config=configs/a.py:tiny',
      '--workdir=../runs/a b', '--config.atp.prune_after=(2, 4)']
  assert shlex.split(copy) == ['gcloud', 'storage', 'cp', '-r', '../runs/a b',
                               'gs://b/w/']


@pytest.mark.parametrize('workdir, bucket, wrong', [
    ('gs://b/w', 'gs://b/w', 'gs://b/w'), ('/runs', 'gs://b/w', '/runs'),
    ('runs/x', 'b/w', 'b/w')])
def test_run_refuses_a_remote_workdir_and_a_local_bucket(workdir, bucket, wrong,
                                                         launch):
  done, commands = launch('tpu_run.sh', 'vm', 'z', 'configs/a.py', workdir,
                          bucket)
  assert done.returncode == 2 and commands == []
  assert wrong in done.stderr and done.stderr.count('\n') == 1


def test_what_workers_run_at_setup_is_valid_shell(launch):
  done, _ = launch('tpu_setup.sh', '--dry-run', 'vm', 'z')
  # shlex does not know bash's $'...', bash does.
  printed = subprocess.run(
      ['bash', '-c', f'set -- {done.stdout.splitlines()[-1]}; '
       'printf %s "${!#}"'], capture_output=True, text=True, check=True).stdout
  remote = printed.removeprefix('--command=')
  assert 'pip install' in remote and 'jax[tpu]' in remote
  subprocess.run(['sh', '-n'], input=remote, text=True, check=True)


def test_setup_leaves_nothing_behind(launch, tmp_path):
  launch('tpu_setup.sh', '--dry-run', 'vm', 'z')
  assert {p.name for p in tmp_path.iterdir()} <= {'gcloud', 'vlm-compress'}


def test_sweep_runs_the_seeds_it_is_given(launch):
  done, commands = launch('sweep_seeds.sh', 'runs', 'configs/a.py', '3', '5')
  assert done.returncode == 0
  assert commands == [
      ['vlm-compress', 'study', '--config=configs/a.py', '--seeds', seed,
       '--allow-partial', '--workdir=runs'] for seed in ('3', '5')]


def test_sweep_refuses_a_seed_that_is_no_number(launch):
  done, commands = launch('sweep_seeds.sh', 'runs', 'configs/a.py', '1', 'x')
  assert done.returncode == 2 and commands == []
  assert "'x'" in done.stderr


# Configs and fields that scripts and README name ---------------------------

PAGE = re.compile(r'configs/\w+\.py(?::\w+)?')
FIELD = re.compile(r'--config\.[\w.]+=[^\s`\']+')
NAMED = '\n'.join([
    *((ROOT / 'launch' / name).read_text() for name in SCRIPTS),
    (ROOT / 'README.md').read_text(),
    *(argument for arguments in ARGUMENTS.values() for argument in arguments)])


@pytest.mark.parametrize('page', sorted(set(PAGE.findall(NAMED))))
def test_named_configs_exist(page, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert load_page(page).train.steps > 0


def test_named_fields_exist():
  flags = sorted(set(FIELD.findall(NAMED)))
  assert '--config.train.seed=1' in flags
  override(load_page(str(ROOT / 'configs/quickstart.py:instruct')), flags)


def test_sweep_calls_study_as_it_is(launch):
  _, (command, *_) = launch('sweep_seeds.sh', *ARGUMENTS['sweep_seeds.sh'])
  arguments = study.parser().parse_args(command[2:])
  assert arguments.seeds == [0] and arguments.allow_partial
  assert load_module(str(ROOT / arguments.config)).PLAN
