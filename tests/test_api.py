"""The five functions against the parts that they are made of, and bad input."""

from __future__ import annotations

import dataclasses
import functools

import core_helpers as helpers
import jax
import numpy as np
import pytest
from api_helpers import NO_PROMPTS, TOKENIZER, make
from PIL import Image

from vlm_compress import api, batches, sharding
from vlm_compress import vlm as vlm_lib
from vlm_compress.config import ConfigError
from vlm_compress.convert.processor import Processor
from vlm_compress.data import images
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Example, Turn
from vlm_compress.data.rows import RowSpec, layout
from vlm_compress.decode.generate import answer_ids, generate
from vlm_compress.models.llava import Llava, PruneOptions
from vlm_compress.models.sequence import make_batch, split_voco
from vlm_compress.vlm import prefill, prepare

METHODS = ('full', 'voco', 'atp')
QUESTION, COUNT = 'what is this on the left side', 5
SAMPLED = {'temperature': 1.5, 'top_p': 0.9, 'seed': 3}


@pytest.fixture(scope='module')
def vlms() -> dict[str, api.Vlm]:
  return {'full': make(helpers.tiny()), 'voco': make(helpers.voco_config()),
          'atp': make(helpers.atp_config(sap_lambda=16.0))}


@pytest.fixture(scope='module')
def pictures() -> list[np.ndarray]:
  rng = np.random.default_rng(1)
  return [rng.integers(0, 255, shape, np.uint8)
          for shape in ((40, 30, 3), (24, 24, 3))]


def prompt_batch(vlm, method, pictures):
  """(model, batch, options) of a question, not padded, by the parts."""
  config = vlm.config
  if method == 'full':
    config = dataclasses.replace(config, voco=None, atp=None)
  pixels = np.stack([images.clip_normalize(images.tower_pixels(
      Image.fromarray(p), config.vision)) for p in pictures])
  features = helpers.apply(Llava(vlm.config), vlm.params, pixels[None],
                           method='vision_features')[0]
  count = 2 if method == 'voco' else 0
  turn = Turn(QUESTION)
  row = layout(Example('x', (turn,), (b'',) * len(pictures)), (turn,),
               RowSpec(), TOKENIZER, config, count, prompt_only=True)
  batch = make_batch([row], [np.asarray(features)],
                     length=len(row['input_ids']), num_images=len(pictures))
  if method == 'voco':
    batch = split_voco(batch, config, int((row['image_ids'] == 0).sum()))
  return Llava(config), batch, PruneOptions() if method == 'atp' else None


@functools.partial(jax.jit, static_argnums=0, static_argnames=(
    'temperature', 'top_p', 'eos_id'))
def one_program(model, params, batch, **kwargs):
  return generate(model, params, batch, max_new_tokens=COUNT, **kwargs)


@pytest.mark.parametrize('method', METHODS)
def test_answers_are_those_of_the_loop_in_one_program(vlms, pictures, method):
  vlm = vlms[method]
  model, batch, prune = prompt_batch(vlm, method, pictures[:1])
  lengths = set()
  for options in ({}, SAMPLED):
    want = one_program(model, vlm.params, batch, prune=prune,
                       eos_id=TOKENIZER.eos_id, **options)
    pieces = []
    got = api.generate(vlm, QUESTION, pictures[:1], max_new_tokens=COUNT,
                       stream=pieces.append, **options)
    assert got.token_ids == answer_ids(want.tokens[0], TOKENIZER.eos_id)
    assert got.text == TOKENIZER.decode(got.token_ids) == ''.join(pieces)
    assert all(pieces) and len(pieces) > 1
    assert (got.visual_tokens is not None) == (method == 'atp')
    if method == 'atp':
      np.testing.assert_array_equal(
          got.visual_tokens, np.asarray(want.outputs.entering).sum((1, 2, 3)))
      assert 0 < got.visual_tokens[-1] < got.visual_tokens[0] == 16
    lengths.add(tuple(got.token_ids))
  assert len(lengths) == 2  # sampling is not greedy


