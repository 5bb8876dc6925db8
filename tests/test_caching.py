"""A cached image is the fresh one, and only of its own model and picture."""

from __future__ import annotations

import dataclasses
import io
import pathlib

import core_helpers as helpers
import jax
import ml_dtypes
import numpy as np
import pytest
from api_helpers import TOKENIZER, make
from PIL import Image

from vlm_compress import api, caching, sharding
from vlm_compress.config import ConfigError
from vlm_compress.convert import efficientnet
from vlm_compress.convert.processor import Processor
from vlm_compress.data.errors import DataError
from vlm_compress.decode.vision_cache import VisionCache
from vlm_compress.presets import efficientnet_lite0
from vlm_compress.vlm import prefill, prepare

QUESTION, COUNT = 'what is this on the left side', 5
WHERE = pytest.mark.parametrize('name', ['folder', 'file.safetensors'])


@pytest.fixture(scope='module')
def directories(tmp_path_factory) -> dict[str, pathlib.Path]:
  """Model directories, from which several processes would load."""
  found = {}
  for name, config in (('voco', helpers.voco_config()),
                       ('sees', helpers.voco_config(text_sees_prefix=True)),
                       ('atp', helpers.atp_config(
                           sap_lambda=16.0, prune_after=(1, 3), capacities=(9,)))):
    found[name] = tmp_path_factory.mktemp('models') / name
    api.save(make(config), found[name])
  return found


def endless(vlm: api.Vlm) -> api.Vlm:
  """The same model, whose answers do not end."""
  return dataclasses.replace(vlm, end_ids={-1})


@pytest.fixture(scope='module')
def vlms(directories) -> dict[str, api.Vlm]:
  return {name: endless(api.load(path)) for name, path in directories.items()}


@pytest.fixture(scope='module')
def pictures() -> list[np.ndarray]:
  rng = np.random.default_rng(1)
  return [rng.integers(0, 255, shape, np.uint8)
          for shape in ((40, 30, 3), (24, 24, 3), (30, 30, 3))]


def prompt_of(vlm: api.Vlm) -> str | None:
  return QUESTION if vlm.config.atp is not None else None


def without_layers(vlm: api.Vlm) -> api.Vlm:
  """The same model, which now fails where it would compress something."""
  other = dataclasses.replace(vlm)
  class Fails:
    programs = vlm.segmented.programs
  other.__dict__['segmented'] = Fails()
  return other


def equal(a, b) -> None:
  """Asserts that two images are the same but for their models."""
  jax.tree.map(np.testing.assert_array_equal, a.state, b.state)
  assert type(a) is type(b)
  for field in dataclasses.fields(a):
    if field.name not in ('vlm', 'state'):
      np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


@WHERE
@pytest.mark.parametrize('which', ['voco', 'sees', 'atp'])
def test_a_cached_image_is_the_fresh_one(vlms, directories, pictures, which, name,
                                         tmp_path):
  vlm, said = vlms[which], []
  prompt, where = prompt_of(vlm), tmp_path / name
  fresh = [api.compress_image(vlm, p) if prompt is None else
           api.keep_image(vlm, p, prompt) for p in pictures[:2]]
  with VisionCache(where) as cache:
    written = [caching.compress_to(vlm, p, cache, prompt=prompt)
               for p in pictures[:2]]
  assert [w.new for w in written] == [True, True]
  assert written[0].nbytes == sum(x.nbytes for x in jax.tree.leaves(fresh[0].state))
  again = without_layers(api.load(directories[which]))  # another process
  cached = [caching.cached_image(again, p, where, prompt=prompt, say=said.append)
            for p in pictures[:2]]
  assert all(line.startswith(f'hit: {where}') for line in said) and len(said) == 2
  for one, other in zip(cached, fresh):
    equal(one, other)
    assert one.vlm is again and not np.array_equal(
        *(jax.tree.leaves(x.state)[0] for x in (cached[0], fresh[1])))
  # ... and so is all that is made of it
  cached = [dataclasses.replace(image, vlm=vlm) for image in cached]
  if prompt is not None:
    one, two = (api.generate(vlm, QUESTION, x[:1], max_new_tokens=COUNT)
                for x in (fresh, cached))
    assert one[:3] == two[:3] and len(one.token_ids) == COUNT
    np.testing.assert_array_equal(one.visual_tokens, two.visual_tokens)
    one, two = (prefill(vlm, prepare(vlm, 'a cat', x[:1], 'atp', None), 4).logits
                for x in (fresh, cached))
    np.testing.assert_array_equal(one, two)
    return
  for images in (cached, [cached[1], fresh[0]], [pictures[0], cached[1]]):
    plain = [fresh[0] if x is pictures[0] or x is cached[0] else
             fresh[1] if x is cached[1] else x for x in images]
    np.testing.assert_array_equal(api.logits(vlm, QUESTION, images).logits,
                                  api.logits(vlm, QUESTION, plain).logits)
  one, two = (api.generate(vlm, QUESTION, x, max_new_tokens=COUNT)
              for x in (fresh, cached))
  assert one == two and len(one.token_ids) == COUNT


