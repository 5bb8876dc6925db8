"""Checkpoints that transformers writes, converted; and the way back.

What is compared: logits of transformers' model with ours on the converted
weights (float32, 1e-4, as for whole models elsewhere), and the weights that
come back from the export, bit by bit.
"""

from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip(
    'torch', reason="parity needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip(
    'transformers',
    reason="parity needs transformers: pip install -e '.[parity]'")

import safetensors.torch  # noqa: E402
from test_llama_parity import compare, spread  # noqa: E402

from vlm_compress.cli import __main__ as cli  # noqa: E402
from vlm_compress.convert import hf_config  # noqa: E402
from vlm_compress.convert.files import load_config, load_params  # noqa: E402
from vlm_compress.models.llava import Llava  # noqa: E402
from vlm_compress.models.sequence import expand_row, make_batch  # noqa: E402

pytestmark = pytest.mark.parity

MODEL = 1e-4
VOCABULARY, IMAGE = 96, 95
TEXT = {'vocab_size': VOCABULARY, 'hidden_size': 32, 'intermediate_size': 48,
        'num_hidden_layers': 3, 'num_attention_heads': 4,
        'num_key_value_heads': 4, 'max_position_embeddings': 1024}
VISION = {'image_size': 24, 'patch_size': 6, 'hidden_size': 32,
          'intermediate_size': 48, 'num_hidden_layers': 3,
          'num_attention_heads': 4}
