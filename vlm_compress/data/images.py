"""From encoded pictures to the uint8 squares that the vision towers read.

Pictures come from outside, so decoding is guarded: only common raster formats
(some of Pillow's other readers start programs), a limit on bytes and pixels
checked before any pixel is decoded, paths that stay below the data root, and
one `DataError` with the file's name for whatever a damaged file provokes.

Resizing is Pillow's antialiased bicubic, the filter that CLIP and LLaVA were
trained with; `jax.image.resize` uses another one.  As in LLaVA, a rotation
noted in EXIF is not applied and an alpha channel is dropped.
"""

from __future__ import annotations

import io
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from vlm_compress.config import VisionConfig, check
from vlm_compress.convert import preprocessor
from vlm_compress.convert.processor import ASPECT_MODES
from vlm_compress.data.errors import DataError
from vlm_compress.data.paths import resolve_path

FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM')
MAX_PIXELS = 64_000_000  # of one picture; above it 0.25 GB when decoded
MAX_SIDE = 16_000  # pixels; 'pad' makes a square of the longer side
MAX_BYTES = 256 * 2**20  # of one encoded picture

CLIP_MEAN = np.array(preprocessor.MEAN, np.float32)
CLIP_STD = np.array(preprocessor.STD, np.float32)
CLIP_BACKGROUND = (122, 116, 104)  # the mean in uint8, cut off, not rounded
# Becomes 0 in (x - 127) / 128, the normalisation of EfficientNet-Lite0.
EFFICIENTNET_BACKGROUND = (127, 127, 127)


def read_bytes(root: str | os.PathLike, name: str) -> bytes:
  """The encoded picture `name` below `root`.

  Raises:
    DataError: outside the root, missing, not a regular file, unreadable, or
      larger than MAX_BYTES.
  """
  path = resolve_path(root, name)
  size = file_size(path)
  if size > MAX_BYTES:
    raise DataError(f'{path}: {size} bytes, more than the limit of '
                    f'{MAX_BYTES} for a picture; shrink or remove it')
  try:
    return path.read_bytes()
  except OSError as error:
    raise _unreadable(path, error) from error


def file_size(path: pathlib.Path, kind: str = 'picture') -> int:
  """Bytes of a file that a picture or video (`kind`) should be in.

  Raises:
    DataError: missing, a directory, not a regular file, or out of reach.
  """
  try:
    if path.is_dir():
      raise DataError(f'{path} is a directory; name a {kind} in it')
    if not path.is_file():  # before open, which would wait on a pipe
      raise DataError(f'{path}: no such file; check the data root or fetch the '
                      f'{kind}s again')
    return path.stat().st_size
  except OSError as error:
    raise _unreadable(path, error) from error


def _unreadable(path: pathlib.Path, error: OSError) -> DataError:
  return DataError(f'{path}: cannot be read ({error.strerror}); check its '
                   'permissions')


def check_size(width: int, height: int, name: str, max_pixels: int) -> None:
  """Raises DataError for a picture or frame that is too large, in pixels."""
  if width * height > max_pixels:
    raise DataError(_too_large(name, f'{width} x {height}', max_pixels))
  if max(width, height) > MAX_SIDE:
    raise DataError(f'{name}: a side of {max(width, height)} pixels, more '
                    f'than the limit of {MAX_SIDE}; shrink or remove it')


def decode(data: bytes, name: str = 'picture',
           max_pixels: int = MAX_PIXELS) -> Image.Image:
  """Decodes an encoded picture (of an animation the first frame) to RGB.

  Args:
    data: the file's bytes, in one of FORMATS.
    name: file name or example id, for the error.
    max_pixels: limit on width times height, checked before decoding.

  Returns:
    A decoded picture in mode RGB, without reference to `data`.

  Raises:
    DataError: not a picture, damaged or cut off, or larger than max_pixels
      or MAX_SIDE.
  """
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      check_size(*image.size, name, max_pixels)
      image.load()
      return image.convert('RGB')
  except DataError:
    raise
  except Image.UnidentifiedImageError as error:
    raise DataError(f'{name}: not a picture in one of the formats '
                    f'{", ".join(FORMATS)}; replace or remove it') from error
  except Image.DecompressionBombError as error:
    raise DataError(_too_large(name, 'far too many', max_pixels)) from error
  except Exception as error:  # decoders raise many types on damaged files
    raise DataError(f'{name}: the picture is damaged or cut off ({error}); '
                    'fetch it again or remove it') from error


def _too_large(name: str, size: str, max_pixels: int) -> str:
  return (f'{name}: {size} pixels, more than the limit of {max_pixels}; '
          'shrink or remove it')


def load(root: str | os.PathLike, name: str) -> Image.Image:
  """The decoded RGB picture `name` below `root`; see read_bytes and decode."""
  return decode(read_bytes(root, name), name=os.path.join(root, name))