@WHERE
@pytest.mark.parametrize('which', ['voco', 'atp'])
def test_the_second_time_nothing_is_computed_and_nothing_written(
    vlms, pictures, which, name, tmp_path):
  vlm, where = vlms[which], tmp_path / name
  files = lambda: {f: (f.read_bytes(), f.stat().st_mtime_ns)
                   for f in sorted(tmp_path.rglob('*')) if f.is_file()}
  first = [caching.compress_to(vlm, p, where, prompt=prompt_of(vlm))
           for p in pictures]
  before = files()
  assert len(before) == (3 if name == 'folder' else 2)  # with its lock
  second = [caching.compress_to(without_layers(vlm), p, where, prompt=prompt_of(vlm))
            for p in pictures]
  assert files() == before
  assert [w.new for w in second] == [False] * 3
  assert [w._replace(new=True) for w in second] == first


def test_a_folder_gets_what_it_has_not(vlms, pictures, tmp_path):
  vlm, said = vlms['voco'], []
  for turn in ('miss: compressed and written to ', 'hit: '):
    image = caching.cached_image(vlm, pictures[0], tmp_path, say=said.append)
    equal(image, api.compress_image(vlm, pictures[0]))
    path, = tmp_path.iterdir()
    assert said.pop() == f'{turn}{path}' and not said


# ---------------------------------------------------- what an entry counts for


def test_every_difference_that_counts_is_another_entry(vlms, pictures, tmp_path):
  voco, atp = vlms['voco'], vlms['atp']
  nudged = jax.tree.map(np.array, voco.params)
  nudged['language_model']['layers']['mlp']['up_proj']['kernel'][0, 0, 0] += 1e-3
  half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), voco.params)
  config = lambda vlm, **fields: dataclasses.replace(
      vlm, config=dataclasses.replace(vlm.config, **fields))
  shift = lambda x: config(atp, atp=dataclasses.replace(
      atp.config.atp, threshold_shift=x))
  templates = [dataclasses.replace(atp, processor=Processor(name))
               for name in ('plain', 'short')]
  tall = pictures[0]  # padded or cropped, unlike a square
  cropped = dataclasses.replace(voco, processor=Processor('short', 'crop'))
  different = [
      (voco, tall), (voco, pictures[1]), (voco, tall, 1), (cropped, tall),
      (dataclasses.replace(voco, params=nudged), tall),
      (dataclasses.replace(voco, params=half), tall),
      (config(voco, dtype='bfloat16'), tall), (vlms['sees'], tall),
      (atp, tall, None, QUESTION), (atp, tall, None, 'what is this'),
      (atp, pictures[1], None, QUESTION), (templates[0], tall, None, QUESTION),
      (shift(0.5), tall, None, QUESTION), (shift(-0.5), tall, None, QUESTION)]
  assert len({caching.identity_of(*x).key for x in different}) == len(
      different)
  cache = VisionCache(tmp_path)
  caching.compress_to(voco, tall, cache)
  caching.compress_to(atp, tall, cache, prompt=QUESTION)
  hits = [cache.find(caching.identity_of(*x), x[0].config) for x in different]
  assert [i for i, hit in enumerate(hits) if hit is not None] == [0, 8]


def test_what_does_not_count_is_the_same_entry(vlms, pictures, tmp_path):
  voco, atp = vlms['voco'], vlms['atp']
  picture = Image.fromarray(pictures[0])
  png, bmp = io.BytesIO(), io.BytesIO()
  picture.save(png, 'PNG')
  picture.save(bmp, 'BMP')
  (tmp_path / 'other name.png').write_bytes(png.getvalue())
  twice = picture.resize((60, 80), Image.Resampling.NEAREST)
  prepared = caching.images_lib.tower_pixels(picture, voco.config.vision)
  same = [(voco, x) for x in (
      pictures[0], picture, png.getvalue(), bmp.getvalue(), prepared,
      tmp_path / 'other name.png')]
  # a compressed image is the same in all templates
  same += [(dataclasses.replace(voco, processor=Processor('voco_v1')), picture),
           (dataclasses.replace(voco, directory='elsewhere'), picture),
           (voco, picture, 2)]
  assert len({caching.identity_of(*x).key for x in same}) == 1
  assert caching.identity_of(voco, twice) != caching.identity_of(voco, picture)
  assert caching.identity_of(atp, picture, None, QUESTION) == caching.identity_of(
      dataclasses.replace(atp, processor=Processor('short')), prepared, None, QUESTION)


