"""Towers that give fewer visual tokens: image downsampling and VisionZip."""

from __future__ import annotations

import dataclasses

import core_helpers as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample

from vlm_compress import presets
from vlm_compress.compress.baselines.downsample import (
  reduced_pixels,
  reduced_positions,
)
from vlm_compress.compress.baselines.visionzip import zip_tokens
from vlm_compress.config import ConfigError
from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.eval import efficiency
from vlm_compress.models import llava
from vlm_compress.models.clip_vit import ClipVisionTower
from vlm_compress.models.efficientnet import EfficientNetLite0
from vlm_compress.nn.kv_cache import grow

COUNTS = {'downsample': 9, 'visionzip': 7}
CONFIGS = {name: helpers.tiny(resampler=name, num_query_tokens=count)
           for name, count in COUNTS.items()}
SIZE = helpers.tiny().vision.image_size
PIXELS = np.random.default_rng(3).normal(size=(3, 2, SIZE, SIZE, 3)).astype(
    np.float32)


@pytest.fixture(scope='module')
def params():
  """Of a model with its tower; those of the baselines are the same."""
  model = llava.Llava(helpers.tiny())
  init = jax.jit(lambda key: llava.init_params(model, key, with_vision=True))
  tree = helpers.nn.unbox(init(jax.random.key(0)))
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(0.0, 0.3, x.shape), x.dtype)
  return {**tree, 'vision_tower': jax.tree.map(draw, tree['vision_tower'])}


@pytest.fixture(scope='module')
def features(params):
  """Of every baseline, float[3, 2, P, Dv]."""
  return {name: _features(config, params, PIXELS)
          for name, config in CONFIGS.items()}


def _features(config, params, pixels):
  return np.asarray(helpers.apply(llava.Llava(config), params, pixels,
                                  method='vision_features'))


@pytest.mark.parametrize('name', CONFIGS)
def test_parameters_are_those_of_the_plain_model(name):
  shapes = lambda config: jax.tree.map(jnp.shape, helpers.nn.unbox(jax.eval_shape(
      lambda key: llava.init_params(llava.Llava(config), key, with_vision=True),
      jax.random.key(0))))
  assert shapes(CONFIGS[name]) == shapes(helpers.tiny())


@pytest.mark.parametrize('name', CONFIGS)
def test_fewer_tokens_of_each_picture_alone(name, params, features):
  got = features[name]
  assert got.shape == (3, 2, COUNTS[name], helpers.tiny().vision.hidden_size)
  for row, image in ((0, 1), (2, 0)):
    alone = _features(CONFIGS[name], params,
                      PIXELS[row:row + 1, image:image + 1])
    helpers.close(alone[0, 0], got[row, image])
  assert np.abs(got[0, 0] - got[1, 1]).max() > 1e-2


def test_a_downsampled_picture_is_a_picture_for_a_smaller_tower(params, features):
  full, vision = params['vision_tower'], helpers.tiny().vision
  small = dataclasses.replace(vision, image_size=3 * vision.patch_size)
  table = full['embeddings']['position_embedding']['embedding']
  embeddings = {**full['embeddings'], 'position_embedding': {
      'embedding': reduced_positions(table, 3)}}
  tower = ClipVisionTower(small, helpers.tiny().vision_feature_layer)
  pixels = reduced_pixels(PIXELS[0], small.image_size)
  want = helpers.apply(tower, {**full, 'embeddings': embeddings}, pixels)
  helpers.close(features['downsample'][0], want)


