"""Every field of every configuration changes something that can be seen.

PROBES names, for each field, a change and what it has to change.  The test
runs over `dataclasses.fields`, so a new field without a probe fails, and so
does a field that nobody reads.
"""

from __future__ import annotations

import dataclasses
import functools

import core_helpers as helpers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, VOCO, Sample, segment

from vlm_compress import losses
from vlm_compress.compress import atp as atp_lib
from vlm_compress.config import (
  AtpConfig,
  ConfigError,
  LlavaConfig,
  LoraConfig,
  TextConfig,
  VisionConfig,
  VocoConfig,
)
from vlm_compress.eval import efficiency
from vlm_compress.models import clip_vit, llava, sequence
from vlm_compress.models.llava import PruneOptions
from vlm_compress.models.segments import capacity_ladder
from vlm_compress.train import steps
from vlm_compress.train.recipe import Recipe


def shapes(config):
  """Paths, shapes and dtypes of the parameters."""
  tree = nn.unbox(jax.eval_shape(
      lambda key: llava.init_params(llava.Llava(config), key),
      jax.random.key(0)))
  return {path: (x.shape, str(x.dtype))
          for path, x in helpers.flat(tree).items()}


def tower(config):
  """Parameters and output of the CLIP tower, as shapes."""
  module = clip_vit.ClipVisionTower(
      config.vision, feature_layer=config.vision_feature_layer,
      select_strategy=config.vision_feature_select_strategy)
  size = config.vision.image_size
  out, variables = jax.eval_shape(
      module.init_with_output, jax.random.key(0), jnp.zeros((1, size, size, 3)))
  return out.shape, {p: x.shape for p, x in
                     helpers.flat(nn.unbox(variables['params'])).items()}


@functools.cache
def _tower_params(vision):
  module = clip_vit.ClipVisionTower(vision)
  pixels = jnp.zeros((1, vision.image_size, vision.image_size, 3))
  tree = nn.unbox(jax.eval_shape(module.init, jax.random.key(0),
                                 pixels)['params'])
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape), x.dtype), tree)


def tower_output(config):
  """Features of a picture, with parameters of the tiny tower."""
  module = clip_vit.ClipVisionTower(
      config.vision, feature_layer=config.vision_feature_layer,
      select_strategy=config.vision_feature_select_strategy)
  pixels = np.random.default_rng(1).normal(size=(1, 24, 24, 3))
  params = _tower_params(helpers.tiny().vision)
  out = jax.jit(lambda p, x: module.apply({'params': p}, x))(
      params, pixels.astype(np.float32))
  return np.asarray(out)


def logits(config):
  """Logits of one row under the config's own method, same parameters."""
  base = dataclasses.replace(config, text=helpers.tiny().text,
                             projector_hidden_act='gelu')
  if config.atp is not None:
    base = dataclasses.replace(base, atp=ATP.atp)
  _, params = helpers.build(base)
  ids = (BOS, *segment(2), 6, 7, 8) if config.voco else (BOS, IMAGE, 6, 7, 8)
  batch = helpers.batch([Sample(ids, seed=1)], config, length=24, num_images=1)
  options = {}
  if config.voco:
    options = dict(mask='voco')
  elif config.atp:
    options = dict(prune=PruneOptions(temperature=jnp.float32(5.0),
                                      hard=config.atp.selector != 'adaptive'))
  out = helpers.apply(llava.Llava(config), params, batch, **options)[0]
  return np.asarray(out)[batch.valid]


def initial_values(config):
  """Fresh parameters."""
  fresh = helpers._fresh(llava.Llava(config), 0)  # not drawn anew
  return np.asarray(helpers.flat(fresh)['language_model/lm_head/kernel'])


def first_thresholds(config):
  """theta_r and theta_s before any training."""
  heads = nn.unbox(atp_lib.ThresholdHeads(3, 16, config.atp).init(
      jax.random.key(0))['params'])
  zeros = jnp.zeros((1, 1, 16))
  module = jax.tree.map(lambda x: x[0], heads)
  return np.asarray(atp_lib.thresholds(module, zeros, zeros, 0.0))


def default_shift(config):
  """threshold_shift that a run without options has."""
  model = llava.Llava(config)
  _, params = helpers.build(ATP)
  batch = helpers.batch([Sample((BOS, IMAGE, 6))], config, length=20,
                        num_images=1)
  x = model.apply({'params': params}, batch, method='embed')
  return float(model.apply({'params': params}, batch, PruneOptions(), x,
                           method='prune_inputs').threshold_shift)


def row(config):
  """A row of which only the placeholders tell what is what."""
  ids = [BOS, -200, 5, VOCO, 5, 7]
  out = sequence.expand_row(ids, [False] * 6, [0] * 6, config)
  return out['token_types'].tolist()