@pytest.mark.parametrize('which', ['voco', 'atp'])
def test_neutral_fields_change_nothing(vlms, pictures, which):
  """identity.NEUTRAL, all of them at once but the kernel of attention."""
  vlm = vlms[which]
  config = vlm.config
  text = dataclasses.replace(config.text, initializer_range=0.5,
                             max_position_embeddings=300)
  fields = {'text': text, 'remat': True, 'attention_implementation': 'dense'}
  if which == 'voco':
    fields['voco'] = dataclasses.replace(config.voco, distill_weight=1.0)
  else:
    fields['atp'] = dataclasses.replace(
        config.atp, capacities=(3, 5, 11), init_theta_r=0.2, init_theta_s=0.3,
        straight_through=True, target_tokens=9.0, lambda_atp=0.5,
        lambda_target=0.5, temperature_start=2.0, temperature_end=3.0)
  other = dataclasses.replace(vlm, config=dataclasses.replace(config, **fields))
  prompt = prompt_of(vlm)
  assert caching.identity_of(other, pictures[0], None, prompt) == (
      caching.identity_of(vlm, pictures[0], None, prompt))
  one, two = (api.compress_image(v, pictures[0]) if prompt is None else
              api.keep_image(v, pictures[0], prompt) for v in (vlm, other))
  assert one.state is not two.state
  jax.tree.map(helpers.close, one.state, two.state)
  if prompt is not None:
    assert one.visual_tokens.tolist() == two.visual_tokens.tolist()


def test_on_a_mesh_it_is_the_same_entry(vlms, directories, pictures, tmp_path):
  several = endless(api.load(directories['voco'], mesh=sharding.make_mesh(
      data=2, fsdp=2, tensor=2)))
  kernel = several.params['language_model']['layers']['mlp']['up_proj']['kernel']
  assert len(kernel.sharding.device_set) == 8
  assert caching.fingerprint(several) == caching.fingerprint(vlms['voco'])
  caching.compress_to(vlms['voco'], pictures[0], tmp_path)
  said = []
  image = caching.cached_image(several, pictures[0], tmp_path, say=said.append)
  assert said[0].startswith('hit')
  own = api.compress_image(several, pictures[1])  # mixed with what is on the mesh
  assert image.state.keys.sharding == own.state.keys.sharding
  got = api.generate(several, QUESTION, [image, own], max_new_tokens=COUNT)
  want = api.generate(vlms['voco'], QUESTION, pictures[:2], max_new_tokens=COUNT)
  assert got.token_ids == want.token_ids and len(want.token_ids) == COUNT


def test_the_weights_of_the_fixed_tower_count(vlms, monkeypatch):
  """EfficientNet-Lite0 is no parameter, but pictures go through it."""
  config = dataclasses.replace(helpers.voco_config(), vision=efficientnet_lite0(64))
  params = {'x': np.ones(3, np.float32)}
  made = lambda config: api.Vlm(config, params, TOKENIZER)
  found = [caching.fingerprint(made(config)), caching.fingerprint(
      made(helpers.voco_config()))]
  monkeypatch.setattr(efficientnet, 'SHA256', 'ab' * 32)
  found += [caching.fingerprint(made(config)), caching.fingerprint(
      made(helpers.voco_config()))]
  assert found[1] == found[3] and len(set(found)) == 3


# ------------------------------------------------- stale, missing, damaged


@WHERE
@pytest.mark.parametrize('which', ['voco', 'atp'])
def test_an_entry_of_other_weights_is_not_used(vlms, pictures, which, name, tmp_path):
  vlm = vlms[which]
  old = make(vlm.config, seed=2)
  prints = [caching.fingerprint(v)[:16] for v in (old, vlm)]
  where, said, prompt = tmp_path / name, [], prompt_of(vlm)
  caching.compress_to(old, pictures[0], where, prompt=prompt)
  look = lambda: caching.cached_image(vlm, pictures[0], where, prompt=prompt,
                                      say=said.append)
  if name == 'folder':
    fresh = look()
    assert len(said) == 2 and said[1].startswith('miss')
    assert all(x in said[0] for x in prints) and 'other weights' in said[0]
    equal(look(), fresh)
    assert said[2].startswith('hit') and len(said) == 3
    return
  with pytest.raises(ConfigError) as error:
    look()
  message = str(error.value)
  assert all(x in message for x in (*prints, str(where), 'vlm-compress compress'))
  assert '\n' not in message and prints[0] != prints[1]
  assert caching.compress_to(vlm, pictures[0], where, prompt=prompt).new
  assert look() is not None and said[0].startswith('hit')
  assert caching.cached_image(old, pictures[0], where, prompt=prompt)


