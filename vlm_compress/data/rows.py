"""From examples to batches: which turns a row holds, and how it is laid out.

A row has frozen features of its one picture, or the pixels of all its
pictures, for a tower that runs in the training step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlm_compress.config import LlavaConfig, check
from vlm_compress.convert.processor import ASPECT_MODES
from vlm_compress.data import images
from vlm_compress.data.buckets import check_buckets
from vlm_compress.data.encode import encode, truncate
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Example, Turn
from vlm_compress.data.templates import IMAGE_MARKER
from vlm_compress.data.tokenizer import Tokenizer
from vlm_compress.models.sequence import (
  VISUAL,
  Batch,
  VocoBatch,
  expand_row,
  make_batch,
  split_voco,
)


@dataclasses.dataclass(frozen=True)
class RowSpec:
  """How rows are made from examples.

  Attributes:
    template: name of the conversation template.
    kinds: turns drawn per example, as (kind, count) pairs; () takes all.
    one_turn: a row holds one turn only, of a kind drawn in proportion to the
      counts.  ATP needs it: at inference only the first question exists when
      thresholds are computed.
    independent_turns: turns of a row do not see each other; False keeps an
      ordinary conversation.
    num_voco_tokens: C, drawn per row where there are several; 0 is none.
    length: T, static length of a batch; a longer row is an error.
    text_length: length of the text part in the two-pass form of VoCo.
    bucket_lengths: static lengths that batches may have instead of `length`;
      () is that one length.  With them a row longer than the longest is cut
      on the right, as in LLaVA, but never inside an image.
    max_images: I, pictures that a row of a batch has place for.  A row with
      more of them is an error, which names it.
    image_aspect_ratio: how pictures become squares, 'pad' or 'crop' (LLaVA's
      alignment); frozen features are of padded pictures.
  """
  template: str = 'short'
  kinds: tuple[tuple[str, int], ...] = ()
  one_turn: bool = False
  independent_turns: bool = True
  num_voco_tokens: tuple[int, ...] = (0,)
  length: int = 256
  text_length: int = 192
  bucket_lengths: tuple[int, ...] = ()
  max_images: int = 1
  image_aspect_ratio: str = 'pad'

  def __post_init__(self):
    check(len(self.num_voco_tokens) > 0 and min(self.num_voco_tokens) >= 0,
          f'rows.num_voco_tokens={self.num_voco_tokens}: one or more numbers, '
          'none negative')
    for name in ('length', 'text_length', 'max_images'):
      check(getattr(self, name) >= 1,
            f'rows.{name}={getattr(self, name)}: at least 1')
    check(self.image_aspect_ratio in ASPECT_MODES,
          f'rows.image_aspect_ratio={self.image_aspect_ratio!r}: use one of '
          f'{ASPECT_MODES}')
    if self.bucket_lengths:
      check_buckets(self.bucket_lengths)
      check(not self.kinds, 'rows.bucket_lengths: the length of a row is not '
            'known in advance where rows.kinds draws its turns; use one of them')
    for kind, count in self.kinds:
      check(count >= 1, f'rows.kinds.{kind}={count}: at least 1; remove the '
            'kind to leave it out')


@dataclasses.dataclass(frozen=True)
class Row:
  """One laid-out row.

  Attributes:
    tokens: fields of `sequence.ROW_FIELDS`.
    features: float[number of images, P', Dv], or uint8[number of images, S,
      S, 3]; those that were cut off the row may be among them, at the end.
    uncompressed: the same row without VoCo tokens, for a teacher, or None.
    record: number of the record that it is made of.
  """
  tokens: dict[str, np.ndarray]
  features: np.ndarray
  uncompressed: dict[str, np.ndarray] | None = None
  record: int = -1


def draw_turns(turns: Sequence[Turn], spec: RowSpec,
               rng: np.random.Generator) -> list[Turn]:
  """Turns of one row, in a random order where they are independent.

  Raises:
    DataError: there is no turn of the kinds that are asked for.
  """
  turns = list(turns)
  known = {t.kind for t in turns}
  present = [(kind, count) for kind, count in
             spec.kinds or tuple((t.kind, 1) for t in turns) if kind in known]
  if not present:
    raise DataError(f'no turn is of a kind in rows.kinds='
                    f'{[kind for kind, _ in spec.kinds]}; the kinds here are '
                    f'{sorted(known)}')
  if spec.one_turn:
    weights = np.asarray([count for _, count in present], np.float64)
    kind = present[rng.choice(len(present), p=weights / weights.sum())][0]
    turns = [t for t in turns if t.kind == kind]
    return [turns[rng.integers(len(turns))]]
  if spec.kinds:
    drawn = []
    for kind, count in spec.kinds:
      of_kind = [t for t in turns if t.kind == kind]
      order = rng.permutation(len(of_kind))[:count]
      drawn += [of_kind[i] for i in order]
    turns = drawn
  if spec.independent_turns:
    turns = [turns[i] for i in rng.permutation(len(turns))]
  return turns


def image_in_front(example: Example) -> Example:
  """The example with its one picture before whichever question comes first.

  Raises:
    DataError: the example has no picture, or several.
  """
  if len(example.images) != 1:
    raise DataError(
        f'example {example.example_id!r} has {len(example.images)} pictures; '
        'frozen features hold exactly one picture per row: leave text-only '
        'rows and rows with several pictures out of the data')
  return without_markers(example)


def without_markers(example: Example) -> Example:
  """The example with its pictures before whichever question comes first.

  Turns are drawn and permuted, so it must not matter which of them holds an
  `<image>` marker: without a marker, the pictures stand in front.
  """
  turns = tuple(
      dataclasses.replace(t, question=t.question.replace(IMAGE_MARKER, '')
                          .strip()) if IMAGE_MARKER in t.question else t
      for t in example.turns)
  return dataclasses.replace(example, turns=turns)


def placed(example: Example, spec: RowSpec, frozen: bool) -> Example:
  """The example with its pictures where rows have them.

  With pixels, a conversation whose turns stay as they are keeps its pictures
  where it has them; everywhere else they stand in front.

  Args:
    example: of a source.
    spec: how rows are made.
    frozen: with frozen features, which are of exactly one picture.

  Raises:
    DataError: too many pictures, or not one with frozen features.
  """
  if frozen:
    return image_in_front(example)
  if len(example.images) > spec.max_images:
    raise DataError(
        f'example {example.example_id!r} has {len(example.images)} pictures, '
        f'more than rows.max_images={spec.max_images}; raise it, or leave the '
        'row out of the data')
  as_it_is = not (spec.independent_turns or spec.one_turn or spec.kinds)
  return example if as_it_is else without_markers(example)


def row_limit(spec: RowSpec, config: LlavaConfig) -> int | None:
  """Tokens at which rows are cut, None if they are not.

  Raises:
    ConfigError: not even an image has place.
  """
  if not spec.bucket_lengths:
    return None
  limit = spec.bucket_lengths[-1]
  need = config.num_visual_tokens + max(spec.num_voco_tokens) + 1
  check(limit > need, f'rows.bucket_lengths={spec.bucket_lengths}: an image '
        f'with what belongs to it takes {need} tokens; use a longer one')
  return limit


def layout(example: Example, turns: Sequence[Turn], spec: RowSpec,
           tokenizer: Tokenizer, config: LlavaConfig, num_voco_tokens: int, *,
           prompt_only: bool = False) -> dict[str, np.ndarray]:
  """Token arrays of one row; `prompt_only` leaves out the last answer."""
  limit = row_limit(spec, config)
  encoded = encode(
      dataclasses.replace(example, turns=tuple(turns)), tokenizer,
      spec.template, num_voco_tokens=num_voco_tokens,
      independent_turns=spec.independent_turns and not prompt_only,
      add_generation_prompt=prompt_only,
      image_token_index=config.image_token_index,
      voco_token_index=config.voco_token_index)
  if limit is not None:
    encoded = truncate(encoded, limit, config.num_visual_tokens,
                       config.image_token_index, config.voco_token_index)
  return expand_row(encoded.input_ids.tolist(), encoded.loss_mask.tolist(),
                    encoded.turn_ids.tolist(), config)


def row_maker(spec: RowSpec, tokenizer: Tokenizer, config: LlavaConfig,
              features: Any, with_uncompressed: bool = False
              ) -> Callable[[int, Example, np.random.Generator], Row]:
  """The transform of the input pipeline.

  Args:
    spec: how rows are made.
    tokenizer, config: of the model.
    features: features[i] is float[P', Dv] of record i's picture; None decodes
      the pictures of an example and brings them to the tower's size.
    with_uncompressed: also lay the row out without VoCo tokens.

  Returns:
    (record index, example, rng) -> Row.  It raises DataError, with the name of
    the example, for one that has more pictures than there is place for (with
    features: not exactly one), a damaged one, or no turn of the right kind.
  """
  def transform(index: int, example: Example, rng: np.random.Generator) -> Row:
    example = placed(example, spec, features is not None)
    try:
      turns = draw_turns(example.turns, spec, rng)
    except DataError as e:
      raise DataError(f'example {example.example_id!r}: {e}') from e
    num_voco = int(rng.choice(spec.num_voco_tokens))
    arrays = layout(example, turns, spec, tokenizer, config, num_voco)
    plain = (layout(example, turns, spec, tokenizer, config, 0)
             if with_uncompressed else None)
    seen = (_pixels(example, spec, config) if features is None
            else np.asarray(features[index])[None])
    return Row(arrays, seen, plain, index)
  return transform


def _pixels(example: Example, spec: RowSpec, config: LlavaConfig) -> np.ndarray:
  """uint8[number of images, S, S, 3] for the tower of `config`."""
  size = config.vision.image_size
  out = np.zeros((len(example.images), size, size, 3), np.uint8)
  for i, data in enumerate(example.images):
    name = f'example {example.example_id!r}: picture {i + 1}'
    out[i] = images.tower_pixels(images.decode(data, name), config.vision,
                                 spec.image_aspect_ratio)
  return out


def _batch(tokens: Sequence[dict[str, np.ndarray]], rows: Sequence[Row],
           length: int, spec: RowSpec) -> Batch:
  """A Batch of token arrays and the images that are left in them."""
  counts = [len(np.unique(t['image_ids'][t['token_types'] == VISUAL]))
            for t in tokens]
  batch = make_batch(
      tokens, [r.features[:n] for r, n in zip(rows, counts, strict=True)],
      length=length, num_images=spec.max_images)
  return batch.replace(records=np.asarray([r.record for r in rows], np.int32))


def _seen_whole(batch: Batch, spec: RowSpec) -> Batch:
  """A batch without turns, where a row is one conversation: its mask need not
  be stored then.
  """
  whole = spec.one_turn or not spec.independent_turns
  return batch.replace(turn_ids=None) if whole else batch


def plain_collate(spec: RowSpec) -> Callable[..., Batch]:
  """(rows, length of the batch; spec.length by default) -> Batch."""
  return lambda rows, length=spec.length: _seen_whole(_batch(
      [r.tokens for r in rows], rows, length, spec), spec)


def voco_collate(spec: RowSpec, config: LlavaConfig
                 ) -> Callable[..., tuple[VocoBatch, Batch | None]]:
  """Rows to the two-pass form, with the uncompressed batch of a teacher.

  Returns:
    (rows, length of the batch; spec.length by default) -> (VocoBatch, teacher's
    Batch or None).  Where a length is given, every row has an image, and the
    text part is as much shorter as that allows.
  """
  check(len(spec.num_voco_tokens) == 1 and spec.num_voco_tokens[0] > 0,
        f'rows.num_voco_tokens={spec.num_voco_tokens}: the two-pass form '
        'needs one positive number for all rows')

  def collate(rows, length=None):
    text_length = spec.text_length
    if length is not None:
      text_length = min(text_length, length - config.num_visual_tokens
                        - spec.num_voco_tokens[0])
    length = spec.length if length is None else length
    batch = _batch([r.tokens for r in rows], rows, length, spec)
    split = split_voco(batch, config, text_length)
    split = split.replace(text=_seen_whole(split.text, spec))
    if rows[0].uncompressed is None:
      return split, None
    teacher = _batch([r.uncompressed for r in rows], rows, length, spec)
    return split, _seen_whole(teacher, spec)
  return collate
