"""A model's compressed or kept images in files that outlive the process.

  compress_to   a picture into a vision cache, unless it is there already
  cached_image  a picture from a vision cache, to stand for it in `generate`

A cache is a directory or a file, see decode/vision_cache.py.  An entry counts
for one model, its weights included, and one picture; what ATP keeps depends on
the question, so there it also counts for one prompt.
"""

from __future__ import annotations

import os
import pathlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlm_compress.config import ConfigError, check
from vlm_compress.convert import efficientnet
from vlm_compress.data import images as images_lib
from vlm_compress.data.prompts import prompt_row
from vlm_compress.decode import identity as identity_lib
from vlm_compress.decode.identity import Identity
from vlm_compress.decode.vision_cache import Entry, VisionCache, stale
from vlm_compress.models.inputs import CompressedImages, KeptTokens
from vlm_compress.models.sequence import PREFIX
from vlm_compress.vlm import (
  CompressedImage,
  KeptImage,
  Vlm,
  compress_image,
  keep_image,
  own_method,
  placeholder_ids,
  voco_count,
)

Where = str | os.PathLike | VisionCache

# Of models in memory: hashing 7B takes seconds.
_FINGERPRINTS: weakref.WeakKeyDictionary[Vlm, str] = weakref.WeakKeyDictionary()


class Written(NamedTuple):
  """What `compress_to` has done.

  Attributes:
    path: the file that has the entry, or will have it when it is flushed.
    new: False: it was there already, and nothing was written.
    nbytes: of keys and values.
    damaged: what was wrong with the entry that the new one replaces, or None.
  """
  path: pathlib.Path
  new: bool
  nbytes: int
  damaged: str | None = None


def fingerprint(vlm: Vlm) -> str:
  """Hash of all weights that a picture goes through, computed once."""
  if vlm not in _FINGERPRINTS:
    params = vlm.params
    if vlm.config.vision.model_type == 'efficientnet_lite0':
      # Its tower is no parameter: it comes from a package, by this hash.
      tower = np.frombuffer(bytes.fromhex(efficientnet.SHA256), np.uint8)
      params = {**params, 'efficientnet_lite0': tower}
    _FINGERPRINTS[vlm] = identity_lib.fingerprint(params)
  return _FINGERPRINTS[vlm]


def layout_of(vlm: Vlm, num_voco_tokens: int | None = None,
              prompt: str | None = None) -> tuple[int, ...]:
  """Token ids that decide what is left of an image: see `Identity.layout`.

  Args:
    vlm: a model with VoCo tokens or ATP modules.
    num_voco_tokens: C, if not as trained; for a VoCo model only.
    prompt: what tokens are kept for; for an ATP model, and only there.

  Raises:
    ConfigError: the model is neither, or an argument is of the other method.
    DataError: the prompt has a word that the tokenizer does not know.
  """
  config, method = vlm.config, own_method(vlm.config)
  check(method != 'full', f'{vlm.directory or "the model"} has neither VoCo '
        'tokens nor ATP modules, so it has nothing to keep of a picture')
  if method == 'voco':
    check(prompt is None, 'a compressed image serves all questions: leave the '
          'prompt out with a VoCo model')
    # What a compressed image has seen is the same in all templates.
    row = prompt_row('', 1, vlm.tokenizer, config, 'short',
                     voco_count(config, num_voco_tokens))
    own = (row['image_ids'] == PREFIX) | (row['image_ids'] == 1)
    return tuple(row['input_ids'][own].tolist())
  check(num_voco_tokens is None, f'num_voco_tokens={num_voco_tokens} has no '
        'meaning for an ATP model')
  check(isinstance(prompt, str), 'what ATP keeps of a picture depends on the '
        f'question: give a prompt, not {prompt!r}')
  row = prompt_row(prompt, 1, vlm.tokenizer, config, vlm.template())
  return placeholder_ids(vlm, row)


def identity_of(vlm: Vlm, image: Any, num_voco_tokens: int | None = None,
                prompt: str | None = None) -> Identity:
  """What decides the entry of a picture; nothing is compressed.

  Args:
    vlm, num_voco_tokens, prompt: see `layout_of`.
    image: see `generate`.

  Raises:
    ConfigError: see `layout_of`.
    DataError: also, the picture is none.
  """
  layout, config = layout_of(vlm, num_voco_tokens, prompt), vlm.config
  method = own_method(config)
  return Identity(
      method, identity_lib.pixels_hash(vlm.pixels(image)), fingerprint(vlm),
      identity_lib.config_hash(config), layout,
      voco_count(config, num_voco_tokens) if method == 'voco' else 0, prompt)