def budget(config):
  """Budget terms of one invented state."""
  entering = np.ones((4, 1, 1, 16), np.float32)
  state = atp_lib.PruneState(
      keep=entering[0], module_keep=entering[:3], thresholds=None,
      redundancy=None)
  got = losses.budget_loss(state, entering, np.ones((1, 1), bool), config.atp)
  return [float(got[name]) for name in ('budget_depth', 'budget_target')]


def temperatures(config):
  """tau at the first and at the last step."""
  return [float(steps.temperature(config, Recipe(steps=100), jnp.int32(s)))
          for s in (0, 99)]


def soft_mask(config):
  """Forward value of a mask while training."""
  inputs = atp_lib.PruneInputs(
      *[None] * 7, temperature=1.0, threshold_shift=0.0, hard=False,
      config=config.atp, grid_size=4)
  return np.asarray(atp_lib.adaptive_mask(
      jnp.full((1, 1, 16), 0.6), jnp.zeros(16), jnp.full((1, 1, 2), 0.5),
      inputs))


def dtypes(config):
  """dtype of hidden states."""
  model = llava.Llava(config)
  batch = llava.example_batch(config)
  params = nn.unbox(jax.eval_shape(
      lambda key: llava.init_params(model, key), jax.random.key(0)))
  hidden, _ = jax.eval_shape(
      lambda p: model.apply({'params': p}, batch, method='hidden'), params)
  return str(hidden.dtype)


def program(config):
  """The program of a forward pass, as text."""
  model = llava.Llava(config)
  batch = llava.example_batch(config)
  params = nn.unbox(jax.eval_shape(
      lambda key: llava.init_params(model, key), jax.random.key(0)))
  return str(jax.make_jaxpr(
      lambda p: model.apply({'params': p}, batch)[0])(params))


def recomputes(config):
  """Whether the program marks layers for recomputation."""
  return 'remat' in program(config) or 'checkpoint' in program(config)


def kept_for_backward(config):
  """Numbers that the forward pass leaves for the backward pass."""
  model = llava.Llava(config)
  batch = llava.example_batch(config)
  params = nn.unbox(jax.eval_shape(
      lambda key: llava.init_params(model, key), jax.random.key(0)))
  pull = jax.eval_shape(lambda p: jax.vjp(
      lambda p: model.apply({'params': p}, batch)[0], p)[1], params)
  return sum(x.size for x in jax.tree.leaves(pull))


def voco_costs(config):
  """FLOPs of a compressed prompt."""
  return float(efficiency.voco_cost(config, 10.0).decoder)


def step_of_stage(config):
  """Whether a plain voco step can be built."""
  try:
    steps.make_step(llava.Llava(config), Recipe(stage='voco'))
    return 'built'
  except ConfigError as e:
    return str(e)


PLAIN = helpers.tiny()
VOCO_MODEL = helpers.voco_config(2)
ATP = helpers.atp_config()
LORA = helpers.tiny(lora=LoraConfig(rank=2, alpha=4.0))
FIXED = helpers.atp_config(selector='uniform', fixed_counts=(8, 4, 2))
BY_RANK = helpers.atp_config(selector='sparsevlm')
POOLED = helpers.tiny(resampler='avg_pool', num_query_tokens=4)
CLIP_128 = helpers.tiny(vision=VisionConfig(image_size=128, patch_size=16, hidden_size=112))

