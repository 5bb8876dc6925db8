"""Where everything lies: golden specs of 7B and 13B, states made in place, and
what the compiler moves between devices.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re

import core_helpers as helpers
import jax
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample

from vlm_compress import presets, sharding
from vlm_compress.config import AtpConfig, ConfigError, VocoConfig
from vlm_compress.models.llava import Llava
from vlm_compress.train.loop import check_mesh, put
from vlm_compress.train.recipe import Recipe
from vlm_compress.train.state import abstract_state, make_state
from vlm_compress.train.steps import make_step

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'partition_specs.json'
RECIPE = Recipe(steps=10, batch_size=8, warmup_steps=1)


def specs(name, method):
  """Path -> [shape, mesh axes] of all that a state holds on 2 x 2 x 2."""
  config = presets.preset(name)
  if method == 'voco':
    config = dataclasses.replace(config, voco=VocoConfig())
  elif method == 'atp':
    config = dataclasses.replace(config, atp=AtpConfig(
        prune_after=presets.prune_after_for(config.text.num_hidden_layers)))
  trainable = ('language_model/', 'multi_modal_projector/') + {
      'voco': ('voco_embedding',), 'atp': ('atp/',)}[method]
  state = abstract_state(Llava(config), dataclasses.replace(
      RECIPE, trainable=trainable), sharding.make_mesh(2, 2, 2), with_vision=True)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): [
      list(x.shape), [a if a is None or isinstance(a, str) else list(a)
                      for a in x.sharding.spec]]
          for path, x in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.parametrize('name', ['llava_1_5_7b', 'llava_1_5_13b'])
@pytest.mark.parametrize('method', ['voco', 'atp'])
def test_golden_specs(name, method):
  """To write them anew: WRITE_GOLDEN=1 pytest -n 0 tests/train/test_sharded.py"""
  found, key = specs(name, method), f'{name} {method}'
  golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
  if os.environ.get('WRITE_GOLDEN'):
    golden[key] = found
    parts = (f'{json.dumps(k)}: {{\n' + ',\n'.join(
        f' {json.dumps(p)}: {json.dumps(v)}' for p, v in sorted(golden[k].items()))
        + '}' for k in sorted(golden))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text('{' + ',\n'.join(parts) + '}\n')
  assert golden[key] == found


def test_golden_specs_split_what_is_large():
  golden = json.loads(GOLDEN.read_text())
  for name, found in golden.items():
    moments = {p for p in found if p.startswith('opt_state')}
    assert not any('vision_tower' in p for p in moments)  # frozen: none
    for path, (shape, axes) in found.items():
      large = np.prod(shape) > 2**24 and 'vision_tower' not in path
      assert not large or {'fsdp', 'tensor'} <= set(axes), (name, path)
      if path.startswith('trainable'):
        same = [p for p in moments if p.endswith(path.removeprefix('trainable/'))]
        assert len(same) == 2 and all(found[p] == [shape, axes] for p in same)


def batch_of(config, num_rows=8, length=40):
  return helpers.batch([Sample((BOS, IMAGE, 5 + i, 7, 8, 9), 2, seed=i)
                        for i in range(num_rows)], config, length=length,
                       num_images=1)


@pytest.mark.parametrize('trainable', [(), ('atp/',)])
def test_a_state_is_made_where_it_lies(trainable):
  config = helpers.atp_config()
  recipe = dataclasses.replace(RECIPE, stage='atp', trainable=trainable)
  mesh = sharding.make_mesh(2, 2, 2)
  model, given = helpers.build(config)
  want = abstract_state(model, recipe, mesh)
  for tree in (None, given, lambda mesh: given):
    state = make_state(model, recipe, mesh, tree)
    for path, x in jax.tree_util.tree_leaves_with_path(state):
      placed = dict(jax.tree_util.tree_leaves_with_path(want))[path]
      assert (x.shape, x.dtype) == (placed.shape, placed.dtype)
      assert x.sharding.is_equivalent_to(placed.sharding, x.ndim), path
  one = make_state(model, recipe, sharding.make_mesh(devices=jax.devices()[:1]))
  eight = make_state(model, recipe, mesh)
  for path, x in helpers.flat(one.params).items():
    np.testing.assert_array_equal(x, helpers.flat(eight.params)[path])


@pytest.mark.parametrize('stage', ['instruct', 'atp'])
def test_no_mask_and_no_score_is_gathered(stage):
  """Nothing of T x S (or T x V) travels between devices."""
  config = helpers.atp_config() if stage == 'atp' else helpers.tiny()
  recipe = dataclasses.replace(RECIPE, stage=stage)
  mesh, length = sharding.make_mesh(2, 2, 2), 40
  model = helpers.build(config)[0]
  with jax.set_mesh(mesh):
    state = abstract_state(model, recipe, mesh)
    batch = put(batch_of(config, length=length), mesh, 1)
    text = jax.jit(make_step(model, recipe), donate_argnums=0).lower(
        state, batch).compile().as_text()
  moved = re.findall(r'= (\S+) (all-gather|all-to-all|collective-permute)\(', text)
  assert moved  # parameters are, under fsdp
  for shape, kind in moved:
    sizes = [int(n) for n in re.findall(r'\d+', shape.partition('[')[2])]
    assert sizes.count(length) + sizes.count(length - 1) < 2, (kind, shape)


def test_meshes_that_do_not_divide():
  config = helpers.tiny()  # 4 heads
  for mesh, recipe, words in (
      (sharding.make_mesh(8), dataclasses.replace(RECIPE, batch_size=12),
       'batch_size=12 does not divide over 8 devices'),
      (sharding.make_mesh(8), dataclasses.replace(
          RECIPE, batch_size=16, accumulate_steps=4), 'accumulate_steps=4'),
      (sharding.make_mesh(1, 1, 8), RECIPE, 'mesh.tensor=8.*num_attention_heads=4')):
    with pytest.raises(ConfigError, match=words):
      check_mesh(config, recipe, mesh)