def compress_to(vlm: Vlm, image: Any, out: Where,
                num_voco_tokens: int | None = None, prompt: str | None = None
                ) -> Written:
  """Puts a picture into a vision cache, unless it is there already.

  Args:
    vlm, num_voco_tokens, prompt: see `layout_of`.
    image: see `generate`.
    out: a directory, a file (*.safetensors), or a VisionCache, which for a
      file of many pictures saves rewriting it for each.

  Raises:
    ConfigError: see `layout_of`; or the file `out` is damaged.
    DataError: the picture is none.
  """
  if not isinstance(out, VisionCache):
    with VisionCache(out) as cache:
      return compress_to(vlm, image, cache, num_voco_tokens, prompt)
  image = images_lib.open_picture(image)
  identity, damaged = identity_of(vlm, image, num_voco_tokens, prompt), None
  path = out.where(identity)
  try:
    found = out.find(identity, vlm.config)
  except ConfigError as error:
    found, damaged = None, str(error)
  if found is not None:
    return Written(path, False, found.nbytes)
  entry = _entry(_fresh(vlm, image, identity), identity)
  out.add(entry, replace=damaged is not None)
  return Written(path, True, entry.nbytes, damaged)


def cached_image(vlm: Vlm, image: Any, where: Where,
                 num_voco_tokens: int | None = None, prompt: str | None = None,
                 say: Callable[[str], Any] = lambda line: None
                 ) -> CompressedImage | KeptImage:
  """A picture from a vision cache.

  A directory is given what it does not have; a file must have it.

  Args:
    vlm, num_voco_tokens, prompt: see `layout_of`.
    image: see `generate`.
    where: a directory, a file (*.safetensors), or a VisionCache.
    say: takes a line on whether the entry was there.

  Raises:
    ConfigError: see `layout_of`; the entry is damaged; or the file has not
      got it, or that of other weights.
    DataError: the picture is none.
  """
  cache = where if isinstance(where, VisionCache) else VisionCache(where)
  image = images_lib.open_picture(image)
  identity = identity_of(vlm, image, num_voco_tokens, prompt)
  path, found = cache.where(identity), cache.find(identity, vlm.config)
  if found is not None:
    say(f'hit: {path}')
    return _image(vlm, found)
  others = cache.others(identity)
  old = sorted({o.weights[:16] for o in others if o.weights != identity.weights})
  if cache.is_file:
    check(not old, stale(path, ', '.join(old), identity.weights))
    raise ConfigError(_missing(path, identity, others))
  if old:
    say(f'{cache.path} has this picture of other weights, fingerprint '
        f'{", ".join(old)}; this model has {identity.weights[:16]}')
  fresh = _fresh(vlm, image, identity)
  cache.add(_entry(fresh, identity))
  say(f'miss: compressed and written to {path}')
  return fresh


def _missing(path: pathlib.Path, wanted: Identity, others: list[Identity]) -> str:
  """What a file has instead of an entry, and the remedy."""
  if not path.exists():
    have = 'does not exist'
  elif not others:
    have = 'does not have this picture'
  elif wanted.prompt is not None and all(o.prompt != wanted.prompt for o in others):
    asked = sorted({str(o.prompt) for o in others})
    have = (f'has this picture, but not what is kept for {wanted.prompt!r}, only '
            f'for {asked}')
  else:
    counts = sorted({o.num_voco_tokens for o in others})
    have = ('has this picture, but ' + (
        f'with {counts} VoCo tokens, not {wanted.num_voco_tokens}'
        if wanted.num_voco_tokens not in counts else
        'of another config (config.json)' if all(
            o.config != wanted.config for o in others) else
        'in another layout (template, tokenizer)'))
  return (f'{path} {have}; add it: vlm-compress compress --out {path}'
          + ' --prompt TEXT' * (wanted.prompt is not None))


def _fresh(vlm: Vlm, image: Any, identity: Identity
           ) -> CompressedImage | KeptImage:
  if identity.method == 'voco':
    return compress_image(vlm, image, identity.num_voco_tokens)
  return keep_image(vlm, image, identity.prompt)


def _entry(image: CompressedImage | KeptImage, identity: Identity) -> Entry:
  """An image as arrays of the host."""
  state = image.state
  if isinstance(image, CompressedImage):
    assert image.segment_ids == identity.layout, 'another segment was compressed'
    names = ('keys', 'values', 'positions')
    return Entry(identity, {n: np.asarray(getattr(state, n)) for n in names}, None)
  assert image.prefix_ids == identity.layout[:len(image.prefix_ids)]
  tensors = {f'{name}/{i}': np.asarray(x) for name in ('keys', 'values')
             for i, x in enumerate(getattr(state, name))}
  return Entry(identity, tensors, tuple(int(n) for n in image.visual_tokens))


def _image(vlm: Vlm, entry: Entry) -> CompressedImage | KeptImage:
  """What `_entry` was made of, its arrays where fresh ones would be."""
  identity, tensors = entry.identity, entry.tensors
  if identity.method == 'voco':
    where = vlm.segmented.programs.out
    put = jnp.asarray if where is None else lambda x: jax.device_put(x, where)
    return CompressedImage(vlm, identity.num_voco_tokens, identity.layout,
                           CompressedImages(*(put(tensors[name]) for name in (
                               'keys', 'values', 'positions'))))
  ids = np.asarray(identity.layout)
  end = int(np.flatnonzero(ids == vlm.config.image_token_index)[-1]) + 1
  state = KeptTokens(*(tuple(tensors[f'{name}/{i}'] for i in range(
      len(tensors) // 2)) for name in ('keys', 'values')))
  return KeptImage(vlm, identity.prompt, identity.layout[:end], state,
                   np.float32(entry.visual_tokens))
