"""The CLIP tower: layout of parameters, which layers run, types, errors.

Equality with Hugging Face is measured in tests/parity.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_compress import presets, sharding
from vlm_compress.config import ConfigError, VisionConfig
from vlm_compress.models.clip_vit import (
  ClipVisionTower,
  LayerNorm,
  activation,
  num_layers_run,
)

CONFIG = VisionConfig(image_size=12, patch_size=6, hidden_size=8,
                      intermediate_size=12, num_hidden_layers=3,
                      num_attention_heads=2)


@pytest.fixture(scope='module')
def boxed():
  """Parameters with logical axis names, drawn large enough to matter."""
  shapes = jax.eval_shape(ClipVisionTower(CONFIG).init, jax.random.key(0),
                          jnp.zeros((1, 12, 12, 3)))['params']
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape), x.dtype), shapes)


@pytest.fixture(scope='module')
def params(boxed):
  return nn.unbox(boxed)


@pytest.fixture(scope='module')
def pixels():
  values = np.random.default_rng(1).normal(size=(2, 12, 12, 3))
  return jnp.asarray(values, jnp.float32)


@functools.partial(jax.jit, static_argnums=0)  # one compilation per tower
def apply(tower, params, pixels):
  return tower.apply({'params': params}, pixels)


def run(params, pixels, config=CONFIG, **kwargs):
  return apply(ClipVisionTower(config, **kwargs), params, pixels)


def paths(tree):
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {'/'.join(key.key for key in path): leaf for path, leaf in leaves}


def test_parameters_have_hugging_face_names_and_a_layer_axis(params):
  shapes = {name: leaf.shape for name, leaf in paths(params).items()}
  expected = {
      'embeddings/class_embedding': (8,),
      'embeddings/patch_embedding/kernel': (6, 6, 3, 8),
      'embeddings/position_embedding/embedding': (5, 8),
      'pre_layrnorm/weight': (8,), 'pre_layrnorm/bias': (8,),
      'layers/mlp/fc1/kernel': (3, 8, 12), 'layers/mlp/fc1/bias': (3, 12),
      'layers/mlp/fc2/kernel': (3, 12, 8), 'layers/mlp/fc2/bias': (3, 8),
  }
  for name in ('layer_norm1', 'layer_norm2'):
    expected[f'layers/{name}/weight'] = expected[f'layers/{name}/bias'] = (3, 8)
  for name in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
    expected[f'layers/self_attn/{name}/kernel'] = (3, 8, 8)
    expected[f'layers/self_attn/{name}/bias'] = (3, 8)
  assert shapes == expected


def test_the_tree_does_not_depend_on_layer_or_strategy(params):
  for layer in (-1, -2, 0, 3):
    tower = ClipVisionTower(CONFIG, layer, 'full')
    tree = jax.eval_shape(tower.init, jax.random.key(0),
                          jnp.zeros((1, 12, 12, 3)))['params']
    assert (jax.tree.map(jnp.shape, nn.unbox(tree)) ==
            jax.tree.map(jnp.shape, params))


def test_logical_axes(boxed):
  axes = {'/'.join(k.key for k in path): leaf.names for path, leaf in
          jax.tree_util.tree_flatten_with_path(
              boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))[0]}
  assert axes['layers/self_attn/q_proj/kernel'] == ('layers', 'embed', 'heads')
  assert axes['layers/self_attn/out_proj/kernel'] == (
      'layers', 'heads', 'embed')
  assert axes['layers/mlp/fc1/kernel'] == ('layers', 'embed', 'mlp')
  assert axes['layers/mlp/fc2/kernel'] == ('layers', 'mlp', 'embed')
  assert axes['layers/layer_norm1/weight'] == ('layers', 'act_embed')
  for names in axes.values():
    sharding.partition_spec(tuple(names))  # every name has a rule


def test_hidden_states_are_numbered_from_both_ends(params, pixels):
  outputs = [np.asarray(run(params, pixels, feature_layer=layer))
             for layer in range(4)]
  np.testing.assert_array_equal(outputs[2],
                                run(params, pixels, feature_layer=-2))
  assert [num_layers_run(CONFIG, layer) for layer in range(-4, 4)] == [
      0, 1, 2, 3, 0, 1, 2, 3]
  for a, b in zip(outputs, outputs[1:]):
    assert np.abs(a - b).max() > 1e-2


@pytest.mark.parametrize('layer', [0, 1, 2, 3])
def test_layers_behind_the_feature_layer_have_no_effect(params, pixels, layer):
  changed = dict(params)
  changed['layers'] = jax.tree.map(lambda x: x.at[layer:].set(jnp.nan),
                                   params['layers'])
  np.testing.assert_array_equal(run(changed, pixels, feature_layer=layer),
                                run(params, pixels, feature_layer=layer))


def test_every_layer_in_front_has_an_effect(params, pixels):
  before = run(params, pixels, feature_layer=3)
  for layer in range(3):
    changed = dict(params)
    changed['layers'] = jax.tree.map(lambda x, i=layer: x.at[i].mul(1.5),
                                     params['layers'])
    assert jnp.abs(run(changed, pixels, feature_layer=3) - before).max() > 1e-2


def test_init_returns_the_same_output_as_apply(pixels):
  tower = ClipVisionTower(CONFIG, feature_layer=1)
  output, variables = jax.jit(tower.init_with_output)(jax.random.key(0),
                                                      pixels)
  np.testing.assert_allclose(output, apply(tower, variables['params'], pixels),
                             atol=1e-5)


def test_gradients_stop_at_the_feature_layer(params, pixels):
  def loss(params):
    return jnp.sum(run(params, pixels, feature_layer=2) ** 2)
  grads = jax.jit(jax.grad(loss))(params)
  for name, grad in paths(grads['layers']).items():
    assert jnp.all(grad[2] == 0), name
    # A key's bias adds the same to all logits of a query: softmax ignores it.
    if name != 'self_attn/k_proj/bias':
      assert jnp.all(jnp.any(grad[:2] != 0, axis=range(1, grad.ndim))), name


def test_default_drops_the_class_token_and_full_keeps_it(params, pixels):
  full = run(params, pixels, select_strategy='full')
  default = run(params, pixels)
  assert full.shape == (2, 5, 8) and default.shape == (2, 4, 8)
  np.testing.assert_array_equal(full[:, 1:], default)


def test_patches_are_row_major(params):
  """At hidden state 0 a token knows its own square of pixels only."""
  flat = jnp.zeros((1, 12, 12, 3))
  lit = flat.at[0, :6, 6:].set(1.0)  # row 0, column 1 of 2 x 2
  change = run(params, lit, feature_layer=0) - run(params, flat,
                                                   feature_layer=0)
  assert jnp.abs(change[0]).max(-1).astype(bool).tolist() == [
      False, True, False, False]


def test_patch_embedding_is_the_convolution(params, pixels):
  kernel = params['embeddings']['patch_embedding']['kernel']
  expected = jax.lax.conv_general_dilated(
      pixels, kernel, (6, 6), 'VALID',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC')).reshape(2, 4, 8)
  expected += params['embeddings']['position_embedding']['embedding'][1:]
  norm = LayerNorm(CONFIG.layer_norm_eps)
  expected = norm.apply({'params': params['pre_layrnorm']}, expected)
  np.testing.assert_allclose(run(params, pixels, feature_layer=0), expected,
                             atol=1e-5)


def test_a_picture_alone_equals_it_in_a_batch(params, pixels):
  batch = run(params, pixels)
  for index in range(2):
    alone = run(params, pixels[index:index + 1])
    np.testing.assert_allclose(alone[0], batch[index], atol=1e-5)


def test_activations():
  x = np.linspace(-3, 3, 13)
  quick = x / (1 + np.exp(-1.702 * x))
  np.testing.assert_allclose(activation(jnp.asarray(x), 'quick_gelu'), quick,
                             atol=1e-6)
  exact = [v / 2 * (1 + math.erf(v / 2 ** 0.5)) for v in x]
  np.testing.assert_allclose(activation(jnp.asarray(x), 'gelu'), exact,
                             atol=1e-6)


@pytest.mark.parametrize('changes', [
    {'hidden_act': 'gelu'}, {'layer_norm_eps': 0.1},
    {'num_attention_heads': 4}])
def test_every_field_that_keeps_the_shapes_has_an_effect(params, pixels,
                                                         changes):
  other = dataclasses.replace(CONFIG, **changes)
  difference = run(params, pixels, other) - run(params, pixels)
  assert jnp.abs(difference).max() > 1e-4


def test_compute_and_storage_types(params, pixels):
  tower = ClipVisionTower(CONFIG, dtype=jnp.bfloat16,
                          param_dtype=jnp.bfloat16)
  tree = jax.eval_shape(tower.init, jax.random.key(0), pixels)['params']
  assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype('bfloat16')}
  low = run(params, pixels, dtype=jnp.bfloat16)
  assert low.dtype == jnp.bfloat16
  high = run(params, pixels)
  assert high.dtype == jnp.float32
  np.testing.assert_allclose(low.astype(jnp.float32), high, atol=0.15)


def test_layer_norm_computes_in_float32():
  x = (1000 + jnp.arange(8.0)).astype(jnp.bfloat16)  # bf16 steps of 4 here
  norm = LayerNorm(1e-5)
  y = norm.apply(norm.init(jax.random.key(0), x), x)
  x32 = np.asarray(x, np.float32)
  expected = (x32 - x32.mean()) / np.sqrt(x32.var() + 1e-5)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=1e-2)


def test_the_7b_tower_has_the_size_of_vit_l():
  config = presets.preset('llava_1_5_7b').vision
  tower = ClipVisionTower(config)
  pixels = jax.ShapeDtypeStruct((1, 336, 336, 3), jnp.float32)
  features, variables = jax.eval_shape(tower.init_with_output,
                                       jax.random.key(0), pixels)
  assert features.shape == (1, 576, 1024)
  # 303,507,456 of openai/clip-vit-large-patch14-336 without the 2048 of
  # post_layernorm.
  count = sum(x.size for x in jax.tree.leaves(variables))
  assert count == 303_507_456 - 2_048


@pytest.mark.parametrize('layer', [4, -5])
def test_a_layer_that_does_not_exist(params, pixels, layer):
  with pytest.raises(ConfigError, match=r'vision_feature_layer.*-4\.\.3'):
    run(params, pixels, feature_layer=layer)
  with pytest.raises(ConfigError, match='vision_feature_layer'):
    num_layers_run(CONFIG, layer)


def test_wrong_pixels_and_strategy(params, pixels):
  with pytest.raises(ConfigError, match='image_size=12'):
    run(params, pixels[:, :6])
  with pytest.raises(ConfigError, match='image_size=12'):
    run(params, pixels[..., :1])
  with pytest.raises(ConfigError, match='select_strategy'):
    run(params, pixels, select_strategy='cls')
