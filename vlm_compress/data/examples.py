"""What every data source yields: pictures and a conversation about them.

Sources (TFDS builders, LLaVA-format JSON) all give an `Example`; everything
after them (templates, tokenisation, batching, scoring) knows this type only.
Pictures stay encoded, so an Example is small and cheap to send between
processes.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Turn:
  """One question and its answer.

  Attributes:
    question: text of the user; may hold `<image>` markers (LLaVA format).
      Without any marker in the conversation, the images stand in front of
      the first question.
    answer: text of the assistant; '' where it is unknown.
    kind: kind of question, for scores per kind; '' if there is none.
    heldout: the answer needs something no training example shows.
  """
  question: str
  answer: str = ''
  kind: str = ''
  heldout: bool = False


@dataclasses.dataclass(frozen=True)
class Example:
  """Pictures and a conversation about them.

  Attributes:
    example_id: names the example in reports; not necessarily unique.
    turns: the conversation, oldest turn first.
    images: encoded pictures (PNG, JPEG, ...), () for a text-only example.
    caption: a description of the picture, '' if there is none.
    metadata: whatever the source knows beside (layout, file names, ...).
  """
  example_id: str
  turns: tuple[Turn, ...]
  images: tuple[bytes, ...] = ()
  caption: str = ''
  metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


def caption_example(example: Example, question: str = '') -> Example:
  """The same pictures with the caption as the only answer.

  Args:
    example: an example that has a caption.
    question: what is asked; the `plain` template throws it away.

  Returns:
    An Example with one turn of kind 'caption'.
  """
  turn = Turn(question=question, answer=example.caption, kind='caption')
  return dataclasses.replace(example, turns=(turn,))