# field -> (base, changed value, what it changes)
PROBES = {
    VisionConfig: {
        'model_type': (CLIP_128, 'efficientnet_lite0',
                       efficiency.vision_flops),
        'image_size': (PLAIN, 12, tower),
        'patch_size': (PLAIN, 12, tower),
        'hidden_size': (PLAIN, 16, shapes),
        'intermediate_size': (PLAIN, 40, tower),
        'num_hidden_layers': (PLAIN, 4, tower),
        'num_attention_heads': (PLAIN, 2, tower_output),
        'layer_norm_eps': (PLAIN, 0.5, tower_output),
        'hidden_act': (PLAIN, 'gelu', tower_output)},
    TextConfig: {
        'vocab_size': (PLAIN, 97, shapes),
        'hidden_size': (PLAIN, 64, shapes),
        'intermediate_size': (PLAIN, 50, shapes),
        'num_hidden_layers': (PLAIN, 5, shapes),
        'num_attention_heads': (PLAIN, 8, shapes),
        'num_key_value_heads': (PLAIN, 4, shapes),
        'head_dim': (PLAIN, 16, shapes),
        'rms_norm_eps': (PLAIN, 0.1, logits),
        'rope_theta': (PLAIN, 100.0, logits),
        'attention_bias': (PLAIN, True, shapes),
        'tie_word_embeddings': (PLAIN, True, shapes),
        'max_position_embeddings': (PLAIN, 20, row),
        'initializer_range': (PLAIN, 0.3, initial_values)},
    VocoConfig: {
        'num_voco_tokens': (VOCO_MODEL, 3, voco_costs),
        'distinct_rows': (VOCO_MODEL, True, shapes),
        'text_sees_prefix': (VOCO_MODEL, True, logits),
        'distill_weight': (VOCO_MODEL, 1.0, step_of_stage)},
    AtpConfig: {
        'prune_after': (ATP, (1, 3), shapes),
        'selector': (FIXED, 'fixed', logits),
        'fixed_counts': (FIXED, (8, 4, 1), logits),
        'rank_scale': (BY_RANK, 0.4, logits),
        'scores': (ATP, 'self', logits),
        'score_norm': (ATP, 'rank', logits),
        'cross_queries': (ATP, 'last', logits),
        'criteria': (ATP, 'redundant', logits),
        'sap_strides': (ATP, (2,), logits),
        'sap_lambda': (ATP, 1.0, logits),
        'threshold_hidden_size': (ATP, 64, shapes),
        'init_theta_r': (ATP, 0.3, first_thresholds),
        'init_theta_s': (ATP, 0.7, first_thresholds),
        'straight_through': (ATP, True, soft_mask),
        'target_tokens': (ATP, 9.0, budget),
        'lambda_atp': (ATP, 0.5, budget),
        'lambda_target': (ATP, 0.5, budget),
        'temperature_start': (ATP, 5.0, temperatures),
        'temperature_end': (ATP, 50.0, temperatures),
        'threshold_shift': (ATP, 0.5, default_shift),
        'capacities': (ATP, (5,), capacity_ladder)},
    LoraConfig: {
        'rank': (LORA, 3, shapes),
        'alpha': (LORA, 8.0, logits),
        'targets': (LORA, ('q_proj', 'down_proj'), shapes)},
    LlavaConfig: {
        'vision': (PLAIN, CLIP_128.vision, tower),
        'text': (PLAIN, TextConfig(), shapes),
        'vision_feature_layer': (PLAIN, -1, tower_output),
        'vision_feature_select_strategy': (PLAIN, 'full', tower),
        'projector_hidden_act': (PLAIN, 'gelu_tanh', logits),
        'image_token_index': (VOCO_MODEL, -300, row),
        'voco_token_index': (VOCO_MODEL, 300, row),
        'voco': (PLAIN, VocoConfig(), shapes),
        'atp': (PLAIN, AtpConfig(prune_after=(1,), target_tokens=8.0), shapes),
        'lora': (PLAIN, LoraConfig(rank=2), shapes),
        'resampler': (POOLED, 'avg_pool_linear', shapes),
        'num_query_tokens': (helpers.tiny(resampler='qformer',
                                          num_query_tokens=4), 2, shapes),
        'dtype': (PLAIN, 'bfloat16', dtypes),
        'param_dtype': (PLAIN, 'bfloat16', shapes),
        'remat': (PLAIN, True, recomputes),
        'remat_policy': (helpers.tiny(remat=True), 'dots_saveable',
                         kept_for_backward),
        'attention_implementation': (PLAIN, 'jax', program)},
}
_PART = {VisionConfig: 'vision', TextConfig: 'text', VocoConfig: 'voco',
         AtpConfig: 'atp', LoraConfig: 'lora'}


def _seen(look, config):
  try:
    return look(config)
  except ConfigError as e:
    return str(e)


@pytest.mark.parametrize('cls,name', [
    (cls, field.name) for cls in PROBES for field in dataclasses.fields(cls)])
def test_every_field_changes_something(cls, name):
  assert name in PROBES[cls], f'{cls.__name__}.{name} has no probe: who reads it?'
  base, value, look = PROBES[cls][name]
  change = {name: value}
  if cls is not LlavaConfig:
    part = _PART[cls]
    change = {part: dataclasses.replace(getattr(base, part), **change)}
  changed = dataclasses.replace(base, **change)
  assert changed != base
  assert helpers.differs(_seen(look, base), _seen(look, changed))


def test_probes_name_no_field_that_is_gone():
  for cls, probes in PROBES.items():
    assert set(probes) == {f.name for f in dataclasses.fields(cls)}


def test_remat_policies_keep_more_and_more():
  kept = [kept_for_backward(helpers.tiny(remat=True, remat_policy=policy)) for policy in (
      'nothing_saveable', 'dots_with_no_batch_dims_saveable', 'dots_saveable')]
  assert kept == sorted(set(kept))
  with pytest.raises(ConfigError, match='remat_policy: use one of'):
    helpers.tiny(remat_policy='everything')