@pytest.mark.parametrize('method', METHODS)
def test_logits_are_those_of_the_model(vlms, pictures, method):
  vlm = vlms[method]
  model, batch, prune = prompt_batch(vlm, method, pictures)
  got = api.logits(vlm, QUESTION, pictures)
  if method == 'voco':
    want = helpers.apply(model, vlm.params, batch, method='two_pass')
    ids = batch.text.input_ids[0]
  else:
    want = helpers.apply(model, vlm.params, batch, prune=prune)[0]
    ids = batch.input_ids[0]
    visual = got.ids == vlm.config.image_token_index
    assert visual.sum() == 2 * 16 and not ids[visual].any()
    ids = np.where(visual, vlm.config.image_token_index, ids)
  np.testing.assert_array_equal(got.ids, ids)
  helpers.close(got.logits, np.asarray(want)[0])
  assert got.logits.dtype == np.float32


@pytest.mark.parametrize('sees_prefix', [False, True])
def test_compressed_images_stand_for_pictures(pictures, sees_prefix):
  vlm = make(helpers.voco_config(text_sees_prefix=sees_prefix))
  packed = [api.compress_image(vlm, p) for p in pictures]
  for given in (packed, packed[::-1], [packed[0], pictures[1]]):
    plain = [pictures[0] if g is packed[0] else pictures[1] for g in given]
    _, batch, _ = prompt_batch(vlm, 'voco', plain)
    want = helpers.apply(vlm.model, vlm.params, batch, method='two_pass')
    helpers.close(api.logits(vlm, QUESTION, given).logits,
                  np.asarray(want)[0])
  one, two = (api.logits(vlm, QUESTION, g).logits
              for g in (packed, packed[::-1]))
  assert np.abs(one - two).max() > 1e-2  # their order matters
  shorter = api.compress_image(vlm, pictures[0], num_voco_tokens=1)
  assert shorter.num_voco_tokens == 1
  alone = api.generate(vlm, QUESTION, [shorter], max_new_tokens=COUNT)
  assert alone == api.generate(vlm, QUESTION, pictures[:1], max_new_tokens=COUNT,
                               num_voco_tokens=1)


def test_a_kept_image_stands_for_its_picture(vlms, pictures):
  """Under its own prompt it is the picture; others read what that one kept."""
  vlm = vlms['atp']
  other = 'what is a red dog'
  kept = api.keep_image(vlm, pictures[0], QUESTION)
  want = api.generate(vlm, QUESTION, pictures[:1], max_new_tokens=COUNT)
  got = api.generate(vlm, QUESTION, [kept], max_new_tokens=COUNT)
  assert got[:3] == want[:3] and 0 < kept.visual_tokens[-1] < 16
  np.testing.assert_array_equal(got.visual_tokens, want.visual_tokens)
  states = [prefill(vlm, prepare(vlm, question, [image], 'atp', None), 4)
            for question, image in ((QUESTION, pictures[0]), (QUESTION, kept),
                                    (other, pictures[0]), (other, kept))]
  fresh, read, other_fresh, other_read = (s.logits for s in states)
  helpers.close(read, fresh)
  assert np.abs(other_read - other_fresh).max() > 1e-3
  # Where the choice does not depend on the question, neither does the answer.
  blind = make(helpers.atp_config(selector='fixed', scores='self',
                                  fixed_counts=(9, 5, 2)))
  kept_blind = api.keep_image(blind, pictures[0], QUESTION)
  one, two = (prefill(blind, prepare(blind, other, [image], 'atp', None), 4)
              for image in (pictures[0], kept_blind))
  helpers.close(two.logits, one.logits)
  with pytest.raises(ConfigError, match='kept image can only be read with method atp'):
    api.generate(vlm, QUESTION, [kept, pictures[1]])
  with pytest.raises(ConfigError, match='with method atp and alone'):
    api.generate(vlm, QUESTION, [kept], method='full')
  with pytest.raises(ConfigError, match='other text in front of the image'):
    api.generate(vlm, QUESTION, [dataclasses.replace(
        kept, prefix_ids=(7, *kept.prefix_ids[1:]))])
  with pytest.raises(ConfigError, match='comes from another model'):
    api.generate(vlm, QUESTION, [kept_blind])
  with pytest.raises(ConfigError, match='no logits of all tokens'):
    api.logits(vlm, QUESTION, [kept])
  with pytest.raises(ConfigError, match='KeptImage is no picture'):
    api.keep_image(vlm, kept, QUESTION)


