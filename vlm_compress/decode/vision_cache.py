"""Keys and values of images in safetensors files, by what they were made from.

A cache is a directory with a file per entry, which any number of writers may
fill at once and which loses nothing; or one file of many entries, to be handed
on, where writers take turns.  Both have the same format: tensors named
`<key>/<name>`, and the metadata of each entry as JSON under its key.

Nothing that a file says is believed.  The key is computed anew from the
metadata, shapes and dtypes must be those that the config gives, and a hash
covers the content.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import string
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np
import safetensors

from vlm_compress import atomic
from vlm_compress.config import ConfigError, LlavaConfig, check
from vlm_compress.convert.tensors import DTYPES, TensorWriter
from vlm_compress.decode.identity import FORMAT, Identity, from_runs, to_runs
from vlm_compress.models.segments import segment_bounds

SUFFIX = '.safetensors'
MAX_HEADER = 90_000_000  # bytes; readers of safetensors stop at 100 MB
_TENSOR_LINE = 250  # bytes of the header that a tensor takes, at most
_MOST_WAITING = 512 * 2**20  # bytes
_MOST_TOKENS = 2**20  # of a layout


class Entry(NamedTuple):
  """Keys and values of one image.

  Attributes:
    identity: what it is of.
    tensors: voco: `keys`, `values` float[M, 1, 1, S, K, H], `positions`
      int32[S]; atp: per segment `keys/0`, `values/0`, ... float[m, S, K, H].
    visual_tokens: atp: that entered each layer, M of them; else None.
  """
  identity: Identity
  tensors: dict[str, np.ndarray]
  visual_tokens: tuple[int, ...] | None

  @property
  def nbytes(self) -> int:
    """Of all tensors."""
    return sum(x.nbytes for x in self.tensors.values())


class _Meta(NamedTuple):
  """What a file says about an entry."""
  identity: Identity
  visual_tokens: tuple[int, ...] | None
  content: str


_Spec = tuple[tuple[int, ...], str]  # shape and dtype


class _Header(NamedTuple):
  """Of a file, by key: metadata, and what tensors there are, by name."""
  metas: dict[str, _Meta]
  specs: dict[str, dict[str, _Spec]]


class VisionCache:
  """A directory of entries, or a file (*.safetensors) of them.

  Attributes:
    path: of the cache; it need not exist.
    is_file: which of the two it is.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path)
    self.is_file = self.path.suffix == SUFFIX and not self.path.is_dir()
    self._waiting: dict[str, Entry] = {}
    self._replacing: set[str] = set()
    self._known: tuple[Any, _Header | None] = (None, None)

  def __enter__(self) -> VisionCache:
    return self

  def __exit__(self, *_: Any) -> None:
    self.flush()

  def where(self, identity: Identity) -> pathlib.Path:
    """The file that has the entry, or will have it."""
    if self.is_file:
      return self.path
    return self.path / f'{identity.pixels[:16]}-{identity.key[:32]}{SUFFIX}'

  def find(self, identity: Identity, config: LlavaConfig) -> Entry | None:
    """The entry of that identity, or None.

    Raises:
      ConfigError: it is damaged or was tampered with; or the file that has
        its name is of other weights.
    """
    if identity.key in self._waiting:
      return self._waiting[identity.key]
    path = self.where(identity)
    if not path.exists():
      return None
    header = self._header() if self.is_file else read_header(path)
    if identity.key in header.metas:
      return _read(path, identity, header, config)
    if self.is_file:
      return None
    for meta in header.metas.values():
      check(meta.identity.weights == identity.weights,
            stale(path, meta.identity.weights, identity.weights))
    _refuse(path, 'key', 'it holds another entry than its name says')

  def others(self, identity: Identity) -> list[Identity]:
    """What other entries there are of the same picture, damaged files apart."""
    if self.is_file:
      found = [self._header()] if self.path.exists() else []
    else:
      found = []
      for path in sorted(self.path.glob(f'{identity.pixels[:16]}-*{SUFFIX}')):
        with contextlib.suppress(ConfigError):
          found.append(read_header(path))
    return [meta.identity for header in found for meta in header.metas.values()
            if meta.identity.pixels == identity.pixels
            and meta.identity != identity]

  def add(self, entry: Entry, replace: bool = False) -> None:
    """Writes an entry; in a file it waits until `flush`, or until as much waits
    as the file has already, so that a file is not rewritten for every entry.

    Args:
      entry: what to write.
      replace: also where there is one of the same key.

    Raises:
      ConfigError: the file that it would go to is damaged.
    """
    if not self.is_file:
      self.path.mkdir(parents=True, exist_ok=True)
      atomic.remove_abandoned(self.path, SUFFIX)
      _write(self.where(entry.identity), [entry])
      return
    if self.path.exists():
      self._header()  # a damaged file is refused before more is done for it
    key = entry.identity.key
    self._waiting[key] = entry
    self._replacing |= {key} if replace else set()
    size = self.path.stat().st_size if self.path.exists() else 0
    waiting = sum(e.nbytes for e in self._waiting.values())
    if waiting >= min(size, _MOST_WAITING):
      self.flush()

  def flush(self) -> None:
    """Writes what waits, beside what other writers have written."""
    if not self._waiting:
      return
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.lock(self.path):
      for dead in self.path.parent.glob(f'.{self.path.name}.*.tmp'):
        dead.unlink(missing_ok=True)  # who has the lock is the only writer
      old = read_header(self.path) if self.path.exists() else None
      new = [entry for key, entry in self._waiting.items() if old is None
             or key not in old.metas or key in self._replacing]
      if new:
        _write(self.path, new, old)
    self._waiting, self._replacing = {}, set()

  def _header(self) -> _Header:
    """The file's header, read again when there is another file."""
    stat = self.path.stat()
    version = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    if self._known[0] != version:
      self._known = version, read_header(self.path)
    return self._known[1]


