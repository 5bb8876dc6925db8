"""The restricted reader reads tensors and refuses everything else.

The files are written here by Python's own pickler with stand-ins whose module
and name are torch's, so that torch is not needed.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct

import numpy as np
import pytest

from vlm_compress.config import ConfigError
from vlm_compress.convert import torch_pickle
from vlm_compress.convert.torch_pickle import TorchFileError


class Global:
  """Pickled as the global `module name` with protocol 2's GLOBAL opcode."""

  def __init__(self, module, name):
    self.module, self.name = module, name

  def __call__(self, *args):
    raise AssertionError('never called: only written into a file')


class Call:
  """Pickled as a call of `function` with `args`."""

  def __init__(self, function, args, state=None):
    self.function, self.args, self.state = function, args, state


class Storage:
  """Pickled as a persistent id."""

  def __init__(self, key, values, kind='FloatStorage', identifier=None):
    self.key, self.values, self.kind = key, values, kind
    self.identifier = identifier or (
        'storage', Global('torch', kind), key, 'cpu', values.size, None)


class Pickler(pickle._Pickler):  # the one written in Python, to hook into
  """Writes the stand-ins above as torch's pickler would."""

  dispatch = dict(pickle._Pickler.dispatch)

  def persistent_id(self, obj):
    return obj.identifier if isinstance(obj, Storage) else None

  def save_stand_in(self, obj):
    if isinstance(obj, Global):
      self.write(pickle.GLOBAL + f'{obj.module}\n{obj.name}\n'.encode())
      return
    self.save(obj.function)
    self.save(obj.args)
    self.write(pickle.REDUCE)
    if obj.state is not None:
      self.save(obj.state)
      self.write(pickle.BUILD)

  dispatch[Global] = save_stand_in
  dispatch[Call] = save_stand_in


ORDERED_DICT = Global('collections', 'OrderedDict')
REBUILD = Global('torch._utils', '_rebuild_tensor_v2')


def dumps(obj):
  buffer = io.BytesIO()
  Pickler(buffer, 2).dump(obj)
  return buffer.getvalue()


def tensor(storage, shape, strides=None, offset=0, function=REBUILD):
  if strides is None:
    strides = tuple(int(np.prod(shape[i + 1:])) for i in range(len(shape)))
  hooks = Call(ORDERED_DICT, ())
  return Call(function, (storage, offset, shape, strides, False, hooks))


def write(path, obj, storages=(), *, magic=torch_pickle.MAGIC_NUMBER,
          version=1001, little_endian=True, keys=None):
  facts = {'protocol_version': 1001, 'little_endian': little_endian,
           'type_sizes': {'short': 2, 'int': 4, 'long': 4}}
  keys = [s.key for s in storages] if keys is None else keys
  parts = [pickle.dumps(p, 2) for p in (magic, version, facts)]
  parts += [dumps(obj), pickle.dumps(keys, 2)]
  for storage in storages:
    parts.append(struct.pack('<q', storage.values.size))
    parts.append(storage.values.tobytes())
  path.write_bytes(b''.join(parts))
  return path


def values(count, dtype='<f4'):
  return np.arange(count).astype(dtype)


def test_tensors_of_every_type_shape_and_stride(tmp_path):
  stored = [Storage(str(i), values(12, dtype), kind) for i, (kind, dtype)
            in enumerate(torch_pickle.STORAGE_TYPES.items())]
  entries = {s.kind: tensor(s, (3, 4)) for s in stored}
  floats = stored[1]
  entries |= {
      'transposed': tensor(floats, (4, 3), (1, 4)),
      'tail': tensor(floats, (2,), offset=10),
      'scalar': tensor(floats, (), offset=5),
      'empty': tensor(floats, (0, 4)),
  }
  path = write(tmp_path / 'a.pth', entries, stored)
  result = torch_pickle.read_legacy_torch_file(path)
  assert list(result) == list(entries)
  for storage in stored:
    array = result[storage.kind]
    assert array.dtype == storage.values.dtype
    np.testing.assert_array_equal(array, storage.values.reshape(3, 4))
  np.testing.assert_array_equal(result['transposed'],
                                floats.values.reshape(3, 4).T)
  assert result['tail'].tolist() == [10, 11]
  assert result['scalar'] == 5 and result['scalar'].shape == ()
  assert result['empty'].shape == (0, 4)
  result['tail'][0] = -1  # arrays are their own and may be written
  assert result['transposed'][2, 2] == 10


