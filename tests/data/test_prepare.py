"""prepare-data: the same bytes however it was written, and what it refuses."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip('PIL', reason='needs the extra [demo]')

import llava_rows  # noqa: E402
from PIL import Image  # noqa: E402

from vlm_compress.cli import __main__ as cli  # noqa: E402
from vlm_compress.config import ConfigError  # noqa: E402
from vlm_compress.data import manifest  # noqa: E402
from vlm_compress.data import prepare as prepare_lib  # noqa: E402
from vlm_compress.data.errors import DataError  # noqa: E402
from vlm_compress.data.prepare import Preparation, prepare  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
NUM_SHARDS = 5


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return llava_rows.write(tmp_path_factory.mktemp('source'))


def what(source, out, **options):
  size = prepare_lib._total_bytes(json.loads(source.read_text()),
                                  source.parent / 'images')
  options = {'shard_mb': size / 1e6 / (NUM_SHARDS - 0.5), **options}
  return Preparation(source, source.parent / 'images', out, **options)


@pytest.fixture(scope='module')
def whole(source, tmp_path_factory):
  """A data set that was written in one go by one process."""
  out = tmp_path_factory.mktemp('whole') / 'out'
  done = prepare(what(source, out))
  assert done.num_written == len(done.manifest['shards']) == NUM_SHARDS
  return out


def content(out):
  """Everything in a directory; the lock has no content."""
  return {str(p.relative_to(out)): p.read_bytes()
          for p in sorted(out.rglob('*')) if p.is_file()}


def shard_paths(out):
  return sorted(out.glob('*.array_record-*'))


def test_files_and_counts(whole):
  found = json.loads((whole / 'manifest.json').read_text())
  assert found['counts'] == {
      'records': 23, 'pictures': 23 - 5 + 4, 'text_only': 5, 'broken': 0,
      'several_pictures': 4, 'turns': 23 + sum(i % 4 for i in range(23)),
      'bytes': sum(p.stat().st_size for p in shard_paths(whole))}
  assert found['name'] == 'rows' and found['source']['rows'] == 23
  assert [s['first_row'] for s in found['shards']] == [
      k * 23 // NUM_SHARDS for k in range(NUM_SHARDS)]
  assert set(content(whole)) == {
      '.lock', 'plan.json', 'manifest.json', 'features.json',
      'dataset_info.json', *(f'shards/{k:05d}.json' for k in range(5)),
      *(f'rows-train.array_record-{k:05d}-of-00005' for k in range(5)),
      *(f'conversations/rows-train.array_record-{k:05d}-of-00005.jsonl.gz'
        for k in range(5))}


def test_tfds_opens_it(source, whole):
  import tensorflow_datasets as tfds
  builder = tfds.builder_from_directory(whole)
  assert builder.info.splits['train'].num_examples == 23
  records = builder.as_data_source('train')
  for record, row in zip(records, json.loads(source.read_text()), strict=True):
    names = row.get('image', [])
    names = [names] if isinstance(names, str) else names
    assert [bytes(data) for data in record['images']] == [
        (source.parent / 'images' / name).read_bytes() for name in names]
    assert [n.decode() for n in record['image_names']] == names
    assert record['id'].decode() == str(row['id'])
    questions = [m['value'] for m in row['conversations'][::2]]
    assert [q.decode() for q in record['turns']['question']] == questions
  assert [int(record['row']) for record in records] == list(range(23))


def test_again_writes_nothing(source, whole):
  before = content(whole)
  assert prepare(what(source, whole)).num_written == 0
  assert content(whole) == before


def test_number_of_processes_does_not_matter(source, whole, tmp_path):
  assert prepare(what(source, tmp_path, workers=3)).num_written == NUM_SHARDS
  assert content(tmp_path) == content(whole)


KILLED = '''
import os, pathlib, signal, sys
from vlm_compress.data import prepare, shards
def at(module, name, count):
  inner, left = getattr(module, name), [count]
  def call(*args, **kwargs):
    left[0] -= 1
    if left[0] < 0:
      os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args, **kwargs)
  setattr(module, name, call)
source, out, size, place, count = sys.argv[1:]
module, name = {'record': (shards, 'to_record'),
                'about': (shards.atomic, 'write_text'),
                'metadata': (prepare, '_write_metadata')}[place]
at(module, name, int(count))
source = pathlib.Path(source)
prepare.prepare(prepare.Preparation(
    source, source.parent / 'images', pathlib.Path(out), shard_mb=float(size)))
'''


@pytest.mark.parametrize('place, count, num_kept', [
    ('record', 11, 2),  # in the midst of a shard
    ('about', 3, 2),  # a shard has its name, but nothing says that it is right
    ('metadata', 0, 5)])
def test_killed_and_run_again(source, whole, tmp_path, place, count, num_kept):
  given = what(source, tmp_path)
  done = subprocess.run(
      [sys.executable, '-c', KILLED, str(source), str(tmp_path),
       str(given.shard_mb), place, str(count)], cwd=ROOT, check=False)
  assert done.returncode == -signal.SIGKILL
  assert len(list((tmp_path / 'shards').iterdir())) == num_kept
  assert not (tmp_path / 'dataset_info.json').exists()
  assert prepare(given).num_written == NUM_SHARDS - num_kept
  assert content(tmp_path) == content(whole)


def children(pid):
  return [int(child) for child in pathlib.Path(
      f'/proc/{pid}/task/{pid}/children').read_text().split()]


@pytest.mark.skipif(not pathlib.Path('/proc/self/task').exists(),
                    reason='needs /proc')
def test_killed_pool_leaves_no_process_and_is_resumed(source, whole, tmp_path):
  given = what(source, tmp_path)
  process = subprocess.Popen(
      [sys.executable, '-m', 'vlm_compress.cli', 'prepare-data',
       f'--json={source}', f'--images={given.image_folder}',
       f'--out={tmp_path}', f'--shard-mb={given.shard_mb!r}', '--workers=2'],
      cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  deadline, ours = time.monotonic() + 60, set()
  while not list(tmp_path.glob('shards/*.json')) and process.poll() is None:
    assert time.monotonic() < deadline
    ours |= {pid for pid in children(process.pid) if b'spawn_main' in pathlib.Path(
        f'/proc/{pid}/cmdline').read_bytes()}
  assert len(ours) == 2
  process.kill()
  process.wait()
  alive = lambda pid: pathlib.Path(f'/proc/{pid}').exists() and (
      pathlib.Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z')
  while any(map(alive, ours)) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(map(alive, ours))
  prepare(given)
  assert content(tmp_path) == content(whole)


@pytest.fixture
def damaged(tmp_path):
  """A source with a missing picture, half of one, a bomb, and a bad row."""
  source = llava_rows.write(tmp_path / 'source')
  folder, good = source.parent / 'images', {}
  for name in ('4.jpg', '13b.png', '20.jpg'):
    good[name] = (folder / name).read_bytes()
  (folder / '4.jpg').unlink()
  (folder / '13b.png').write_bytes(good['13b.png'][:200])
  Image.new('1', (1, 20_000)).save(folder / '20.jpg', 'PNG')
  rows = json.loads(source.read_text())
  rows[21] = {'id': 'odd', 'conversations': []}
  source.write_text(json.dumps(rows))
  return source, good


def report(out):
  return [json.loads(line)
          for line in (out / 'broken.jsonl').read_text().splitlines()]


def test_broken_rows_are_listed_and_an_error_at_the_end(damaged, tmp_path):
  source, _ = damaged
  out = tmp_path / 'out'
  with pytest.raises(DataError) as caught:
    prepare(what(source, out))
  message = str(caught.value)
  assert '4 of 23 rows' in message and str(out / 'broken.jsonl') in message
  assert 'row 4' in message and '--skip-broken' in message
  found = report(out)
  assert [(b['row'], b['id'], b['path']) for b in found] == [
      (4, 'one-4', '4.jpg'), (13, 'two-13', '13b.png'), (20, 'one-20', '20.jpg'),
      (21, 'odd', None)]
  for b, word in zip(found, ('no such file', 'damaged', '20000', 'conversations'),
                     strict=True):
    assert word in b['reason']
  # Shards without such a row are done; nothing can be trained on.
  assert len(shard_paths(out)) == 2
  assert not (out / 'manifest.json').exists()


def test_skip_broken_and_mending(damaged, tmp_path, capsys):
  source, good = damaged
  out = tmp_path / 'out'
  done = prepare(what(source, out, skip_broken=True))
  assert (done.num_broken, done.manifest['counts']['records']) == (4, 19)
  assert done.manifest['counts']['broken'] == 4 and len(report(out)) == 4
  given = what(source, out)
  arguments = ['prepare-data', f'--json={source}', f'--out={out}', '--workers=1',
               f'--images={given.image_folder}', f'--shard-mb={given.shard_mb!r}']
  assert cli.main([*arguments, '--skip-broken']) == 0
  printed = capsys.readouterr()
  assert '19 rows with 18 pictures' in printed.out
  assert '(0 written, 5 already there)' in printed.out
  assert '4 rows are left out' in printed.err and 'broken.jsonl' in printed.err
  # Without the flag they count again.
  assert cli.main(arguments) == 2
  assert capsys.readouterr().err.count('\n') == 1
  for name, data in good.items():
    (source.parent / 'images' / name).write_bytes(data)
  with pytest.raises(DataError, match='1 of 23 rows.*row 21'):
    prepare(given)
  done = prepare(dataclasses.replace(given, skip_broken=True))
  # Shards with a row that was broken, one of which the last call mended.
  assert done.num_written == 1
  assert done.manifest['counts']['records'] == 22
  assert [b['row'] for b in report(out)] == [21]
  assert prepare(dataclasses.replace(given, skip_broken=True)).num_written == 0


def test_nothing_usable(tmp_path):
  source = tmp_path / 'rows.json'
  (tmp_path / 'images').mkdir()
  source.write_text('[{"id": 1}]')
  with pytest.raises(DataError, match='none of its 1 rows'):
    prepare(Preparation(source, tmp_path / 'images', tmp_path / 'out',
                        skip_broken=True))
  source.write_text('[]')
  with pytest.raises(DataError, match='no rows'):
    prepare(Preparation(source, tmp_path / 'images', tmp_path / 'out'))


@pytest.mark.parametrize('options, words', [
    ({'name': 'other'}, ['--name is other, was rows']),
    ({'shard_mb': 7.0}, ['--shard-mb is 7.0, was 0.0']),
    ({'image_folder': 'elsewhere'}, ['--images is ', 'elsewhere, was '])])
def test_other_options_are_refused(source, whole, tmp_path, options, words):
  if 'image_folder' in options:
    options = {'image_folder': tmp_path / 'elsewhere'}
    options['image_folder'].mkdir()
  given = what(source, whole)
  before = content(whole)
  with pytest.raises(DataError) as caught:
    prepare(dataclasses.replace(given, **options))
  assert all(word in str(caught.value) for word in words), caught.value
  assert content(whole) == before


def test_a_changed_file_is_refused(tmp_path):
  source = llava_rows.write(tmp_path)
  prepare(what(source, tmp_path / 'out'))
  given = what(source, tmp_path / 'out')
  source.write_text(source.read_text().replace('a dog', 'a cat'))
  with pytest.raises(DataError, match='SHA-256 of --json is .*, was '):
    prepare(given)


@pytest.mark.parametrize('damage', ['flip', 'cut', 'gone', 'about'])
def test_a_shard_that_is_not_right_is_written_again(source, tmp_path, damage,
                                                    monkeypatch):
  monkeypatch.setattr(manifest, 'EDGE', 100)  # so that shards have a middle
  prepare(what(source, tmp_path))
  before = content(tmp_path)
  path = shard_paths(tmp_path)[2]
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  if damage == 'flip':
    path.write_bytes(data)
  elif damage == 'cut':
    path.write_bytes(data[:-1])
  elif damage == 'gone':
    path.unlink()
  else:
    (tmp_path / 'shards/00002.json').write_text('{"file": ')
  assert prepare(what(source, tmp_path)).num_written == 1
  assert content(tmp_path) == before


def test_a_directory_with_something_else_is_left_alone(source, tmp_path):
  (tmp_path / 'thesis.tex').write_text('x')
  with pytest.raises(DataError, match='not empty .*thesis.tex'):
    prepare(what(source, tmp_path))
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']
  (tmp_path / 'thesis.tex').rename(tmp_path / 'plan.json')
  with pytest.raises(DataError, match='plan.json is damaged'):
    prepare(what(source, tmp_path))


def test_two_at_once_are_refused(source, whole):
  with open(whole / '.lock', 'w') as stream:
    fcntl.flock(stream, fcntl.LOCK_EX)
    with pytest.raises(DataError, match='another process is writing'):
      prepare(what(source, whole))


LIMITED = '''
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
from vlm_compress.cli.__main__ import main
sys.exit(main(sys.argv[1:]))
'''


@pytest.mark.parametrize('workers', [1, 2])
def test_a_full_disk_is_one_line(source, tmp_path, workers):
  done = subprocess.run(
      [sys.executable, '-c', LIMITED, 'prepare-data', f'--json={source}',
       f'--images={source.parent / "images"}', f'--out={tmp_path}',
       f'--workers={workers}', '--shard-mb=0.03'], cwd=ROOT, check=False,
      capture_output=True, text=True)
  assert done.returncode == 2, done.stderr
  assert done.stderr.count('\n') == 1
  assert 'cannot be written (' in done.stderr and '--out' in done.stderr
  assert not list(tmp_path.glob('.*.tmp'))


@pytest.mark.parametrize('options, words', [
    (['--out={root}/file'], ['file', 'directory']),
    (['--out=s3://bucket/data'], ['s3://bucket/data', 'gs://']),
    (['--images={root}/none'], ['image folder', 'none']),
    (['--json={root}/none.json'], ['none.json', 'does not exist']),
    (['--workers=0'], ['--workers', '>= 1']),
    (['--shard-mb=0'], ['--shard-mb', '> 0']),
    (['--name=Big Set'], ["--name='Big Set'", 'small letters'])])
def test_mistakes_are_one_line(source, tmp_path, capsys, options, words):
  (tmp_path / 'file').write_text('x')
  given = [f'--json={source}', f'--images={source.parent / "images"}',
           f'--out={tmp_path / "out"}', '--workers=1']
  options = [o.format(root=tmp_path) for o in options]
  assert cli.main(['prepare-data', *given, *options]) == 2
  captured = capsys.readouterr()
  assert captured.err.count('\n') == 1 and not captured.out
  assert all(word in captured.err for word in words), captured.err


def test_help_has_examples(capsys):
  with pytest.raises(SystemExit):
    cli.main(['prepare-data', '--help'])
  printed = capsys.readouterr().out
  assert printed.count('vlm-compress prepare-data --json=') == 2
  assert 'llava_v1_5_mix665k.json' in printed


@pytest.mark.parametrize('stem, name', [
    ('llava_v1_5_mix665k', 'llava_v1_5_mix665k'), ('A b-C', 'a_b_c'),
    ('558k', 'data_558k')])
def test_name_is_made_of_the_file(stem, name):
  assert prepare_lib._name_of(pathlib.Path(f'x/{stem}.json')) == name


def die(job):
  os.kill(os.getpid(), signal.SIGKILL)


def test_worker_that_dies_is_named(source, tmp_path, monkeypatch):
  monkeypatch.setattr(prepare_lib, 'write_shard', die)
  with pytest.raises(DataError, match='a worker process died'):
    prepare(what(source, tmp_path, workers=2))


def test_library_refuses_what_the_command_line_would(source, tmp_path):
  with pytest.raises(ConfigError, match='--workers=0'):
    prepare(what(source, tmp_path, workers=0))
