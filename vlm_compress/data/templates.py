"""Conversation templates, as data, and how a conversation is rendered.

A conversation becomes a list of pieces: text, image placeholder, VoCo
placeholder, end of answer.  Every piece carries whether it is a target of the
loss and to which turn it belongs, so a label mask is a property of the text
and never found again by comparing lengths.

Deliberate difference from LLaVA's and VoCo-LLaMA's code: they tokenise the
whole conversation, tokenise its parts once more, and mask by the lengths of
the parts; when the lengths do not add up (an answer that contains
' ASSISTANT: ' is enough) the whole sample silently loses its labels.  Here the
mask comes from the pieces.  The token ids stay theirs, because a cut inside a
text always stands before a space or after a newline, where the LLaMA
vocabulary has no merge (tests compare with their ids).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Turn

IMAGE_MARKER = '<image>'
VOCO_MARKER = '<voco>'
EOS_MARKER = '</s>'

TEXT, IMAGE, VOCO, EOS = 'text', 'image', 'voco', 'eos'


@dataclasses.dataclass(frozen=True)
class Template:
  """How turns become text.

  A turn is `user + question + assistant + answer_lead + answer + answer_end`
  and, with `eos`, the end-of-sequence token.

  Attributes:
    name: what a config calls it.
    system: text in front of the first turn, '' for none.
    system_end: separates the system text from the first turn.
    user: text in front of a question.
    assistant: text after a question; an open turn ends with it.
    answer_lead: text between `assistant` and answer; a target of the loss
      (LLaMA's first answer token carries the space).
    answer_end: text after the answer, a target of the loss.
    eos: the turn ends with the end-of-sequence token, a target of the loss.
    after_image: text after an image placeholder.
    image_first: images stand in front of the turn (and of the system text),
      not between `user` and question.  VoCo tokens need it.
    keep_question: False throws the question away (captioning).
    keep_newlines: False deletes newlines from a conversation with images.
  """
  name: str
  system: str = ''
  system_end: str = ''
  user: str = ''
  assistant: str = ''
  answer_lead: str = ''
  answer_end: str = ''
  eos: bool = True
  after_image: str = '\n'
  image_first: bool = False
  keep_question: bool = True
  keep_newlines: bool = True


_ROLES = dict(system_end=' ', user='USER: ', assistant=' ASSISTANT:',
              answer_lead=' ')
_HELPFUL = ('The assistant gives helpful, detailed, and polite answers to the '
            "{}'s questions.")
_VICUNA_SYSTEM = ('A chat between a curious user and an artificial '
                  'intelligence assistant. ' + _HELPFUL.format('user'))

TEMPLATES = {t.name: t for t in (
    # LLaVA-1.5: fine-tuning and all image benchmarks.
    Template('vicuna_v1', system=_VICUNA_SYSTEM, **_ROLES),
    # Video-LLaVA's video scripts.
    Template('llava_v1', system=(
        'A chat between a curious human and an artificial intelligence '
        'assistant. ' + _HELPFUL.format('human')), **_ROLES),
    # LLaVA's alignment stage: image, caption, newline; no end of sequence.
    Template('plain', answer_end='\n', eos=False, after_image='',
             image_first=True, keep_question=False),
    # The VoCo authors' template, for their checkpoints and numbers.
    Template('voco_v1', system=(
        'A chat between a curious user and an artificial intelligence '
        'assistant of the image. ' + _HELPFUL.format('user')),
             image_first=True, keep_newlines=False, **_ROLES),
    # Ours: image and VoCo tokens first, then vicuna_v1's text as it is.
    Template('voco', system=_VICUNA_SYSTEM, image_first=True, **_ROLES),
    # The demo's: no system text, no roles.
    Template('short', assistant='\n', image_first=True),
)}


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a rendered conversation.

  Attributes:
    kind: TEXT, IMAGE (one placeholder for a whole image), VOCO (one token)
      or EOS.
    text: the text of a TEXT piece.
    supervised: its tokens are targets of the loss.
    turn: 0 belongs to everybody, t >= 1 to turn t alone.
  """
  kind: str
  text: str = ''
  supervised: bool = False
  turn: int = 0


def get_template(name: str) -> Template:
  """The template of that name.

  Raises:
    DataError: there is none; the message lists them.
  """
  if name not in TEMPLATES:
    raise DataError(f'template {name!r} is unknown; '
                    f'use one of {sorted(TEMPLATES)}')
  return TEMPLATES[name]


def render(turns: Sequence[Turn], template: Template, *,
           num_images: int | None = None, num_voco_tokens: int = 0,
           independent_turns: bool = False,
           add_generation_prompt: bool = False) -> tuple[Piece, ...]:
  """Renders a conversation (without BOS).

  Args:
    turns: the conversation.
    template: the template.
    num_images: images the example has; None counts the `<image>` markers.
    num_voco_tokens: VoCo tokens per image.
    independent_turns: number the turns 1, 2, ...; system text and images are
      turn 0.  Otherwise everything is turn 0 (an ordinary conversation).
    add_generation_prompt: leave out the last turn's answer, to be generated.

  Returns:
    Pieces; neighbouring texts of the same turn and supervision are one piece.

  Raises:
    DataError: markers and images disagree, or the template cannot say this.
  """
  questions, counts = _place_images(turns, num_images)
  _check(turns, counts, template, num_voco_tokens, independent_turns)
  delete_newlines = not template.keep_newlines and sum(counts) > 0
  pieces: list[Piece] = []
  for i, (turn, question) in enumerate(zip(turns, questions, strict=True)):
    own = i + 1 if independent_turns else 0
    open_turn = add_generation_prompt and i == len(turns) - 1
    answer = turn.answer
    if delete_newlines:
      question = question.replace('\n', '')
      answer = answer.replace('\n', '')
    head = [Piece(TEXT, template.system)] if i == 0 else []
    lead = template.system_end if i == 0 else ''
    images = _image_pieces(counts[i], template, num_voco_tokens)
    if template.image_first:
      head = images + head
      user = [Piece(TEXT, lead + template.user, turn=own)]
    else:
      # With an image, the words in front of it are the shared prefix.
      user = [Piece(TEXT, lead + template.user, turn=0 if images else own)]
      if images and not question:  # LLaVA strips '<image>\n' to '<image>'.
        images = images[:-1]
      user += images
    if not template.keep_question:
      question = ''
    pieces += head + user
    pieces.append(Piece(TEXT, question + template.assistant, turn=own))
    if not open_turn:
      text = (template.answer_lead + answer if answer else '')
      pieces.append(Piece(TEXT, text + template.answer_end, True, own))
      if template.eos:
        pieces.append(Piece(EOS, '', True, own))
  return _merge(pieces)


def to_text(pieces: Sequence[Piece]) -> str:
  """The rendered conversation as a string with markers, for people."""
  markers = {IMAGE: IMAGE_MARKER, VOCO: VOCO_MARKER, EOS: EOS_MARKER}
  return ''.join(p.text if p.kind == TEXT else markers[p.kind] for p in pieces)


def _place_images(turns: Sequence[Turn], num_images: int | None
                  ) -> tuple[list[str], list[int]]:
  """Questions without markers, and the number of images of every turn.

  As LLaVA prepares its samples: in a turn with markers they are taken out and
  the rest is stripped.  (LLaVA keeps one marker a turn; here all of them
  count.)  Without any marker the images belong to the first turn.
  """
  counts = [t.question.count(IMAGE_MARKER) for t in turns]
  questions = [t.question.replace(IMAGE_MARKER, '').strip() if n
               else t.question for t, n in zip(turns, counts, strict=True)]
  if num_images is not None and sum(counts) != num_images:
    if sum(counts):
      raise DataError(f'{sum(counts)} {IMAGE_MARKER} marker(s) for '
                      f'{num_images} image(s); there must be one marker for '
                      'every image')
    if counts:
      counts[0] = num_images
  return questions, counts


def _check(turns: Sequence[Turn], counts: list[int], template: Template,
           num_voco_tokens: int, independent_turns: bool) -> None:
  """Raises DataError for what the template cannot render."""
  if not turns:
    raise DataError('the conversation has no turn')
  if any(IMAGE_MARKER in t.answer for t in turns) and sum(counts):
    raise DataError(f'an answer contains {IMAGE_MARKER}; '
                    'only questions may carry images')
  if num_voco_tokens < 0:
    raise DataError(f'num_voco_tokens={num_voco_tokens} must be >= 0')
  if num_voco_tokens and sum(counts) and not template.image_first:
    raise DataError(
        f'template {template.name!r} puts text before the image, which text '
        "after the VoCo tokens could not see; use 'voco' or 'voco_v1'")
  if not template.keep_question and (len(turns) != 1 or not sum(counts)):
    raise DataError(f'template {template.name!r} needs exactly one turn and an '
                    f'image, got {len(turns)} turn(s), {sum(counts)} image(s)')
  if independent_turns and any(counts[1:]):
    raise DataError('independent turns share the images of the first turn; '
                    f'a later turn has an {IMAGE_MARKER} marker of its own')


def _image_pieces(count: int, template: Template, num_voco_tokens: int
                  ) -> list[Piece]:
  """Placeholders of a turn's images, each with its VoCo tokens."""
  block = [Piece(IMAGE), Piece(TEXT, template.after_image)]
  if num_voco_tokens:
    block = [Piece(IMAGE), Piece(TEXT, '\n')]
    block += [Piece(VOCO)] * num_voco_tokens + [Piece(TEXT, '\n')]
  return block * count


def _merge(pieces: list[Piece]) -> tuple[Piece, ...]:
  """Joins neighbouring texts alike in turn and supervision, drops empty."""
  merged: list[Piece] = []
  for piece in pieces:
    if piece.kind == TEXT and not piece.text:
      continue
    last = merged[-1] if merged else None
    if (last and last.kind == piece.kind == TEXT and last.turn == piece.turn
        and last.supervised == piece.supervised):
      merged[-1] = dataclasses.replace(last, text=last.text + piece.text)
    else:
      merged.append(piece)
  return tuple(merged)
