"""Named model sizes, and the published placement of modules."""

from __future__ import annotations

from vlm_compress.config import ConfigError, LlavaConfig, TextConfig, VisionConfig


def preset(name: str) -> LlavaConfig:
  """Named model sizes: 'tiny', 'llava_1_5_7b', 'llava_1_5_13b'."""
  if name == 'tiny':
    return LlavaConfig(
        vision=VisionConfig(image_size=24, patch_size=6, hidden_size=32,
                            intermediate_size=48, num_hidden_layers=3,
                            num_attention_heads=4),
        text=TextConfig(vocab_size=96, hidden_size=32, intermediate_size=48,
                        num_hidden_layers=4, num_attention_heads=4,
                        num_key_value_heads=2, max_position_embeddings=256,
                        initializer_range=0.1))
  if name == 'llava_1_5_7b':
    return LlavaConfig(dtype='bfloat16', remat=True)
  if name == 'llava_1_5_13b':
    return LlavaConfig(
        text=TextConfig(hidden_size=5120, intermediate_size=13824,
                        num_hidden_layers=40, num_attention_heads=40,
                        num_key_value_heads=40),
        dtype='bfloat16', remat=True)
  raise ConfigError(f'preset {name!r} is unknown; use tiny, llava_1_5_7b or '
                    'llava_1_5_13b')


def efficientnet_lite0(image_size: int = 128) -> VisionConfig:
  """The frozen EfficientNet-Lite0 tower, features of stride 16."""
  return VisionConfig(model_type='efficientnet_lite0', image_size=image_size,
                      patch_size=16, hidden_size=112)


def prune_after_for(num_hidden_layers: int) -> tuple[int, ...]:
  """The published placement (4, 14, 24 of 32) for any depth, without repeats."""
  shares = (0.125, 0.4375, 0.75)
  layers = [max(1, int(num_hidden_layers * share)) for share in shares]
  return tuple(sorted({l for l in layers if l < num_hidden_layers}))
