"""Logical axes, meshes and where parameters go, on eight fake devices."""

from __future__ import annotations

import core_helpers as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from vlm_compress import sharding
from vlm_compress.config import ConfigError
from vlm_compress.models import llava


def test_eight_devices():
  assert jax.device_count() == 8


def test_unknown_logical_axis_raises():
  with pytest.raises(ConfigError, match="'heds'.*'heads'"):
    sharding.partition_spec(('batch', 'heds'))
  with pytest.raises(ConfigError, match="'heds'"):  # also without a mesh
    sharding.constrain(jnp.zeros((2, 2)), 'batch', 'heds')
  with pytest.raises(ConfigError, match='1 logical axes.*shape'):
    sharding.constrain(jnp.zeros((2, 2)), 'batch')


def test_specs():
  assert sharding.partition_spec(('batch', 'length', None, 'mlp')) == Spec(
      ('data', 'fsdp'), None, None, 'tensor')
  assert sharding.partition_spec(('layers', 'embed', 'heads')) == Spec(
      None, 'fsdp', 'tensor')
  for axes in sharding.RULES.values():
    for axis in (axes,) if isinstance(axes, str) else axes or ():
      assert axis in sharding.MESH_AXES


def test_make_mesh():
  assert dict(sharding.make_mesh().shape) == dict(data=8, fsdp=1, tensor=1)
  assert dict(sharding.make_mesh(fsdp=2, tensor=2).shape) == dict(
      data=2, fsdp=2, tensor=2)
  one = sharding.make_mesh(devices=jax.devices()[:1])
  assert one.size == 1
  with pytest.raises(ConfigError, match='tensor=3 does not divide 8'):
    sharding.make_mesh(tensor=3)
  with pytest.raises(ConfigError, match='needs 4 devices.*there are 8'):
    sharding.make_mesh(data=2, fsdp=2)


def test_constrain_under_a_mesh_is_not_a_no_op():
  mesh = sharding.make_mesh(4, 1, 2)
  with jax.set_mesh(mesh):
    out = jax.jit(lambda x: sharding.constrain(x + 1, 'batch', 'mlp'))(
        jnp.zeros((8, 4)))
  assert out.sharding.is_equivalent_to(
      NamedSharding(mesh, Spec(('data', 'fsdp'), 'tensor')), 2)


def _shardings(config, mesh):
  model = llava.Llava(config)
  boxed = jax.eval_shape(lambda key: llava.init_params(model, key),
                         jax.random.key(0))
  return helpers.flat(sharding.tree_shardings(boxed, mesh))


def test_tiny_parameters_on_2_x_2_x_2():
  mesh = sharding.make_mesh(2, 2, 2)
  got = _shardings(helpers.tiny(), mesh)
  layers = 'language_model/layers/'
  want = {
      'language_model/embed_tokens/embedding': Spec('tensor', 'fsdp'),
      'language_model/lm_head/kernel': Spec('fsdp', 'tensor'),
      'language_model/norm/weight': Spec(None),
      layers + 'self_attn/q_proj/kernel': Spec(None, 'fsdp', 'tensor'),
      layers + 'self_attn/k_proj/kernel': Spec(None, 'fsdp', 'tensor'),
      layers + 'self_attn/o_proj/kernel': Spec(None, 'tensor', 'fsdp'),
      layers + 'mlp/gate_proj/kernel': Spec(None, 'fsdp', 'tensor'),
      layers + 'mlp/down_proj/kernel': Spec(None, 'tensor', 'fsdp'),
      layers + 'input_layernorm/weight': Spec(None, None),
      'multi_modal_projector/linear_1/kernel': Spec(None, 'tensor'),
      'multi_modal_projector/linear_2/kernel': Spec('tensor', 'fsdp')}
  for path, spec in want.items():
    assert got[path].spec == spec, path
  # everything large is really split
  params = helpers.flat(helpers.build(helpers.tiny())[1])
  for path, x in params.items():
    placed = jax.device_put(x, got[path])
    local = placed.addressable_shards[0].data.size
    if x.ndim >= 2 and 'norm' not in path and 'bias' not in path:
      assert local < x.size, path


def test_dimension_that_does_not_divide_is_replicated():
  import dataclasses
  config = helpers.tiny(text=dataclasses.replace(helpers.tiny().text,
                                                 intermediate_size=49))
  got = _shardings(config, sharding.make_mesh(2, 2, 2))
  assert got['language_model/layers/mlp/gate_proj/kernel'].spec == Spec(
      None, 'fsdp', None)


@pytest.mark.parametrize('shape', [(2, 2, 2), (1, 1, 8)])
def test_logits_do_not_depend_on_the_mesh(shape):
  """Also on a mesh with more devices than heads."""
  config = helpers.tiny()
  model, params = helpers.build(config)
  batch = helpers.batch([Sample((BOS, IMAGE, 5 + i, 7), seed=i)
                         for i in range(4)], config, length=20, num_images=1)
  want, _ = helpers.apply(model, params, batch)
  mesh = sharding.make_mesh(*shape)
  flat = _shardings(config, mesh)
  with jax.set_mesh(mesh):
    import flax.traverse_util
    placed = jax.device_put(
        params, flax.traverse_util.unflatten_dict(flat, sep='/'))
    data = jax.device_put(batch, sharding.batch_sharding(mesh))
    got, _ = jax.jit(lambda p, b: model.apply({'params': p}, b))(placed, data)
  helpers.close(np.asarray(got), want)
