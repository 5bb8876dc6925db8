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
    ({'tiles': 4}, ['tiles', 'NEUTRAL']),
    ({'image_mean': 0.5}, ['image_mean=0.5']),
    ({'image_mean': ['a', 'b', 'c']}, ["image_mean=['a'"]),
    ({'image_std': None}, ['image_std=None']),
    ({'rescale_factor': 'x'}, ["rescale_factor='x'"]),
    ({'rescale_factor': None}, ['rescale_factor=None']),
    ({'do_resize': None}, ['do_resize=None']),
    ({'do_pad': 'no'}, ["do_pad='no'", 'true or false']),
    ({'do_center_crop': 1}, ['do_center_crop=1']),
    ({'default_to_square': True}, ['default_to_square']),
    ({'size': True}, ['size=True']),
    ({'size': {}}, ['size={}']),
    ({'crop_size': {'height': [336], 'width': [336]}}, ['crop_size'])])
@pytest.mark.parametrize('inside', [False, True])
def test_what_is_refused(tmp_path, change, words, inside):
  with pytest.raises(ConfigError) as caught:
    (newer if inside else mode)(tmp_path, {**CLIP, **change})
  message = str(caught.value)
  name = 'processor_config.json, image_processor' if inside else (
      'preprocessor_config.json')
  assert message.startswith(f'{tmp_path / name}: ') and '\n' not in message
  assert all(word in message for word in words), message


def newer(directory, values, size=336):
  """As transformers 5 writes it."""
  path = directory / 'processor_config.json'
  path.write_text(json.dumps({
      'processor_class': 'LlavaProcessor', 'patch_size': 14,
      'image_processor': values}))
  return preprocessor.aspect_mode(directory, size)


def test_inside_the_processors_file(tmp_path):
  assert newer(tmp_path, CLIP) == 'crop'
  assert newer(tmp_path, {**CLIP, 'do_pad': True}) == 'pad'
  (tmp_path / 'processor_config.json').write_text('{"patch_size": 14}')
  assert preprocessor.aspect_mode(tmp_path, 336) is None  # an older one
  assert mode(tmp_path, CLIP) == 'crop'
  for values in ('3', '[]', '{"image_processor": 3}', '{"image_processor": []}', '{'):
    (tmp_path / 'processor_config.json').write_text(values)
    with pytest.raises(ConfigError, match='/processor_config.json'):
      preprocessor.aspect_mode(tmp_path, 336)


@pytest.mark.parametrize('pads', [True, False])
def test_both_files_must_agree(pads, tmp_path):
  newer(tmp_path, {**CLIP, 'do_pad': pads})
  assert mode(tmp_path, {**CLIP, 'do_pad': pads}) == ('pad' if pads else 'crop')
  with pytest.raises(ConfigError, match='contradict each other') as caught:
    mode(tmp_path, {**CLIP, 'do_pad': not pads})
  for name in ('preprocessor_config.json', 'processor_config.json'):
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize('text', ['{', '[]', '3'])
def test_no_preprocessor_at_all(tmp_path, text):
  with pytest.raises(ConfigError, match='JSON'):
    mode(tmp_path, text)
