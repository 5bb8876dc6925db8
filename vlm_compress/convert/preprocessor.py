"""preprocessor_config.json: how a checkpoint's pictures are prepared.

Two ways are implemented, LLaVA's: pad to a square of the mean colour, or crop
the centre.  A file that says anything else (another mean, filter or size) is
refused, because its numbers would be others.
"""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

from vlm_compress.config import ConfigError, check

PREPROCESSOR = 'preprocessor_config.json'
# CLIP's, of red, green and blue.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3
# Names of classes and bookkeeping; no pixel depends on these.
NEUTRAL = frozenset('''
  image_processor_type feature_extractor_type processor_class image_seq_length
  do_convert_rgb data_format input_data_format device return_tensors
  disable_grouping patch_size vision_feature_select_strategy
  num_additional_image_tokens auto_map pad_size default_to_square
'''.split())


def aspect_mode(directory: pathlib.Path, image_size: int) -> str | None:
  """How pictures become squares.

  Args:
    directory: of the checkpoint.
    image_size: of the tower, in pixels.

  Returns:
    'pad' or 'crop' (`data.images.ASPECT_MODES`), or None without a file.

  Raises:
    ConfigError: an unreadable file, or a field that is not implemented.
  """
  path = directory / PREPROCESSOR
  if not path.is_file():
    return None
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as e:
    raise ConfigError(f'{path} is not readable JSON ({e})') from e
  check(isinstance(values, dict), f'{path}: must be a JSON object')
  fixed = {
      'do_resize': (True,), 'do_rescale': (True,), 'do_normalize': (True,),
      'resample': (BICUBIC,)}
  for name, allowed in fixed.items():
    value = values.pop(name, allowed[0])
    check(value in allowed, f'{path}: {name}={value!r} is not supported; only '
          f'{allowed[0]!r}')
  scale = values.pop('rescale_factor', 1 / 255)
  check(math.isclose(scale, 1 / 255, rel_tol=1e-6), f'{path}: rescale_factor='
        f'{scale} is not supported; only 1/255')
  for name, ours in (('image_mean', MEAN), ('image_std', STD)):
    found = values.pop(name, ours)
    check(len(found) == 3 and all(
        math.isclose(a, b, abs_tol=1e-6) for a, b in zip(found, ours)),
        f"{path}: {name}={found} is not CLIP's, {list(ours)}")
  pad = values.pop('do_pad', False)
  crop = values.pop('do_center_crop', True)
  size = _side(values.pop('size', image_size), path, 'size')
  cropped = _side(values.pop('crop_size', size), path, 'crop_size')
  unknown = sorted(set(values) - NEUTRAL)
  check(not unknown, f'{path}: the field {unknown[:1]} is unknown and might '
        'change the pictures; see NEUTRAL in convert/preprocessor.py for what '
        'is read over')
  check(size == cropped == image_size, f'{path}: size {size} and crop_size '
        f'{cropped}, but the tower reads {image_size} pixels')
  check(pad or crop, f'{path}: neither do_pad nor do_center_crop; the result '
        'would not be square, which is not supported')
  return 'pad' if pad else 'crop'


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


def _side(value: Any, path: pathlib.Path, name: str) -> int:
  """The side that a size stands for, in pixels.

  As a height and a width, `size` stretches a picture to a square.
  """
  if isinstance(value, dict):
    value = {k: v for k, v in value.items() if v is not None}
    keys = {'shortest_edge'} if name == 'size' else {'height', 'width'}
    sides = set(value.values())
    value = sides.pop() if set(value) == keys and len(sides) == 1 else value
  check(isinstance(value, int), f'{path}: {name}={value!r} is not supported; '
        'only a shortest_edge that is the side of a square crop_size')
  return value
