"""A public config.json as ours, and back.

Every field of a source config is either read, or known to change no number,
or has one value that this code implements; anything else raises with its
name.  Absent fields have the defaults of the source's own format.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from vlm_compress.config import (
  ConfigError,
  LlavaConfig,
  TextConfig,
  VisionConfig,
  check,
)
from vlm_compress.models.clip_vit import num_layers_run

CONFIG = 'config.json'
TEXT_TYPES = ('llama', 'qwen2')
VISION_TYPES = ('clip_vision_model', 'clip')
# What the original LLaVA code calls the whole model.
ORIGINAL_TYPES = ('llava', 'llava_llama')
# Names of the projector's activation, and ours.
PROJECTOR_ACTS = {'gelu': 'gelu', 'gelu_pytorch_tanh': 'gelu_tanh'}
SPECIAL_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')

# Bookkeeping, generation and training: no logit depends on these.
NEUTRAL = frozenset('''
  _name_or_path architectures model_type transformers_version dtype torch_dtype
  use_cache return_dict output_attentions output_hidden_states is_decoder
  bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
  attention_dropout dropout pretraining_tp initializer_factor
  projection_dim ignore_index image_seq_length max_length max_new_tokens
  do_sample temperature top_p top_k num_beams repetition_penalty
  tune_mm_mlp_adapter freeze_mm_mlp_adapter unfreeze_mm_vision_tower
  mm_projector_lr mm_hidden_size max_sequence_length tokenizer_model_max_length
  tokenizer_padding_side image_grid_pinpoints use_mm_proj mm_vision_tower
  pretrain_mm_mlp_adapter freeze_mm_vision_resampler
  tune_mm_vision_resampler is_llama_config auto_map id2label label2id
  add_cross_attention cross_attention_hidden_size chunk_size_feed_forward
  bad_words_ids begin_suppress_tokens suppress_tokens diversity_penalty
  early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
  finetuning_task forced_bos_token_id forced_eos_token_id is_encoder_decoder
  length_penalty min_length no_repeat_ngram_size num_beam_groups
  num_return_sequences output_scores prefix problem_type remove_invalid_values
  return_dict_in_generate task_specific_params tf_legacy_loss
  tie_encoder_decoder tokenizer_class torchscript typical_p use_bfloat16
  logit_scale_init_value vision_config_dict text_config_dict
'''.split())
# Fields that must have one of the values that this code implements.
FIXED: dict[str, tuple[Any, ...]] = {
    'hidden_act': ('silu',), 'mlp_bias': (False,),
    'partial_rotary_factor': (1.0,), 'rope_interleaved': (False,),
    'pruned_heads': ({},),
    'sliding_window': (None,), 'use_sliding_window': (False,),
    'num_channels': (3,), 'multimodal_projector_bias': (True,),
    'mm_projector_type': ('mlp2x_gelu',), 'mm_use_im_start_end': (False,),
    'mm_use_im_patch_token': (False,), 'mm_patch_merge_type': ('flat',),
    'mm_resampler_type': (None,), 'image_aspect_ratio': ('pad', 'square')}

# Defaults of the formats, where they are not ours.
LLAMA = {'max_position_embeddings': 2048, 'rms_norm_eps': 1e-6}
QWEN2 = {'vocab_size': 151936, 'intermediate_size': 22016,
         'max_position_embeddings': 32768, 'rms_norm_eps': 1e-6}
CLIP = {'hidden_size': 768, 'intermediate_size': 3072, 'num_hidden_layers': 12,
        'num_attention_heads': 12, 'image_size': 224, 'patch_size': 32}
LLAVA_TOWER = {'hidden_size': 1024, 'intermediate_size': 4096,
               'num_hidden_layers': 24, 'num_attention_heads': 16,
               'image_size': 336, 'patch_size': 14}


def read_json(directory: str | os.PathLike[str]) -> dict[str, Any]:
  """The config.json of a directory.

  Raises:
    ConfigError: it is missing or not readable.
  """
  path = pathlib.Path(directory) / CONFIG
  check(path.is_file(), f'{path} does not exist; a checkpoint directory has '
        'one beside its weights')
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as e:
    raise ConfigError(f'{path} is not readable JSON ({e})') from e
  check(isinstance(values, dict), f'{path}: must be a JSON object')
  return values


class _Reader:
  """Takes fields from a source config and insists that none is left."""

  def __init__(self, values: dict[str, Any], where: str):
    self.values, self.where = dict(values), where

  def take(self, names: dict[str, Any]) -> dict[str, Any]:
    """Fields by name, each with its default; null is the default, too.

    Raises:
      ConfigError: a value of another type than the default's.
    """
    out = {}
    for name, default in names.items():
      value = self.values.pop(name, None)
      out[name] = default if value is None else value
      if default is not None:
        _check_type(name, out[name], default, self.where)
    return out

  def end(self) -> None:
    """Raises for a field that is neither read, neutral, nor as implemented."""
    for name, value in sorted(self.values.items()):
      if name in FIXED:
        check(value in FIXED[name] or value is None, f'{self.where}: '
              f'{name}={value!r} is not supported; only '
              f'{" or ".join(map(repr, FIXED[name]))}')
      else:
        check(name in NEUTRAL, f'{self.where}: the field {name}={value!r} is '
              'unknown and might change the numbers; only what is known to be '
              'harmless is read over: see convert/hf_config.py, NEUTRAL')


def _check_type(name: str, value: Any, default: Any, where: str) -> None:
  kind = float if isinstance(default, float) else type(default)
  kinds = {float: (int, float), tuple: (list, tuple)}.get(kind, kind)
  check(isinstance(value, kinds) and
        isinstance(value, bool) == isinstance(default, bool), f'{where}: '
        f'{name}={value!r} is no {kind.__name__}')
  check(kind is not float or 0 <= value < math.inf, f'{where}: {name}={value!r} '
        'is not supported; a finite number that is not negative')


def _make(kind: Callable[..., Any], where: str, **fields: Any) -> Any:
  """A config of ours; what it refuses is told with the file it comes from."""
  try:
    return kind(**fields)
  except ConfigError as e:
    raise ConfigError(f'{where}: {e}') from e


def text_config(values: dict[str, Any], where: str) -> TextConfig:
  """A language model's config.

  Args:
    values: of its config.json, or of that of the original LLaVA code.
    where: for messages.

  Raises:
    ConfigError: an architecture, or a field, that is not implemented.
  """
  kind = values.get('model_type', 'llama')
  kinds = TEXT_TYPES + ORIGINAL_TYPES * is_original(values)
  check(kind in kinds, f'{where}: model_type={kind!r} is not supported; only '
        f'{", ".join(kinds)}')
  reader = _Reader(values, where)
  defaults = {'vocab_size': 32000, 'hidden_size': 4096,
              'intermediate_size': 11008, 'num_hidden_layers': 32,
              'num_attention_heads': 32, 'num_key_value_heads': 0,
              'head_dim': 0, 'tie_word_embeddings': False,
              'initializer_range': 0.02,
              **(QWEN2 if kind == 'qwen2' else LLAMA)}
  fields = reader.take(defaults)
  fields['num_key_value_heads'] = (fields['num_key_value_heads'] or
                                   fields['num_attention_heads'])
  bias = reader.take({'attention_bias': False})['attention_bias']
  check(not bias, f'{where}: attention_bias=True puts a bias on o_proj, too, '
        'which is not supported; Qwen2 has none there')
  fields['attention_bias'] = kind == 'qwen2'
  fields['rope_theta'] = _rope_theta(reader)
  if kind == 'qwen2':  # windows are off; how they would lie does not matter
    reader.take({'sliding_window': None, 'max_window_layers': None})
    layers = reader.take({'layer_types': ()})['layer_types']
    check(all(kind == 'full_attention' for kind in layers),
          f'{where}: layer_types={layers} are not supported; only full_attention')
  reader.end()
  return _make(TextConfig, where, **fields)


def _rope_theta(reader: _Reader) -> float:
  """rope_theta, at its old place or its new ones; other RoPEs raise."""
  scaling = reader.take({'rope_scaling': {}})['rope_scaling']
  new = reader.take({'rope_parameters': {}})['rope_parameters']
  for name, found in (('rope_scaling', scaling), ('rope_parameters', new)):
    kind = found.get('rope_type', found.get('type', 'default'))
    extra = sorted(set(found) - {'rope_type', 'type', 'rope_theta'})
    check(kind == 'default' and not extra, f'{reader.where}: {name}={found} '
          'is not supported; only the default RoPE')
    if found.get('rope_theta') is not None:
      _check_type(f'{name}: rope_theta', found['rope_theta'], 1.0, reader.where)
  old = reader.take({'rope_theta': 10000.0})['rope_theta']
  inner = {float(f['rope_theta']) for f in (scaling, new)
           if f.get('rope_theta') is not None}
  check(len(inner) < 2, f'{reader.where}: rope_scaling={scaling} and '
        f'rope_parameters={new} contradict each other; remove one of them')
  return inner.pop() if inner else float(old)


def vision_config(values: dict[str, Any], where: str) -> VisionConfig:
  """A CLIP tower's config, alone or in a whole CLIP model's.

  Raises:
    ConfigError: another tower, or a field that is not implemented.
  """
  kind = values.get('model_type', 'clip_vision_model')
  check(kind in VISION_TYPES, f'{where}: model_type={kind!r} is not supported; '
        f'only {" and ".join(VISION_TYPES)}')
  if kind == 'clip':
    values = values.get('vision_config') or {}
    _check_type('vision_config', values, {}, where)
  reader = _Reader(values, where)
  fields = reader.take({**CLIP, 'layer_norm_eps': 1e-5,
                        'hidden_act': 'quick_gelu'})
  # of the text half, in files that dump everything
  reader.take({'initializer_range': None, 'vocab_size': None,
               'tie_word_embeddings': None})
  reader.end()
  return _make(VisionConfig, where, **fields)


def is_original(values: dict[str, Any]) -> bool:
  """Whether a config.json is of the original LLaVA code."""
  return 'mm_projector_type' in values or 'mm_vision_tower' in values


def llava_config(values: dict[str, Any], where: str,
                 vision: VisionConfig | None = None) -> LlavaConfig:
  """A whole LLaVA's config, Hugging Face's or the original code's.

  Args:
    values: of its config.json.
    where: for messages.
    vision: the tower's, if it comes from a directory of its own.

  Raises:
    ConfigError: something is not implemented, or the original format without
      `vision`.
  """
  if is_original(values):
    return _original(values, where, vision)
  kind = values.get('model_type', 'llava')
  check(kind == 'llava', f'{where}: model_type={kind!r} is not supported; only '
        'llava, which is LLaVA-1.5')
  reader = _Reader(values, where)
  several = values.get('vision_feature_layer')
  check(not isinstance(several, list), f'{where}: vision_feature_layer='
        f'{several!r}: several layers are not supported; one number')
  fields = reader.take({'vision_feature_layer': -2,
                        'vision_feature_select_strategy': 'default',
                        'projector_hidden_act': 'gelu'})
  inner = reader.take({'text_config': {}, 'vision_config': {},
                       'tie_word_embeddings': False, 'vocab_size': None})
  fields['image_token_index'] = _image_index(reader)
  reader.end()
  act = fields['projector_hidden_act']
  check(act in PROJECTOR_ACTS, f'{where}: projector_hidden_act={act!r} is not '
        f'supported; only {" or ".join(PROJECTOR_ACTS)}')
  fields['projector_hidden_act'] = PROJECTOR_ACTS[act]
  text = dict(inner['text_config'])
  if inner['tie_word_embeddings']:  # the flag stands at either place
    text['tie_word_embeddings'] = True
  vision = vision or vision_config(inner['vision_config'] or LLAVA_TOWER,
                                   f'{where}, vision_config')
  return _whole(where, vision=vision,
                text=text_config(text, f'{where}, text_config'), **fields)


def _original(values: dict[str, Any], where: str, vision: VisionConfig | None
              ) -> LlavaConfig:
  """llava_config of the original code, whose tower is another directory's."""
  tower = values.get('mm_vision_tower')
  check(vision is not None, f'{where}: the sizes of the vision tower '
        f'{tower!r} are not in this format; give its directory with --vision')
  # OpenAI's names say the sizes; without the last number it is 224
  named = re.search(r'clip-vit-[a-z]+-patch(\d+)(?:-(\d+))?/*$', str(tower))
  if named:
    sizes = int(named[2] or 224), int(named[1])
    check(sizes == (vision.image_size, vision.patch_size), f'{where}: '
          f'mm_vision_tower={tower!r} has image_size={sizes[0]} and patch_size='
          f'{sizes[1]}, but --vision has {vision.image_size} and '
          f'{vision.patch_size}; give the tower that it was trained with')
  reader = _Reader(values, where)
  taken = reader.take({'mm_vision_select_layer': -2,
                       'mm_vision_select_feature': 'patch'})
  select = {'patch': 'default', 'cls_patch': 'full'}
  feature = taken['mm_vision_select_feature']
  check(feature in select, f'{where}: mm_vision_select_feature={feature!r} '
        f'is not supported; only {" or ".join(select)}')
  return _whole(where, vision=vision, text=text_config(reader.values, where),
                vision_feature_layer=taken['mm_vision_select_layer'],
                vision_feature_select_strategy=select[feature])


