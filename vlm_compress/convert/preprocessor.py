"""How a checkpoint's pictures are prepared: preprocessor_config.json.

Newer checkpoints say it inside processor_config.json; what both say must agree.

Two ways are implemented, LLaVA's: pad to a square of the mean colour, or crop
the centre.  A file that says anything else (another mean, filter or size) is
refused, because its numbers would be others.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from vlm_compress.config import ConfigError, LlavaConfig, check

PREPROCESSOR, PROCESSORS = 'preprocessor_config.json', 'processor_config.json'
INNER = 'image_processor'  # where the second has what is in the first
# CLIP's, of red, green and blue.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3
# Names of classes and bookkeeping; no pixel depends on these.
NEUTRAL = frozenset('''
  image_processor_type feature_extractor_type processor_class image_seq_length
  do_convert_rgb data_format input_data_format device return_tensors
  disable_grouping patch_size vision_feature_select_strategy
  num_additional_image_tokens auto_map pad_size
'''.split())


def aspect_mode(directory: pathlib.Path, image_size: int) -> str | None:
  """How pictures become squares.

  Args:
    directory: of the checkpoint.
    image_size: of the tower, in pixels.

  Returns:
    'pad' or 'crop' (`data.images.ASPECT_MODES`), or None without a file.

  Raises:
    ConfigError: an unreadable file, a field that is not implemented, or two
      files that contradict each other.
  """
  found = {}
  for name in (PREPROCESSOR, PROCESSORS):
    values = _read(directory / name)
    where = f'{directory / name}'
    if name == PROCESSORS and values is not None:
      values = values.get(INNER)
      where += f', {INNER}'
      check(isinstance(values, dict | None), f'{where}: must be an object')
    if values is not None:
      found[where] = _mode(values, where, image_size)
  check(len(set(found.values())) < 2, f'{" and ".join(found)} contradict each '
        f'other: one pads pictures, the other crops them; correct do_pad in one')
  return next(iter(found.values()), None)


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  if not path.is_file():
    return None
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as e:
    raise ConfigError(f'{path} is not readable JSON ({e})') from e
  check(isinstance(values, dict), f'{path}: must be a JSON object')
  return values


def _mode(values: dict[str, Any], where: str, image_size: int) -> str:
  """aspect_mode of one file's values."""
  values = dict(values)
  fixed = {
      'do_resize': (True,), 'do_rescale': (True,), 'do_normalize': (True,),
      'resample': (BICUBIC,), 'default_to_square': (False, None)}
  for name, allowed in fixed.items():
    value = values.pop(name, allowed[0])
    check(value in allowed, f'{where}: {name}={value!r} is not supported; only '
          f'{allowed[0]!r}')
  scale = values.pop('rescale_factor', 1 / 255)
  check(_close([scale], [1 / 255]), f'{where}: rescale_factor={scale!r} is not '
        'supported; only 1/255')
  for name, ours in (('image_mean', MEAN), ('image_std', STD)):
    found = values.pop(name, ours)
    check(_close(found, ours), f"{where}: {name}={found!r} is not CLIP's, "
          f'{list(ours)}')
  pad = values.pop('do_pad', False)
  crop = values.pop('do_center_crop', True)
  for name, value in (('do_pad', pad), ('do_center_crop', crop)):
    check(isinstance(value, bool | None), f'{where}: {name}={value!r}: must be '
          'true or false')
  size = _side(values.pop('size', image_size), where, 'size')
  cropped = _side(values.pop('crop_size', size), where, 'crop_size')
  unknown = sorted(set(values) - NEUTRAL)
  check(not unknown, f'{where}: the field {unknown[:1]} is unknown and might '
        'change the pictures; see NEUTRAL in convert/preprocessor.py for what '
        'is read over')
  check(size == cropped == image_size, f'{where}: size {size} and crop_size '
        f'{cropped}, but the tower reads {image_size} pixels')
  check(pad or crop, f'{where}: neither do_pad nor do_center_crop; the result '
        'would not be square, which is not supported')
  return 'pad' if pad else 'crop'


def _close(found: Any, ours: Sequence[float]) -> bool:
  """Whether these are our numbers, as far as files write them out."""
  return isinstance(found, list | tuple) and len(found) == len(ours) and all(
      isinstance(a, int | float) and math.isclose(a, b, rel_tol=1e-6)
      for a, b in zip(found, ours))


def values_for(mode: str, image_size: int) -> dict[str, Any]:
  """A preprocessor_config.json, as transformers reads it.

  Args:
    mode: 'pad' or 'crop'.
    image_size: of the tower, in pixels.
  """
  return {'image_processor_type': 'LlavaImageProcessor',
          'do_pad': mode == 'pad', 'do_resize': True, 'do_center_crop': True,
          'do_rescale': True, 'do_normalize': True, 'do_convert_rgb': True,
          'size': {'shortest_edge': image_size},
          'crop_size': {'height': image_size, 'width': image_size},
          'resample': BICUBIC, 'rescale_factor': 1 / 255,
          'image_mean': list(MEAN), 'image_std': list(STD)}


def processor_values(config: LlavaConfig, mode: str, image_token: str
                     ) -> dict[str, Any]:
  """A processor_config.json, as transformers' LlavaProcessor reads it.

  Args:
    config: of the model.
    mode: 'pad' or 'crop'.
    image_token: the token that stands for an image.
  """
  return {'processor_class': 'LlavaProcessor', 'image_token': image_token,
          'patch_size': config.vision.patch_size,
          'vision_feature_select_strategy': config.vision_feature_select_strategy,
          'num_additional_image_tokens': 1,  # the class token
          INNER: values_for(mode, config.vision.image_size)}


def _side(value: Any, where: str, name: str) -> int:
  """The side that a size stands for, in pixels.

  As a height and a width, `size` stretches a picture to a square.
  """
  said = value
  if isinstance(value, dict):
    value = {k: v for k, v in value.items() if v is not None}
    keys = {'shortest_edge'} if name == 'size' else {'height', 'width'}
    same = all(v == next(iter(value.values())) for v in value.values())
    value = next(iter(value.values())) if set(value) == keys and same else None
  check(type(value) is int, f'{where}: {name}={said!r} is not supported; '
        'only a shortest_edge that is the side of a square crop_size')
  return value
