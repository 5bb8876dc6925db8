"""From examples to batches: which turns a row holds, and how it is laid out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlm_compress.config import LlavaConfig, check
from vlm_compress.data.encode import encode
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Example, Turn
from vlm_compress.data.templates import IMAGE_MARKER
from vlm_compress.data.tokenizer import Tokenizer
from vlm_compress.models.sequence import Batch, VocoBatch, expand_row, make_batch, split_voco


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
    length: T, static length of a batch.
    text_length: length of the text part in the two-pass form of VoCo.
  """
  template: str = 'short'
  kinds: tuple[tuple[str, int], ...] = ()
  one_turn: bool = False
  independent_turns: bool = True
  num_voco_tokens: tuple[int, ...] = (0,)
  length: int = 256
  text_length: int = 192

  def __post_init__(self):
    check(len(self.num_voco_tokens) > 0 and min(self.num_voco_tokens) >= 0,
          f'rows.num_voco_tokens={self.num_voco_tokens}: one or more numbers, '
          'none negative')
    for name in ('length', 'text_length'):
      check(getattr(self, name) >= 1,
            f'rows.{name}={getattr(self, name)}: at least 1')
    for kind, count in self.kinds:
      check(count >= 1, f'rows.kinds.{kind}={count}: at least 1; remove the '
            'kind to leave it out')


@dataclasses.dataclass(frozen=True)
class Row:
  """One laid-out row.

  Attributes:
    tokens: fields of `sequence.ROW_FIELDS`.
    features: float[number of images, P', Dv].
    uncompressed: the same row without VoCo tokens, for a teacher, or None.
  """
  tokens: dict[str, np.ndarray]
  features: np.ndarray
  uncompressed: dict[str, np.ndarray] | None = None


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
  """The example with its picture before whichever question comes first.

  Turns are drawn and permuted, so it must not matter which of them holds the
  `<image>` marker: without a marker, the picture stands in front.

  Raises:
    DataError: the example has no picture, or several.
  """
  if len(example.images) != 1:
    raise DataError(
        f'example {example.example_id!r} has {len(example.images)} pictures; '
        'frozen features hold exactly one picture per row: leave text-only '
        'rows and rows with several pictures out of the data')
  turns = tuple(
      dataclasses.replace(t, question=t.question.replace(IMAGE_MARKER, '')
                          .strip()) if IMAGE_MARKER in t.question else t
      for t in example.turns)
  return dataclasses.replace(example, turns=turns)


def layout(example: Example, turns: Sequence[Turn], spec: RowSpec,
           tokenizer: Tokenizer, config: LlavaConfig, num_voco_tokens: int, *,
           prompt_only: bool = False) -> dict[str, np.ndarray]:
  """Token arrays of one row; `prompt_only` leaves out the last answer."""
  encoded = encode(
      dataclasses.replace(example, turns=tuple(turns)), tokenizer,
      spec.template, num_voco_tokens=num_voco_tokens,
      independent_turns=spec.independent_turns and not prompt_only,
      add_generation_prompt=prompt_only,
      image_token_index=config.image_token_index,
      voco_token_index=config.voco_token_index)
  return expand_row(encoded.input_ids.tolist(), encoded.loss_mask.tolist(),
                    encoded.turn_ids.tolist(), config)


def row_maker(spec: RowSpec, tokenizer: Tokenizer, config: LlavaConfig,
              features: Any, with_uncompressed: bool = False
              ) -> Callable[[int, Example, np.random.Generator], Row]:
  """The transform of the input pipeline.

  Args:
    spec: how rows are made.
    tokenizer, config: of the model.
    features: features[i] is float[P', Dv] of record i's picture.
    with_uncompressed: also lay the row out without VoCo tokens.

  Returns:
    (record index, example, rng) -> Row.  It raises DataError, with the name of
    the example, for one that does not have exactly one picture or has no
    turn of the right kind.
  """
  def transform(index: int, example: Example, rng: np.random.Generator) -> Row:
    example = image_in_front(example)
    try:
      turns = draw_turns(example.turns, spec, rng)
    except DataError as e:
      raise DataError(f'example {example.example_id!r}: {e}') from e
    num_voco = int(rng.choice(spec.num_voco_tokens))
    arrays = layout(example, turns, spec, tokenizer, config, num_voco)
    plain = (layout(example, turns, spec, tokenizer, config, 0)
             if with_uncompressed else None)
    return Row(arrays, np.asarray(features[index])[None], plain)
  return transform


def plain_collate(spec: RowSpec) -> Callable[[Sequence[Row]], Batch]:
  """Rows to a Batch."""
  return lambda rows: make_batch(
      [r.tokens for r in rows], [r.features for r in rows],
      length=spec.length, num_images=1)


def voco_collate(spec: RowSpec, config: LlavaConfig
                 ) -> Callable[[Sequence[Row]], tuple[VocoBatch, Batch | None]]:
  """Rows to the two-pass form, with the uncompressed batch of a teacher."""
  check(len(spec.num_voco_tokens) == 1 and spec.num_voco_tokens[0] > 0,
        f'rows.num_voco_tokens={spec.num_voco_tokens}: the two-pass form '
        'needs one positive number for all rows')

  def collate(rows):
    batch = plain_collate(spec)(rows)
    teacher = None
    if rows[0].uncompressed is not None:
      teacher = make_batch([r.uncompressed for r in rows],
                           [r.features for r in rows], length=spec.length,
                           num_images=1)
    return split_voco(batch, config, spec.text_length), teacher
  return collate
