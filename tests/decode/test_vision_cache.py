"""Files of a vision cache: two writers, a killed one, and nothing believed."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import core_helpers as helpers
import ml_dtypes
import numpy as np
import pytest

from vlm_compress import atomic
from vlm_compress.config import ConfigError
from vlm_compress.decode import identity as identity_lib
from vlm_compress.decode import vision_cache
from vlm_compress.decode.identity import Identity
from vlm_compress.decode.vision_cache import Entry, VisionCache

VOCO, ATP = helpers.voco_config(), helpers.atp_config()
WHERE = pytest.mark.parametrize('name', ['folder', 'file.safetensors'])


def voco_entry(picture=1, config=VOCO, dtype=np.float32, **fields) -> Entry:
  """An invented entry of the tiny model, C = 2."""
  identity = Identity(**{
      'method': 'voco', 'pixels': f'{picture:064x}', 'weights': 'a' * 64,
      'config': identity_lib.config_hash(config), 'num_voco_tokens': 2,
      'layout': (1, *[0] * 16, 5, 0, 0), 'prompt': None, **fields})
  rng = np.random.default_rng(picture)
  shape = (4, 1, 1, 4 if config.voco.text_sees_prefix else 2, 2, 8)
  keys, values = (rng.normal(size=shape).astype(dtype) for _ in range(2))
  positions = [0, 17, 18, 19] if config.voco.text_sees_prefix else [18, 19]
  return Entry(identity, {'keys': keys, 'values': values,
                          'positions': np.int32(positions)}, None)


def atp_entry(picture=1, visual=(16, 8, 8, 1), **fields) -> Entry:
  """An invented entry behind BOS and two words, with modules after 1, 2, 3."""
  identity = Identity(**{
      'method': 'atp', 'pixels': f'{picture:064x}', 'weights': 'a' * 64,
      'config': identity_lib.config_hash(ATP), 'num_voco_tokens': 0,
      'layout': (1, 6, 7, *[-200] * 16, 5, 9), 'prompt': 'what', **fields})
  rng = np.random.default_rng(picture)
  tensors = {f'{name}/{i}': rng.normal(size=(1, 3 + n, 2, 8)).astype(np.float32)
             for name in ('keys', 'values') for i, n in enumerate(visual)}
  return Entry(identity, tensors, visual)


def same(a: Entry, b: Entry) -> None:
  """Asserts that two entries agree in every bit."""
  assert (a.identity, a.visual_tokens) == (b.identity, b.visual_tokens)
  assert set(a.tensors) == set(b.tensors)
  for name, value in a.tensors.items():
    assert value.dtype == b.tensors[name].dtype
    np.testing.assert_array_equal(value, b.tensors[name])


def put(where, *entries: Entry) -> None:
  with VisionCache(where) as cache:
    for entry in entries:
      cache.add(entry)


def state(path: pathlib.Path) -> dict:
  """Bytes and times of all files of a cache but its lock."""
  files = [path] if path.is_file() else sorted(path.iterdir())
  return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in files}


# ------------------------------------------------------------ what goes in


@WHERE
def test_what_is_written_is_read(name, tmp_path):
  sees = helpers.voco_config(text_sees_prefix=True)
  half = dataclasses.replace(VOCO, dtype='bfloat16')
  given = [(voco_entry(), VOCO), (atp_entry(), ATP), (voco_entry(2), VOCO),
           (voco_entry(3, sees), sees), (atp_entry(2, (16, 16, 16, 16)), ATP),
           (voco_entry(4, half, ml_dtypes.bfloat16), half),
           (atp_entry(prompt='is it a \u00fc "cat"'), ATP)]
  path = tmp_path / 'new' / name
  put(path, *[entry for entry, _ in given])
  cache = VisionCache(path)
  for entry, config in given:
    same(cache.find(entry.identity, config), entry)
    assert cache.where(entry.identity).is_file()
  assert cache.find(voco_entry(9).identity, VOCO) is None
  assert VisionCache(tmp_path / 'none' / name).find(voco_entry().identity,
                                                    VOCO) is None
  assert len({cache.where(entry.identity) for entry, _ in given}) == (
      1 if cache.is_file else 7)
  # of the same picture, for whom the same entry is no answer
  assert set(cache.others(given[0][0].identity)) == {
      given[1][0].identity, given[6][0].identity}
  assert cache.others(voco_entry(9).identity) == []


def test_a_file_takes_what_is_new_and_sees_what_others_write(tmp_path):
  path = tmp_path / 'file.safetensors'
  mine, one, two = VisionCache(path), voco_entry(1), voco_entry(2)
  assert mine.find(one.identity, VOCO) is None
  put(path, one)
  before = state(path)
  same(mine.find(one.identity, VOCO), one)
  put(path, one)
  assert state(path) == before
  put(path, two)
  same(mine.find(two.identity, VOCO), two)
  same(mine.find(one.identity, VOCO), one)
  assert state(path) != before


def test_a_file_is_not_rewritten_for_every_entry(tmp_path, monkeypatch):
  path, written, write = tmp_path / 'file.safetensors', [], vision_cache._write
  monkeypatch.setattr(vision_cache, '_write', lambda path, entries, old: (
      written.append(len(entries)), write(path, entries, old)))
  entries = [voco_entry(i) for i in range(1, 41)]
  with pytest.raises(KeyboardInterrupt), VisionCache(path) as cache:
    for entry in entries:
      cache.add(entry)
      same(cache.find(entry.identity, VOCO), entry)  # also while it waits
    raise KeyboardInterrupt
  assert sum(written) == 40 and len(written) <= 10 and written[0] == 1
  for entry in entries:
    same(VisionCache(path).find(entry.identity, VOCO), entry)


def test_a_file_can_be_full(tmp_path, monkeypatch):
  path = tmp_path / 'file.safetensors'
  put(path, voco_entry(1))
  before = state(path)
  monkeypatch.setattr(vision_cache, 'MAX_HEADER', 2500)
  with pytest.raises(ConfigError, match='2 entries are too many.*a directory'):
    put(path, voco_entry(2))
  assert state(path) == before


# ------------------------------------------------------- several, and killed

CHILD = r'''
import pathlib, sys, threading, time
sys.path[:0] = sys.argv[1:3]
import test_vision_cache as t
from vlm_compress.decode import vision_cache
folder, what, first, count = pathlib.Path(sys.argv[3]), sys.argv[4], *map(int, sys.argv[5:])
write, close = vision_cache.TensorWriter.write, vision_cache.TensorWriter.close
def slow(self):
  time.sleep(0.02)
  close(self)
def hang(self, *args):
  write(self, *args)
  sys.stdout.write('hangs\n')
  sys.stdout.flush()
  time.sleep(60)
if what == 'hang':
  vision_cache.TensorWriter.write = hang
else:
  vision_cache.TensorWriter.close = slow
print('ready', flush=True)
sys.stdin.readline()
def work(name):
  for i in range(first, first + count):
    t.put(folder / name, t.voco_entry(i), t.atp_entry(i))
threads = [threading.Thread(target=work, args=(n,)) for n in ('folder', 'file.safetensors')]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
'''
NAMES = ('folder', 'file.safetensors')


@pytest.fixture
def start():
  """Starts a process that will write entries once it is sent a line."""
  children = []

  def start(folder, what, first, count):
    here = pathlib.Path(__file__).parent
    children.append(subprocess.Popen(
        [sys.executable, '-c', CHILD, str(here), str(here.parent), str(folder), what,
         str(first), str(count)], cwd=here.parents[1],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    return children[-1]
  yield start
  for child in children:
    child.kill()
    child.communicate()


def send(*children):
  for child in children:
    assert child.stdout.readline() == 'ready\n'
  for child in children:
    child.stdin.write('\n')
    child.stdin.flush()


def test_two_writers_lose_nothing_and_a_killed_one_leaves_nothing(start, tmp_path):
  killed = start(tmp_path / 'killed', 'hang', 2, 1)
  writers = [start(tmp_path, 'write', first, 6) for first in (1, 4)]
  put(tmp_path / 'killed' / NAMES[1], voco_entry(1))
  before = state(tmp_path / 'killed' / NAMES[1])
  send(killed)
  assert [killed.stdout.readline() for _ in NAMES] == ['hangs\n'] * 2
  killed.kill()
  killed.wait()
  folder, path = (tmp_path / 'killed' / name for name in NAMES)
  assert state(path) == before and not [*folder.glob('*.safetensors')]
  assert len([*path.parent.glob('.*.tmp')]) == 1  # so it was killed in between
  put(path, voco_entry(3))  # its lock ended with it
  assert not [*path.parent.glob('.*.tmp')]
  # a directory has no lock: what looks abandoned goes, what is young may live
  left, = folder.iterdir()
  put(folder, voco_entry(3))
  assert left.exists()
  os.utime(left, (0, 0))
  put(folder, voco_entry(4))
  assert not left.exists() and len([*folder.iterdir()]) == 2
  send(*writers)
  assert [child.wait(timeout=60) for child in writers] == [0, 0]
  for name in NAMES:
    cache = VisionCache(tmp_path / name)
    for i in range(1, 10):
      same(cache.find(voco_entry(i).identity, VOCO), voco_entry(i))
      same(cache.find(atp_entry(i).identity, ATP), atp_entry(i))
  assert len([*(tmp_path / 'folder').iterdir()]) == 18


def test_who_writes_a_file_waits_for_the_other(tmp_path):
  path, done = tmp_path / 'file.safetensors', threading.Event()
  thread = threading.Thread(target=lambda: (put(path, voco_entry()), done.set()))
  with atomic.lock(path):
    thread.start()
    time.sleep(0.1)
    assert not done.is_set()
  thread.join()
  assert done.is_set() and path.exists()


# ------------------------------------------------------ nothing is believed


def edit(path: pathlib.Path, change) -> None:
  """Rewrites header and data of a safetensors file.

  Args:
    path: of a file with one entry.
    change: function of (header, metadata of the entry, key, data); gives new
      data or None.
  """
  raw = path.read_bytes()
  size = int.from_bytes(raw[:8], 'little')
  header, data = json.loads(raw[8:8 + size]), bytearray(raw[8 + size:])
  key = next(k for k in header['__metadata__'] if k != 'format')
  meta = json.loads(header['__metadata__'][key])
  data = change(header, meta, key, data) or data
  if isinstance(header.get('__metadata__', {}).get(key), str) and (
      header['__metadata__'][key] != 'no JSON'):
    header['__metadata__'][key] = json.dumps(meta)
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data)


def flip(header, name, data):
  data[header[name]['data_offsets'][0] + 5] ^= 1


def rehash(entry: Entry, **tensors) -> str:
  return vision_cache.content_hash({**entry.tensors, **tensors})


SHIFTED = rehash(voco_entry(), positions=np.int32([18, 20]))
TAMPER = {
    'prompt': ('voco', 'key', lambda h, m, k, d: m.update(prompt='is it')),
    'weights': ('voco', 'key', lambda h, m, k, d: m.update(weights='b' * 64)),
    'count': ('atp', 'key', lambda h, m, k, d: m.update(num_voco_tokens=1)),
    'layout': ('atp', 'key', lambda h, m, k, d: m.update(layout=[[1, 21]])),
    'runs': ('voco', 'layout', lambda h, m, k, d: m.update(layout=[[1, -1]])),
    'endless': ('voco', 'layout', lambda h, m, k, d: m.update(layout=[[1, 2**40]])),
    'method': ('voco', 'method', lambda h, m, k, d: m.update(method='full')),
    'pixels': ('voco', 'pixels', lambda h, m, k, d: m.update(pixels='cat')),
    'type': ('voco', 'num_voco_tokens', lambda h, m, k, d: m.update(
        num_voco_tokens=True)),
    'gone': ('voco', 'the fields', lambda h, m, k, d: m.pop('content') and None),
    'more': ('voco', 'the fields', lambda h, m, k, d: m.update(extra=1)),
    'json': ('voco', 'no JSON', lambda h, m, k, d: h['__metadata__'].update(
        {k: 'no JSON'})),
    'format': ('voco', 'format', lambda h, m, k, d: h['__metadata__'].update(
        format='vlm_compress vision cache 0')),
    'bare': ('voco', 'format', lambda h, m, k, d: h.pop('__metadata__') and None),
    'keys': ('voco', 'content', lambda h, m, k, d: flip(h, f'{k}/keys', d)),
    'values': ('atp', 'content', lambda h, m, k, d: flip(h, f'{k}/values/3', d)),
    'content': ('voco', 'content', lambda h, m, k, d: m.update(content='0' * 64)),
    'shape': ('voco', 'keys: float32[4, 1, 2, 1, 2, 8] where', lambda h, m, k, d: (
        h[f'{k}/keys'].update(shape=[4, 1, 2, 1, 2, 8]))),
    'dtype': ('voco', 'values: int32', lambda h, m, k, d: h[f'{k}/values'].update(
        dtype='I32')),
    'odd': ('voco', 'a tensor of U32', lambda h, m, k, d: h[f'{k}/values'].update(
        dtype='U32')),
    'name': ('atp', 'keys/1: no tensor', lambda h, m, k, d: h.update(
        {f'{k}/keys/9': h.pop(f'{k}/keys/1')})),
    'nobody': ('voco', 'belongs to no entry', lambda h, m, k, d: h.update(
        {'x/keys': h.pop(f'{k}/keys')})),
    'positions': ('voco', 'positions', lambda h, m, k, d: (
        d.__setitem__(slice(-4, None), np.int32(20).tobytes()),
        m.update(content=SHIFTED)) and None),
    'kept': ('voco', 'visual_tokens', lambda h, m, k, d: m.update(
        visual_tokens=[16, 8, 8, 1])),
    'none': ('atp', 'visual_tokens', lambda h, m, k, d: m.update(
        visual_tokens=None)),
    'few': ('atp', 'visual_tokens', lambda h, m, k, d: m.update(
        visual_tokens=[16, 8, 8])),
    'grows': ('atp', 'visual_tokens', lambda h, m, k, d: m.update(
        visual_tokens=[16, 8, 9, 1])),
    'other': ('atp', 'keys/2', lambda h, m, k, d: m.update(
        visual_tokens=[16, 8, 7, 1])),
    'cut': ('voco', 'truncated', lambda h, m, k, d: d[:-4]),
    'longer': ('voco', 'truncated', lambda h, m, k, d: d + b'\0' * 4)}


@WHERE
@pytest.mark.parametrize('case', TAMPER)
def test_a_file_that_was_changed_is_refused(case, name, tmp_path):
  method, field, change = TAMPER[case]
  entry, config = ((voco_entry(), VOCO) if method == 'voco' else
                   (atp_entry(), ATP))
  where = tmp_path / name
  put(where, entry)
  path = VisionCache(where).where(entry.identity)
  edit(path, lambda *_: None)
  same(VisionCache(where).find(entry.identity, config), entry)  # edit can do it
  edit(path, change)
  with pytest.raises(ConfigError) as error:
    VisionCache(where).find(entry.identity, config)
  message = str(error.value)
  assert message.startswith(f'{path}: ') and '\n' not in message
  assert field in message and 'vlm-compress compress' in message, message


@pytest.mark.parametrize('content', [b'', b'no file', b'\xff' * 64])
def test_what_is_no_file_is_refused_and_left_alone(content, tmp_path):
  path = tmp_path / 'file.safetensors'
  path.write_bytes(content)
  before = state(path)
  for use in (lambda: VisionCache(path).find(voco_entry().identity, VOCO),
              lambda: put(path, voco_entry())):
    with pytest.raises(ConfigError, match='truncated or no safetensors.*delete'):
      use()
  assert state(path) == before


def test_a_renamed_file_is_refused(tmp_path):
  cache = VisionCache(tmp_path)
  ours, other = voco_entry(1), voco_entry(2)
  old = voco_entry(1, weights='b' * 64)
  for found, words in ((other, ['key', 'another entry than its name']),
                       (old, ['fingerprint bbbbbbbbbbbbbbbb', 'a' * 16])):
    put(tmp_path, found)
    cache.where(found.identity).rename(cache.where(ours.identity))
    with pytest.raises(ConfigError) as error:
      cache.find(ours.identity, VOCO)
    assert all(word in str(error.value) for word in words), error.value
    assert 'vlm-compress compress' in str(error.value)


def test_damaged_neighbours_do_no_harm(tmp_path):
  put(tmp_path, voco_entry(), voco_entry(weights='b' * 64),
      voco_entry(weights='c' * 64))
  cache, wanted = VisionCache(tmp_path), voco_entry(weights='d' * 64).identity
  cache.where(voco_entry().identity).write_bytes(b'')
  assert cache.find(wanted, VOCO) is None
  assert {o.weights[0] for o in cache.others(wanted)} == {'b', 'c'}
