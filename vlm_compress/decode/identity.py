"""What an image's keys and values were made from, as hashes.

Everything that decides them has a part: the pixels, the weights, the config,
the token ids around the image, the number of VoCo tokens.  Where one of them
differs, so does the key; nothing else does, neither names of files nor where
arrays are.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
from typing import Any

import jax
import numpy as np

from vlm_compress.config import LlavaConfig
from vlm_compress.config_values import to_dict

# Part of every key; another number when the same model leaves other keys and
# values of a picture than before.
FORMAT = 'vlm_compress vision cache 1'

# Fields that decide nothing about the keys and values of an image, and may
# change under an entry: how something is computed (rounding aside), limits,
# and what only training reads.  A field that is not here counts.
NEUTRAL = {
    '': ('remat', 'remat_policy', 'attention_implementation'),
    'text': ('max_position_embeddings', 'initializer_range'),
    'voco': ('distill_weight',),
    'atp': ('capacities', 'init_theta_r', 'init_theta_s', 'straight_through',
            'target_tokens', 'lambda_atp', 'lambda_target', 'temperature_start',
            'temperature_end'),
}

_BLOCK = 64 * 2**20  # bytes that are hashed at once


@dataclasses.dataclass(frozen=True)
class Identity:
  """What an entry is of.

  Attributes:
    method: 'voco' or 'atp'.
    pixels: of the square that the vision tower reads, see `pixels_hash`.
    weights: of all parameters, see `fingerprint`.
    config: see `config_hash`.
    layout: token ids of the compression segment (voco), or of the whole prompt
      (atp); visual tokens are placeholders.
    num_voco_tokens: C; 0 for atp.
    prompt: that the tokens were kept for; None for voco.
  """
  method: str
  pixels: str
  weights: str
  config: str
  layout: tuple[int, ...]
  num_voco_tokens: int
  prompt: str | None

  @property
  def key(self) -> str:
    """SHA-256 of all of it, 64 hexadecimal digits."""
    values = {**dataclasses.asdict(self), 'layout': to_runs(self.layout)}
    return _sha256(json.dumps([FORMAT, values], sort_keys=True).encode())


def to_runs(ids: tuple[int, ...]) -> list[list[int]]:
  """(7, 7, 5) -> [[7, 2], [5, 1]]: an image's placeholders are many."""
  return [[id_, len([*group])] for id_, group in itertools.groupby(ids)]


def from_runs(runs: list[list[int]]) -> tuple[int, ...]:
  """[[7, 2], [5, 1]] -> (7, 7, 5)."""
  return tuple(id_ for id_, count in runs for _ in range(count))


def pixels_hash(pixels: np.ndarray) -> str:
  """SHA-256 of uint8[S, S, 3]; S is in the config."""
  return _sha256(np.ascontiguousarray(pixels))


def config_hash(config: LlavaConfig) -> str:
  """SHA-256 of the config without the fields in NEUTRAL."""
  values = to_dict(config)
  if values['lora'] is None:  # a younger field: keys of older entries stay
    del values['lora']
  for section, names in NEUTRAL.items():
    part = values.get(section) if section else values
    for name in names if part is not None else ():
      del part[name]
  return _sha256(json.dumps(_plain(values), sort_keys=True).encode())


def fingerprint(params: Any) -> str:
  """SHA-256 over names, dtypes, shapes and bytes of all parameters.

  It does not depend on where they are: numpy arrays, device arrays, or
  arrays spread over a mesh, which are fetched a block at a time.

  Args:
    params: a parameter tree.
  """
  flat = [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)]  # sorted
  blocks = {name: _blocks(leaf) for name, leaf in flat}
  with concurrent.futures.ThreadPoolExecutor(_num_cores()) as pool:
    digests = pool.map(lambda job: _digest(*job), (
        (leaf, block) for name, leaf in flat for block in blocks[name]))
    lines = [' '.join([name, str(leaf.dtype), str(tuple(leaf.shape)),
                       *itertools.islice(digests, len(blocks[name]))])
             for name, leaf in flat]
  return _sha256('\n'.join(lines).encode())


def _blocks(leaf: Any) -> list[tuple[int, int]]:
  """Bounds along the leading axis, the same wherever the array is."""
  if not leaf.shape or not leaf.size:
    return [(0, 1)]
  step = max(1, _BLOCK * leaf.shape[0] // leaf.nbytes)
  return [(i, min(i + step, leaf.shape[0])) for i in range(0, leaf.shape[0], step)]


def _digest(leaf: Any, block: tuple[int, int]) -> str:
  whole = not leaf.shape or block == (0, leaf.shape[0])
  part = np.asarray(leaf if whole else leaf[slice(*block)])
  return _sha256(np.ascontiguousarray(part).reshape(-1).view(np.uint8))


def _plain(value: Any) -> Any:
  """JSON types; 0 and 0.0 are the same number."""
  if isinstance(value, dict):
    return {name: _plain(part) for name, part in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(part) for part in value]
  return float(value) if type(value) is int else value


def _num_cores() -> int:
  return (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity')
          else os.cpu_count() or 1)


def _sha256(data: Any) -> str:
  return hashlib.sha256(data).hexdigest()