def test_an_ordered_dict_with_torch_metadata_is_read(tmp_path):
  storage = Storage('7', values(2))
  metadata = {'_metadata': Call(ORDERED_DICT, ())}
  # OrderedDict() with items and then the attribute, as torch writes it.
  data = dumps(Call(ORDERED_DICT, ()))[:-1]
  items = dumps({'w': tensor(storage, (2,))})
  body = items[items.index(b'}') + 1:-1]  # behind PROTO and EMPTY_DICT
  body = body[2:] if body[:1] == pickle.BINPUT else body
  state = dumps(metadata)[2:-1]
  blob = data + body + state + pickle.BUILD + pickle.STOP
  path = write(tmp_path / 'a.pth', {}, [storage])
  path.write_bytes(path.read_bytes().replace(dumps({}), blob, 1))
  assert torch_pickle.read_legacy_torch_file(path)['w'].tolist() == [0, 1]


ATTACKS = {
    'os.system': Call(Global('posix', 'system'), ('touch pwned',)),
    'eval': Call(Global('builtins', 'eval'), ('1',)),
    'getattr': Call(Global('builtins', 'getattr'), ((), 'x')),
    'a bare name': Global('subprocess', 'Popen'),
    'torch code': Call(Global('torch.hub', 'load'), ('x',)),
    'a torch name': Global('torch', 'load'),
    'a dotted name': Global('collections', 'OrderedDict.fromkeys'),
    'OrderedDict of items': Call(ORDERED_DICT, ([('a', 1)],)),
    'a call of a value': Call('text', ()),
    'a call of a storage type': Call(Global('torch', 'FloatStorage'), (9,)),
}


