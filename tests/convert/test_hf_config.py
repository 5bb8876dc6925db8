"""Fields of a source's config.json: what has one value only, and refusals.

tests/parity compares the defaults with those of transformers.
"""

from __future__ import annotations

import pytest
from test_released_configs import CLIP, LLAVA_HF, LLAVA_ORIGINAL, SMOLLM2

from vlm_compress.config import ConfigError, VisionConfig
from vlm_compress.convert import hf_config

WHERE = 'here/config.json'
QWEN2 = {'model_type': 'qwen2', 'hidden_size': 32, 'num_attention_heads': 4,
         'num_key_value_heads': 2, 'num_hidden_layers': 3}


def original(values):
  return hf_config.llava_config({**LLAVA_ORIGINAL, **values}, WHERE,
                                VisionConfig())


def whole(values):
  return hf_config.llava_config({**LLAVA_HF, **values}, WHERE)


def text(values):
  return hf_config.text_config({**SMOLLM2, **values}, WHERE)


def qwen2(values):
  return hf_config.text_config({**QWEN2, **values}, WHERE)


def tower(values):
  return hf_config.vision_config(
      {**CLIP, 'vision_config': {**CLIP['vision_config'], **values}}, WHERE)


# field -> (its reader, the value that is implemented, others)
FIXED = {
    'hidden_act': (text, 'silu', ['gelu', 'swish']),
    'mlp_bias': (text, False, [True]),
    'partial_rotary_factor': (text, 1.0, [0.5]),
    'rope_interleaved': (text, False, [True]),
    'pruned_heads': (tower, {}, [{'0': [1]}]),
    'sliding_window': (text, None, [4096]),
    'use_sliding_window': (qwen2, False, [True]),
    'num_channels': (tower, 3, [1, 4]),
    'multimodal_projector_bias': (whole, True, [False]),
    'mm_projector_type': (original, 'mlp2x_gelu', ['linear', 'mlp3x_gelu']),
    'mm_use_im_start_end': (original, False, [True]),
    'mm_use_im_patch_token': (original, False, [True]),
    'mm_patch_merge_type': (original, 'flat', ['spatial', 'spatial_unpad']),
    'mm_resampler_type': (original, None, ['spatial_pool', 'perceiver']),
    'image_aspect_ratio': (original, 'pad', ['anyres'])}


def test_the_table_has_all_of_them():
  assert FIXED.keys() == hf_config.FIXED.keys()


@pytest.mark.parametrize('name', FIXED)
def test_fields_with_one_value(name):
  reader, value, others = FIXED[name]
  want = reader({})
  assert reader({name: value}) == reader({name: None}) == want
  for other in others:
    with pytest.raises(ConfigError) as caught:
      reader({name: other})
    assert WHERE in str(caught.value) and f'{name}={other!r}' in str(caught.value)