def _whole(where: str, **fields: Any) -> LlavaConfig:
  """A LlavaConfig whose feature layer its tower has."""
  _make(num_layers_run, where, config=fields['vision'],
        feature_layer=fields['vision_feature_layer'])
  return _make(LlavaConfig, where, **fields)


def _image_index(reader: _Reader) -> int:
  """image_token_index, under either of its names."""
  found = reader.take({'image_token_index': None, 'image_token_id': None})
  given = [value for value in found.values() if value is not None]
  for value in given:
    _check_type('image_token_index', value, 0, reader.where)
  check(len(set(given)) < 2, f'{reader.where}: {found} contradict each other; '
        'remove one of them')
  return given[0] if given else 32000


def to_hf(config: LlavaConfig, token_ids: Mapping[str, Any] | None = None
          ) -> dict[str, Any]:
  """The config.json of Hugging Face's LlavaForConditionalGeneration.

  The compression method is left out: it has no field there.

  Args:
    config: of the model.
    token_ids: of BOS, EOS and padding, as far as they are known.
  """
  text, vision = config.text, config.vision
  names = ('vocab_size', 'hidden_size', 'intermediate_size',
           'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads',
           'rms_norm_eps', 'tie_word_embeddings', 'max_position_embeddings',
           'initializer_range')
  tower = ('image_size', 'patch_size', 'hidden_size', 'intermediate_size',
           'num_hidden_layers', 'num_attention_heads', 'layer_norm_eps',
           'hidden_act')
  acts = {ours: theirs for theirs, ours in PROJECTOR_ACTS.items()}
  return {
      'architectures': ['LlavaForConditionalGeneration'],
      'model_type': 'llava', 'dtype': config.param_dtype,
      'image_token_index': config.image_token_index,
      'image_seq_length': config.num_patches,
      'projector_hidden_act': acts[config.projector_hidden_act],
      'multimodal_projector_bias': True,
      'vision_feature_layer': config.vision_feature_layer,
      'vision_feature_select_strategy': config.vision_feature_select_strategy,
      'tie_word_embeddings': text.tie_word_embeddings,
      'text_config': {
          'model_type': 'qwen2' if text.attention_bias else 'llama',
          'head_dim': text.size_per_head, 'rope_theta': text.rope_theta,
          'hidden_act': 'silu', **(token_ids or {}), **{n: getattr(text, n) for n in names}},
      'vision_config': {
          'model_type': 'clip_vision_model',
          **{n: getattr(vision, n) for n in tower}}}
