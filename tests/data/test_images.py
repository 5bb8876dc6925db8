"""Decoding is guarded, and CLIP preprocessing equals the reference pixels.

`tests/data_files/image/expected.json` holds the SHA-256 of the uint8 result
and sample values of the normalised one, as CLIPImageProcessor gives them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vlm_compress import config, presets
from vlm_compress.data import images
from vlm_compress.data.errors import DataError
from vlm_compress.models import efficientnet

FILES = pathlib.Path(__file__).parents[1] / 'data_files' / 'image'
EXPECTED = json.loads((FILES / 'expected.json').read_text())
CASES = sorted(key for key in EXPECTED if '/' in key)


def encoded(image, kind='PNG'):
  buffer = io.BytesIO()
  image.save(buffer, kind)
  return buffer.getvalue()


def noise(width, height, mode='RGB', seed=0):
  bands = len(mode)
  shape = (height, width, bands)[:3 if bands > 1 else 2]
  values = np.random.default_rng(seed).integers(0, 256, shape)
  return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize('case', CASES)
def test_clip_preprocessing_equals_the_reference(case):
  name, mode = case.split('/')
  expected = EXPECTED[case]
  image = images.load(FILES, f'{name}_in.png')
  assert list(image.size) == expected['in_size']
  pixels = images.clip_pixels(image, 336, mode)
  assert pixels.dtype == np.uint8 and pixels.shape == (336, 336, 3)
  digest = hashlib.sha256(pixels.tobytes()).hexdigest()
  assert digest == expected['sha256_uint8']
  normalized = images.clip_normalize(pixels)
  assert normalized.dtype == np.float32
  for place, values in expected['px'].items():
    row, column = map(int, place.split(','))
    np.testing.assert_allclose(normalized[row, column], values, atol=1e-6)
  np.testing.assert_allclose(normalized.mean((0, 1)), expected['mean'],
                             atol=1e-5)
  np.testing.assert_allclose(normalized.std((0, 1)), expected['std'],
                             atol=1e-5)


def test_the_cases_cover_both_modes_and_orientations():
  sizes = {tuple(EXPECTED[case]['in_size']) for case in CASES}
  assert {case.split('/')[1] for case in CASES} == {'pad', 'crop'}
  assert any(w > h for w, h in sizes) and any(w < h for w, h in sizes)


def test_background_is_the_clip_mean_cut_off():
  assert list(images.CLIP_BACKGROUND) == EXPECTED['background']
  assert images.CLIP_BACKGROUND == tuple(
      int(255 * mean) for mean in images.CLIP_MEAN)


@pytest.mark.parametrize('width,height', [(1, 1), (1, 7), (300, 2), (64, 64)])
@pytest.mark.parametrize('mode', images.ASPECT_MODES)
def test_any_size_becomes_the_square(width, height, mode):
  for prepare in (images.clip_pixels, images.efficientnet_pixels):
    assert prepare(noise(width, height), 32, mode).shape == (32, 32, 3)


def test_padding_centres_and_leaves_the_odd_pixel_at_the_end():
  image = Image.new('RGB', (5, 2), (255, 0, 0))
  rows = np.asarray(images.pad_to_square(image, (1, 2, 3)))[:, 0].tolist()
  red, grey = [255, 0, 0], [1, 2, 3]
  assert rows == [grey, red, red, grey, grey]


def test_a_square_of_the_right_size_is_not_changed():
  image = noise(32, 32)
  for mode in images.ASPECT_MODES:
    np.testing.assert_array_equal(images.clip_pixels(image, 32, mode), image)


def test_padding_of_efficientnet_becomes_zero():
  pixels = images.efficientnet_pixels(Image.new('RGB', (4, 2), 'white'), 4)
  normalized = np.asarray(efficientnet.normalize(pixels))
  assert (normalized[0] == 0).all() and (normalized[3] == 0).all()
  assert normalized.max() == 1.0  # (255 - 127) / 128


def test_tower_pixels_follow_the_tower():
  wide = Image.new('RGB', (8, 4), 'white')
  clip = config.VisionConfig(image_size=28, patch_size=14)
  lite = presets.efficientnet_lite0(32)
  assert tuple(images.tower_pixels(wide, clip)[0, 0]) == (122, 116, 104)
  assert tuple(images.tower_pixels(wide, lite)[0, 0]) == (127, 127, 127)
  assert images.tower_pixels(wide, clip).shape == (28, 28, 3)
  assert images.tower_pixels(wide, clip, 'crop').min() == 255


def test_an_unknown_mode_names_the_field():
  with pytest.raises(config.ConfigError, match='image_aspect_ratio'):
    images.clip_pixels(noise(4, 4), 8, 'stretch')
  with pytest.raises(config.ConfigError, match='image_aspect_ratio'):
    images.efficientnet_pixels(noise(4, 4), 8, 'stretch')


@pytest.mark.parametrize('mode', ['L', 'LA', 'RGBA', 'RGB'])
def test_every_mode_becomes_rgb(mode):
  image = images.decode(encoded(noise(6, 5, mode)))
  assert image.mode == 'RGB' and image.size == (6, 5)
  expected = np.asarray(noise(6, 5, mode).convert('RGB'))
  np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'GIF', 'WEBP', 'BMP'])
def test_a_picture_cut_off_anywhere_is_a_data_error(kind):
  data = encoded(noise(64, 64), kind)
  images.decode(data)
  for share in (0.1, 0.5, 0.9):
    with pytest.raises(DataError, match='cat.x') as caught:
      images.decode(data[:int(len(data) * share)], 'cat.x')
    assert 'remove it' in str(caught.value)


@pytest.mark.parametrize('data', [b'', b'GIF89a', b'<svg></svg>', b'\0' * 99,
                                  b'%!PS-Adobe-3.0 EPSF-3.0\n'])
def test_what_is_no_picture_is_a_data_error(data):
  with pytest.raises(DataError, match='note.txt'):
    images.decode(data, 'note.txt')


def test_flipped_bytes_never_escape_as_another_error():
  rng = np.random.default_rng(0)
  data = encoded(noise(40, 40), 'PNG')
  for _ in range(200):
    damaged = bytearray(data)
    for place in rng.integers(0, 300, 3):
      damaged[place] = rng.integers(0, 256)
    try:
      assert images.decode(bytes(damaged)).mode == 'RGB'
    except DataError:
      pass


def png_header(width, height):
  """A PNG that claims a size and has no pixels."""
  body = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return (b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + body +
          struct.pack('>I', zlib.crc32(body)) +
          struct.pack('>I', 0) + b'IDAT' + struct.pack('>I', 0))


@pytest.mark.parametrize('width,height', [(9000, 9000), (60000, 60000)])
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_a_decompression_bomb_is_refused_by_its_header(width, height):
  with pytest.raises(DataError, match='bomb.png.*limit of 64000000'):
    images.decode(png_header(width, height), 'bomb.png')


def test_the_pixel_limit_is_exact():
  data = encoded(noise(10, 10))
  assert images.decode(data, max_pixels=100).size == (10, 10)
  with pytest.raises(DataError, match='10 x 10 pixels.*limit of 99'):
    images.decode(data, max_pixels=99)


def test_a_thin_picture_cannot_blow_up_when_padded_or_cropped():
  with pytest.raises(DataError, match='limit of 16000'):
    images.decode(png_header(1, 20_000), 'thin.png')
  with pytest.raises(DataError, match="use mode 'pad'"):
    images.clip_pixels(Image.new('RGB', (1, 5000)), 336, 'crop')


@pytest.mark.parametrize('name', ['../secret.png', '/etc/passwd', 'a/../../b',
                                  '', '.', 'a\0b', '../root-twin/a.png'])
def test_a_path_outside_the_root_is_refused(tmp_path, name):
  root = tmp_path / 'root'
  (tmp_path / 'root-twin').mkdir()
  root.mkdir()
  with pytest.raises(DataError, match='outside the data root'):
    images.read_bytes(root, name)


def test_paths_below_the_root_are_read(tmp_path):
  (tmp_path / 'coco').mkdir()
  image = noise(5, 4)
  image.save(tmp_path / 'coco' / 'a.png')
  for name in ('coco/a.png', 'coco/../coco/a.png', './coco/a.png'):
    np.testing.assert_array_equal(images.load(tmp_path, name), image)


def test_the_data_root_may_be_the_file_system_root(tmp_path):
  noise(5, 4).save(tmp_path / 'a.png')
  assert images.load('/', str(tmp_path / 'a.png')).size == (5, 4)


def test_links_that_the_user_made_are_followed(tmp_path):
  (tmp_path / 'elsewhere').mkdir()
  noise(5, 4).save(tmp_path / 'elsewhere' / 'a.png')
  (tmp_path / 'root').mkdir()
  (tmp_path / 'root' / 'coco').symlink_to(tmp_path / 'elsewhere')
  assert images.load(tmp_path / 'root', 'coco/a.png').size == (5, 4)


def test_missing_files_directories_and_pipes_are_data_errors(tmp_path):
  (tmp_path / 'folder').mkdir()
  os.mkfifo(tmp_path / 'pipe')  # reading one would wait for ever
  for name, words in (('missing.png', ': no such file'),
                      ('folder', ' is a directory'), ('pipe', ': no such file')):
    with pytest.raises(DataError, match=f'{name}{words}'):
      images.read_bytes(tmp_path, name)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
  with open(tmp_path / 'huge.png', 'wb') as file:
    file.truncate(images.MAX_BYTES + 1)  # sparse
  with pytest.raises(DataError, match='huge.png.*limit'):
    images.read_bytes(tmp_path, 'huge.png')


def test_load_names_the_file(tmp_path):
  (tmp_path / 'a.jpg').write_bytes(b'no picture')
  with pytest.raises(DataError, match='a.jpg: not a picture'):
    images.load(tmp_path, 'a.jpg')