# name -> (changes to the text config, to the tower, to the whole)
VARIANTS = {
    'llava 1.5': ({}, {}, {}),
    'grouped queries, rope base 5e5, odd heads': (
        {'num_key_value_heads': 2, 'head_dim': 22, 'rms_norm_eps': 1e-5,
         'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5}}, {}, {}),
    'tied, class token, last layer': (
        {'tie_word_embeddings': True}, {},
        {'vision_feature_layer': -1, 'tie_word_embeddings': True,
         'vision_feature_select_strategy': 'full'}),
    'qwen2': ({'model_type': 'qwen2', 'num_key_value_heads': 2}, {}, {}),
    'qwen2, odd heads': ({'model_type': 'qwen2', 'num_key_value_heads': 2,
                          'head_dim': 22}, {}, {}),
    'projector of tanh': ({}, {}, {'projector_hidden_act': 'gelu_pytorch_tanh'}),
    '56 px': ({}, {'image_size': 56, 'patch_size': 14}, {}),
    '336 px': ({}, {'image_size': 336, 'patch_size': 14}, {}),
}


def build(name):
  """transformers' model of a variant, no weight at its default."""
  text, vision, fields = VARIANTS[name]
  text = {**TEXT, **text}
  kind = text.pop('model_type', 'llama')
  make = transformers.Qwen2Config if kind == 'qwen2' else transformers.LlamaConfig
  tower = transformers.CLIPVisionConfig(hidden_act='quick_gelu',
                                        **{**VISION, **vision})
  side = tower.image_size // tower.patch_size
  extra = fields.get('vision_feature_select_strategy') == 'full'
  return spread(transformers.LlavaForConditionalGeneration(
      transformers.LlavaConfig(
          vision_config=tower, text_config=make(**text),
          image_token_index=IMAGE, image_seq_length=side ** 2 + extra,
          attn_implementation='eager', **fields)))


def as_original(state):
  """Key names of the original LLaVA code."""
  def rename(key):
    for theirs, original in (
        ('model.language_model.', 'model.'),
        ('model.vision_tower.', 'model.vision_tower.vision_tower.vision_model.'),
        ('model.multi_modal_projector.linear_1', 'model.mm_projector.0'),
        ('model.multi_modal_projector.linear_2', 'model.mm_projector.2')):
      if key.startswith(theirs):
        return original + key.removeprefix(theirs)
    return key
  return {rename(key): value.contiguous() for key, value in state.items()}


def write_original(model, directory):
  """A directory of the original LLaVA format, tower inside."""
  directory.mkdir()
  text = model.config.text_config
  safetensors.torch.save_file(as_original(model.state_dict()),
                              directory / 'model.safetensors')
  (directory / 'config.json').write_text(json.dumps({
      'architectures': ['LlavaLlamaForCausalLM'], 'model_type': 'llava_llama',
      'mm_projector_type': 'mlp2x_gelu', 'mm_vision_tower': 'openai/clip',
      'mm_vision_select_layer': -2, 'mm_vision_select_feature': 'patch',
      'mm_use_im_start_end': False, 'image_aspect_ratio': 'pad',
      'rope_scaling': None, 'hidden_act': 'silu', 'rope_theta': 10000.0,
      **{name: getattr(text, name) for name in (
          'vocab_size', 'hidden_size', 'intermediate_size',
          'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads',
          'rms_norm_eps', 'max_position_embeddings')}}))


def their_logits(model, ids, pixels):
  tokens = [t for token in ids for t in (
      [IMAGE] * model.config.image_seq_length if token == IMAGE else [token])]
  with torch.no_grad():
    return model(input_ids=torch.tensor([tokens]), pixel_values=torch.tensor(
        pixels.transpose(0, 3, 1, 2))).logits[0].numpy()


def our_logits(directory, ids, pixels):
  config = load_config(directory)
  model = Llava(config)
  params = {'params': load_params(directory)}
  features = model.apply(params, pixels[None], method='vision_features')
  ids = [config.image_token_index if token == IMAGE else token for token in ids]
  row = expand_row(ids, [False] * len(ids), [0] * len(ids), config)
  batch = make_batch([row], [np.asarray(features[0])],
                     length=len(row['input_ids']), num_images=1)
  return np.asarray(model.apply(params, batch)[0][0])


def example(model):
  rng = np.random.default_rng(0)
  side = model.config.vision_config.image_size
  return ([1, 5, 9, IMAGE, *rng.integers(3, IMAGE, 9).tolist()],
          rng.normal(size=(1, side, side, 3)).astype(np.float32))


def convert(*argv):
  assert cli.main(['convert', *map(str, argv)]) == 0


@pytest.mark.parametrize('name', VARIANTS)
def test_there_and_back(name, tmp_path):
  model = build(name)
  model.save_pretrained(tmp_path / 'hf')
  convert('--from', tmp_path / 'hf', '--to', tmp_path / 'ours')
  ids, pixels = example(model)
  theirs = their_logits(model, ids, pixels)
  compare(f'converted, {name}', our_logits(tmp_path / 'ours', ids, pixels),
          theirs, MODEL)
  assert cli.main(['export', '--from', str(tmp_path / 'ours'), '--to',
                   str(tmp_path / 'back')]) == 0
  back, info = transformers.LlavaForConditionalGeneration.from_pretrained(
      tmp_path / 'back', output_loading_info=True, attn_implementation='eager')
  assert not any(info.values()), info
  want, got = model.state_dict(), back.state_dict()
  assert want.keys() == got.keys()
  assert all(torch.equal(want[key], got[key]) for key in want)
  np.testing.assert_array_equal(their_logits(back.eval(), ids, pixels), theirs)


@pytest.mark.parametrize('layout', ['in memory', 'sharded'])
def test_other_layouts_hold_the_same(layout, tmp_path):
  model = build('llava 1.5')
  model.save_pretrained(tmp_path / 'hf')
  convert('--from', tmp_path / 'hf', '--to', tmp_path / 'want')
  other = tmp_path / 'other'
  if layout == 'sharded':
    model.save_pretrained(other, max_shard_size='40KB')
    assert len(list(other.glob('*.safetensors'))) > 3
  else:
    model.config.save_pretrained(other)
    safetensors.torch.save_file(model.state_dict(), other / 'model.safetensors')
  convert('--from', other, '--to', tmp_path / 'got')
  same_weights(tmp_path / 'got', tmp_path / 'want')


@pytest.mark.parametrize('place', ['rope_scaling', 'rope_parameters', None])
def test_places_of_rope_theta(place, tmp_path):
  """What transformers itself makes of the file is what counts."""
  build('llava 1.5').save_pretrained(tmp_path / 'hf')
  path = tmp_path / 'hf/config.json'
  values = json.loads(path.read_text())
  text = values['text_config']
  for name in ('rope_parameters', 'rope_scaling', 'rope_theta'):
    text.pop(name, None)
  text |= ({'rope_theta': 5e5} if place is None else
           {place: {'rope_type': 'default', 'rope_theta': 5e5}})
  path.write_text(json.dumps(values))
  model = transformers.LlavaForConditionalGeneration.from_pretrained(
      tmp_path / 'hf', attn_implementation='eager').eval()
  convert('--from', tmp_path / 'hf', '--to', tmp_path / 'ours')
  ids, pixels = example(model)
  compare(f'rope base in {place}', our_logits(tmp_path / 'ours', ids, pixels),
          their_logits(model, ids, pixels), MODEL)


def test_absent_fields_have_their_defaults():
  theirs = {'llama': transformers.LlamaConfig(), 'qwen2': transformers.Qwen2Config()}
  for kind, config in theirs.items():
    ours = hf_config.text_config({'model_type': kind}, 'here')
    for name in ('vocab_size', 'hidden_size', 'intermediate_size',
                 'num_hidden_layers', 'num_attention_heads', 'rms_norm_eps',
                 'max_position_embeddings', 'tie_word_embeddings',
                 'initializer_range'):
      assert getattr(ours, name) == getattr(config, name), (kind, name)
    assert ours.rope_theta == config.rope_parameters['rope_theta']
    assert ours.num_key_value_heads == (
        config.num_key_value_heads if kind == 'llama' else 32)
  whole = transformers.LlavaConfig()
  ours = hf_config.llava_config({'model_type': 'llava'}, 'here')
  for tower, config in ((hf_config.vision_config({}, 'here'),
                         transformers.CLIPVisionConfig()),
                        (ours.vision, whole.vision_config)):
    for name in ('image_size', 'patch_size', 'hidden_size', 'intermediate_size',
                 'num_hidden_layers', 'num_attention_heads', 'layer_norm_eps',
                 'hidden_act'):
      assert getattr(tower, name) == getattr(config, name), name
  for name in ('vision_feature_layer', 'vision_feature_select_strategy',
               'projector_hidden_act', 'image_token_index'):
    assert getattr(ours, name) == getattr(whole, name), name


def same_weights(got, want):
  got, want = (safetensors.torch.load_file(pathlib.Path(d) / 'model.safetensors')
               for d in (got, want))
  assert got.keys() == want.keys()
  assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_vlm_from_parts(tmp_path):
  """A Qwen2 and a whole CLIP model with its text half."""
  inner = build('qwen2')
  lm = spread(transformers.Qwen2ForCausalLM(inner.config.text_config))
  lm.save_pretrained(tmp_path / 'lm')
  clip = transformers.CLIPModel(transformers.CLIPConfig(
      vision_config=inner.config.vision_config.to_dict(),
      text_config={'num_hidden_layers': 1, 'hidden_size': 8,
                   'intermediate_size': 8, 'num_attention_heads': 1,
                   'vocab_size': 9}))
  spread(clip.vision_model)
  clip.save_pretrained(tmp_path / 'clip')
  convert('--llm', tmp_path / 'lm', '--vision', tmp_path / 'clip', '--to',
          tmp_path / 'ours')
  params, config = load_params(tmp_path / 'ours'), load_config(tmp_path / 'ours')
  kernel = params['multi_modal_projector']['linear_1']['kernel']
  assert 0.5 < kernel.std() / config.text.initializer_range < 1.5
  # the same parts inside transformers' LLaVA, with our fresh projector
  inner.model.language_model.load_state_dict(lm.model.state_dict())
  inner.lm_head.load_state_dict(lm.lm_head.state_dict())
  inner.model.vision_tower.load_state_dict({
      key.removeprefix('vision_model.'): value
      for key, value in clip.state_dict().items()
      if key.startswith('vision_model.')})
  with torch.no_grad():
    for name in ('linear_1', 'linear_2'):
      layer = getattr(inner.model.multi_modal_projector, name)
      ours = params['multi_modal_projector'][name]
      layer.weight.copy_(torch.tensor(ours['kernel'].T))
      layer.bias.copy_(torch.tensor(ours['bias']))
  ids, pixels = example(inner)
  compare('from parts', our_logits(tmp_path / 'ours', ids, pixels),
          their_logits(inner, ids, pixels), MODEL)


def test_original_llava_with_a_tower_of_its_own(tmp_path):
  """Also VoCo-LLaMA: one row more, which becomes voco_embedding."""
  model, outside = build('llava 1.5'), tmp_path / 'outside'
  write_original(model, outside)
  state = safetensors.torch.load_file(outside / 'model.safetensors')
  tower = {key.rpartition('vision_tower.vision_model.')[2]: state.pop(key)
           for key in list(state) if 'vision_tower' in key}
  safetensors.torch.save_file(state, outside / 'model.safetensors')
  clip = tmp_path / 'clip'
  clip.mkdir()
  model.config.vision_config.save_pretrained(clip)
  # a tower inside is taken; the directory gives its sizes
  write_original(model, tmp_path / 'inside')
  convert('--from', tmp_path / 'inside', '--vision', clip, '--to',
          tmp_path / 'whole')
  safetensors.torch.save_file({f'vision_model.{k}': v for k, v in tower.items()},
                              clip / 'model.safetensors')
  convert('--from', outside, '--vision', clip, '--to', tmp_path / 'ours')
  ids, pixels = example(model)
  compare('original LLaVA', our_logits(tmp_path / 'ours', ids, pixels),
          their_logits(model, ids, pixels), MODEL)
  same_weights(tmp_path / 'ours', tmp_path / 'whole')

  (outside / 'added_tokens.json').write_text('{"<voco>": 95}')
  convert('--from', outside, '--vision', clip, '--to', tmp_path / 'voco',
          '--num-voco-tokens', 4)
  config, params = load_config(tmp_path / 'voco'), load_params(tmp_path / 'voco')
  assert config.text.vocab_size == 95 and config.voco.num_voco_tokens == 4
  want = model.model.language_model.embed_tokens.weight.detach().numpy()
  np.testing.assert_array_equal(params['voco_embedding'], want[95:])
  np.testing.assert_array_equal(
      params['language_model']['embed_tokens']['embedding'], want[:95])
  compare('VoCo-LLaMA', our_logits(tmp_path / 'voco', ids, pixels),
          their_logits(model, ids, pixels)[:, :95], MODEL)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_stays_as_it_is(dtype, tmp_path):
  model = build('llava 1.5').to(getattr(torch, dtype))
  model.save_pretrained(tmp_path / 'hf')
  convert('--from', tmp_path / 'hf', '--to', tmp_path / 'ours')
  config, params = load_config(tmp_path / 'ours'), load_params(tmp_path / 'ours')
  computed = 'bfloat16' if dtype == 'bfloat16' else 'float32'
  assert (config.param_dtype, config.dtype) == (dtype, computed)
  norm = params['language_model']['norm']['weight']
  assert norm.dtype == jnp.dtype(dtype)
  np.testing.assert_array_equal(
      norm.astype(np.float32),
      model.model.language_model.norm.weight.detach().float().numpy())
  convert('--from', tmp_path / 'hf', '--to', tmp_path / 'wide', '--dtype',
          'float32')
  ids, pixels = example(model)
  wide = our_logits(tmp_path / 'wide', ids, pixels)
  # loaded anew: .to(half) has rounded RoPE's frequencies as well
  theirs = their_logits(
      transformers.LlavaForConditionalGeneration.from_pretrained(
          tmp_path / 'hf', dtype=torch.float32, attn_implementation='eager'
      ).eval(), ids, pixels)
  compare('widened', wide, theirs, MODEL)
  half = our_logits(tmp_path / 'ours', ids, pixels)
  if dtype == 'float16':  # computed in float32: nothing more is lost
    compare('float16', half, theirs, MODEL)
    return
  # bfloat16 activations have 8 bits: 2 % of the largest logit, 0.7 % measured
  off = np.abs(half - theirs).max() / np.abs(theirs).max()
  print(f'\nparity: {dtype}: off by {off:.4f} of the largest logit')
  assert off < 0.02