def open_picture(source: Any) -> Image.Image:
  """An RGB picture from whatever a caller has.

  Args:
    source: a path, a file's bytes, uint8[H, W, 3], or an image of Pillow.

  Raises:
    DataError: it is none of these; or see `read_bytes` and `decode`.
  """
  if isinstance(source, (str, os.PathLike)):
    path = pathlib.Path(source)
    return decode(read_bytes(path.parent, path.name), str(path))
  if isinstance(source, bytes):
    return decode(source)
  if isinstance(source, np.ndarray) and source.dtype == np.uint8 and (
      source.ndim == 3 and source.shape[2] == 3 and source.size):
    return Image.fromarray(source)
  if isinstance(source, Image.Image):
    return source.convert('RGB')
  what = type(source).__name__
  if isinstance(source, np.ndarray):
    what = f'{source.dtype}{list(source.shape)}'
  raise DataError('a picture must be a path, bytes, uint8[H, W, 3] or an '
                  f"image of Pillow's, not {what}")


def pad_to_square(image: Image.Image,
                  background: tuple[int, int, int]) -> Image.Image:
  """Centres an RGB picture on a square of its longer side.

  An odd surplus pixel goes to the right or the bottom.
  """
  width, height = image.size
  if width == height:
    return image
  side = max(width, height)
  square = Image.new('RGB', (side, side), background)
  square.paste(image, ((side - width) // 2, (side - height) // 2))
  return square


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
  """Resizes the shorter side to `size` and crops the centre.

  The longer side becomes size * long / short, cut off to whole pixels.  The
  crop stays a separate step: Pillow's `resize(box=...)`, which would compute
  the centre only, does not give the same values.

  Args:
    image: RGB, of any size.
    size: side of the result, in pixels.

  Returns:
    RGB, size x size.

  Raises:
    DataError: the picture is so long that the resized one exceeds MAX_PIXELS.
  """
  short = min(image.size)
  width, height = (size * side // short for side in image.size)
  if width * height > MAX_PIXELS:
    raise DataError(
        f'a picture of {image.size[0]} x {image.size[1]} pixels becomes '
        f'{width} x {height} before the centre is cropped, more than the limit '
        f"of {MAX_PIXELS}; use mode 'pad' or remove it")
  if (width, height) != image.size:
    image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = (width - size) // 2, (height - size) // 2
  return image.crop((left, top, left + size, top + size))


def clip_pixels(image: Image.Image, size: int, mode: str = 'pad') -> np.ndarray:
  """LLaVA-1.5's preparation of a picture for the CLIP tower.

  Args:
    image: RGB, of any size.
    size: side of the tower's input, in pixels.
    mode: 'pad' puts the picture on a square of CLIP's mean colour (instruction
      tuning and evaluation); 'crop' keeps the centre (alignment).

  Returns:
    uint8[size, size, 3].

  Raises:
    ConfigError: for another mode.
    DataError: mode 'crop' and a picture of extreme aspect ratio.
  """
  check(mode in ASPECT_MODES,
        f'image_aspect_ratio={mode!r}: use one of {ASPECT_MODES}')
  if mode == 'pad':
    image = pad_to_square(image, CLIP_BACKGROUND)
  return np.asarray(resize_and_crop(image, size))


def clip_normalize(pixels: Any) -> Any:
  """uint8[..., 3] -> float32[..., 3], the scale that CLIP was trained with;
  numpy arrays, or jax arrays in a program.
  """
  scaled = pixels.astype(np.float32) * np.float32(1 / 255)
  return (scaled - CLIP_MEAN) / CLIP_STD


def efficientnet_pixels(image: Image.Image, size: int,
                        mode: str = 'pad') -> np.ndarray:
  """The picture for EfficientNet-Lite0, which normalises it by itself.

  Args:
    image: RGB, of any size.
    size: side of the tower's input, in pixels.
    mode: 'pad' puts the picture on a mid-grey square, so that nothing is
      stretched or lost (ours); 'crop' keeps the centre.

  Returns:
    uint8[size, size, 3]; `models.efficientnet.normalize` makes it
    (x - 127) / 128.

  Raises:
    ConfigError: for another mode.
    DataError: mode 'crop' and a picture of extreme aspect ratio.
  """
  check(mode in ASPECT_MODES,
        f'image_aspect_ratio={mode!r}: use one of {ASPECT_MODES}')
  if mode == 'pad':
    image = pad_to_square(image, EFFICIENTNET_BACKGROUND)
  return np.asarray(resize_and_crop(image, size))


def tower_pixels(image: Image.Image, vision: VisionConfig,
                 mode: str = 'pad') -> np.ndarray:
  """The uint8[S, S, 3] that the tower of `vision` reads, S its image_size."""
  prepare = (clip_pixels if vision.model_type == 'clip_vision_model'
             else efficientnet_pixels)
  return prepare(image, vision.image_size, mode)
