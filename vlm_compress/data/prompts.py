"""What a user asks: laid out as a row, and the answer's text as it comes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_compress.config import LlavaConfig, check
from vlm_compress.data.examples import Example, Turn
from vlm_compress.data.rows import RowSpec, layout
from vlm_compress.data.tokenizer import Tokenizer

_BYTE = re.compile('<0x[0-9A-F]{2}>')  # byte fallback's pieces
_UNFINISHED = '\ufffd'  # what decoding makes of a part of a character


def check_prompt(prompt: Any, answered: bool = False) -> None:
  """Raises ConfigError unless it is a question, or turns that end in one.

  Args:
    prompt: whatever was given for one.
    answered: the last turn may have its answer.
  """
  is_turn = lambda x: isinstance(x, Turn) and isinstance(
      x.question, str) and isinstance(x.answer, str)
  check(isinstance(prompt, str) or isinstance(prompt, Sequence) and all(
      map(is_turn, prompt)), f'prompt={prompt!r}: give a question, or a list of '
        'data.examples.Turn')
  check(answered or isinstance(prompt, str) or not prompt or not prompt[-1].answer,
        'the last turn of the prompt has an answer; leave it out')


def prompt_row(prompt: str | Sequence[Turn], num_images: int,
               tokenizer: Tokenizer, config: LlavaConfig, template: str,
               num_voco_tokens: int = 0, hides: bool = True) -> dict[str, np.ndarray]:
  """Token arrays of a question or a conversation.

  Args:
    prompt: a question; or turns that see each other, of which the last may
      lack its answer, to be generated.  Without `<image>` markers the images
      stand in front.
    num_images: images that belong to it.
    tokenizer, config: of the model.
    template: name of the conversation template.
    num_voco_tokens: VoCo tokens behind every image.
    hides: text sees an image by its VoCo tokens only.  Otherwise (VoCo's upper
      bound) it sees all, so a second image stands behind the first one and not
      where that does.

  Returns:
    The fields of `sequence.ROW_FIELDS`, each [T].

  Raises:
    DataError: markers and images disagree, the template cannot say this, or
      a word is unknown.
    ConfigError: it is longer than the context, or the tokenizer does not
      belong to the model.
  """
  turns = (Turn(prompt),) if isinstance(prompt, str) else tuple(prompt)
  check(bool(turns), 'the prompt has no turn; ask something')
  name = turns[-1].question.replace('\n', ' ')
  example = Example(example_id=name if len(name) <= 40 else f'{name[:37]}...',
                    images=(b'',) * num_images, turns=turns)
  row = layout(example, turns, RowSpec(template, independent_turns=False),
               tokenizer, config, num_voco_tokens,
               prompt_only=not turns[-1].answer)
  largest = int(row['input_ids'].max())
  check(largest < config.text.vocab_size,
        f'tokenizer.json gives the id {largest}, but the model has '
        f'text.vocab_size={config.text.vocab_size}; take the tokenizer that '
        'belongs to the weights')
  if not hides:
    row['positions'] = row['read_positions'] = np.arange(len(row['positions']), dtype=np.int32)
  return row


class TextStream:
  """Text of token ids that come one by one; what was given out stays true.

  A character may take several tokens, and the pieces of byte fallback turn
  into other text until the last of them is there: such text is held back.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._ids: list[int] = []
    self._given = ''

  def push(self, token_id: int) -> str:
    """The text that is certain now and was not before, perhaps ''."""
    self._ids.append(token_id)
    if _BYTE.fullmatch(self._tokenizer.tokens([token_id])[0] or ''):
      return ''
    return self._more(self._tokenizer.decode(self._ids).rstrip(_UNFINISHED))

  def finish(self) -> str:
    """What was held back; no more tokens come."""
    return self._more(self._tokenizer.decode(self._ids))

  def _more(self, text: str) -> str:
    if not text.startswith(self._given):
      return ''
    piece, self._given = text[len(self._given):], text
    return piece