def test_what_a_file_has_not_is_said(vlms, pictures, tmp_path):
  voco, atp, path = vlms['voco'], vlms['atp'], tmp_path / 'file.safetensors'
  def message(vlm, picture=pictures[0], count=None, prompt=None):
    with pytest.raises(ConfigError) as error:
      caching.cached_image(without_layers(vlm), picture, path, count, prompt)
    assert '\n' not in str(error.value) and 'vlm-compress compress' in str(error.value)
    return str(error.value)
  assert f'{path} does not exist' in message(voco) and not path.exists()
  caching.compress_to(voco, pictures[0], path)
  assert 'does not have this picture' in message(voco, pictures[1])
  assert 'with [2] VoCo tokens, not 1' in message(voco, count=1)
  bf16 = dataclasses.replace(voco, config=dataclasses.replace(
      voco.config, dtype='bfloat16'))
  assert 'another config' in message(bf16)
  path.unlink()
  caching.compress_to(atp, pictures[0], path, prompt=QUESTION)
  text = message(atp, prompt='a cat')
  assert f"kept for 'a cat', only for ['{QUESTION}']" in text and '--prompt' in text
  plain = dataclasses.replace(atp, processor=Processor('plain'))
  assert 'another layout' in message(plain, prompt=QUESTION)


@WHERE
def test_a_damaged_entry_is_refused_and_can_be_replaced(vlms, pictures, name, tmp_path):
  vlm, where = vlms['voco'], tmp_path / name
  for picture in pictures[:2]:
    path = caching.compress_to(vlm, picture, where).path
  good = path.read_bytes()
  path.write_bytes(good[:-20] + b'x' + good[-19:])  # the second picture's values
  with pytest.raises(ConfigError, match='content: .*delete the file'):
    caching.cached_image(vlm, pictures[1], where)
  assert caching.cached_image(vlm, pictures[0], where)
  written = caching.compress_to(vlm, pictures[1], where)
  assert written.new and written.damaged.startswith(f'{path}: ')
  assert path.read_bytes() == good
  assert caching.cached_image(vlm, pictures[0], where)


def test_a_truncated_file_is_refused_before_more_is_done(vlms, pictures, tmp_path):
  vlm, path = vlms['voco'], tmp_path / 'one.safetensors'
  caching.compress_to(vlm, pictures[0], path)
  path.write_bytes(path.read_bytes()[:-8])
  before = path.read_bytes()
  with caching.VisionCache(path) as cache:
    with pytest.raises(ConfigError, match='one.safetensors'):
      caching.compress_to(vlm, pictures[1], cache)
  assert path.read_bytes() == before


@pytest.mark.parametrize('which, arguments, error, words', [
    ('voco', {'prompt': 'a cat'}, ConfigError, ['prompt', 'VoCo']),
    ('voco', {'num_voco_tokens': 3}, ConfigError, ['1 to 2']),
    ('atp', {}, ConfigError, ['depends on the question', 'None']),
    ('atp', {'prompt': 'a cat', 'num_voco_tokens': 1}, ConfigError, ['ATP']),
    ('atp', {'prompt': 'an elephant'}, DataError, ["'an'", 'vocabulary']),
    ('full', {}, ConfigError, ['neither VoCo', 'dir']),
    ('voco', {'image': b'GIF8'}, DataError, ['not a picture'])])
def test_bad_input_is_one_line(vlms, pictures, which, arguments, error, words,
                               tmp_path):
  vlm = make(helpers.tiny()) if which == 'full' else vlms[which]
  arguments = {'image': pictures[0], **arguments}
  for function, where in ((caching.compress_to, 'out'),
                          (caching.cached_image, 'where')):
    with pytest.raises(error) as caught:
      function(vlm, **arguments, **{where: tmp_path / 'new'})
    message = str(caught.value)
    assert '\n' not in message and all(w in message for w in words), message
  assert not [*tmp_path.iterdir()]
