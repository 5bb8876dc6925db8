"""LoRA: fresh adapters change nothing; merged and unmerged are one model."""

from __future__ import annotations

import dataclasses

import core_helpers as helpers
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample, segment
from jax.sharding import PartitionSpec as Spec

from vlm_compress import sharding
from vlm_compress.config import PROJECTIONS, LoraConfig
from vlm_compress.convert import lora
from vlm_compress.decode import identity
from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.models import llava
from vlm_compress.models.llava import PruneOptions
from vlm_compress.models.sequence import split_voco
from vlm_compress.nn.kv_cache import grow

LORA = LoraConfig(rank=3, alpha=4.5)
SOME = LoraConfig(rank=2, alpha=8.0, targets=('v_proj', 'down_proj'))
LAYERS = 'language_model/layers/'
SIZES = {'self_attn/q_proj': (32, 32), 'self_attn/k_proj': (32, 16),
         'self_attn/v_proj': (32, 16), 'self_attn/o_proj': (32, 32),
         'mlp/gate_proj': (32, 48), 'mlp/up_proj': (32, 48),
         'mlp/down_proj': (48, 32)}
SAMPLES = [Sample((BOS, IMAGE, 6, 7, 8, 9), seed=1), Sample((BOS, 6, 7, 8)),
           Sample((BOS, 4, 11, IMAGE, 12), seed=2)]


def shapes(config):
  tree = nn.unbox(jax.eval_shape(
      lambda key: llava.init_params(llava.Llava(config), key), jax.random.key(0)))
  return {path: x.shape for path, x in helpers.flat(tree).items()}


def without(params):
  """The kernels alone."""
  return flax.traverse_util.unflatten_dict(
      {path: x for path, x in helpers.flat(params).items()
       if not lora.is_lora(path)}, sep='/')


def test_parameters_lie_beside_the_kernels():
  for config in (LORA, SOME):
    want = shapes(helpers.tiny())
    for path, (size_in, size_out) in SIZES.items():
      if path.split('/')[1] in config.targets:
        want[f'{LAYERS}{path}/lora_a'] = (4, size_in, config.rank)
        want[f'{LAYERS}{path}/lora_b'] = (4, config.rank, size_out)
    assert shapes(helpers.tiny(lora=config)) == want
  assert len(SIZES) == len(PROJECTIONS)


def test_they_are_split_as_the_kernels_are_but_for_the_rank():
  mesh = sharding.make_mesh(2, 2, 2)
  boxed = jax.eval_shape(
      lambda key: llava.init_params(llava.Llava(helpers.tiny(lora=LORA)), key),
      jax.random.key(0))
  got = helpers.flat(sharding.tree_shardings(boxed, mesh))
  for path in SIZES:
    _, first, last = got[f'{LAYERS}{path}/kernel'].spec
    assert {first, last} == {'fsdp', 'tensor'}
    assert got[f'{LAYERS}{path}/lora_a'].spec == Spec(None, first, None)
    assert got[f'{LAYERS}{path}/lora_b'].spec == Spec(None, None, last)


def test_fresh_the_model_is_the_one_without():
  plain, adapted = helpers.tiny(remat=True), helpers.tiny(remat=True, lora=LORA)
  batch = helpers.batch(SAMPLES, plain, length=24, num_images=1)
  params = helpers._fresh(llava.Llava(adapted), 0)  # B is zero
  want, _ = helpers.apply(llava.Llava(plain), without(params), batch)
  got, _ = helpers.apply(llava.Llava(adapted), params, batch)
  np.testing.assert_array_equal(got, want)
  got, _ = helpers.apply(*helpers.build(adapted), batch)
  assert np.abs(got - want)[batch.valid].max() > 0.1


@pytest.mark.parametrize('name', ['atp', 'voco', 'remat'])
def test_merged_is_unmerged(name):
  """Soft masks in the scan, two passes, and with layers computed again."""
  config = {'atp': helpers.atp_config(), 'voco': helpers.voco_config(2),
            'remat': helpers.tiny(remat=True)}[name]
  config = dataclasses.replace(config, lora=SOME if name == 'voco' else LORA)
  model, params = helpers.build(config)
  merged, plain = lora.merge(params, config)
  assert plain == dataclasses.replace(config, lora=None)
  options = {}
  if name == 'voco':
    samples = [Sample((BOS, *segment(2), 8, 9), seed=1), Sample((BOS, 8, 9))]
    batch = split_voco(helpers.batch(samples, config, length=30, num_images=1),
                       config, 8)
    options['method'] = 'two_pass'
  else:
    batch = helpers.batch(SAMPLES, config, length=24, num_images=1)
    if name == 'atp':
      options['prune'] = PruneOptions(temperature=jnp.float32(5.0), hard=False)
  first = lambda out: out if name == 'voco' else out[0]
  got = first(helpers.apply(model, params, batch, **options))
  helpers.close(first(helpers.apply(llava.Llava(plain), merged, batch,
                                    **options)), got)
  # and it is another model than the kernels alone
  other = first(helpers.apply(llava.Llava(plain), without(params), batch,
                              **options))
  assert np.abs(other - got).max() > 0.1


