"""Our decoder and our LLaVA against Hugging Face's, on small random weights.

The weights are mapped here, by hand, so that this does not depend on the
conversion table that it helps to trust.  float32 on both sides.  A block is
one decoder layer or the projector; a model is everything from ids to logits.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip(
    'torch', reason="parity needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip(
    'transformers',
    reason="parity needs transformers: pip install -e '.[parity]'")

from test_clip_parity import converted as converted_tower

from vlm_compress.config import LlavaConfig, TextConfig, VisionConfig
from vlm_compress.decode.generate import generate
from vlm_compress.models.clip_vit import ClipVisionTower
from vlm_compress.models.language_model import LanguageModel
from vlm_compress.models.layer_stack import StackInputs
from vlm_compress.models.llama import DecoderLayer
from vlm_compress.models.llava import Llava
from vlm_compress.models.projector import Projector
from vlm_compress.models.sequence import expand_row, make_batch
from vlm_compress.nn.masks import causal_mask

pytestmark = pytest.mark.parity

# Absolute and relative, on outputs of size 1 to 10; never relaxed.
BLOCK, MODEL = 1e-5, 1e-4

BASE = TextConfig(vocab_size=96, hidden_size=32, intermediate_size=48,
                  num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=4, max_position_embeddings=128)
VARIANTS = {
    'plain': {},
    'grouped queries': {'num_key_value_heads': 2},
    'one key head': {'num_key_value_heads': 1, 'rms_norm_eps': 1e-3},
    'rope base 5e5': {'rope_theta': 5e5},
    'tied embeddings': {'tie_word_embeddings': True},
    'heads of 10': {'head_dim': 10, 'num_key_value_heads': 2},
    'heads wider than hidden': {'head_dim': 22, 'hidden_size': 24},
    'qwen2': {'attention_bias': True, 'tie_word_embeddings': True,
              'num_key_value_heads': 2, 'rope_theta': 1e6},
    'deep and wide': {'num_hidden_layers': 8, 'hidden_size': 128,
                      'intermediate_size': 344, 'num_attention_heads': 8,
                      'num_key_value_heads': 4},
}


def text_config(variant: str) -> TextConfig:
  return dataclasses.replace(BASE, **VARIANTS[variant])


def hf_text_config(config: TextConfig):
  fields = {**dataclasses.asdict(config), 'head_dim': config.size_per_head}
  bias, theta = fields.pop('attention_bias'), fields.pop('rope_theta')
  # Qwen2 is the model with a bias on q, k and v and none on o, as ours.
  make = transformers.Qwen2Config if bias else transformers.LlamaConfig
  return make(**fields, attn_implementation='eager', pad_token_id=0,
              bos_token_id=1, eos_token_id=2,
              rope_parameters={'rope_type': 'default', 'rope_theta': theta})


def spread(model):
  """Weights at no default: norms, biases and embeddings all matter."""
  torch.manual_seed(0)
  with torch.no_grad():
    for name, value in model.named_parameters():
      noise = torch.randn_like(value)
      if 'norm' in name and name.endswith('weight'):
        value.copy_(1 + 0.1 * noise)
      elif name.endswith('bias') or 'embed' in name:
        value.copy_(0.3 * noise)
      else:
        value.copy_(noise / value.shape[-1] ** 0.5)
  return model.eval()


def hf_decoder(config: TextConfig):
  make = (transformers.Qwen2ForCausalLM if config.attention_bias
          else transformers.LlamaForCausalLM)
  return spread(make(hf_text_config(config)))


def dense(module):
  out = {'kernel': module.weight.detach().numpy().T}
  if module.bias is not None:
    out['bias'] = module.bias.detach().numpy()
  return out


def layer_params(layer):
  attention, mlp = layer.self_attn, layer.mlp
  norm = lambda module: {'weight': module.weight.detach().numpy()}
  return {
      'input_layernorm': norm(layer.input_layernorm),
      'post_attention_layernorm': norm(layer.post_attention_layernorm),
      'self_attn': {name: dense(getattr(attention, name))
                    for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj')},
      'mlp': {name: dense(getattr(mlp, name))
              for name in ('gate_proj', 'up_proj', 'down_proj')}}


def stacked(trees):
  """Trees of the layers -> one tree with the layer as leading axis."""
  if isinstance(trees[0], dict):
    return {key: stacked([tree[key] for tree in trees]) for key in trees[0]}
  return np.stack(trees)


def decoder_params(inner, lm_head, config: TextConfig):
  out = {'embed_tokens': {'embedding':
                          inner.embed_tokens.weight.detach().numpy()},
         'layers': stacked([layer_params(layer) for layer in inner.layers]),
         'norm': {'weight': inner.norm.weight.detach().numpy()}}
  if not config.tie_word_embeddings:
    out['lm_head'] = dense(lm_head)
  return out


def compare(name, ours, theirs, tolerance):
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  print(f'\nparity: {name}: {np.abs(ours - theirs).max():.1e} of '
        f'{np.abs(theirs).max():.1f}')
  np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def sample_rows(rng, vocab_size):
  """Two rows of 12 tokens; the second is padded by 4 on the left.

  Positions have a gap, as behind pruned tokens.
  """
  ids = rng.integers(3, vocab_size, (2, 12))
  positions = np.tile(np.arange(12), (2, 1))
  positions[0, 7:] += 9
  valid = np.ones((2, 12), bool)
  valid[1, :4] = False
  return ids, positions, valid


def attention_mask(valid):
  return np.asarray(causal_mask(jnp.asarray(valid),
                                jnp.zeros(valid.shape, jnp.int32)))


@pytest.mark.parametrize('variant', VARIANTS)
def test_layer(variant):
  config = text_config(variant)
  model = hf_decoder(config)
  rng = np.random.default_rng(0)
  _, positions, valid = sample_rows(rng, config.vocab_size)
  x = rng.normal(size=(2, 12, config.hidden_size)).astype(np.float32)
  mask = attention_mask(valid)
  added = np.where(mask[:, None], 0.0, np.finfo(np.float32).min)
  hidden = torch.tensor(x)
  with torch.no_grad():
    angles = model.model.rotary_emb(hidden, torch.tensor(positions))
    theirs = model.model.layers[1](
        hidden, attention_mask=torch.tensor(added, dtype=torch.float32),
        position_embeddings=angles)
  params = layer_params(model.model.layers[1])
  ours, _ = DecoderLayer(config, jnp.float32, jnp.float32).apply(
      {'params': params}, x, positions, mask)
  compare(f'layer, {variant}', np.asarray(ours)[valid],
          theirs.numpy()[valid], BLOCK)


@pytest.mark.parametrize('variant', VARIANTS)
def test_logits_of_the_decoder(variant):
  config = text_config(variant)
  model = hf_decoder(config)
  ids, positions, valid = sample_rows(np.random.default_rng(1),
                                      config.vocab_size)
  with torch.no_grad():
    theirs = model(torch.tensor(ids), attention_mask=torch.tensor(valid).long(),
                   position_ids=torch.tensor(positions)).logits
  params = decoder_params(model.model, model.lm_head, config)

  def logits(module):
    shared = StackInputs(positions=jnp.asarray(positions),
                         mask=jnp.asarray(attention_mask(valid)))
    return module.logits(module(module.embed(jnp.asarray(ids)), shared)[0])
  ours = LanguageModel(LlavaConfig(text=config)).apply(
      {'params': params}, method=logits)
  compare(f'decoder, {variant}', np.asarray(ours)[valid],
          theirs.numpy()[valid], MODEL)


# LLaVA ----------------------------------------------------------------------

IMAGE = 95  # Hugging Face's placeholder is an id of the vocabulary
VISION = {'image_size': 24, 'patch_size': 6, 'hidden_size': 32,
          'intermediate_size': 48, 'num_hidden_layers': 3,
          'num_attention_heads': 4}
LLAVAS = {
    'llava 1.5': ('plain', {}),
    'class token kept, last layer but two':
        ('grouped queries', {'vision_feature_select_strategy': 'full',
                             'vision_feature_layer': -3}),
    'qwen2 decoder': ('qwen2', {}),
}


def build_llava(name):
  """(Hugging Face's model, our config, our params, their tower's params)."""
  variant, fields = LLAVAS[name]
  text = text_config(variant)
  config = LlavaConfig(vision=VisionConfig(**VISION), text=text, **fields)
  model = spread(transformers.LlavaForConditionalGeneration(
      transformers.LlavaConfig(
          vision_config=transformers.CLIPVisionConfig(
              hidden_act='quick_gelu', **VISION),
          text_config=hf_text_config(text), image_token_index=IMAGE,
          image_seq_length=config.num_patches,
          tie_word_embeddings=text.tie_word_embeddings,
          attn_implementation='eager', **fields)))
  inner = model.model
  projector = inner.multi_modal_projector
  params = {
      'language_model': decoder_params(inner.language_model, model.lm_head,
                                       text),
      'multi_modal_projector': {'linear_1': dense(projector.linear_1),
                                'linear_2': dense(projector.linear_2)}}
  return model, config, params, converted_tower(inner.vision_tower,
                                                config.vision)


def llava_rows(config, rng):
  """Token ids with -200 for images: one image, two images, text alone."""
  word = lambda n: rng.integers(3, IMAGE, n).tolist()
  return [[1, *word(3), -200, *word(6)], [1, -200, *word(2), -200, *word(3)],
          [1, *word(9)]]


def their_inputs(rows, config, length):
  """Placeholders repeated once per visual token, padded on the left."""
  ids = np.zeros((len(rows), length), np.int64)
  valid = np.zeros((len(rows), length), np.int64)
  for b, row in enumerate(rows):
    tokens = [t for token in row for t in (
        [IMAGE] * config.num_patches if token == -200 else [token])]
    ids[b, length - len(tokens):] = tokens
    valid[b, length - len(tokens):] = 1
  return {'input_ids': torch.tensor(ids), 'attention_mask': torch.tensor(valid)}


def our_batch(rows, features, config, length):
  expanded = [expand_row(row, [False] * len(row), [0] * len(row), config)
              for row in rows]
  return make_batch(expanded, features, length=length, num_images=2,
                    pad_left=True)


@pytest.mark.parametrize('name', LLAVAS)
def test_llava_from_pixels_to_logits(name):
  model, config, params, tower_params = build_llava(name)
  rng = np.random.default_rng(2)
  rows = llava_rows(config, rng)
  pixels = rng.normal(size=(3, 24, 24, 3)).astype(np.float32)
  tower = ClipVisionTower(config.vision, config.vision_feature_layer,
                          config.vision_feature_select_strategy)
  features = np.asarray(tower.apply({'params': tower_params}, pixels))
  length = 2 * config.num_patches + 10
  inputs = their_inputs(rows, config, length)
  # Hugging Face counts positions from the first pad unless it is told.
  positions = (inputs['attention_mask'].cumsum(-1) - 1).clamp(min=0)
  with torch.no_grad():
    theirs = model(**inputs, position_ids=positions, pixel_values=torch.tensor(
        pixels.transpose(0, 3, 1, 2))).logits.numpy()
  batch = our_batch(rows, [features[:1], features[1:], features[:0]], config,
                    length)
  ours, _ = Llava(config).apply({'params': params}, batch)
  valid = np.asarray(batch.valid)
  np.testing.assert_array_equal(valid, inputs['attention_mask'].numpy() > 0)
  compare(f'llava, {name}', np.asarray(ours)[valid], theirs[valid], MODEL)


def test_projector():
  model, config, params, _ = build_llava('llava 1.5')
  x = np.random.default_rng(3).normal(size=(2, 16, 32)).astype(np.float32)
  with torch.no_grad():
    theirs = model.model.multi_modal_projector(torch.tensor(x)).numpy()
  ours = Projector(config.text.hidden_size, 'gelu', 0.02, jnp.float32,
                   jnp.float32).apply(
                       {'params': params['multi_modal_projector']}, x)
  compare('projector', ours, theirs, BLOCK)


def test_greedy_answers_from_the_cache():
  model, config, params, tower_params = build_llava('llava 1.5')
  rng = np.random.default_rng(4)
  pixels = rng.normal(size=(3, 24, 24, 3)).astype(np.float32)
  features = np.asarray(ClipVisionTower(config.vision, -2, 'default').apply(
      {'params': tower_params}, pixels))
  rows = llava_rows(config, rng)
  length = 2 * config.num_patches + 10
  with torch.no_grad():
    theirs = model.generate(
        **their_inputs(rows, config, length), max_new_tokens=12,
        do_sample=False, pad_token_id=2, pixel_values=torch.tensor(
            pixels.transpose(0, 3, 1, 2)))[:, length:].numpy()
  batch = our_batch(rows, [features[:1], features[1:], features[:0]], config,
                    length)
  ours = np.asarray(generate(Llava(config), params, batch, max_new_tokens=12,
                             eos_id=2).tokens)
  assert len({tuple(row) for row in ours.tolist()}) == 3
  np.testing.assert_array_equal(ours[:, :theirs.shape[1]], theirs)