@pytest.mark.parametrize('name', sorted(ATTACKS))
def test_everything_else_is_refused_and_nothing_is_executed(
    tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  path = write(tmp_path / 'evil.pth', {'w': ATTACKS[name]})
  with pytest.raises(TorchFileError, match='evil.pth: refused'):
    torch_pickle.read_legacy_torch_file(path)
  assert os.listdir(tmp_path) == ['evil.pth']


def test_attributes_are_set_on_nothing(tmp_path):
  storage = Storage('0', values(2))
  rebuilt = tensor(storage, (2,))
  rebuilt.state = {'__dict__': {}}
  path = write(tmp_path / 'a.pth', {'w': rebuilt}, [storage])
  with pytest.raises(TorchFileError, match='sets attributes'):
    torch_pickle.read_legacy_torch_file(path)


class Gadget:
  """An ordinary object whose pickle runs a command."""

  def __reduce__(self):
    return os.system, ('touch pwned',)


@pytest.mark.parametrize('protocol', [0, 1, 2, 3, 4, 5])
def test_a_crafted_pickle_of_any_protocol_is_refused(tmp_path, monkeypatch,
                                                     protocol):
  monkeypatch.chdir(tmp_path)
  for position in range(5):  # in place of each of the five pickles
    parts = [pickle.dumps(p, 2) for p in (
        torch_pickle.MAGIC_NUMBER, 1001, {'little_endian': True}, {}, [])]
    parts[position] = pickle.dumps(Gadget(), protocol)
    (tmp_path / 'evil.pth').write_bytes(b''.join(parts))
    with pytest.raises(TorchFileError, match='evil.pth'):
      torch_pickle.read_legacy_torch_file(tmp_path / 'evil.pth')
  assert os.listdir(tmp_path) == ['evil.pth']


def test_the_gadget_of_these_tests_does_run_in_an_unpickler(tmp_path,
                                                            monkeypatch):
  monkeypatch.chdir(tmp_path)
  pickle.loads(pickle.dumps(Gadget()))
  assert os.listdir(tmp_path) == ['pwned']


BAD_STORAGES = {
    'too short for its shape': tensor(Storage('0', values(3)), (2, 2)),
    'offset behind the end': tensor(Storage('0', values(3)), (2,), offset=2),
    'negative offset': tensor(Storage('0', values(3)), (2,), offset=-1),
    'negative stride': tensor(Storage('0', values(3)), (2,), (-1,)),
    'stride of 0, a size bomb': tensor(Storage('0', values(1)), (9**9,), (0,)),
    'ranks differ': tensor(Storage('0', values(3)), (3,), (1, 1)),
    'a shape of text': tensor(Storage('0', values(3)), ('3',), (1,)),
    'a view': tensor(Storage('0', values(3), identifier=(
        'storage', Global('torch', 'FloatStorage'), '0', 'cpu', 3, ('v',))),
        (3,)),
    'a module': tensor(Storage('0', values(3), identifier=(
        'module', Global('torch', 'FloatStorage'), '0', 'cpu', 3, None)),
        (3,)),
    'OrderedDict for a type': tensor(Storage('0', values(3), identifier=(
        'storage', ORDERED_DICT, '0', 'cpu', 3, None)), (3,)),
}


@pytest.mark.parametrize('name', sorted(BAD_STORAGES))
def test_a_tensor_that_does_not_fit_its_storage(tmp_path, name):
  entry = BAD_STORAGES[name]
  path = write(tmp_path / 'a.pth', {'w': entry}, [entry.args[0]])
  with pytest.raises(TorchFileError):
    torch_pickle.read_legacy_torch_file(path)


def test_a_file_cut_off_anywhere_is_damaged(tmp_path):
  storage = Storage('0', values(6))
  path = write(tmp_path / 'a.pth', {'w': tensor(storage, (6,))}, [storage])
  data = path.read_bytes()
  for end in range(len(data)):
    path.write_bytes(data[:end])
    with pytest.raises(TorchFileError, match='a.pth'):
      torch_pickle.read_legacy_torch_file(path)


def test_flipped_bytes_never_escape_as_another_error(tmp_path):
  storage = Storage('0', values(6))
  path = write(tmp_path / 'a.pth', {'w': tensor(storage, (2, 3))}, [storage])
  data = path.read_bytes()
  rng = np.random.default_rng(0)
  for _ in range(1500):
    damaged = bytearray(data)
    for place in rng.integers(0, len(data), 2):
      damaged[place] = rng.integers(0, 256)
    path.write_bytes(bytes(damaged))
    try:
      torch_pickle.read_legacy_torch_file(path)
    except TorchFileError:
      pass


@pytest.mark.parametrize('changes,message', [
    ({'magic': 1}, 'magic number'),
    ({'version': 1002}, 'not 1001'),
    ({'little_endian': False}, 'big-endian'),
    ({'keys': ['1']}, 'list of storages'),
    ({'keys': ['0', '0']}, 'list of storages'),
    ({'keys': [0]}, 'list of storages'),
])
def test_wrong_headers(tmp_path, changes, message):
  storage = Storage('0', values(6))
  path = write(tmp_path / 'a.pth', {'w': tensor(storage, (6,))}, [storage],
               **changes)
  with pytest.raises(TorchFileError, match=message):
    torch_pickle.read_legacy_torch_file(path)


@pytest.mark.parametrize('obj', [[], 'text', {'w': 'text'}, {1: 2},
                                 {'w': {'v': 1}}, 3])
def test_only_a_flat_dictionary_of_tensors(tmp_path, obj):
  with pytest.raises(TorchFileError, match='refused|damaged'):
    torch_pickle.read_legacy_torch_file(write(tmp_path / 'a.pth', obj))


def test_the_zip_format_is_named(tmp_path):
  path = tmp_path / 'new.pth'
  path.write_bytes(b'PK\x03\x04' + b'\0' * 40)
  with pytest.raises(TorchFileError, match='zip format.*safetensors'):
    torch_pickle.read_legacy_torch_file(path)


def test_a_missing_file_and_the_class_of_the_error(tmp_path):
  assert issubclass(TorchFileError, ConfigError)
  with pytest.raises(FileNotFoundError):
    torch_pickle.read_legacy_torch_file(tmp_path / 'none.pth')


def test_an_empty_state_dictionary(tmp_path):
  path = write(tmp_path / 'a.pth', collections.OrderedDict())
  assert torch_pickle.read_legacy_torch_file(path) == {}
