"""Conversations to token ids, loss masks and turn ids.

A conversation is rendered to pieces (templates.py) and every piece is
tokenised on its own: ids around an image are then LLaVA-1.5's
(`... USER: _ [image] _ \\n ...`, `_` SentencePiece's dummy prefix), which
tokenising the whole text would not give.  Targets of the loss are the answers
and what closes them; the mask is a property of the pieces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vlm_compress.data import templates
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Example, Turn
from vlm_compress.data.tokenizer import ROLES, Tokenizer


@dataclasses.dataclass(frozen=True)
class EncodedRow:
  """A tokenised conversation; an image is one placeholder.

  Attributes:
    input_ids: int32[L]; `image_token_index` stands for a whole image,
      `voco_token_index` for one VoCo token.
    loss_mask: bool[L], the token is a target of the loss.
    turn_ids: int32[L], 0 is seen by everybody, a token of turn t >= 1 sees
      turn 0 and its own turn.  All 0 in an ordinary conversation.
  """
  input_ids: np.ndarray
  loss_mask: np.ndarray
  turn_ids: np.ndarray

  def __len__(self) -> int:
    return len(self.input_ids)


def encode(conversation: Example | Sequence[Turn], tokenizer: Tokenizer,
           template: templates.Template | str, num_voco_tokens: int = 0,
           independent_turns: bool = False,
           add_generation_prompt: bool = False,
           image_token_index: int = -200,
           voco_token_index: int = 32000) -> EncodedRow:
  """Tokenises a conversation.

  Args:
    conversation: an Example, or turns whose questions hold the `<image>`
      markers (an Example without markers has its images in front).
    tokenizer: the tokenizer.
    template: a template or its name.
    num_voco_tokens: VoCo tokens behind every image.
    independent_turns: give each turn its own turn id, so that turns about
      the same image do not see each other; BOS, system text and images are
      turn 0.
    add_generation_prompt: leave out the last turn's answer, to be generated.
    image_token_index: placeholder id of an image.
    voco_token_index: id of a VoCo token.

  Returns:
    An EncodedRow that begins with BOS, if the tokenizer has one.

  Raises:
    DataError: markers and images disagree, the template cannot say this, a
      word is unknown, or VoCo tokens meet a tokenizer without BOS; the
      message names the example.
  """
  if isinstance(template, str):
    template = templates.get_template(template)
  turns, num_images, name = conversation, None, ''
  if isinstance(conversation, Example):
    turns, num_images = conversation.turns, len(conversation.images)
    name = f'example {conversation.example_id!r}: '
  try:
    pieces = templates.render(
        turns, template, num_images=num_images,
        num_voco_tokens=num_voco_tokens, independent_turns=independent_turns,
        add_generation_prompt=add_generation_prompt)
    return encode_pieces(pieces, tokenizer, image_token_index,
                         voco_token_index)
  except DataError as e:
    raise DataError(f'{name}{e}') from e


def expanded_length(row: EncodedRow, num_visual_tokens: int,
                    image_token_index: int = -200) -> int:
  """Tokens of a row when every image is its visual tokens."""
  images = int(np.count_nonzero(row.input_ids == image_token_index))
  return len(row) + images * (num_visual_tokens - 1)


def truncate(row: EncodedRow, limit: int, num_visual_tokens: int,
             image_token_index: int = -200, voco_token_index: int = 32000
             ) -> EncodedRow:
  """Cuts a row on the right, as LLaVA does, but never inside an image.

  An image that does not fit with all its visual tokens, and with its VoCo
  tokens if it has some, is left out with all that follows.

  Args:
    row: the row.
    limit: tokens that may be left, visual tokens counted.
    num_visual_tokens: of an image.
    image_token_index, voco_token_index: the placeholders.

  Returns:
    The row itself if it fits.
  """
  is_image = row.input_ids == image_token_index
  ends = np.cumsum(np.where(is_image, num_visual_tokens, 1))
  keep = int(np.searchsorted(ends, limit, side='right'))
  if keep == len(row):
    return row
  starts = np.flatnonzero(is_image)
  for start, following in zip(starts, [*starts[1:], len(row)], strict=True):
    vocos = np.flatnonzero(
        row.input_ids[start:following] == voco_token_index)
    if len(vocos) and start < keep <= start + vocos[-1]:
      keep = int(start)
  return EncodedRow(row.input_ids[:keep], row.loss_mask[:keep],
                    row.turn_ids[:keep])


def encode_pieces(pieces: Sequence[templates.Piece], tokenizer: Tokenizer,
                  image_token_index: int = -200,
                  voco_token_index: int = 32000) -> EncodedRow:
  """Tokenises rendered pieces, with BOS in front where the tokenizer has one.

  A text that follows another text (of another turn or supervision) continues
  it; a text at the beginning or after a placeholder or `</s>` starts anew.
  """
  placeholders = {templates.IMAGE: image_token_index,
                  templates.VOCO: voco_token_index,
                  templates.EOS: tokenizer.eos_id}
  bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  if not bos and any(piece.kind == templates.VOCO for piece in pieces):
    raise DataError('VoCo tokens are computed behind a BOS token, but this '
                    'tokenizer puts none in front; name one as bos_token in '
                    f'{ROLES}, with "add_bos_token": true')
  input_ids, loss_mask, turn_ids = bos, [False] * len(bos), [0] * len(bos)
  previous = ''
  for piece in pieces:
    if piece.kind == templates.TEXT:
      ids = tokenizer.encode(piece.text, first=previous != templates.TEXT)
    else:
      ids = [placeholders[piece.kind]]
    input_ids += ids
    loss_mask += [piece.supervised] * len(ids)
    turn_ids += [piece.turn] * len(ids)
    previous = piece.kind
  return EncodedRow(np.asarray(input_ids, np.int32),
                    np.asarray(loss_mask, bool),
                    np.asarray(turn_ids, np.int32))