def test_a_picture_is_encoded_once_and_a_program_compiled_once(
    vlms, pictures, monkeypatch):
  vlm = make(vlms['full'].config)
  calls, encode = [], api.Vlm._encode
  monkeypatch.setattr(api.Vlm, '_encode', lambda self, pixels: (
      calls.append(1), encode(self, pixels))[1])
  programs = set()
  for question in (QUESTION, 'what is this', 'a cat on the right side'):
    api.generate(vlm, question, pictures[:1], max_new_tokens=4)
    programs.add(len(vlm.segmented.programs))
  assert len(calls) == 1 and len(programs) == 1
  rng = np.random.default_rng(2)
  monkeypatch.setattr(vlm_lib, '_PICTURES_KEPT', 8)
  for _ in range(20):  # ... but not all pictures of a lifetime are kept
    vlm.features(rng.integers(0, 255, (24, 24, 3), np.uint8))
  assert len(calls) == 21 and len(vlm._features) == 8


def test_a_picture_may_be_given_in_any_form(vlms, pictures, tmp_path):
  vlm, path = vlms['full'], tmp_path / 'p.png'
  Image.fromarray(pictures[0]).save(path)
  want = vlm.features(pictures[0])
  for form in (path, str(path), path.read_bytes(), Image.open(path)):
    np.testing.assert_array_equal(vlm.features(form), want)
  cropped = dataclasses.replace(vlm, processor=Processor('short', 'crop'))
  assert np.abs(cropped.features(path) - want).max() > 1e-2


def test_a_loaded_model_is_in_memory_once(vlms, pictures, tmp_path):
  """On a CPU, layers for serving and the stack share the file's numbers."""
  api.save(vlms['full'], tmp_path)
  vlm = api.load(tmp_path)
  api.generate(vlm, QUESTION, pictures[:1], max_new_tokens=2)
  flat = helpers.flat(vlm.params)
  shared = [x.unsafe_buffer_pointer() == flat[f'language_model/layers/{name}'][
      i].ctypes.data for i, layer in enumerate(vlm.segmented.layers)
            for name, x in helpers.flat(layer).items()
            if x.nbytes % 64 == 0]
  shared += [x.unsafe_buffer_pointer() == flat[name].ctypes.data
             for name, x in helpers.flat(vlm.on_device).items()]
  assert all(shared) and len(shared) > 40


def test_without_pictures_every_method_is_the_language_model(vlms):
  for vlm in vlms.values():
    full = api.logits(vlm, 'what is a cat', method='full')
    got = api.logits(vlm, 'what is a cat')
    assert len(got.ids) == 6  # BOS, four words, a newline
    np.testing.assert_array_equal(got.logits, full.logits)
  with pytest.raises(DataError, match='1 <image> marker.* for 0 image'):
    api.generate(vlms['full'], '<image> what is this')


def test_a_conversation_and_its_answer(vlms, pictures):
  """An open turn is the beginning of the row with its answer."""
  vlm = vlms['full']
  turns = [Turn('what is this', 'a cat'), Turn('a red cat')]
  asked = api.logits(vlm, turns, pictures[:1])
  said = api.logits(vlm, [turns[0], Turn('a red cat', 'blue .')], pictures[:1])
  size = len(asked.ids)
  assert said.ids[size:].tolist() == [
      *TOKENIZER.encode('blue .'), TOKENIZER.eos_id]
  np.testing.assert_array_equal(said.ids[:size], asked.ids)
  helpers.close(said.logits[:size], asked.logits)
  alone = api.logits(vlm, turns[1:], pictures[:1])
  assert np.abs(alone.logits[-1] - asked.logits[-1]).max() > 1e-2
  with pytest.raises(ConfigError, match='last turn of the prompt has an answer'):
    api.generate(vlm, turns[:1], pictures[:1])


