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
from core_helpers import BOS, IMAGE, Sample, segment
from jax.sharding import AbstractMesh

from vlm_compress import presets, sharding
from vlm_compress.config import AtpConfig, ConfigError, VocoConfig
from vlm_compress.models.llava import Llava
from vlm_compress.models.sequence import split_voco
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


STAGES = ('instruct', 'voco', 'atp')


def stage_of(stage, length=40):
  """A model's config, a recipe and a batch of eight rows."""
  config = {'instruct': helpers.tiny, 'voco': helpers.voco_config,
            'atp': helpers.atp_config}[stage]()
  image = segment(2) if stage == 'voco' else (IMAGE,)
  batch = helpers.batch([Sample((BOS, *image, 5 + i, 7, 8, 9), 2, seed=i)
                         for i in range(8)], config, length=length, num_images=1)
  if stage == 'voco':
    batch = split_voco(batch, config, length - 13), None
  return config, dataclasses.replace(RECIPE, stage=stage), batch


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


MOVES = re.compile(
    r'= (\(.*?\)|\S+) (all-gather|all-to-all|collective-permute)(?:-start)?\(')


def moves(text):
  """(kind, sizes) of every array that a compiled program moves, tuples' too."""
  return [(kind, tuple(int(n) for n in sizes.split(',') if n))
          for shapes, kind in MOVES.findall(text)
          for sizes in re.findall(r'\w+\[([\d,]*)\]', shapes)]


def test_moves_are_found():
  assert moves('%a = f32[8,40]{1,0} all-gather(x), b\n%c = (f32[3]{0}, s32[40,40]) '
               'all-to-all(x)\n%d = (f32[2,5]) all-gather-start(%e)') == [
      ('all-gather', (8, 40)), ('all-to-all', (3,)), ('all-to-all', (40, 40)),
      ('all-gather', (2, 5))]


@pytest.mark.parametrize('stage', STAGES)
def test_no_mask_and_no_score_is_gathered(stage):
  """Nothing of T x S (or T x V) travels between devices."""
  config, recipe, batch = stage_of(stage)
  lengths = {40} if stage != 'voco' else {  # text, with what it reads, segments
      27, 27 + 2, len(batch[0].segment_ids)}
  lengths |= {n - 1 for n in lengths}  # shifted by one, as targets are
  mesh, model = sharding.make_mesh(2, 2, 2), helpers.build(config)[0]
  with jax.set_mesh(mesh):
    state = abstract_state(model, recipe, mesh)
    text = jax.jit(make_step(model, recipe), donate_argnums=0).lower(
        state, put(batch, mesh, 1)).compile().as_text()
  moved = moves(text)
  assert moved  # parameters are, under fsdp
  for kind, sizes in moved:
    assert sum(n in lengths for n in sizes) < 2, (kind, sizes)


def test_voco_on_one_device_or_eight():
  """The other stages: test_loop.py, through `fit`."""
  config, recipe, batch = stage_of('voco')
  model, given = helpers.build(config)
  seen = []
  for mesh in (sharding.make_mesh(devices=jax.devices()[:1]),
               sharding.make_mesh(2, 2, 2)):
    with jax.set_mesh(mesh):
      state, metrics = jax.jit(make_step(model, recipe))(
          make_state(model, recipe, mesh, given), put(batch, mesh, 1))
      seen.append(jax.device_get((state.opt_state, metrics)))  # has the gradients
  (want, one), (got, eight) = seen
  for name, value in one.items():
    helpers.close(eight[name], value, 1e-5)
  assert max(np.abs(x).max() for x in jax.tree.leaves(want)) > 1e-3
  jax.tree.map(lambda a, b: helpers.close(a, b, 1e-5), got, want)


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


def test_fsdp_must_split_the_hidden_sizes():
  """One that does not would leave every kernel whole on every device."""
  recipe = dataclasses.replace(RECIPE, batch_size=9)
  three = sharding.make_mesh(fsdp=3, devices=jax.devices()[:3])
  config = helpers.tiny()  # 32 in both
  wide = dataclasses.replace(config, text=dataclasses.replace(
      config.text, hidden_size=96))
  for model, words in ((config, 'mesh.fsdp=3 does not divide text.hidden_size=32'),
                       (wide, 'mesh.fsdp=3 does not divide vision.hidden_size=32')):
    with pytest.raises(ConfigError, match=words):
      check_mesh(model, recipe, three)
  # whose features are made before is not on the mesh
  check_mesh(dataclasses.replace(wide, vision=presets.efficientnet_lite0()), recipe,
             three)
  for name in ('llava_1_5_7b', 'llava_1_5_13b'):
    for fsdp in (32, 64, 256):
      mesh = AbstractMesh((1, fsdp, 1), sharding.MESH_AXES)
      sharding.check_sizes(presets.preset(name), mesh, with_vision=True)