@pytest.mark.parametrize('reader,values,words', [
    (qwen2, {'layer_types': ['full_attention', 'sliding_attention']},
     ['layer_types', 'full_attention']),
    (qwen2, {'layer_types': [['full_attention']]}, ['layer_types']),
    (text, {'rms_norm_eps': float('nan')}, ['rms_norm_eps=nan', 'finite']),
    (text, {'rms_norm_eps': -1e-5}, ['rms_norm_eps=-1e-05']),
    (text, {'rms_norm_eps': float('inf')}, ['rms_norm_eps=inf']),
    (text, {'rope_theta': float('inf')}, ['rope_theta=inf']),
    (text, {'rope_theta': 0}, ['rope_theta', 'positive']),
    (text, {'num_attention_heads': 5}, ['num_attention_heads=5', 'multiple']),
    (text, {'num_key_value_heads': 2}, ['num_key_value_heads=2', 'multiple']),
    (text, {'max_position_embeddings': 0}, ['max_position_embeddings=0']),
    (text, {'rope_scaling': {'rope_type': 'default', 'rope_theta': '1'}},
     ['rope_scaling', "'1'"]),
    (text, {'rope_scaling': {'rope_type': 'default', 'rope_theta': 1e4},
            'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5}},
     ['rope_scaling', 'rope_parameters', 'contradict']),
    (text, {'model_type': 'llava'}, ["model_type='llava'", 'qwen2']),
    (tower, {'hidden_act': 'gelu_new'}, ["hidden_act='gelu_new'", 'quick_gelu']),
    (tower, {'image_size': 26}, ['image_size=26', 'patch_size']),
    (tower, {'num_attention_heads': 5}, ['num_attention_heads=5']),
    (tower, {'layer_norm_eps': float('nan')}, ['layer_norm_eps=nan']),
    (whole, {'vision_feature_layer': 25}, ['vision_feature_layer=25', '24']),
    (whole, {'vision_feature_layer': -26}, ['vision_feature_layer=-26']),
    (whole, {'vision_feature_select_strategy': 'cls'}, ['select_strategy']),
    (whole, {'projector_hidden_act': 'gelu_tanh'},
     ["'gelu_tanh'", 'gelu_pytorch_tanh']),
    (whole, {'projector_hidden_act': 'relu'}, ["'relu'"]),
    (whole, {'model_type': 'llava_next'}, ["'llava_next'", 'llava']),
    (whole, {'model_type': 'vipllava'}, ["'vipllava'"]),
    (whole, {'image_token_index': 'x'}, ["image_token_index='x'", 'int']),
    (whole, {'image_token_id': 7}, ['32000', '7', 'contradict']),
    (original, {'model_type': 'llava_qwen'}, ["'llava_qwen'", 'llava_llama']),
    (original, {'mm_vision_select_feature': 'cls'}, ["'cls'", 'cls_patch']),
    (original, {'mm_vision_select_layer': 25}, ['vision_feature_layer=25']),
    (original, {'mm_vision_tower': 'openai/clip-vit-large-patch14'},
     ['224', '336', '--vision']),
    (original, {'mm_vision_tower': '/data/clip-vit-large-patch14-224/'}, ['224']),
    (original, {'mm_vision_tower': 'openai/clip-vit-base-patch16-336'},
     ['patch_size=16', '14'])])
def test_what_is_refused(reader, values, words):
  with pytest.raises(ConfigError) as caught:
    reader(values)
  message = str(caught.value)
  assert message.startswith(WHERE) and '\n' not in message
  assert all(word in message for word in words), message


@pytest.mark.parametrize('values,theta', [
    ({'rope_theta': 5e5}, 5e5),
    ({'rope_theta': None}, 1e4),
    ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5}}, 5e5),
    ({'rope_scaling': {'rope_type': 'default', 'rope_theta': 5e5}}, 5e5),
    ({'rope_scaling': {'type': 'default', 'rope_theta': 5e5},
      'rope_parameters': {'rope_theta': 500000}}, 5e5),
    ({'rope_theta': 3e4, 'rope_scaling': {'rope_type': 'default'}}, 3e4),
    # as transformers: what stands inside counts
    ({'rope_theta': 3e4, 'rope_parameters': {'rope_theta': 5e5}}, 5e5)])
def test_places_of_rope_theta(values, theta):
  without = {k: v for k, v in SMOLLM2.items() if k != 'rope_theta'}
  assert hf_config.text_config({**without, **values}, WHERE).rope_theta == theta


def test_places_of_the_image_placeholder():
  without = {k: v for k, v in LLAVA_HF.items() if k != 'image_token_index'}
  read = lambda **v: hf_config.llava_config({**without, **v}, WHERE)
  assert read().image_token_index == 32000
  assert read(image_token_index=0).image_token_index == 0
  assert read(image_token_id=7).image_token_index == 7
  assert read(image_token_id=7, image_token_index=7).image_token_index == 7


def test_the_projectors_activation_there_and_back():
  for theirs, ours in (('gelu', 'gelu'), ('gelu_pytorch_tanh', 'gelu_tanh')):
    config = whole({'projector_hidden_act': theirs})
    assert config.projector_hidden_act == ours
    assert hf_config.to_hf(config)['projector_hidden_act'] == theirs


def test_features_of_the_original_code():
  assert original({}).vision_feature_select_strategy == 'default'
  config = original({'mm_vision_select_feature': 'cls_patch',
                     'mm_vision_select_layer': -1, 'mm_vision_tower': '/my/clip'})
  assert (config.vision_feature_select_strategy, config.vision_feature_layer,
          config.num_patches) == ('full', -1, 577)


def test_what_a_file_may_leave_out():
  """The defaults of LLaVA, where they are not those of CLIP."""
  config = hf_config.llava_config({'model_type': 'llava'}, WHERE)
  assert config.vision == VisionConfig()
  assert (config.text.rms_norm_eps, config.text.max_position_embeddings) == (
      1e-6, 2048)
  assert qwen2({}).rms_norm_eps == 1e-6
  assert hf_config.vision_config({}, WHERE) == VisionConfig(
      image_size=224, patch_size=32, hidden_size=768, intermediate_size=3072,
      num_hidden_layers=12, num_attention_heads=12)
