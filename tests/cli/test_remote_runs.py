"""Data and runs in a bucket are those of a disk, byte for byte, also when the
process that writes them is killed.

The bucket is that of tests/gcs_server.py; the commands are programs of their own.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

pytest.importorskip('gcsfs', reason='needs the extra [gcs]')
pytest.importorskip('google_crc32c', reason='needs the extra [test]')
pytest.importorskip('PIL', reason='needs the extra [demo]')

import llava_rows  # noqa: E402
from gcs_server import GcsServer, Refused  # noqa: E402

from vlm_compress.cli import __main__ as cli  # noqa: E402
from vlm_compress.data import tokenizer as tokenizer_lib  # noqa: E402
from vlm_compress.data.prepare import Preparation, prepare  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
PAGE = '''
from vlm_compress.cli import quickstart_config

def get_config(where):
  config = quickstart_config.get_config('instruct')
  config.data.update(name='prepared', train_split='train', image_size=24,
                     tokenizer=f'{where}/tokenizer.json')
  config.data.options = {'directory': f'{where}/data'}
  config.model.vision = {
      'model_type': 'clip_vision_model', 'image_size': 24, 'patch_size': 6,
      'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2,
      'num_attention_heads': 4}
  config.model.text.update(hidden_size=32, intermediate_size=32, num_hidden_layers=2)
  config.rows.kinds = {}
  config.rows.update(template='vicuna_v1', independent_turns=False, max_images=2,
                     num_voco_tokens=(0,), bucket_lengths=(120,))
  config.train.update(batch_size=8, steps=12, checkpoint_steps=4, log_steps=2,
                      warmup_steps=1)
  return config
'''


@pytest.fixture(scope='module', name='service')
def fixture_service():
  with GcsServer() as service:
    yield service


def start(service, *words, **variables):
  """A command of vlm-compress, on one device."""
  return subprocess.Popen(
      [sys.executable, '-m', 'vlm_compress.cli', *map(str, words)], cwd=ROOT,
      text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={
          **os.environ, **service.variables(), 'PYTHONPATH': str(ROOT),
          'XLA_FLAGS': '--xla_force_host_platform_device_count=1', **variables})


def end(process, code=0):
  """What it said."""
  with process:
    said, _ = process.communicate(timeout=400)
  assert process.returncode == code, said
  return said


def kill_at(service, process, part):
  """Kills it when an object with this in its name is about to be written."""
  def written(name):
    if part in name:
      service.written = lambda name: None
      process.kill()
      raise Refused(503, 'nobody is there to hear it')
  service.written = written


@pytest.fixture(scope='module', name='data')
def fixture_data(service, tmp_path_factory):
  """A folder with `data`, which is in the bucket, too, where it took two tries."""
  root = tmp_path_factory.mktemp('remote')
  source, images = llava_rows.write(root, 46), root / 'images'
  prepare(Preparation(source, images, root / 'data', shard_mb=0.05))
  words = ['prepare-data', f'--json={source}', f'--images={images}',
           '--out=gs://bucket/data', '--shard-mb=0.05', '--workers=1']
  first = start(service, *words)
  kill_at(service, first, 'shards/00001.json')
  end(first, -signal.SIGKILL)
  assert 'data/shards/00000.json' in service.names()
  assert 'data/manifest.json' not in service.names()
  assert '(2 written, 1 already there)' in end(start(service, *words))
  tokenizer = tokenizer_lib.word_level(llava_rows.WORDS)
  tokenizer.save(root / 'tokenizer.json')
  service.write('tokenizer.json', (root / 'tokenizer.json').read_bytes(), None)
  (root / 'page.py').write_text(PAGE)
  return root


def files(folder):
  """Name -> bytes of all visible files below a folder."""
  return {path.relative_to(folder).as_posix(): path.read_bytes()
          for path in folder.rglob('*') if path.is_file() and path.name[0] != '.'}


def objects(service, prefix):
  """Name -> bytes of all objects below a prefix."""
  return {name.removeprefix(prefix): service.data(name)
          for name in service.names(prefix)}


def test_prepared_data_are_those_of_a_disk(service, data):
  assert objects(service, 'data/') == files(data / 'data')


@pytest.mark.slow  # three trainings, each a program of its own
def test_a_run_that_was_killed_is_that_of_a_disk(service, data):
  train = lambda where, workdir, *words: start(
      service, 'train', f'--config={data}/page.py:{where}', f'--workdir={workdir}',
      *words, JAX_COMPILATION_CACHE_DIR=str(data / 'programs'),
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.5')
  end(train(data, data / 'run', '--no-tensorboard'))
  first = train('gs://bucket', 'gs://bucket/run')
  kill_at(service, first, 'run/checkpoints/8/')
  end(first, -signal.SIGKILL)
  steps = lambda name: [json.loads(line)['step'] for line in
                        service.data(f'run/{name}').splitlines()]
  complete = lambda: {name.split('/')[2] for name in service.names('run/checkpoints')
                      if name.count('/') == 3 and 'commit_success' in name}
  # the checkpoint of step 8 was behind the lines of its steps, and is torn
  assert complete() == {'4'} and steps('metrics.jsonl')[:4] == [2, 4, 6, 8]
  events = set(service.names('run/tensorboard/events'))
  assert len(events) == 1

  said = end(train('gs://bucket', 'gs://bucket/run', '--profile-steps=6:7',
                   '--no-tensorboard'))
  assert 'resumed at step 4 of 12' in said and 'gs://bucket/run/model' in said
  assert complete() == {'8', '12'}
  assert service.data('run/metrics.jsonl') == (data / 'run/metrics.jsonl').read_bytes()
  assert objects(service, 'run/model/') == files(data / 'run/model')
  assert steps('throughput.jsonl')[:4] == [2, 4, 6, 8]  # as on a disk, all are kept
  assert steps('throughput.jsonl')[-5:-3] in ([8, 6], [12, 6])
  assert events == set(service.names('run/tensorboard/events'))
  assert any(name.endswith('.xplane.pb') for name in service.names('run/tensorboard'))
  assert len(service.names('lengths/')) == 1
  ours, theirs = (json.loads(text) for text in (
      service.data('run/config.json'), (data / 'run/config.json').read_bytes()))
  assert ours['data'] != theirs['data']
  assert ours | {'data': 0} == theirs | {'data': 0}
  assert {name.split('/')[1] for name in service.names('run/')} == {
      'checkpoints', 'config.json', 'metrics.jsonl', 'model', 'parameters.txt',
      'seconds.txt', 'tensorboard', 'throughput.jsonl'}


@pytest.mark.slow  # two trainings, of two programs each
def test_two_processes_share_a_workdir(service, data):
  """And put a damaged checkpoint aside together, once."""
  def train():
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    both = [start(service, 'train', f'--config={data}/page.py:gs://bucket',
                  '--workdir=gs://bucket/two', '--no-tensorboard',
                  f'--coordinator=localhost:{port}', '--num-processes=2',
                  # no compilation cache: who finds a program there waits for who
                  # does not, and gloo waits for half a minute only
                  f'--process-id={i}', XLA_FLAGS='--xla_force_host_platform_device_count=2')
            for i in range(2)]
    return [end(process) for process in both]
  said = train()
  assert 'gs://bucket/two/model' in said[0] and 'gs://bucket/two/model' not in said[1]
  lines, model = service.data('two/metrics.jsonl'), objects(service, 'two/model/')
  assert [json.loads(line)['step'] for line in lines.splitlines()] == [2, 4, 6, 8, 10, 12]
  assert 'model.safetensors' in model
  for name in service.names('two/'):
    if name.startswith('two/model/'):
      service.objects.pop(name)
    elif '/12/state/' in name and ('manifest.ocdbt' in name or '/d/' in name):
      service.write(name, b'torn', None)
  said = train()
  assert 'resumed at step 8 of 12' in said[0]
  assert {'/'.join(name.split('/')[1:3]) for name in service.names('two/')
          if 'checkpoints/' in name} == {
              'checkpoints/8', 'checkpoints/12', 'damaged_checkpoints/12'}
  assert service.data('two/metrics.jsonl') == lines
  assert objects(service, 'two/model/') == model


@pytest.mark.parametrize('words, refuses, found', [
    (['--workdir=gs://none/run'], 0, '--workdir=gs://none/run cannot be used'),
    (['--workdir=gs://bucket/run'], 403, 'Forbidden'),
    (['--workdir=gs://bucket/run'], 401, 'credentials'),
    (['--workdir=gs://bucket/run', '--config=configs/quickstart.py:instruct'], 0,
     '--data-root'),
    (['--workdir=gs://bucket/run', '--data-root=s3://b/c'], 0, 's3://b/c'),
    (['--workdir=gs://bucket'], 0, 'gs://BUCKET/FOLDER'),
    (['--workdir={root}', '--config.init_from=gs://bucket/no'], 0, 'init_from'),
    (['--workdir={root}', '--config.init_from=gs://no/no'], 0, 'init_from')])
def test_mistakes_are_one_line_before_long_work(words, refuses, found, data, tmp_path,
                                                capsys):
  words = [word.format(root=tmp_path) for word in words]
  with GcsServer() as service, service.here():
    service.refuses = refuses
    assert cli.main(['train', f'--config={data}/page.py:{data}', *words]) == 2
    assert not service.objects
  said = capsys.readouterr().err.splitlines()
  assert found in said[-1] and said[-1].startswith('error: ')
