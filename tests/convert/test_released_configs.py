"""Fields that released checkpoints have in their config.json: all are read.

Values are those of the public files, so a field that is new to the reader is
found here and not by a user.
"""

from __future__ import annotations

import pytest

from vlm_compress import presets
from vlm_compress.config import ConfigError, VisionConfig
from vlm_compress.convert import hf_config

LLAVA_HF = {  # llava-hf/llava-1.5-7b-hf
    'architectures': ['LlavaForConditionalGeneration'], 'ignore_index': -100,
    'image_token_index': 32000, 'model_type': 'llava', 'pad_token_id': 32001,
    'projector_hidden_act': 'gelu', 'text_config': {
        '_name_or_path': 'lmsys/vicuna-7b-v1.5',
        'architectures': ['LlamaForCausalLM'], 'max_position_embeddings': 4096,
        'model_type': 'llama', 'rms_norm_eps': 1e-05, 'torch_dtype': 'float16',
        'vocab_size': 32064},
    'tie_word_embeddings': False, 'torch_dtype': 'float16',
    'transformers_version': '4.36.0.dev0', 'vision_config': {
        'hidden_size': 1024, 'image_size': 336, 'intermediate_size': 4096,
        'model_type': 'clip_vision_model', 'num_attention_heads': 16,
        'num_hidden_layers': 24, 'patch_size': 14, 'projection_dim': 768,
        'vocab_size': 32000},
    'vision_feature_layer': -2, 'vision_feature_select_strategy': 'default',
    'vocab_size': 32064}
LLAVA_ORIGINAL = {  # liuhaotian/llava-v1.5-13b
    '_name_or_path': 'llava-v1.5-13b', 'architectures': ['LlavaLlamaForCausalLM'],
    'bos_token_id': 1, 'eos_token_id': 2, 'freeze_mm_mlp_adapter': False,
    'freeze_mm_vision_resampler': False, 'hidden_act': 'silu',
    'hidden_size': 5120, 'image_aspect_ratio': 'pad', 'initializer_range': 0.02,
    'intermediate_size': 13824, 'max_length': 4096,
    'max_position_embeddings': 4096, 'mm_hidden_size': 1024,
    'mm_projector_type': 'mlp2x_gelu', 'mm_resampler_type': None,
    'mm_use_im_patch_token': False, 'mm_use_im_start_end': False,
    'mm_vision_select_feature': 'patch', 'mm_vision_select_layer': -2,
    'mm_vision_tower': 'openai/clip-vit-large-patch14-336',
    'model_type': 'llava', 'num_attention_heads': 40, 'num_hidden_layers': 40,
    'num_key_value_heads': 40, 'pad_token_id': 0, 'pretraining_tp': 1,
    'rms_norm_eps': 1e-05, 'rope_scaling': None, 'tie_word_embeddings': False,
    'torch_dtype': 'float16', 'transformers_version': '4.31.0',
    'tune_mm_mlp_adapter': False, 'tune_mm_vision_resampler': False,
    'unfreeze_mm_vision_tower': False, 'use_cache': True, 'use_mm_proj': True,
    'vocab_size': 32000}
SMOLLM2 = {  # HuggingFaceTB/SmolLM2-135M
    'architectures': ['LlamaForCausalLM'], 'attention_bias': False,
    'attention_dropout': 0.0, 'bos_token_id': 0, 'eos_token_id': 0,
    'hidden_act': 'silu', 'hidden_size': 576,
    'initializer_range': 0.041666666666666664, 'intermediate_size': 1536,
    'is_llama_config': True, 'max_position_embeddings': 8192,
    'model_type': 'llama', 'num_attention_heads': 9, 'num_hidden_layers': 30,
    'num_key_value_heads': 3, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05,
    'rope_interleaved': False, 'rope_scaling': None, 'rope_theta': 100000,
    'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
    'transformers_version': '4.40.1', 'use_cache': True, 'vocab_size': 49152}