def stale(path: pathlib.Path, found: str, wanted: str) -> str:
  """The message about an entry of other weights."""
  return (f'{path}: weights: this picture was compressed with other weights, '
          f'fingerprint {found[:16]}, than this model has, {wanted[:16]}; '
          'compress it with this model: vlm-compress compress')


# ------------------------------------------------------------------- writing


def _write(path: pathlib.Path, entries: list[Entry],
           old: _Header | None = None) -> None:
  """Writes entries, and those of the file's header that are not among them."""
  old = old or _Header({}, {})
  new = {entry.identity.key: entry for entry in entries}
  metadata = {'format': FORMAT}
  metadata |= {key: _to_json(meta) for key, meta in old.metas.items()
               if key not in new}
  kept = {f'{key}/{name}': spec for key, specs in old.specs.items()
          if key not in new for name, spec in specs.items()}
  specs, given = dict(kept), {}
  for key, entry in new.items():
    metadata[key] = _to_json(_Meta(entry.identity, entry.visual_tokens,
                                   content_hash(entry.tensors)))
    for name, value in entry.tensors.items():
      specs[f'{key}/{name}'] = (value.shape, value.dtype.name)
      given[f'{key}/{name}'] = value
  size = len(json.dumps(metadata)) + _TENSOR_LINE * len(specs)
  check(size <= MAX_HEADER, f'{path}: {len(metadata) - 1:,} entries are too many '
        'for one file; name a directory')
  with atomic.replace(path) as temporary:
    writer = TensorWriter(temporary, specs, metadata)
    if kept:
      with safetensors.safe_open(path, framework='numpy') as file:
        for name in kept:
          writer.write(name, file.get_tensor(name))
    for name, value in given.items():
      writer.write(name, value)
    writer.close()


def content_hash(tensors: Mapping[str, np.ndarray]) -> str:
  """SHA-256 over names, dtypes, shapes and bytes."""
  digest = hashlib.sha256()
  for name, value in sorted(tensors.items()):
    digest.update(f'{name} {value.dtype.name} {value.shape}\n'.encode())
    digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
  return digest.hexdigest()


def _to_json(meta: _Meta) -> str:
  values = dataclasses.asdict(meta.identity)
  values |= {'layout': to_runs(meta.identity.layout), 'content': meta.content,
             'visual_tokens': meta.visual_tokens}
  return json.dumps(values)


# ------------------------------------------------------------------- reading


def read_header(path: pathlib.Path) -> _Header:
  """What a file says that it holds.

  Raises:
    ConfigError: it is no such file, truncated, or says what cannot be: a
      missing or wrong field, a key that does not follow from the metadata, a
      tensor of no entry.
  """
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      metadata = file.metadata() or {}
      slices = {name: file.get_slice(name) for name in file.keys()}
      found = {name: (tuple(s.get_shape()), s.get_dtype())
               for name, s in slices.items()}
  except (safetensors.SafetensorError, OSError) as e:
    _refuse(path, 'file', f'truncated or no safetensors file ({e})', e)
  said = metadata.pop('format', None)
  if said != FORMAT:
    _refuse(path, 'format', f'{said!r} where {FORMAT!r} is read')
  metas = {key: _from_json(path, key, text) for key, text in metadata.items()}
  specs: dict[str, dict[str, _Spec]] = {key: {} for key in metas}
  for name, (shape, code) in found.items():
    key, _, rest = name.partition('/')
    if key not in metas or code not in DTYPES:
      _refuse(path, name[:40], f'a tensor of {code} that belongs to no entry')
    specs[key][rest] = shape, DTYPES[code]
  return _Header(metas, specs)


def _is_hash(x: Any) -> bool:
  return isinstance(x, str) and len(x) == 64 and set(x) <= set(string.hexdigits)


def _is_ints(x: Any) -> bool:
  return isinstance(x, list) and all(type(i) is int for i in x)


def _is_layout(x: Any) -> bool:
  return isinstance(x, list) and all(
      _is_ints(run) and len(run) == 2 and run[1] > 0 for run in x) and (
          sum(run[1] for run in x) <= _MOST_TOKENS)


