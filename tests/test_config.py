"""Configurations: errors that name field and remedy, dicts and back."""

from __future__ import annotations

import dataclasses
import json

import core_helpers as helpers
import pytest

from vlm_compress import config as config_lib
from vlm_compress import config_values, presets
from vlm_compress.config import (
  AtpConfig,
  ConfigError,
  LlavaConfig,
  LoraConfig,
  TextConfig,
  VisionConfig,
  VocoConfig,
)
from vlm_compress.train.recipe import Recipe

PLAIN = helpers.tiny()
VOCO_MODEL = helpers.voco_config(2)
ATP = helpers.atp_config()
FIXED = helpers.atp_config(selector='uniform', fixed_counts=(8, 4, 2))
LORA = helpers.tiny(lora=LoraConfig(4, 8.0, ('q_proj', 'up_proj')))
POOLED = helpers.tiny(resampler='avg_pool', num_query_tokens=4)


@pytest.mark.parametrize('make,parts', [
    (lambda: config_values.from_dict({'text': {'hidden_sise': 4}}),
     ['hidden_sise', 'TextConfig', 'hidden_size']),
    (lambda: config_values.from_dict({'tekst': {}}), ['tekst', 'LlavaConfig']),
    (lambda: presets.preset('huge'), ['huge', 'tiny']),
    # tiny, first module after 1 of 4 layers: (16 + 3) / 4
    (lambda: helpers.atp_config(target_tokens=4.0),
     ['target_tokens=4', 'floor 4.75', 'prune earlier']),
    (lambda: helpers.atp_config(target_tokens=17.0), ['target_tokens=17', '16']),
    (lambda: helpers.atp_config(prune_after=(1, 4)), ['prune_after', '4 layers']),
    (lambda: TextConfig(num_attention_heads=0), ['num_attention_heads=0']),
    (lambda: TextConfig(num_hidden_layers=0), ['num_hidden_layers=0']),
    (lambda: VisionConfig(image_size=0), ['vision.image_size=0', 'positive']),
    (lambda: AtpConfig(lambda_target=-1.0), ['lambda_target', 'negative']),
    (lambda: AtpConfig(threshold_hidden_size=0), ['threshold_hidden_size=0']),
    (lambda: LlavaConfig(resampler='qformer', num_query_tokens=-1),
     ['num_query_tokens']),
    (lambda: Recipe(learning_rate=-1.0), ['learning_rate']),
    (lambda: Recipe(b2=2.0), ['b2=2']),
    (lambda: Recipe(seed=2 ** 31), ['seed=2147483648']),
    (lambda: AtpConfig(prune_after=(4, 4)), ['prune_after=(4, 4)']),
    (lambda: AtpConfig(prune_after=(0, 4)), ['prune_after=(0, 4)']),
    (lambda: AtpConfig(prune_after=()), ['prune_after=()']),
    (lambda: AtpConfig(selector='best'), ['selector', 'best', 'adaptive']),
    (lambda: AtpConfig(scores='text'), ['scores', 'text', 'cross']),
    (lambda: AtpConfig(score_norm='z'), ['score_norm', 'minmax']),
    (lambda: AtpConfig(criteria='all'), ['criteria', 'spatial']),
    (lambda: AtpConfig(cross_queries='first'), ['cross_queries', 'last']),
    (lambda: AtpConfig(fixed_counts=(1, 1, 1)), ['fixed_counts', 'adaptive']),
    (lambda: AtpConfig(selector='random'), ['fixed_counts', 'random']),
    (lambda: AtpConfig(selector='fixed', fixed_counts=(1, 2, 3)),
     ['must not increase']),
    (lambda: helpers.atp_config(selector='fixed', fixed_counts=(17, 2, 1)),
     ['(17, 2, 1)', '16']),
    (lambda: AtpConfig(init_theta_r=1.0), ['init_theta_r=1.0']),
    (lambda: AtpConfig(init_theta_s=0.0), ['init_theta_s=0.0']),
    (lambda: AtpConfig(temperature_start=0.0), ['temperature_start']),
    (lambda: AtpConfig(temperature_start=9.0, temperature_end=8.0),
     ['temperature_end']),
    (lambda: VocoConfig(0), ['num_voco_tokens=0']),
    (lambda: VocoConfig(distill_weight=-1.0), ['distill_weight=-1.0']),
    (lambda: LoraConfig(rank=0), ['lora.rank=0', 'positive']),
    (lambda: LoraConfig(alpha=0.0), ['lora.alpha=0.0']),
    (lambda: LoraConfig(targets=()), ['lora.targets=()', 'q_proj']),
    (lambda: LoraConfig(targets=('q_proj', 'lm_head')), ['lm_head', 'down_proj']),
    (lambda: config_values.from_dict({'lora': {'targets': [3]}}), ['targets=(3,)']),
    (lambda: config_values.from_dict({'lora': {'targets': 'q_proj'}}),
     ["targets='q_proj'", 'tuple']),
    (lambda: config_values.from_dict({'lora': {'r': 3}}), ["['r']", 'rank']),
    (lambda: TextConfig(hidden_size=100), ['hidden_size=100', '32', 'head_dim']),
    (lambda: TextConfig(head_dim=3), ['head_dim=3']),
    (lambda: TextConfig(head_dim=-2), ['head_dim=-2']),
    (lambda: TextConfig(num_key_value_heads=5), ['num_key_value_heads=5']),
    (lambda: VisionConfig(image_size=100), ['image_size=100', 'patch_size=14']),
    (lambda: VisionConfig(model_type='vit'), ["'vit'", 'clip_vision_model']),
    (lambda: VisionConfig(hidden_act='relu'), ['relu', 'quick_gelu']),
    (lambda: VisionConfig(num_attention_heads=3), ['num_attention_heads=3']),
    (lambda: VisionConfig(model_type='efficientnet_lite0'), ['patch_size=16']),
    (lambda: helpers.tiny(voco=VocoConfig(), atp=ATP.atp),
     ['voco and atp', 'one']),
    (lambda: helpers.tiny(resampler='avg_pool'), ['num_query_tokens']),
    (lambda: helpers.tiny(num_query_tokens=3), ['num_query_tokens']),
    (lambda: helpers.tiny(resampler='mean', num_query_tokens=3), ["'mean'"]),
    (lambda: helpers.tiny(atp=ATP.atp, resampler='avg_pool',
                          num_query_tokens=4), ['resampler="none"']),
    (lambda: helpers.tiny(vision_feature_select_strategy='cls'), ['full']),
    (lambda: helpers.tiny(atp=ATP.atp, vision_feature_select_strategy='full'),
     ['class token']),
    (lambda: helpers.tiny(projector_hidden_act='relu'), ['relu', 'gelu']),
    (lambda: helpers.tiny(voco=VocoConfig(), voco_token_index=95),
     ['voco_token_index=95', 'word']),
    (lambda: helpers.tiny(voco=VocoConfig(), voco_token_index=-200),
     ['voco_token_index=-200', 'image']),
    (lambda: helpers.tiny(dtype='float16'), ['dtype', 'bfloat16']),
    (lambda: Recipe(stage='rl'), ["'rl'", 'instruct']),
    (lambda: Recipe(teacher='big'), ["'big'", 'frozen']),
    (lambda: Recipe(steps=0), ['train.steps']),
    (lambda: Recipe(seed=-1), ['train.seed=-1']),
    (lambda: Recipe(steps=5, warmup_steps=5), ['warmup_steps=5', 'steps=5'])])