def test_served_in_segments_it_is_the_merged_model():
  config = dataclasses.replace(
      helpers.atp_config(prune_after=(2,), target_tokens=10.0), lora=LORA)
  _, params = helpers.build(config)
  merged, plain = lora.merge(params, config)
  batch = helpers.batch(SAMPLES, config, length=24, num_images=1)
  options, answers = PruneOptions(), np.int32([[9, 10], [11, 12], [13, 14]])
  model = llava.Llava(plain)
  want, cache, out = helpers.apply(model, merged, batch, method='prefill',
                                   prune=options)
  serving = SegmentedModel(config, params)
  state = serving.prefill(batch, options, room=2)
  helpers.close(state.logits, want)
  np.testing.assert_array_equal(state.pruning.state.module_keep,
                                out.prune.module_keep)
  cache = grow(cache, 2)
  for step in range(2):
    want, cache = helpers.apply(model, merged, answers[:, step], cache,
                                method='extend')
    helpers.close(serving.extend(answers[:, step], state), want)


def test_merging_by_hand_and_what_it_leaves_alone():
  config = dataclasses.replace(helpers.voco_config(2), lora=SOME)
  _, params = helpers.build(config)
  for kind in (np.asarray, jnp.asarray):
    given = jax.tree.map(kind, params)
    merged, _ = lora.merge(given, config)
    flat, old = helpers.flat(merged), helpers.flat(given)
    assert set(flat) == {path for path in old if not lora.is_lora(path)}
    for path, x in flat.items():
      if path.endswith(('v_proj/kernel', 'down_proj/kernel')):
        assert type(x) is type(old[path])
        stem = path.removesuffix('kernel')
        a, b = (np.float64(old[f'{stem}lora_{name}']) for name in 'ab')
        want = np.float64(old[path]) + 4.0 * np.einsum('mir,mro->mio', a, b)
        helpers.close(x, want, 1e-6)
      else:
        assert x is old[path]
  same, plain = lora.merge(merged, dataclasses.replace(config, lora=None))
  assert same is merged and plain.lora is None


def test_in_bfloat16_a_merged_kernel_is_rounded_once():
  rng = np.random.default_rng(0)
  kernel, a, b = (rng.normal(size=shape).astype(jnp.bfloat16)
                  for shape in ((2, 8, 6), (2, 8, 3), (2, 3, 6)))
  got = lora.folded(kernel, a, b, 0.5)
  assert got.dtype == jnp.bfloat16
  wide = kernel.astype(np.float64) + 0.5 * a.astype(np.float64) @ b.astype(np.float64)
  np.testing.assert_array_equal(got, wide.astype(np.float32).astype(jnp.bfloat16))


def test_other_adapters_are_another_model_to_a_vision_cache():
  config = dataclasses.replace(helpers.voco_config(2), lora=SOME)
  params = helpers.build(config)[1]
  flat = helpers.flat(params)
  found = {identity.fingerprint(params)}
  for name in ('lora_a', 'lora_b'):
    path = f'{LAYERS}mlp/down_proj/{name}'
    changed = {**flat, path: flat[path].at[0, 0, 0].add(1e-3)}
    found.add(identity.fingerprint(
        flax.traverse_util.unflatten_dict(changed, sep='/')))
  found.add(identity.fingerprint(lora.merge(params, config)[0]))
  assert len(found) == 4


def test_parameters_have_param_dtype():
  config = helpers.tiny(lora=LORA, param_dtype='bfloat16')
  shapes = nn.unbox(jax.eval_shape(
      lambda key: llava.init_params(llava.Llava(config), key), jax.random.key(0)))
  found = {x.dtype for path, x in helpers.flat(shapes).items() if lora.is_lora(path)}
  assert found == {jnp.dtype('bfloat16')}
