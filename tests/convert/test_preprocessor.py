"""preprocessor_config.json: what is read, and what is refused."""

from __future__ import annotations

import json

import pytest

from vlm_compress.config import ConfigError
from vlm_compress.convert import preprocessor
from vlm_compress.data import images

CLIP = {'crop_size': {'height': 336, 'width': 336}, 'do_center_crop': True,
        'do_convert_rgb': True, 'do_normalize': True, 'do_rescale': True,
        'do_resize': True, 'image_processor_type': 'CLIPImageProcessor',
        'image_mean': [0.48145466, 0.4578275, 0.40821073],
        'image_std': [0.26862954, 0.26130258, 0.27577711],
        'resample': 3, 'rescale_factor': 1 / 255, 'size': {'shortest_edge': 336}}


def mode(directory, values, size=336):
  path = directory / 'preprocessor_config.json'
  path.write_text(values if isinstance(values, str) else json.dumps(values))
  return preprocessor.aspect_mode(directory, size)


def test_what_is_read(tmp_path):
  assert preprocessor.aspect_mode(tmp_path, 336) is None
  assert mode(tmp_path, CLIP) == 'crop'
  assert mode(tmp_path, {**CLIP, 'do_pad': True}) == 'pad'
  assert mode(tmp_path, {**CLIP, 'do_pad': False}) == 'crop'
  # sizes as older files have them
  assert mode(tmp_path, {**CLIP, 'size': 224, 'crop_size': 224}, 224) == 'crop'
  assert mode(tmp_path, {}, 56) == 'crop'
  assert set(images.ASPECT_MODES) == {'pad', 'crop'}


@pytest.mark.parametrize('change,words', [
    ({'image_mean': [0.5, 0.5, 0.5]}, ['image_mean', "CLIP's"]),
    ({'image_std': [0.5, 0.5]}, ['image_std']),
    ({'resample': 2}, ['resample=2']),
    ({'do_normalize': False}, ['do_normalize']),
    ({'rescale_factor': 1 / 127}, ['rescale_factor']),
    ({'do_center_crop': False}, ['do_pad', 'do_center_crop']),
    ({'size': {'height': 336, 'width': 336}}, ['size=', 'shortest_edge']),
    ({'size': {'shortest_edge': 224}}, ['224', '336']),
    ({'crop_size': {'height': 336, 'width': 300}}, ['crop_size', '300']),
    ({'tiles': 4}, ['tiles', 'NEUTRAL'])])
def test_what_is_refused(tmp_path, change, words):
  with pytest.raises(ConfigError) as caught:
    mode(tmp_path, {**CLIP, **change})
  message = str(caught.value)
  assert str(tmp_path) in message and '\n' not in message
  assert all(word in message for word in words), message


@pytest.mark.parametrize('text', ['{', '[]', '3'])
def test_no_preprocessor_at_all(tmp_path, text):
  with pytest.raises(ConfigError, match='JSON'):
    mode(tmp_path, text)