def test_errors_name_field_and_remedy_in_one_line(make, parts):
  with pytest.raises(ConfigError) as e:
    make()
  for part in parts:
    assert part in str(e.value), str(e.value)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('config', [
    PLAIN, VOCO_MODEL, ATP, FIXED, LORA, POOLED, presets.preset('llava_1_5_7b'),
    presets.preset('llava_1_5_13b')])
def test_dict_and_back(config):
  values = json.loads(json.dumps(config_values.to_dict(config)))
  assert config_values.from_dict(values) == config


def test_efficientnet_lite0_has_its_own_sizes():
  lite = presets.efficientnet_lite0(128)
  assert lite.grid_size == 8 and lite.hidden_size == 112
  assert helpers.tiny(vision=lite).num_visual_tokens == 64


def test_head_size_follows_the_hidden_size_unless_it_is_given():
  text = PLAIN.text
  assert (text.hidden_size, text.num_attention_heads) == (32, 4)
  assert text.size_per_head == 8
  assert dataclasses.replace(text, head_dim=8) == text
  assert dataclasses.replace(text, hidden_size=64).size_per_head == 16
  given = dataclasses.replace(text, head_dim=10)
  assert dataclasses.replace(given, hidden_size=64).size_per_head == 10


def test_floor_and_placement_of_the_paper():
  config = LlavaConfig(atp=AtpConfig())
  assert config_lib.token_floor(config) == (4 * 576 + 28) / 32  # 72.875
  assert presets.prune_after_for(32) == (4, 14, 24)
  for depth in range(2, 41):
    placed = presets.prune_after_for(depth)
    assert placed and placed[0] >= 1 and placed[-1] < depth
    assert len(set(placed)) == len(placed)
