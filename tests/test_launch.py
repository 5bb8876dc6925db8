"""Launch scripts: their form, dry runs, and what they hand to gcloud."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from launch_helpers import ROOT, Stage

from vlm_compress.cli import prepare_data, study, sweep
from vlm_compress.cli import train as train_command
from vlm_compress.cli.train import load_module, load_page, override

SCRIPTS = sorted(path.name for path in (ROOT / 'launch').glob('*.sh'))
CONFIG = 'configs/quickstart.py:instruct'
RUN = [CONFIG, 'shared/runs/a', 'gs://b/w', '--config.train.seed=1']
ARGUMENTS = {
    'gke_run.sh': ['--spot', 'job', 'registry/image:1', 'tpu-v5-lite-podslice',
                   '4x8', '2', 'disk', CONFIG, 'runs/a', '--config.train.seed=1'],
    'local_processes.sh': ['2', f'--config={CONFIG}', '--workdir=runs/a b'],
    'prepare_data.sh': ['a.json', 'images', 'out', '--workers', '4'],
    'slurm_train.sh': [CONFIG, 'no such/a', '--config.train.seed=1'],
    'sweep_seeds.sh': ['runs'],
    'sweep_tiny.sh': ['sweeps/a b'],
    'tpu_create.sh': ['vm', 'zone-a'],
    'tpu_queue.sh': ['--spot', 'q', 'zone-a', 'v5litepod-16', '2'],
    'tpu_run.sh': ['--queued', 'vm', 'zone-a', *RUN],
    'tpu_setup.sh': ['--queued', 'vm', 'zone-a', '10.0.0.2:/share'],
    'tpu_spot.sh': ['q', 'zone-a', 'v5litepod-16', '2', '10.0.0.2:/share', *RUN],
}
pytestmark = pytest.mark.skipif(shutil.which('bash') is None,
                                reason='bash is not installed')


@pytest.fixture
def stage(tmp_path):
  return Stage(tmp_path)


def test_every_script_is_tested():
  assert set(SCRIPTS) == set(ARGUMENTS)


@pytest.mark.parametrize('script', SCRIPTS)
def test_script_follows_the_rules(script):
  path = ROOT / 'launch' / script
  subprocess.run(['bash', '-n', path], check=True)
  lines = path.read_text().splitlines()
  assert len(lines) < 60
  assert lines[0] == '#!/usr/bin/env bash' and 'set -euo pipefail' in lines
  assert f'launch/{script} [--dry-run]' in '\n'.join(lines[:6])
  assert path.stat().st_mode & 0o100, 'not executable'


def test_shellcheck_has_nothing_to_say():
  # beside this Python, which need not be on the path
  program = shutil.which('shellcheck', path=os.pathsep.join(
      [os.path.dirname(sys.executable), os.environ['PATH']]))
  if program is None:
    pytest.skip('shellcheck is not installed (extra [test])')
  done = subprocess.run([program, '--shell=bash', *SCRIPTS], cwd=ROOT / 'launch',
                        capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('script', SCRIPTS)
def test_dry_run_prints_exactly_what_is_run(script, stage):
  """What is printed, given to a shell, calls the same programs."""
  shown, calls = stage.launch(script, '--dry-run', *ARGUMENTS[script])
  assert shown.returncode == 0, shown.stderr
  assert calls == []
  _, printed = stage.bash('-c', shown.stdout)
  assert printed
  if script == 'tpu_spot.sh':  # what it does depends on what it finds
    return
  done, calls = stage.launch(script, *ARGUMENTS[script])
  calls = [call for call in calls if call[0] not in ('sleep', 'squeue')]
  assert done.returncode == 0, done.stderr
  assert sorted(calls) == sorted(printed)


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('words, code', [([], 2), (['-h'], 0), (['--no'], 2)])
def test_usage_is_shown(script, words, code, stage):
  done, calls = stage.launch(script, *words)
  assert done.returncode == code and calls == []
  assert f'launch/{script}' in done.stderr and '#!/' not in done.stderr
  assert 'set -euo' not in done.stderr and 'SBATCH' not in done.stderr


@pytest.mark.parametrize('script, words, wrong', [
    ('tpu_run.sh', ['vm', 'z', CONFIG, 'gs://b', 'gs://b/w'], 'gs://b'),
    ('tpu_run.sh', ['vm', 'z', CONFIG, 's3://b/w', 'gs://b/w'], 's3://b/w'),
    ('slurm_train.sh', [CONFIG, 'gs://b/w'], 'gs://b/w'),
    ('tpu_run.sh', ['vm', 'z', CONFIG, '/runs', 'gs://b/w'], '/runs'),
    ('tpu_run.sh', ['vm', 'z', CONFIG, 'runs/x', 'b/w'], 'b/w'),
    ('tpu_queue.sh', ['q', 'z', 'v6e-8', '0'], 'SLICES 0'),
    ('tpu_spot.sh', ['q', 'z', 'v6e-8', '1', 's:/d', CONFIG, 'runs/a', 'gs://b'],
     'runs/a'),
    ('gke_run.sh', ['Job', 'i', 'a', '4x8', '1', 'c', CONFIG, 'r'], 'Job'),
    ('gke_run.sh', ['job', 'i', 'a', '48', '1', 'c', CONFIG, 'r'], '48'),
    ('gke_run.sh', ['job', 'i', 'a', '3x3', '1', 'c', CONFIG, 'r'], '3x3'),
    ('gke_run.sh', ['job', 'i', 'a', '4x8', 'x', 'c', CONFIG, 'r'], 'SLICES x'),
    ('gke_run.sh', ['job', 'i', 'a', '4x8', '1', 'c', CONFIG, 'gs://r'], 'gs://r'),
    ('local_processes.sh', ['two', '--config=a'], 'two'),
    ('sweep_seeds.sh', ['runs', 'configs/a.py', '1', 'x'], "'x'")])
def test_mistakes_are_one_line(script, words, wrong, stage):
  done, calls = stage.launch(script, *words)
  assert done.returncode == 2 and calls == []
  assert wrong in done.stderr and done.stderr.count('\n') == 1


# TPUs ---------------------------------------------------------------------


def test_create_passes_type_and_runtime(stage):
  _, calls = stage.launch('tpu_create.sh', 'vm', 'z', 'v6e-4', 'image')
  assert calls == [['gcloud', 'compute', 'tpus', 'tpu-vm', 'create', 'vm',
                    '--zone=z', '--accelerator-type=v6e-4', '--version=image']]


@pytest.mark.parametrize('script', ['tpu_create.sh', 'tpu_queue.sh'])
@pytest.mark.parametrize('kind, runtime', [
    ('v4-8', 'tpu-ubuntu2204-base'), ('v5litepod-8', 'v2-alpha-tpuv5-lite'),
    ('v5p-128', 'v2-alpha-tpuv5'), ('v6e-256', 'v2-alpha-tpuv6e'), ('v9x-8', None)])
def test_runtime_follows_the_type(script, kind, runtime, stage):
  done, calls = stage.launch(script, 'q', 'z', kind)
  if runtime is None:
    assert done.returncode == 2 and not calls and 'RUNTIME' in done.stderr
  else:
    assert f'version={runtime}' in ' '.join(calls[0])


@pytest.mark.parametrize('words, nodes', [
    ([], ['--node-id=q']), (['1'], ['--node-id=q']),
    (['3'], ['--node-count=3', '--node-prefix=q'])])
def test_queue_asks_for_slices(words, nodes, stage):
  _, calls = stage.launch('tpu_queue.sh', 'q', 'z', 'v6e-8', *words)
  assert calls == [[
      'gcloud', 'compute', 'tpus', 'queued-resources', 'create', 'q', '--zone=z',
      '--accelerator-type=v6e-8', '--runtime-version=v2-alpha-tpuv6e', *nodes]]


def test_paths_are_below_the_shared_disk(stage):
  command, home = hosts_command(
      stage, 0, CONFIG, 'shared/runs/a', 'gs://b/w', '--data-root=data')
  program = home / 'vlm_env/bin/vlm-compress'
  program.write_text('#!/bin/bash\npwd; printf "<%s>\\n" "$@"\n')
  program.chmod(0o755)
  done, _ = stage.bash('-c', command, cwd=home, HOSTNAME='w-1')
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [f'w-1: {x}' for x in (
      home / 'shared', '<train>', '<--distributed>',
      f'<--config=../vlm_compress/{CONFIG}>', '<--workdir=runs/a>',
      '<--data-root=data>')]
  copy, _ = hosts_command(stage, 2, CONFIG, 'shared/runs/a', 'gs://b/w')
  assert 'test -e shared/runs/a/model/config.json' in copy


@pytest.mark.parametrize('queued', [False, True])
def test_run_trains_on_all_hosts_at_once(queued, stage):
  _, calls = stage.launch('tpu_run.sh', *['--queued'] * queued, 'vm', 'z', *RUN)
  train, logs, copy = calls
  kind = 'queued-resources' if queued else 'tpu-vm'
  for call in calls:
    assert call[:7] == ['gcloud', 'compute', 'tpus', kind, 'ssh', 'vm', '--zone=z']
  everywhere = ['--worker=all', '--batch-size=all', *['--node=all'] * queued]
  assert train[7:-1] == logs[7:-1] == everywhere
  assert copy[7:-1] == ['--worker=0']


def hosts_command(stage, number, *words):
  """Command of call `number` of tpu_run.sh, and a home that it can run in."""
  _, calls = stage.launch('tpu_run.sh', 'vm', 'z', *words)
  home = stage.bin.parent / 'home'
  (home / 'vlm_env' / 'bin').mkdir(parents=True, exist_ok=True)
  (home / 'shared').mkdir(exist_ok=True)
  return calls[number][-1].removeprefix('--command='), home


def test_a_host_trains_with_a_log_and_gives_its_exit_code(stage):
  command, home = hosts_command(
      stage, 0, CONFIG, 'runs/a b', 'gs://b/w', '--config.atp.prune_after=(2, 4)')
  program = home / 'vlm_env/bin/vlm-compress'
  program.write_text('#!/bin/bash\nprintf "<%s>\\n" "$@"; echo bad >&2; exit 3\n')
  program.chmod(0o755)
  done, _ = stage.bash('-c', command, cwd=home, HOSTNAME='w-1')
  assert done.returncode == 3, done.stderr
  lines = ['<train>', '<--distributed>', f'<--config=vlm_compress/{CONFIG}>',
           '<--workdir=runs/a b>', '<--config.atp.prune_after=(2, 4)>', 'bad']
  assert sorted(done.stdout.splitlines()) == sorted(f'w-1: {x}' for x in lines)
  log = home / 'vlm_logs/w-1.log'
  assert sorted(log.read_text().splitlines()) == sorted(lines)
  parser = train_command.parser()
  args, rest = parser.parse_known_args([x[1:-1] for x in lines[1:-1]])
  assert args.distributed and rest == ['--config.atp.prune_after=(2, 4)']


def test_training_that_is_left_over_saves_before_the_next_begins(stage):
  command, home = hosts_command(stage, 0, *RUN)
  program = home / 'vlm_env/bin/vlm-compress'
  program.write_text(
      '#!/bin/bash\n'
      'if [[ -e first ]]; then echo second >>order; exit; fi\n'
      'trap "echo saved >>order; exit" TERM; touch first\n'
      'while true; do command -p sleep 0.1; done\n')
  program.chmod(0o755)
  environment = stage.environment(HOSTNAME='w-0')
  with subprocess.Popen(['bash', '-c', command], cwd=home, env=environment,
                        stdout=subprocess.DEVNULL) as first:
    until = time.monotonic() + 20
    while not (home / 'shared/first').exists() and time.monotonic() < until:
      time.sleep(0.05)
    stage.program('sleep', 'command -p sleep 0.1')
    done, _ = stage.bash('-c', command, cwd=home, HOSTNAME='w-0')
    assert done.returncode == 0 and first.wait(20) == 0
  assert (home / 'shared/order').read_text().split() == ['saved', 'second']


def test_the_result_is_copied_when_there_is_one(stage):
  command, home = hosts_command(stage, 2, CONFIG, 'runs/a b', 'gs://b/w/')
  done, calls = stage.bash('-c', command, cwd=home)
  assert done.returncode == 3 and calls == []
  assert 'run it again to resume' in done.stderr
  (home / 'runs/a b/model').mkdir(parents=True)
  (home / 'runs/a b/model/config.json').touch()
  done, (copy,) = stage.bash('-c', command, cwd=home)
  assert done.returncode == 0
  assert copy == ['gcloud', 'storage', 'rsync', '-r',
                  '--exclude=^(damaged_)?checkpoints/.*', 'runs/a b', 'gs://b/w/a b']
  assert re.match(copy[4].partition('=')[2], 'checkpoints/4/state')
  assert not re.match(copy[4].partition('=')[2], 'model/config.json')


def test_a_workdir_on_gs_needs_no_copy(stage):
  words = (CONFIG, 'gs://c/r/a b/', 'gs://b/w', '--data-root=data')
  command, home = hosts_command(stage, 0, *words)
  program = home / 'vlm_env/bin/vlm-compress'
  program.write_text('#!/bin/bash\npwd; printf "<%s>\\n" "$@"\n')
  program.chmod(0o755)
  done, _ = stage.bash('-c', command, cwd=home, HOSTNAME='w-1')
  assert done.stdout.splitlines() == [f'w-1: {x}' for x in (
      home, '<train>', '<--distributed>', f'<--config=vlm_compress/{CONFIG}>',
      '<--workdir=gs://c/r/a b>', '<--data-root=data>')]
  assert 'gs://b/w/a\\ b/logs/' in hosts_command(stage, 1, *words)[0]
  command, _ = hosts_command(stage, 2, *words)
  done, calls = stage.bash('-c', command, cwd=home)
  assert done.returncode == 0, done.stderr
  assert calls == [['gcloud', 'storage', 'ls', 'gs://c/r/a b/model/config.json']]
  stage.program('gcloud', 'exit 1')
  done, _ = stage.bash('-c', command, cwd=home)
  assert done.returncode == 3 and 'run it again to resume' in done.stderr


def test_failed_training_copies_logs_and_no_result(stage):
  stage.program('gcloud', '[[ ${*: -1} != *--distributed* ]] || exit 5')
  done, calls = stage.launch('tpu_run.sh', 'vm', 'z', *RUN)
  assert done.returncode == 5 and len(calls) == 2
  assert 'vlm_logs' in calls[1][-1] and 'gs://b/w/a/logs/' in calls[1][-1]
  assert 'run it again to resume' in done.stderr


def test_what_hosts_run_at_setup_is_valid_shell(stage):
  _, calls = stage.launch('tpu_setup.sh', 'vm', 'z', "10.0.0.2:/o'dd share")
  archive, copy, install = calls
  assert archive[0] == 'git' and copy[4] == 'scp' and install[4] == 'ssh'
  for call in (copy, install):
    assert '--worker=all' in call and '--node=all' not in call
  remote = install[-1].removeprefix('--command=')
  assert 'pip install' in remote and 'jax[tpu]' in remote
  subprocess.run(['bash', '-n'], input=remote, text=True, check=True)
  first = remote.splitlines()[0]
  share = subprocess.run(['bash', '-c', f'{first}\nprintf %s "$share"'],
                         capture_output=True, text=True, check=True).stdout
  assert share == "10.0.0.2:/o'dd share"


def test_setup_leaves_nothing_behind(stage, tmp_path):
  stage.launch('tpu_setup.sh', '--dry-run', 'vm', 'z')
  assert {p.name for p in tmp_path.iterdir()} == {'bin', 'record'}


# Seeds, data --------------------------------------------------------------


def test_sweep_runs_the_seeds_it_is_given(stage):
  done, calls = stage.launch('sweep_seeds.sh', 'runs', 'configs/a.py', '3', '5')
  assert done.returncode == 0
  assert calls == [
      ['vlm-compress', 'study', '--config=configs/a.py', '--seeds', seed,
       '--allow-partial', '--workdir=runs'] for seed in ('3', '5')]


def test_sweep_calls_study_as_it_is(stage):
  _, (call, *_) = stage.launch('sweep_seeds.sh', *ARGUMENTS['sweep_seeds.sh'])
  arguments = study.parser().parse_args(call[2:])
  assert arguments.seeds == [0] and arguments.allow_partial
  assert load_module(str(ROOT / arguments.config)).PLAN


def test_the_tiny_sweep_trains_and_evaluates_what_it_trains(stage, monkeypatch):
  _, calls = stage.launch('sweep_tiny.sh', *ARGUMENTS['sweep_tiny.sh'])
  *trained, (_, command, *words) = calls
  monkeypatch.chdir(ROOT)
  args, flags = sweep.parser().parse_known_args(words)
  page = load_page(args.config)
  override(page, flags)
  assert command == 'sweep' and list(page.seeds) == [0, 1, 2]
  made = set()
  for _, command, *words in trained:
    assert command == 'train'
    args, flags = train_command.parser().parse_known_args(words)
    config = load_page(args.config)
    override(config, flags)
    start = config.init_from  # the shipped model, or what was trained before
    assert start in made or (ROOT / start / 'config.json').exists()
    assert (start in made) == (config.model.get('voco', {}).get('num_voco_tokens') == 2)
    made.add(f'{args.workdir}/model')
  wanted = {page.checkpoints[name].replace('{seed}', str(seed))
            for name in ('voco8', 'voco2', 'qformer8', 'pool8', 'pool16', 'atp')
            for seed in page.seeds}
  assert made == wanted


def test_data_are_prepared_with_the_flags_given(stage):
  _, calls = stage.launch('prepare_data.sh', 'a b.json', 'images', 'out',
                          '--workers', '4', '--skip-broken')
  assert calls == [['vlm-compress', 'prepare-data', '--json', 'a b.json',
                    '--images', 'images', '--out', 'out', '--workers', '4',
                    '--skip-broken']]
  args = prepare_data.parser().parse_args(calls[0][2:])
  assert args.workers == 4 and args.skip_broken and str(args.json) == 'a b.json'


# Configs and fields that scripts and README name ---------------------------

PAGE = re.compile(r'configs/\w+\.py(?::\w+)?')
FIELD = re.compile(r'--config\.[\w.]+=(?:"[^"]+"|[^\s`\'"]+)')
NAMED = '\n'.join([
    *((ROOT / 'launch' / name).read_text() for name in SCRIPTS),
    (ROOT / 'README.md').read_text(),
    *(argument for arguments in ARGUMENTS.values() for argument in arguments)])


@pytest.mark.parametrize('page', sorted(set(PAGE.findall(NAMED))))
def test_named_configs_exist(page, monkeypatch):
  monkeypatch.chdir(ROOT)
  config = load_page(page)
  assert config.methods if 'sweeps' in page else config.train.steps > 0


def test_named_fields_exist():
  flags = sorted({flag.replace('"', '') for flag in FIELD.findall(NAMED)
                  if '$' not in flag})  # a script's own variables
  assert '--config.train.seed=1' in flags
  of_sweeps = [flag for flag in flags if re.match(
      r'--config\.(seeds|checkpoints|benchmarks|calib)', flag)]
  for page, some in (('quickstart.py:instruct', set(flags) - set(of_sweeps)),
                     ('sweeps.py:tiny', of_sweeps)):
    override(load_page(str(ROOT / 'configs' / page)), sorted(some))


def test_scripts_of_the_readme_exist():
  text = (ROOT / 'README.md').read_text()
  named = set(re.findall(r'launch/(\w+\.\w+)', text))
  assert set(SCRIPTS) <= named
  assert named <= {path.name for path in (ROOT / 'launch').iterdir()}
  for line in re.findall(r'^launch/\w+\.sh .*$', text, re.MULTILINE):
    script, *words = shlex.split(line)
    assert os.access(ROOT / script, os.X_OK) and words