CLIP = {  # openai/clip-vit-base-patch32, which dumps every default
    '_name_or_path': 'openai/clip-vit-base-patch32',
    'architectures': ['CLIPModel'], 'initializer_factor': 1.0,
    'logit_scale_init_value': 2.6592, 'model_type': 'clip', 'projection_dim': 512,
    'vision_config': {
        '_name_or_path': '', 'add_cross_attention': False, 'architectures': None,
        'attention_dropout': 0.0, 'bad_words_ids': None, 'bos_token_id': None,
        'chunk_size_feed_forward': 0, 'cross_attention_hidden_size': None,
        'diversity_penalty': 0.0, 'dropout': 0.0, 'early_stopping': False,
        'encoder_no_repeat_ngram_size': 0, 'finetuning_task': None,
        'hidden_act': 'quick_gelu', 'hidden_size': 768,
        'id2label': {'0': 'LABEL_0'}, 'image_size': 224,
        'initializer_factor': 1.0, 'initializer_range': 0.02,
        'intermediate_size': 3072, 'is_decoder': False,
        'is_encoder_decoder': False, 'label2id': {'LABEL_0': 0},
        'layer_norm_eps': 1e-05, 'length_penalty': 1.0, 'max_length': 20,
        'model_type': 'clip_vision_model', 'no_repeat_ngram_size': 0,
        'num_attention_heads': 12, 'num_beam_groups': 1,
        'num_hidden_layers': 12, 'output_scores': False, 'patch_size': 32,
        'prefix': None, 'projection_dim': 512, 'pruned_heads': {},
        'tie_word_embeddings': True, 'top_k': 50, 'top_p': 1.0,
        'torchscript': False, 'use_bfloat16': False}}


def test_they_are_read():
  seven = hf_config.llava_config(LLAVA_HF, 'config.json')
  want = presets.preset('llava_1_5_7b')
  assert (seven.text.hidden_size, seven.text.num_hidden_layers) == (4096, 32)
  assert seven.text.vocab_size == 32064 and seven.text.rms_norm_eps == 1e-5
  assert seven.vision == want.vision and seven.image_token_index == 32000
  original = hf_config.llava_config(LLAVA_ORIGINAL, 'c', VisionConfig())
  assert original.text == presets.preset('llava_1_5_13b').text
  small = hf_config.text_config(SMOLLM2, 'c')
  assert small.rope_theta == 1e5 and small.num_key_value_heads == 3
  assert hf_config.vision_config(CLIP, 'c').patch_size == 32


@pytest.mark.parametrize('change,words', [
    ({'hidden_size': '576'}, ['hidden_size', "'576'", 'int']),
    ({'rms_norm_eps': '1e-5'}, ['rms_norm_eps', 'float']),
    ({'rope_scaling': 'linear'}, ['rope_scaling', "'linear'"]),
    ({'max_position_embeddings': 2.5}, ['max_position_embeddings=2.5']),
    ({'tie_word_embeddings': 1}, ['tie_word_embeddings=1', 'bool']),
    ({'num_hidden_layers': True}, ['num_hidden_layers=True']),
    ({'rope_interleaved': True}, ['rope_interleaved=True']),
    ({'pruned_heads': {'0': [1]}}, ['pruned_heads']),
    ({'quantization_config': {'bits': 4}}, ['quantization_config'])])
def test_values_that_are_none(change, words):
  with pytest.raises(ConfigError) as caught:
    hf_config.text_config({**SMOLLM2, **change}, 'here/config.json')
  message = str(caught.value)
  assert all(word in message for word in [*words, 'here/config.json']), message


@pytest.mark.parametrize('name', ['rope_theta', 'num_hidden_layers',
                                  'tie_word_embeddings', 'rms_norm_eps'])
def test_null_is_the_default(name):
  without = {k: v for k, v in SMOLLM2.items() if k != name}
  assert hf_config.text_config({**SMOLLM2, name: None}, 'c') == (
      hf_config.text_config(without, 'c'))
