"""A model directory from Python, in five functions.

  load            a model directory into memory
  save            a model into a directory
  logits          of every token of a prompt or a conversation
  generate        an answer, streamed if wanted
  compress_image  a picture as VoCo tokens, to ask several questions about
                  (`keep_image`: as the tokens that ATP keeps)

`compile_ahead` takes the compiling out of the first questions.

`generate` and the command of that name are the same code.  A prompt is padded
to a multiple of 64 tokens, which changes no result, and compiled programs and
the vision features of the last pictures are kept, so a second question costs
less than the first.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vlm_compress.config import ConfigError, check, check_whole
from vlm_compress.convert import files
from vlm_compress.convert.processor import Processor, load_processor
from vlm_compress.data import tokenizer as tokenizer_lib
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Turn
from vlm_compress.data.prompts import TextStream
from vlm_compress.data.templates import TEMPLATES
from vlm_compress.decode import stream as stream_lib
from vlm_compress.decode.prefilled import entering
from vlm_compress.models.inputs import CompressedImages, PruneOptions, place
from vlm_compress.models.llava import Llava
from vlm_compress.models.sequence import VISUAL, Batch
from vlm_compress.vlm import (
  CompressedImage,
  KeptImage,
  Vlm,
  compress_image,
  keep_image,
  padded,
  prefill,
  prepare,
)

__all__ = ['load', 'save', 'logits', 'generate', 'compress_image',
           'keep_image', 'compile_ahead', 'Vlm', 'CompressedImage', 'KeptImage', 'Logits',
           'Answer', 'Turn']


class Logits(NamedTuple):
  """What `logits` returns.

  Attributes:
    ids: int32[T] token ids; visual tokens are config.image_token_index.
    logits: float32[T, V], of the token after each.
  """
  ids: np.ndarray
  logits: np.ndarray


class Answer(NamedTuple):
  """What `generate` returns.

  Attributes:
    text: the answer.
    token_ids: its tokens, without the end of sequence.
    ended: why it ended: 'eos', 'max_new_tokens', or 'context', where
      text.max_position_embeddings left no room.
    visual_tokens: float[M], visual tokens that entered each layer; None
      unless the method is atp.
  """
  text: str
  token_ids: list[int]
  ended: str
  visual_tokens: np.ndarray | None


def load(directory: str | os.PathLike, *, template: str | None = None,
         mesh: Mesh | None = None) -> Vlm:
  """Reads a model directory.

  Args:
    directory: as `vlm-compress` train, quickstart or convert wrote it.
    template: conversation template, if not the one in processor.json.
    mesh: devices that the parameters are spread over, each reading its shards
      (`sharding.make_mesh`); None is the first device.

  Raises:
    ConfigError: a file of it is missing or damaged; the message names it.
  """
  config = files.load_config(directory)
  path = pathlib.Path(directory) / files.TOKENIZER
  params = files.load_params(directory, mesh)
  try:
    tokenizer = tokenizer_lib.load(path)
  except (FileNotFoundError, DataError) as error:
    raise ConfigError(f'{error}; write the model directory again') from error
  processor = load_processor(directory)
  if template is not None:
    check(template in TEMPLATES, f'template={template!r} is unknown; use one '
          f'of {sorted(TEMPLATES)}')
    processor = (Processor(template) if processor is None else
                 dataclasses.replace(processor, template=template))
  ends = {tokenizer.eos_id, *files.generation_ends(directory)}
  return Vlm(config, params, tokenizer, processor, str(directory), ends)


def save(vlm: Vlm, directory: str | os.PathLike) -> None:
  """Writes a model directory; every file appears whole or not at all.

  A model that is there already is replaced, config.json last.  Files of other
  formats (chat template, generation settings) come from where `vlm` was loaded.
  """
  files.save_model(directory, vlm.params, vlm.config, vlm.tokenizer,
                   processor=vlm.processor, copy_from=vlm.directory or None)


def logits(vlm: Vlm, prompt: str | Sequence[Turn], images: Sequence[Any] = (),
           *, method: str = 'auto', num_voco_tokens: int | None = None
           ) -> Logits:
  """Logits of every token that `generate` would read.

  Args:
    vlm, images, method, num_voco_tokens: see `generate`.
    prompt: as there; or a conversation whose last turn has its answer, which
      is then part of the row.

  Returns:
    Logits.  With method voco the row is the text behind the compressed
    images; otherwise it holds all tokens, visual ones included.

  Raises:
    ConfigError, DataError: as `generate`.
  """
  row = prepare(vlm, prompt, images, method, num_voco_tokens, answered=True)
  check(row.kept is None, 'a kept image has no logits of all tokens; give the '
        'picture itself')
  if row.compressed is None:
    out = _logits(row.model, vlm.on_device, row.batch, row.prune)
  else:
    out = _read(row.model, vlm.on_device, row.batch, row.compressed,
                row.voco_positions)
  types, ids = row.batch.token_types[0], row.batch.input_ids[0]
  ids = np.where(types == VISUAL, vlm.config.image_token_index, ids)
  return Logits(ids[:row.size], np.asarray(out[0, :row.size]))


def generate(vlm: Vlm, prompt: str | Sequence[Turn],
             images: Sequence[Any] = (), *, method: str = 'auto',
             num_voco_tokens: int | None = None, max_new_tokens: int = 32,
             temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
             stream: Callable[[str], Any] | None = None) -> Answer:
  """Answers a question.

  Args:
    vlm: the model.
    prompt: a question, or a conversation (data.examples.Turn) whose last turn
      has no answer.  Pictures stand in front of the turn that has their
      `<image>` markers, as LLaVA prepares its data, or of the first one.
    images: each a path, a file's bytes, uint8[H, W, 3], an image of Pillow's,
      or a CompressedImage (method voco), or one KeptImage (method atp).
    method: 'full', 'voco', 'atp', or 'auto', what the model was made for.
    num_voco_tokens: VoCo tokens per picture, if not as trained.
    max_new_tokens: longest answer; the end of the context may come before.
    temperature: 0 is greedy; top_p: nucleus; seed: of sampling.
    stream: called with every piece of text as soon as it is certain; joined,
      the pieces are the answer's text.

  Raises:
    DataError: a picture that is none, markers that are not as many as the
      pictures, or a word that the tokenizer does not know.
    ConfigError: a setting, method or prompt that does not fit the model.
  """
  for name, value in (('temperature', temperature), ('top_p', top_p)):
    check(isinstance(value, (int, float)), f'{name}={value!r}: must be a number')
  check_whole('max_new_tokens', max_new_tokens, 1)
  check_whole('seed', seed)
  check(temperature >= 0, f'temperature={temperature}: not negative')
  check(0 < top_p <= 1, f'top_p={top_p}: above 0 and at most 1')
  row = prepare(vlm, prompt, images, method, num_voco_tokens)
  limit = vlm.config.text.max_position_embeddings
  room = limit - row.positions
  check(room > 0, f'the prompt takes all {limit} positions of '
        'text.max_position_embeddings; shorten it to leave room for an answer')
  count = min(max_new_tokens, room)
  state = prefill(vlm, row, count - 1)
  text, ids = TextStream(vlm.tokenizer), []
  give = lambda piece: piece and stream is not None and stream(piece)
  for (token,) in stream_lib.tokens(
      vlm.segmented, state, max_new_tokens=count, end_ids=vlm.end_ids,
      temperature=temperature, top_p=top_p, seed=seed):
    ids.append(token)
    give(text.push(token))
  give(text.finish())
  ended = ('eos' if len(ids) < count else
           'max_new_tokens' if count == max_new_tokens else 'context')
  kept = row.kept.visual_tokens if row.kept is not None else None
  if state.pruning is not None:
    kept = entering(vlm.config, state.pruning).sum((1, 2))
  return Answer(vlm.tokenizer.decode(ids), ids, ended, kept)


def compile_ahead(vlm: Vlm, *, text_tokens: int, num_images: int = 1,
                  batch_size: int = 1, max_new_tokens: int = 32,
                  method: str = 'auto') -> int:
  """Compiles what greedy answers need, so that no question waits for it.

  `generate` asks one question at a time; `batches.answer_all` batch_size of
  them, where batches that regroup need a few more programs, which move rows.
  So do a kept image, sampling, and a context that ends before max_new_tokens.

  Args:
    vlm: the model.
    text_tokens: of the longest prompt, with those of the template.
    num_images: pictures per prompt.
    batch_size: questions at a time.
    max_new_tokens: as questions will have it.
    method: 'full' or 'atp', as in `generate`.

  Returns:
    How many programs there are now.

  Raises:
    ConfigError: a number that cannot be, or a method that needs few programs.
  """
  for name, value, least in (
      ('text_tokens', text_tokens, 1), ('num_images', num_images, 0),
      ('batch_size', batch_size, 1), ('max_new_tokens', max_new_tokens, 1)):
    check_whole(name, value, least)
  method = vlm.method(method)
  check(method != 'voco' or num_images == 0, 'method voco has one program '
        'for 64 tokens of text, whatever is asked: ask one question instead')
  visual = num_images * vlm.config.num_visual_tokens
  limit = vlm.config.text.max_position_embeddings
  check(visual + text_tokens < limit, f'text_tokens={text_tokens} and '
        f'{num_images} image(s) take {visual + text_tokens} of {limit} positions '
        '(text.max_position_embeddings), which leaves no room for an answer')
  if num_images > 0:
    size = vlm.config.vision.image_size
    vlm.features(np.zeros((size, size, 3), np.uint8))
  stream_lib.compile_ahead(vlm.segmented, batch_size)
  shortest = 1
  while shortest <= text_tokens:  # prompts are padded, each to its own length
    length = padded(visual + shortest)
    longest = min(text_tokens, length - visual)
    vlm.segmented.compile_ahead(
        batch_size, length, longest, padded(max_new_tokens - 1), num_images,
        method == 'atp' and num_images > 0, shortest)
    shortest = longest + 1
  return len(vlm.segmented.programs)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Llava, params: Any, batch: Batch,
            prune: PruneOptions | None) -> jax.Array:
  return model.apply({'params': params}, batch, prune=prune)[0]


@functools.partial(jax.jit, static_argnums=0)
def _read(model: Llava, params: Any, text: Batch, images: CompressedImages,
          voco_positions: jax.Array) -> jax.Array:
  prefix = place(images, text.image_valid, voco_positions,
                 model.config.text.rope_theta)
  return model.apply({'params': params}, text, prefix, method='read')[0]
