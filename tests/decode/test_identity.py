"""Keys of a vision cache: everything that counts has a part, and nothing else."""

from __future__ import annotations

import copy
import dataclasses

import core_helpers as helpers
import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm_compress import sharding
from vlm_compress.config import LoraConfig
from vlm_compress.decode import identity as identity_lib
from vlm_compress.decode.identity import Identity

VOCO, ATP = helpers.voco_config(), helpers.atp_config()
LORA = helpers.tiny(lora=LoraConfig(rank=2))

# Caches that are out there stay good: these change together with FORMAT.
GOLDEN_KEY = '3f70f219da71250a387d15065a34ef26f21b12b77f6d79c55de0b92d6d8bff45'
GOLDEN_CONFIG = '15cc86c06835015e65ef385d09d9c6b8787d0ffdf41a042d266a55a7e195bb17'
GOLDEN_FINGERPRINT = (
    '0d56d478cf77902436a0e8dd0af3a0acc35494ee90777661489fa3687e0137fe')


def test_every_part_of_the_identity_is_in_the_key():
  one = Identity('voco', '1' * 64, '2' * 64, '3' * 64, (1, 0, 0, 5, 0), 2, None)
  other = {'method': 'atp', 'pixels': '0' * 64, 'weights': 'b' * 64,
           'config': 'c' * 64, 'layout': (1, 0, 0, 5, 5),
           'num_voco_tokens': 1, 'prompt': ''}
  assert set(other) == {f.name for f in dataclasses.fields(Identity)}
  keys = {dataclasses.replace(one, **{k: v}).key for k, v in other.items()}
  assert len(keys | {one.key}) == len(other) + 1
  fixed = Identity('atp', '1' * 64, '2' * 64, '3' * 64, (1, -200, -200, 5), 0, 'a')
  assert fixed.key == GOLDEN_KEY


def test_the_config_counts_but_for_the_neutral_fields():
  full = {'': dataclasses.replace(VOCO, atp=None), 'voco': VOCO, 'atp': ATP,
          'text': VOCO, 'vision': VOCO, 'lora': LORA}
  for section, config in full.items():
    part = getattr(config, section) if section else config
    for field in dataclasses.fields(part):
      value = getattr(part, field.name)
      if dataclasses.is_dataclass(value) or value is None:
        continue
      changed = copy.copy(part)
      object.__setattr__(changed, field.name, (
          not value if isinstance(value, bool) else
          value + {str: 'x', tuple: (3,)}.get(type(value), 1)))
      other = copy.copy(config)
      object.__setattr__(other, section, changed) if section else None
      neutral = field.name in identity_lib.NEUTRAL.get(section, ())
      assert neutral == (identity_lib.config_hash(config) ==
                         identity_lib.config_hash(other if section else changed)), (
                             section, field.name)
  whole = helpers.atp_config(threshold_shift=0)
  assert identity_lib.config_hash(whole) == identity_lib.config_hash(
      helpers.atp_config(threshold_shift=0.0))
  assert identity_lib.config_hash(ATP) != identity_lib.config_hash(VOCO)
  # a field that came later changes no key of a model that does not use it
  assert identity_lib.config_hash(VOCO) == GOLDEN_CONFIG


def parameters() -> dict:
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {'a': {'kernel': draw(16, 8), 'bias': draw(8)}, 'b': draw(4, 6, 2),
          'scalar': np.float32(2), 'half': draw(8, 4).astype(ml_dtypes.bfloat16),
          'none': np.zeros((0, 3), np.float32)}


@pytest.mark.parametrize('block', [40, 2**26])
def test_the_fingerprint_does_not_depend_on_where_arrays_are(block, monkeypatch):
  monkeypatch.setattr(identity_lib, '_BLOCK', block)
  tree = parameters()
  want = identity_lib.fingerprint(tree)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  spread = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(
      *['fsdp', 'tensor'][:x.ndim] if x.ndim == 2 and x.size else ())))
  assert not jax.tree.map(spread, tree)['a']['kernel'].is_fully_replicated
  strided = jax.tree.map(lambda x: np.array(x, order='F'), tree)
  for other in (jax.tree.map(jax.numpy.asarray, tree), jax.tree.map(spread, tree),
                strided, dict(reversed(tree.items()))):
    assert identity_lib.fingerprint(other) == want
  if block == 2**26:
    assert identity_lib.fingerprint(
        {'a': np.arange(3, dtype=np.float32)}) == GOLDEN_FINGERPRINT


@pytest.mark.parametrize('block', [40, 2**26])
def test_the_fingerprint_sees_every_bit(block, monkeypatch):
  monkeypatch.setattr(identity_lib, '_BLOCK', block)
  def changed(path, change):
    tree = parameters()
    tree[path] = change(tree[path])
    return identity_lib.fingerprint(tree)

  def flipped(index):
    def change(x):
      x = np.array(x)
      x.reshape(-1).view(np.uint8)[index] ^= 1
      return x
    return change
  found = {identity_lib.fingerprint(parameters())} | {
      changed('b', flipped(i)) for i in range(4 * 48)}
  found |= {
      changed('half', lambda x: x.view(np.float16)), changed('half', flipped(-1)),
      changed('b', lambda x: x.reshape(4, 2, 6)), changed('scalar', lambda x: x + 1),
      changed('b', lambda x: x[::-1]), changed('none', lambda x: x.reshape(3, 0)),
      changed('a', lambda x: {'bias': x['kernel'], 'kernel': x['bias']}),
      changed('a', lambda x: {'bias2': x['bias'], 'kernel': x['kernel']})}
  assert len(found) == 1 + 4 * 48 + 8
