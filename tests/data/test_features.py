"""The feature cache: computed once, reopened, rebuilt when it is not right."""

from __future__ import annotations

import errno
import io
import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from vlm_compress.data import features
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Example

_SIZE, _NUM = 8, 7


def _png(value: int) -> bytes:
  stream = io.BytesIO()
  Image.new('RGB', (_SIZE, _SIZE), (value, 0, 0)).save(stream, 'PNG')
  return stream.getvalue()


@pytest.fixture
def source():
  return [Example(f'picture-{i}', (), (_png(10 * i),)) for i in range(_NUM)]


class _Encoder:
  """Mean colour in two tokens of three features; counts the calls."""

  def __init__(self):
    self.calls = 0

  def __call__(self, pictures):
    assert pictures.dtype == np.uint8
    assert pictures.shape == (3, _SIZE, _SIZE, 3)
    self.calls += 1
    mean = pictures.astype(np.float32).mean((1, 2))
    return np.stack([mean, -mean], axis=1)


def _open(source, encoder, directory, fingerprint='a', **kwargs):
  messages = []
  cache = features.cached_features(
      source, encoder, fingerprint, directory, image_size=_SIZE, batch_size=3,
      message=messages.append, **kwargs)
  return cache, messages


def test_values_order_and_type(source, tmp_path):
  cache, _ = _open(source, _Encoder(), tmp_path / 'new' / 'dir')
  assert len(cache) == _NUM and cache.array.shape == (_NUM, 2, 3)
  assert cache[0].dtype == np.float16
  for i in range(_NUM):
    np.testing.assert_array_equal(cache[i], [[10 * i, 0, 0], [-10 * i, 0, 0]])
  assert cache[[5, 1]].shape == (2, 2, 3)
  with pytest.raises(ValueError):
    cache.array[0] = 0  # read-only


def test_computed_once_per_fingerprint(source, tmp_path):
  encoder = _Encoder()
  _open(source, encoder, tmp_path)
  assert encoder.calls == 3
  _, messages = _open(source, encoder, tmp_path)
  assert (encoder.calls, messages) == (3, [])
  _open(source, encoder, tmp_path, fingerprint='b')
  assert encoder.calls == 6
  _open(source, encoder, tmp_path)  # the first is still there
  assert encoder.calls == 6
  assert not list(tmp_path.glob('*.tmp'))


def _truncate(path: pathlib.Path):
  path.write_bytes(path.read_bytes()[:-5])


def _flip_a_bit(path: pathlib.Path):
  data = bytearray(path.read_bytes())
  data[-3] ^= 1
  path.write_bytes(bytes(data))


def _edit_sidecar(path: pathlib.Path):
  sidecar = path.with_suffix('.json')
  sidecar.write_text(json.dumps(
      json.loads(sidecar.read_text()) | {'fingerprint': 'other'}))


@pytest.mark.parametrize('damage, reason', [
    (_truncate, 'size'),
    (_flip_a_bit, 'checksum'),
    (_edit_sidecar, 'something else'),
    (lambda path: path.with_suffix('.json').unlink(), 'No such file'),
    (lambda path: path.unlink(), 'No such file'),
    (lambda path: path.with_suffix('.json').write_text('{'), 'Expecting'),
    (lambda path: path.with_suffix('.json').write_text('[]'), 'indices'),
])
def test_damaged_cache_is_rebuilt_with_a_warning(source, tmp_path, damage,
                                                 reason):
  encoder = _Encoder()
  cache, _ = _open(source, encoder, tmp_path)
  expected = np.array(cache.array)
  damage(pathlib.Path(cache.path))
  rebuilt, messages = _open(source, encoder, tmp_path)
  assert encoder.calls == 6
  assert messages[0].startswith('warning: ') and reason in messages[0]
  np.testing.assert_array_equal(rebuilt.array, expected)
  assert _open(source, encoder, tmp_path)[1] == []


def test_interrupted_leaves_nothing_and_starts_again(source, tmp_path):
  class Killed(_Encoder):
    def __call__(self, pictures):
      if self.calls == 2:
        raise KeyboardInterrupt
      return super().__call__(pictures)
  with pytest.raises(KeyboardInterrupt):
    _open(source, Killed(), tmp_path)
  assert os.listdir(tmp_path) == []
  assert len(_open(source, _Encoder(), tmp_path)[0]) == _NUM


def test_full_disk_is_one_line(source, tmp_path, monkeypatch):
  def full(handle):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(DataError, match='No space left.*free space') as info:
    _open(source, _Encoder(), tmp_path)
  assert '\n' not in str(info.value)
  assert os.listdir(tmp_path) == []


def test_damaged_picture_names_the_example(source, tmp_path):
  source[4] = Example('picture-4', (), (b'not a picture',))
  with pytest.raises(DataError, match='picture-4'):
    _open(source, _Encoder(), tmp_path)


def test_text_only_example_is_refused(source, tmp_path):
  source[4] = Example('picture-4', ())
  with pytest.raises(DataError, match='picture-4 has 0 pictures'):
    _open(source, _Encoder(), tmp_path)


def test_features_beyond_float16_are_refused(source, tmp_path):
  with pytest.raises(DataError, match='not finite'):
    _open(source, lambda x: np.full((3, 2, 3), 1e6), tmp_path)