def test_save_and_load(vlms, pictures, tmp_path):
  vlm = vlms['voco']
  api.save(vlm, tmp_path)
  again = api.load(tmp_path)
  assert (again.config, again.processor) == (vlm.config, vlm.processor)
  jax.tree.map(np.testing.assert_array_equal, again.params, vlm.params)
  np.testing.assert_array_equal(api.logits(again, QUESTION, pictures).logits,
                                api.logits(vlm, QUESTION, pictures).logits)
  assert api.load(tmp_path, template='voco').template() == 'voco'
  (tmp_path / 'processor.json').unlink()
  assert api.load(tmp_path, template='plain').processor == Processor('plain')
  with pytest.raises(ConfigError, match=r"processor.json does not exist.*'short'"):
    api.generate(api.load(tmp_path), QUESTION, pictures)
  with pytest.raises(ConfigError, match="template='nice' is unknown.*'short'"):
    api.load(tmp_path, template='nice')
  (tmp_path / 'processor.json').write_text('{"template": "nice"}')
  with pytest.raises(ConfigError, match="processor.json: template='nice' .*'sho"):
    api.generate(api.load(tmp_path), QUESTION, pictures)
  (tmp_path / 'tokenizer.json').unlink()
  with pytest.raises(ConfigError, match='tokenizer.json does not exist'):
    api.load(tmp_path)


@pytest.mark.parametrize('method', [
    'full', 'voco', pytest.param('atp', marks=pytest.mark.slow)])
def test_on_a_mesh_it_answers_the_same(vlms, pictures, tmp_path, method):
  api.save(vlms[method], tmp_path / 'model')
  one = api.load(tmp_path / 'model')
  several = api.load(tmp_path / 'model',
                     mesh=sharding.make_mesh(data=2, fsdp=2, tensor=2))
  kernel = several.params['language_model']['layers']['mlp']['up_proj']['kernel']
  assert len(kernel.sharding.device_set) == 8
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  a, b = (api.logits(vlm, QUESTION, pictures[:1]).logits
          for vlm in (one, several))
  # what modules decide rests on sums, whose order a mesh changes
  close = 1e-4 if method == 'atp' else 1e-5
  np.testing.assert_allclose(a, b, rtol=close, atol=close)
  a, b = (api.generate(vlm, QUESTION, pictures[:1], max_new_tokens=4)
          for vlm in (one, several))
  assert a.token_ids == b.token_ids
  if method == 'full':
    return
  # once more from what is left of the picture, and in batches
  again = {'voco': api.compress_image, 'atp': functools.partial(
      api.keep_image, prompt=QUESTION)}[method](several, pictures[0])
  requests = [batches.Request(QUESTION, [again]),
              batches.Request(QUESTION, pictures[:1])]
  for got in batches.answer_all(several, requests, max_new_tokens=4,
                                batch_size=2):
    assert got.token_ids == a.token_ids


def test_the_end_of_the_context(vlms, pictures):
  vlm = vlms['full']
  used = len(api.logits(vlm, QUESTION, pictures[:1]).ids)
  want = api.generate(vlm, QUESTION, pictures[:1], max_new_tokens=COUNT)
  assert len(want.token_ids) == COUNT and want.ended == 'max_new_tokens'
  short = make(vlm.config, max_position_embeddings=used + 3)
  got = api.generate(short, QUESTION, pictures[:1], max_new_tokens=COUNT)
  assert got.token_ids == want.token_ids[:3] and got.ended == 'context'
  full = make(vlm.config, max_position_embeddings=used)
  with pytest.raises(ConfigError, match=f'all {used} positions.*no room|leave'):
    api.generate(full, QUESTION, pictures[:1])
  with pytest.raises(ConfigError, match=f'needs {used + 1} positions.*shorten'):
    api.generate(full, QUESTION + ' .', pictures[:1])


def test_the_end_of_the_answer(vlms, pictures):
  """A token that the model says becomes the end of sequence."""
  vlm = vlms['full']
  want = api.generate(vlm, QUESTION, pictures[:1], max_new_tokens=COUNT)
  last = next(i for i, t in enumerate(want.token_ids)
              if t not in want.token_ids[:i] and i > 0)

  class Stops(type(TOKENIZER)):
    def __init__(self):
      self.__dict__.update(TOKENIZER.__dict__)
      self.eos_id = want.token_ids[last]
  got = api.generate(dataclasses.replace(vlm, tokenizer=Stops(), end_ids=()), QUESTION,
                     pictures[:1], max_new_tokens=COUNT)
  assert got.token_ids == want.token_ids[:last] and got.ended == 'eos'