_FIELDS = {
    'method': lambda x: x in ('voco', 'atp'), 'pixels': _is_hash,
    'weights': _is_hash, 'config': _is_hash, 'layout': _is_layout,
    'num_voco_tokens': lambda x: type(x) is int,
    'prompt': lambda x: x is None or isinstance(x, str), 'content': _is_hash,
    'visual_tokens': lambda x: x is None or _is_ints(x)}


def _from_json(path: pathlib.Path, key: str, text: str) -> _Meta:
  entry = key[:16]
  try:
    values = json.loads(text)
  except (ValueError, RecursionError) as e:
    _refuse(path, entry, f'metadata that are no JSON ({e})', e)
  if not isinstance(values, dict) or set(values) != set(_FIELDS):
    _refuse(path, entry, f'metadata must have the fields {sorted(_FIELDS)}')
  for name, good in _FIELDS.items():
    if not good(values[name]):
      _refuse(path, f'{entry}/{name}', f'{str(values[name])[:40]!r} cannot be')
  visual, content = values.pop('visual_tokens'), values.pop('content')
  identity = Identity(**{**values, 'layout': from_runs(values['layout'])})
  if identity.key != key:
    _refuse(path, f'{entry}/key', 'the metadata are those of '
            f'{identity.key[:16]}: one of them was changed')
  return _Meta(identity, None if visual is None else tuple(visual), content)


def _read(path: pathlib.Path, identity: Identity, header: _Header,
          config: LlavaConfig) -> Entry:
  """Tensors of an entry, after their shapes and dtypes were compared."""
  meta, prefix = header.metas[identity.key], f'{identity.key}/'
  entry = prefix[:16] + '/'
  said, want = header.specs[identity.key], _expected(path, meta, config)
  for name in sorted(set(want) | set(said)):
    if want.get(name) != said.get(name):
      _refuse(path, entry + name, f'{_spec(said.get(name))} where config and '
              f'metadata give {_spec(want.get(name))}')
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      tensors = {name: file.get_tensor(prefix + name) for name in want}
  except (safetensors.SafetensorError, OSError) as e:
    _refuse(path, 'file', f'cannot be read ({e})', e)
  if content_hash(tensors) != meta.content:
    _refuse(path, entry + 'content', 'keys and values are not those that were '
            'written')
  if identity.method == 'voco' and (
      tensors['positions'].tolist() != _positions(identity, config)):
    _refuse(path, entry + 'positions', 'not those of the layout')
  return Entry(identity, tensors, meta.visual_tokens)


def _positions(identity: Identity, config: LlavaConfig) -> list[int]:
  """Of VoCo's keys in their segment, see models.inputs.voco_states."""
  size = len(identity.layout)
  if config.voco.text_sees_prefix:
    return [0, *range(1 + config.num_visual_tokens, size)]
  return [*range(size - identity.num_voco_tokens, size)]


def _expected(path: pathlib.Path, meta: _Meta, config: LlavaConfig
              ) -> dict[str, _Spec]:
  """Shapes and dtypes that config and metadata give."""
  text, identity, visual = config.text, meta.identity, meta.visual_tokens
  head = (text.num_key_value_heads, text.size_per_head)
  at_most, field = config.num_visual_tokens, f'{identity.key[:16]}/visual_tokens'
  if identity.method == 'voco':
    if visual is not None:
      _refuse(path, field, 'only what ATP has kept has them')
    size = len(_positions(identity, config))
    each = (text.num_hidden_layers, 1, 1, size, *head), config.dtype
    return {'keys': each, 'values': each, 'positions': ((size,), 'int32')}
  bounds = segment_bounds(config, True)
  counts = [visual[first] for first, _ in bounds] if visual is not None and (
      len(visual) == text.num_hidden_layers) else []
  by_layer = [n for n, (first, last) in zip(counts, bounds)
              for _ in range(last - first)]
  if not counts or list(visual) != by_layer or not all(
      1 <= b <= a for a, b in zip([at_most, *counts], counts)):
    _refuse(path, field, f'{str(visual)[:60]}: a number for each of '
            f'{text.num_hidden_layers} layers, of 1 to {at_most}, less only '
            f'behind layer {config.atp.prune_after}')
  before, out = identity.layout.index(config.image_token_index), {}
  for index, (count, (first, last)) in enumerate(zip(counts, bounds)):
    each = (last - first, before + count, *head), config.dtype
    out |= {f'keys/{index}': each, f'values/{index}': each}
  return out


def _spec(spec: _Spec | None) -> str:
  return 'no tensor' if spec is None else f'{spec[1]}{list(spec[0])}'


def _refuse(path: pathlib.Path, field: str, problem: str,
            cause: Exception | None = None) -> NoReturn:
  raise ConfigError(
      f'{path}: {field}: {problem}; delete the file and write it again: '
      'vlm-compress compress') from cause
