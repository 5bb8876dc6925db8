"""Our CLIP tower against Hugging Face's, on small random weights."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip(
    'torch', reason="parity needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip(
    'transformers',
    reason="parity needs transformers: pip install -e '.[parity]'")

from vlm_compress.config import VisionConfig
from vlm_compress.models.clip_vit import ClipVisionTower

pytestmark = pytest.mark.parity

# Absolute and relative; measured 6e-6 at most, on outputs up to 10.
TOLERANCE = 1e-5

SIZES = {
    'tiny': {'image_size': 24, 'patch_size': 6, 'hidden_size': 32,
             'intermediate_size': 48, 'num_hidden_layers': 3,
             'num_attention_heads': 4},
    'one layer': {'image_size': 14, 'patch_size': 14, 'hidden_size': 16,
                  'intermediate_size': 24, 'num_hidden_layers': 1,
                  'num_attention_heads': 1},
    'wider': {'image_size': 56, 'patch_size': 14, 'hidden_size': 128,
              'intermediate_size': 512, 'num_hidden_layers': 4,
              'num_attention_heads': 8, 'layer_norm_eps': 1e-3},
}


def reference(config):
  """A Hugging Face tower whose norms and biases are not at their defaults."""
  torch.manual_seed(0)
  fields = {name: getattr(config, name) for name in (
      'image_size', 'patch_size', 'hidden_size', 'intermediate_size',
      'num_hidden_layers', 'num_attention_heads', 'layer_norm_eps',
      'hidden_act')}
  model = transformers.CLIPVisionModel(
      transformers.CLIPVisionConfig(**fields)).eval()
  with torch.no_grad():
    for name, value in model.named_parameters():
      noise = torch.randn_like(value)
      if 'norm' in name and name.endswith('weight'):
        value.copy_(1 + 0.1 * noise)
      elif name.endswith('bias') or 'embedding' in name:
        value.copy_(0.3 * noise)
      else:
        value.copy_(noise / value.shape[-1] ** 0.5)
  return model


def converted(model, config):
  """The torch parameters in our layout, written out for this test alone."""
  state = {name.removeprefix('vision_model.'): value.detach().numpy()
           for name, value in model.named_parameters()}
  def norm(prefix):
    return {'weight': state[f'{prefix}.weight'],
            'bias': state[f'{prefix}.bias']}
  def dense(prefix):
    return {'kernel': state[f'{prefix}.weight'].T,
            'bias': state[f'{prefix}.bias']}
  def stack(make, name):
    layers = [make(f'encoder.layers.{i}.{name}')
              for i in range(config.num_hidden_layers)]
    return {key: np.stack([layer[key] for layer in layers])
            for key in layers[0]}
  patch = state['embeddings.patch_embedding.weight']  # D, 3, rows, columns
  return {
      'embeddings': {
          'class_embedding': state['embeddings.class_embedding'],
          'patch_embedding': {'kernel': patch.transpose(2, 3, 1, 0)},
          'position_embedding': {
              'embedding': state['embeddings.position_embedding.weight']}},
      'pre_layrnorm': norm('pre_layrnorm'),
      'layers': {
          'layer_norm1': stack(norm, 'layer_norm1'),
          'layer_norm2': stack(norm, 'layer_norm2'),
          'self_attn': {name: stack(dense, f'self_attn.{name}') for name in
                        ('q_proj', 'k_proj', 'v_proj', 'out_proj')},
          'mlp': {name: stack(dense, f'mlp.{name}')
                  for name in ('fc1', 'fc2')}}}


@pytest.mark.parametrize('act', ['quick_gelu', 'gelu'])
@pytest.mark.parametrize('size', sorted(SIZES))
def test_hidden_states_equal_hugging_face(size, act):
  config = VisionConfig(hidden_act=act, **SIZES[size])
  model = reference(config)
  params = converted(model, config)
  shape = (2, config.image_size, config.image_size, 3)
  pixels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  with torch.no_grad():
    hidden = model(torch.tensor(pixels.transpose(0, 3, 1, 2)),
                   output_hidden_states=True).hidden_states
  assert len(hidden) == config.num_hidden_layers + 1
  for layer in {-1, -2, 0, 1, -len(hidden)}:
    for strategy, first in (('default', 1), ('full', 0)):
      expected = hidden[layer][:, first:].numpy()
      tower = ClipVisionTower(config, layer, strategy)
      ours = tower.apply({'params': params}, pixels)
      error = np.abs(np.asarray(ours) - expected).max()
      print(f'\nparity: CLIP, {size} {act} layer {layer} {strategy}: {error:.1e} '
            f'of {np.abs(expected).max():.1f}')
      np.testing.assert_allclose(ours, expected, rtol=TOLERANCE,
                                 atol=TOLERANCE)