def test_visionzip_looks_at_the_layer_whose_output_is_used(params, features):
  """Class attention and keys computed by hand from the layer's input."""
  vision, full = helpers.tiny().vision, params['vision_tower']
  run = lambda layer: np.asarray(helpers.apply(
      ClipVisionTower(vision, layer, 'full'), full, PIXELS[0]), np.float64)
  used = helpers.tiny().vision_feature_layer % (vision.num_hidden_layers + 1)
  x, out = run(used - 1), run(used)
  one = jax.tree.map(lambda p: np.asarray(p[used - 1], np.float64), full['layers'])
  norm, attention = one['layer_norm1'], one['self_attn']
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + vision.layer_norm_eps)
  x = x * norm['weight'] + norm['bias']
  heads = (vision.num_attention_heads, -1)
  q, k = ((x @ attention[name]['kernel'] + attention[name]['bias']).reshape(
      *x.shape[:2], *heads) for name in ('q_proj', 'k_proj'))
  logits = np.einsum('bnh,btnh->bnt', q[:, 0], k) * q.shape[-1] ** -0.5
  probs = np.exp(logits - logits.max(-1, keepdims=True))
  probs = (probs / probs.sum(-1, keepdims=True)).sum(1)[:, 1:]
  want = zip_tokens(*(jnp.asarray(y, jnp.float32) for y in (
      out, probs, k[:, 1:].mean(2))), COUNTS['visionzip'])
  helpers.close(features['visionzip'][0], want)


@pytest.mark.parametrize('name', CONFIGS)
def test_prefill_and_decoding_on_short_rows(name, params, features):
  """Alone, in a batch, and in the serving form."""
  config = CONFIGS[name]
  prompts = [Sample((BOS, IMAGE, 6, 7)), Sample((BOS, 5, IMAGE, 8, IMAGE, 9)),
             Sample((BOS, IMAGE, 11, 12, 13))]
  batch = helpers.batch(prompts, config, length=24, num_images=2)
  assert (np.sum(batch.visual_slots >= 0, axis=1) ==
          COUNTS[name] * np.array([1, 2, 1])).all()
  batch = batch.replace(features=features[name])
  answers = np.int32([[7, 8, 9], [10, 11, 12]])
  model, serving = llava.Llava(config), SegmentedModel(config, params)
  logits, cache, _ = helpers.apply(model, params, batch, method='prefill')
  cache, state = grow(cache, 2), serving.prefill(batch, None, room=2)
  helpers.close(state.logits, logits)
  for token in answers:
    logits, cache = helpers.apply(model, params, token, cache, method='extend')
    helpers.close(serving.extend(token, state), logits)
  alone = jax.tree.map(lambda x: x[2:], batch)
  single = helpers.apply(model, params, alone, method='prefill')[0]
  all_rows = helpers.apply(model, params, batch, method='prefill')[0]
  helpers.close(single[0], all_rows[2])


@pytest.mark.parametrize('name', CONFIGS)
def test_features_of_the_full_tower_are_refused(name, params):
  batch = helpers.batch([Sample((BOS, IMAGE, 6))], CONFIGS[name], length=12,
                        num_images=1)
  batch = batch.replace(features=np.zeros((1, 1, 16, batch.features.shape[-1])))
  with pytest.raises(ConfigError, match='16 features per image'):
    llava.Llava(CONFIGS[name]).apply({'params': params}, batch)


def test_efficientnet_reads_a_smaller_picture():
  pixels = jax.ShapeDtypeStruct((1, 48, 48, 3), np.float32)
  out = jax.eval_shape(EfficientNetLite0().init_with_output, jax.random.key(0),
                       pixels)[0]
  assert out.shape == (1, 9, 112)


def test_costs_follow():
  """Fewer tokens everywhere; the tower itself only saves when downsampled."""
  plain = helpers.tiny()
  cost = lambda config: efficiency.prefill_cost(
      config, float(config.num_visual_tokens), 5)
  small = dataclasses.replace(plain.vision, image_size=3 * plain.vision.patch_size)
  want = cost(dataclasses.replace(plain, vision=small))
  assert dataclasses.astuple(cost(CONFIGS['downsample'])) == (
      dataclasses.astuple(want))
  zipped = cost(CONFIGS['visionzip'])
  assert zipped.vision == cost(plain).vision > want.vision
  assert zipped.projector == cost(plain).projector * 7 / 16
  lite = helpers.tiny(vision=presets.efficientnet_lite0(64), num_query_tokens=9,
                      resampler='downsample')
  assert efficiency.vision_flops(lite) == efficiency.efficientnet_lite0_flops(48)