@pytest.mark.parametrize('name, prompt, change, error, words', [
    ('full', QUESTION, {'images': ['no.png']}, DataError, ['no.png', 'no such']),
    ('full', QUESTION, {'images': [b'GIF8 no']}, DataError, ['not a picture']),
    ('full', QUESTION, {'images': [np.zeros((4, 4))]}, DataError,
     ['float64[4, 4]', 'uint8[H, W, 3]']),
    ('full', QUESTION, {'images': [7]}, DataError, ['not int']),
    ('full', QUESTION, {'images': 'p.png'}, ConfigError, ['images is a str']),
    ('full', '<image> <image> what', {}, DataError,
     ['2 <image> marker(s) for 1 image(s)']),
    ('full', 'what elephant', {}, DataError, ["'elephant'", 'vocabulary']),
    ('full', [], {}, ConfigError, ['no turn']),
    ('full', QUESTION, {'method': 'voco'}, ConfigError, ['dir', 'VoCo tokens']),
    ('full', QUESTION, {'method': 'atp'}, ConfigError, ['dir', 'ATP modules']),
    ('full', QUESTION, {'method': 'best'}, ConfigError, ["'best'", "'auto'"]),
    ('full', QUESTION, {'num_voco_tokens': 2}, ConfigError,
     ['num_voco_tokens=2', 'method full']),
    ('voco', QUESTION, {'num_voco_tokens': 3}, ConfigError,
     ['num_voco_tokens=3', '1 to 2']),
    ('voco', QUESTION, {'num_voco_tokens': 0}, ConfigError, ['1 to 2']),
    ('full', QUESTION, {'max_new_tokens': 0}, ConfigError, ['max_new_tokens=0']),
    ('full', QUESTION, {'max_new_tokens': 2.5}, ConfigError, ['fraction']),
    ('full', QUESTION, {'seed': '1'}, ConfigError, ["seed='1'", 'fraction']),
    ('full', QUESTION, {'temperature': '1'}, ConfigError, ["ture='1': must be"]),
    ('full', QUESTION, {'temperature': -1.0}, ConfigError, ['temperature']),
    ('full', QUESTION, {'top_p': 0.0}, ConfigError, ['top_p=0.0'])])
def test_bad_input_is_one_line(vlms, pictures, name, prompt, change, error,
                               words):
  with pytest.raises(error) as caught:
    api.generate(vlms[name], prompt, **{'images': pictures[:1], **change})
  message = str(caught.value)
  assert '\n' not in message and all(w in message for w in words), message


@pytest.mark.parametrize('prompt, words', NO_PROMPTS)
def test_what_is_no_prompt_is_refused_by_all(vlms, pictures, prompt, words):
  vlm, image = vlms['atp'], pictures[:1]
  for ask in (lambda: api.generate(vlm, prompt, image),
              lambda: api.keep_image(vlm, pictures[0], prompt),
              lambda: prepare(vlm, prompt, image, 'full', None)):
    with pytest.raises(ConfigError, match=words):
      ask()
  if 'has an answer' not in words:
    with pytest.raises(ConfigError, match=words):
      api.logits(vlm, prompt, image)


def test_compressed_images_that_do_not_fit(vlms, pictures):
  vlm = vlms['voco']
  one = api.compress_image(vlm, pictures[0], 1)
  two = api.compress_image(vlm, pictures[1], 2)
  for given, options, words in (
      ([one], {'method': 'full'}, 'method voco, not full'),
      ([one, two], {}, r'\[1, 2\] VoCo tokens'),
      ([two], {'num_voco_tokens': 1}, r'\[2\] VoCo tokens'),
      ([one], {'other': True}, 'another model')):
    other = options.pop('other', False)
    asked = dataclasses.replace(vlm) if other else vlm
    with pytest.raises(ConfigError, match=words):
      api.generate(asked, QUESTION, given, **options)
  with pytest.raises(ConfigError, match='no VoCo tokens'):
    api.compress_image(vlms['atp'], pictures[0])
  for count in (1.5, '1', True):
    with pytest.raises(ConfigError, match=f'num_voco_tokens={count!r}: must be'):
      api.compress_image(vlm, pictures[0], count)
  blind = {k: v for k, v in vlm.params.items() if k != 'vision_tower'}
  with pytest.raises(ConfigError, match='no weights of its CLIP tower'):
    api.compress_image(dataclasses.replace(vlm, params=blind), pictures[0])
