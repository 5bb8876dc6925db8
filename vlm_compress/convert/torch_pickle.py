"""Reads tensors from a legacy torch.save file without executing anything.

A pickle is a program.  Python's unpickler runs it, and a crafted file runs
whatever it likes.  This reader is not an unpickler: it walks the opcodes with
`pickletools`, which only parses, and gives a meaning to the few that a state
dictionary of tensors is made of.  Two callables are known by name, the tensor
rebuild and OrderedDict, and even these are not looked up or called: they
select our own code.  Everything else is refused with the name of what was
found, so no import, call or attribute access can come from the file.

The format (torch before 1.6): five pickles (a magic number, a protocol
number, facts about the machine, the object, the storage keys), and then for
each storage key its element count as int64 and its raw bytes.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pathlib
import pickletools
import struct
from typing import Any, BinaryIO

import numpy as np

from vlm_compress.config import ConfigError

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
# Storage types and the little-endian numpy type of their elements.
STORAGE_TYPES = {
    'DoubleStorage': '<f8', 'FloatStorage': '<f4', 'HalfStorage': '<f2',
    'LongStorage': '<i8', 'IntStorage': '<i4', 'ShortStorage': '<i2',
    'CharStorage': '|i1', 'ByteStorage': '|u1', 'BoolStorage': '|b1',
}
REBUILD = 'torch._utils _rebuild_tensor_v2'
ORDERED_DICT = 'collections OrderedDict'
ZIP_MAGIC = b'PK\x03\x04'

_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_LITERALS = ('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINUNICODE',
             'SHORT_BINUNICODE')
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


class TorchFileError(ConfigError):
  """A file that is damaged, of another format, or asks for what is refused."""


@dataclasses.dataclass(frozen=True)
class _Global:
  """A name the pickle mentions, 'module name'; never imported."""
  name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
  """A flat array whose bytes stand at the end of the file."""
  key: str
  dtype: str
  num_elements: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """A strided view of a storage, offset and strides in elements."""
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


_MARK = object()


def _is_size(value: Any) -> bool:
  return type(value) is int and value >= 0


def _is_sizes(value: Any) -> bool:
  return isinstance(value, tuple) and all(_is_size(v) for v in value)


def _global(name: str) -> _Global:
  """Accepts the two callables and the storage types, by name only."""
  module, _, attribute = name.partition(' ')
  known = (name in (REBUILD, ORDERED_DICT) or
           (module == 'torch' and attribute in STORAGE_TYPES))
  if not known:
    raise TorchFileError(
        f'refused: the pickle asks for {name.replace(" ", ".")!r}; only '
        'tensors and OrderedDict are read')
  return _Global(name)


def _storage(identifier: Any) -> _Storage:
  """A persistent id ('storage', type, key, location, count, None)."""
  if (not isinstance(identifier, tuple) or len(identifier) != 6 or
      identifier[0] != 'storage' or identifier[5] is not None or
      not isinstance(identifier[1], _Global) or
      not identifier[1].name.startswith('torch ') or
      not isinstance(identifier[2], str) or not _is_size(identifier[4])):
    raise TorchFileError(f'refused: persistent id {identifier!r} is not a '
                         'plain tensor storage')
  _, kind, key, _, num_elements, _ = identifier
  return _Storage(key, STORAGE_TYPES[kind.name.split()[1]], num_elements)


def _reduce(function: Any, args: Any) -> Any:
  """What calling `function` would give, for the two that are known."""
  name = function.name if isinstance(function, _Global) else repr(function)
  if name == ORDERED_DICT and args == ():
    return {}
  if name != REBUILD:
    raise TorchFileError(f'refused: the pickle calls {name!r} with arguments; '
                         'only tensors and empty OrderedDicts are rebuilt')
  valid = (isinstance(args, tuple) and len(args) >= 4 and
           isinstance(args[0], _Storage) and _is_size(args[1]) and
           _is_sizes(args[2]) and _is_sizes(args[3]) and
           len(args[2]) == len(args[3]))
  if not valid:
    raise TorchFileError('damaged: a tensor has arguments of a wrong kind')
  storage, offset, shape, strides = args[:4]
  last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
  if math.prod(shape) and last >= storage.num_elements:
    raise TorchFileError(
        f'damaged: a tensor of shape {shape} reaches element {last} of a '
        f'storage with {storage.num_elements}')
  if math.prod(shape) > storage.num_elements:  # strides of 0: a size bomb
    raise TorchFileError(
        f'refused: a tensor of shape {shape} repeats the elements of a '
        f'storage with {storage.num_elements}')
  return _Tensor(storage, offset, shape, strides)


class _Machine:
  """A stack machine for the opcodes of a state dictionary."""

  def __init__(self):
    self.stack: list[Any] = []
    self.memo: dict[int, Any] = {}

  def pop_to_mark(self) -> list[Any]:
    """Takes everything above the last mark, and the mark."""
    items = []
    while (item := self.stack.pop()) is not _MARK:
      items.append(item)
    return items[::-1]

  def set_items(self, items: list[Any]) -> None:
    """Puts alternating keys and values into the dictionary on the stack."""
    target = self.stack[-1]
    if not isinstance(target, dict) or len(items) % 2:
      raise TorchFileError('damaged: items are set on what is no dictionary')
    for key, value in zip(items[::2], items[1::2]):
      if not isinstance(key, (str, int)):
        raise TorchFileError(f'refused: a dictionary key {key!r} is not text')
      target[key] = value

  def extend(self, items: list[Any]) -> None:
    """Appends to the list on the stack."""
    if not isinstance(self.stack[-1], list):
      raise TorchFileError('damaged: an append to what is no list')
    self.stack[-1].extend(items)

  def step(self, opcode: str, argument: Any) -> None:
    """Does one opcode; an unknown one is refused."""
    stack = self.stack
    if opcode in ('PROTO', 'FRAME'):
      return
    if opcode in _CONSTANTS:
      stack.append(_CONSTANTS[opcode])
    elif opcode in _LITERALS:
      stack.append(argument)
    elif opcode in ('BINPUT', 'LONG_BINPUT'):
      self.memo[argument] = stack[-1]
    elif opcode in ('BINGET', 'LONG_BINGET'):
      stack.append(self.memo[argument])
    elif opcode == 'MARK':
      stack.append(_MARK)
    elif opcode in ('EMPTY_DICT', 'EMPTY_LIST', 'EMPTY_TUPLE'):
      stack.append({'EMPTY_DICT': {}, 'EMPTY_LIST': [],
                    'EMPTY_TUPLE': ()}[opcode])
    elif opcode == 'TUPLE':
      stack.append(tuple(self.pop_to_mark()))
    elif opcode in _TUPLES:
      count = _TUPLES[opcode]
      if len(stack) < count or _MARK in stack[-count:]:
        raise TorchFileError('damaged: a tuple lacks items')
      stack[-count:] = [tuple(stack[-count:])]
    elif opcode == 'SETITEM':
      value, key = stack.pop(), stack.pop()
      self.set_items([key, value])
    elif opcode == 'SETITEMS':
      self.set_items(self.pop_to_mark())
    elif opcode == 'APPEND':
      item = stack.pop()
      self.extend([item])
    elif opcode == 'APPENDS':
      self.extend(self.pop_to_mark())
    elif opcode == 'GLOBAL':
      stack.append(_global(argument))
    elif opcode == 'BINPERSID':
      stack.append(_storage(stack.pop()))
    elif opcode == 'REDUCE':
      args, function = stack.pop(), stack.pop()
      stack.append(_reduce(function, args))
    elif opcode == 'BUILD':
      # torch sets `_metadata` on the OrderedDict: version numbers of layers,
      # which hold no tensor.  Dropped, not applied.
      stack.pop()
      if not isinstance(stack[-1], dict):
        raise TorchFileError('refused: the pickle sets attributes of what is '
                             'no OrderedDict')
    else:
      raise TorchFileError(f'refused: pickle opcode {opcode} is not one that '
                           'a dictionary of tensors needs')


def _parse(file: BinaryIO) -> Any:
  """The value of the next pickle of the file, which stays open behind it."""
  machine = _Machine()
  try:
    for opcode, argument, _ in pickletools.genops(file):
      if opcode.name == 'STOP':
        break
      machine.step(opcode.name, argument)
    value = machine.stack.pop()
  except TorchFileError:
    raise
  except (ValueError, IndexError, KeyError, TypeError, struct.error) as error:
    raise TorchFileError(f'damaged: not a readable pickle ({error})') from error
  if machine.stack or value is _MARK:
    raise TorchFileError('damaged: a pickle ends with values left over')
  return value


def _read_storages(file: BinaryIO, storages: dict[str, _Storage],
                   keys: Any, size: int) -> dict[str, np.ndarray]:
  """The flat arrays that follow the pickles, by key."""
  if (not isinstance(keys, list) or
      not all(isinstance(key, str) for key in keys) or
      len(set(keys)) != len(keys) or set(keys) != set(storages)):
    raise TorchFileError('damaged: the list of storages does not match the '
                         'tensors')
  arrays = {}
  for key in keys:
    dtype = np.dtype(storages[key].dtype)
    header = file.read(8)
    count = struct.unpack('<q', header)[0] if len(header) == 8 else -1
    if (count != storages[key].num_elements or
        count * dtype.itemsize > size - file.tell()):
      raise TorchFileError(f'damaged: storage {key} should hold '
                           f'{storages[key].num_elements} elements; the file '
                           'is cut off or altered')
    arrays[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype)
  return arrays


def _collect(tensors: Any) -> dict[str, _Storage]:
  """Checks that the object is {name: tensor}; returns its storages by key."""
  if not isinstance(tensors, dict):
    raise TorchFileError('refused: the file holds no dictionary of tensors')
  storages: dict[str, _Storage] = {}
  for name, tensor in tensors.items():
    if not isinstance(name, str) or not isinstance(tensor, _Tensor):
      raise TorchFileError(f'refused: entry {name!r} is no tensor; only a flat '
                           'dictionary of tensors is read')
    known = storages.setdefault(tensor.storage.key, tensor.storage)
    if known != tensor.storage:
      raise TorchFileError(f'damaged: storage {known.key} is described twice, '
                           'differently')
  return storages


def read_legacy_torch_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads a state dictionary that torch.save wrote in its legacy format.

  Args:
    path: of the .pth file.

  Returns:
    {name: contiguous array of its own}, in the order of the file.

  Raises:
    TorchFileError: the file is damaged, cut off, of another format, or asks
      for anything but tensors and OrderedDict.  Nothing of it was executed.
    FileNotFoundError: there is no such file.
  """
  try:
    data = pathlib.Path(path).read_bytes()
    # In memory, because a damaged length then reads no further than the end;
    # a file would first allocate whatever the length says.
    return _read(io.BytesIO(data), len(data))
  except TorchFileError as error:
    raise TorchFileError(f'{os.fspath(path)}: {error}') from error


def _read(file: BinaryIO, size: int) -> dict[str, np.ndarray]:
  """`read_legacy_torch_file` of an open file of `size` bytes."""
  if file.read(4) == ZIP_MAGIC:
    raise TorchFileError('the newer zip format of torch.save; save it with '
                         '_use_new_zipfile_serialization=False or as '
                         'safetensors')
  file.seek(0)
  if _parse(file) != MAGIC_NUMBER:
    raise TorchFileError('not a file of torch.save: the magic number is wrong')
  if _parse(file) != PROTOCOL_VERSION:
    raise TorchFileError('a torch.save protocol that is not 1001')
  machine_facts = _parse(file)
  if (not isinstance(machine_facts, dict) or
      machine_facts.get('little_endian') is not True):
    raise TorchFileError('written on a big-endian machine; not supported')
  tensors = _parse(file)
  storages = _collect(tensors)
  arrays = _read_storages(file, storages, _parse(file), size)
  result = {}
  for name, tensor in tensors.items():
    flat = arrays[tensor.storage.key][tensor.offset:]
    strides = tuple(s * flat.itemsize for s in tensor.strides)
    view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides)
    result[name] = np.array(view)
  return result
