"""Rendering: texts of every template, places of images, supervised pieces."""

from __future__ import annotations

import pytest

from vlm_compress.data import templates
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Turn
from vlm_compress.data.templates import EOS, IMAGE, TEXT, VOCO, Piece

SYSTEM = ('A chat between a curious user and an artificial intelligence '
          'assistant. The assistant gives helpful, detailed, and polite '
          "answers to the user's questions.")
TWO = (Turn('<image>\nq1', 'a1'), Turn('q2\nx', 'a2\ny'))


def text(turns, name, **kwargs):
  return templates.to_text(
      templates.render(turns, templates.get_template(name), **kwargs))


def supervised(pieces):
  return templates.to_text([p for p in pieces if p.supervised])


def test_vicuna_text():
  assert text(TWO, 'vicuna_v1') == (
      SYSTEM + ' USER: <image>\nq1 ASSISTANT: a1</s>'
      'USER: q2\nx ASSISTANT: a2\ny</s>')


def test_llava_v1_says_human():
  human = SYSTEM.replace('curious user', 'curious human').replace(
      "user's", "human's")
  assert text(TWO[1:], 'llava_v1') == (
      human + ' USER: q2\nx ASSISTANT: a2\ny</s>')


def test_voco_v1_deletes_newlines_and_says_of_the_image():
  system = SYSTEM.replace('assistant. ', 'assistant of the image. ')
  assert text(TWO, 'voco_v1', num_voco_tokens=2) == (
      '<image>\n<voco><voco>\n' + system +
      ' USER: q1 ASSISTANT: a1</s>USER: q2x ASSISTANT: a2y</s>')
  # Text only: no VoCo tokens, newlines stay.
  assert text(TWO[1:], 'voco_v1', num_voco_tokens=2) == (
      system + ' USER: q2\nx ASSISTANT: a2\ny</s>')


def test_voco_is_image_first_then_vicuna_text():
  rest = SYSTEM + (' USER: q1 ASSISTANT: a1</s>'
                   'USER: q2\nx ASSISTANT: a2\ny</s>')
  assert text(TWO, 'voco', num_voco_tokens=1) == '<image>\n<voco>\n' + rest
  assert text(TWO, 'voco') == '<image>\n' + rest


def test_short_text():
  assert text(TWO, 'short') == '<image>\nq1\na1</s>q2\nx\na2\ny</s>'
  assert text(TWO, 'short', num_voco_tokens=3) == (
      '<image>\n<voco><voco><voco>\nq1\na1</s>q2\nx\na2\ny</s>')
  assert text(TWO[1:], 'short', num_voco_tokens=3) == 'q2\nx\na2\ny</s>'


def test_plain_keeps_the_caption_only():
  turns = [Turn('Describe it.\n<image>', 'a cat')]
  pieces = templates.render(turns, templates.get_template('plain'))
  assert pieces == (Piece(IMAGE), Piece(TEXT, 'a cat\n', True))


@pytest.mark.parametrize('name, lead', [
    ('vicuna_v1', ' '), ('llava_v1', ' '), ('voco', ' '), ('short', '')])
def test_supervised_is_answer_and_eos(name, lead):
  pieces = templates.render(TWO, templates.get_template(name))
  assert supervised(pieces) == f'{lead}a1</s>{lead}a2\ny</s>'


def test_role_words_inside_an_answer_keep_the_mask():
  # LLaVA's code would mask this whole sample.
  turns = [Turn('q', 'USER: x ASSISTANT: y ASSISTANT: z'), Turn('r', 's')]
  pieces = templates.render(turns, templates.get_template('vicuna_v1'))
  assert supervised(pieces) == ' USER: x ASSISTANT: y ASSISTANT: z</s> s</s>'


@pytest.mark.parametrize('name, end', [
    ('vicuna_v1', 'q2\nx ASSISTANT:'), ('voco_v1', 'q2x ASSISTANT:'),
    ('short', 'q2\nx\n')])
def test_generation_prompt_opens_the_last_turn(name, end):
  rendered = text(TWO, name, add_generation_prompt=True)
  assert rendered.endswith('</s>' + end.replace('q2', 'USER: q2')
                           if name != 'short' else '</s>' + end)
  full = text(TWO, name)
  assert full.startswith(rendered) and full != rendered


def test_image_moves_to_the_front_of_its_turn():
  for question in ('a\n<image>', '<image>a', ' <image>\na ', 'a<image>'):
    assert text([Turn(question, 'b')], 'vicuna_v1').endswith(
        ' USER: <image>\na ASSISTANT: b</s>')
  # LLaVA's double newline stays when the marker stood in the middle.
  assert 'USER: <image>\na\n\nb ASSISTANT' in text(
      [Turn('a\n<image>\nb', 'c')], 'vicuna_v1')
  # Nothing but the marker: the newline is stripped too.
  assert 'USER: <image> ASSISTANT' in text([Turn('<image>', 'c')], 'vicuna_v1')


def test_images_without_markers_stand_first():
  turns = [Turn('q1', 'a1'), Turn('q2', 'a2')]
  assert text(turns, 'short', num_images=2) == (
      '<image>\n<image>\nq1\na1</s>q2\na2</s>')
  assert 'USER: <image>\nq1 ' in text(turns, 'vicuna_v1', num_images=1)


def test_every_image_has_its_voco_tokens():
  turns = [Turn('<image><image>q1', 'a1'), Turn('<image>q2', 'a2')]
  block = '<image>\n<voco><voco>\n'
  assert text(turns, 'voco', num_voco_tokens=2) == (
      block + block + SYSTEM + ' USER: q1 ASSISTANT: a1</s>'
      + block + 'USER: q2 ASSISTANT: a2</s>')


def test_independent_turns_are_numbered_and_share_the_prefix():
  pieces = templates.render(
      [Turn('q1', 'a1'), Turn('q2', 'a2')], templates.get_template('short'),
      num_images=1, num_voco_tokens=1, independent_turns=True)
  assert pieces == (
      Piece(IMAGE), Piece(TEXT, '\n'), Piece(VOCO), Piece(TEXT, '\n'),
      Piece(TEXT, 'q1\n', turn=1), Piece(TEXT, 'a1', True, 1),
      Piece(EOS, '', True, 1),
      Piece(TEXT, 'q2\n', turn=2), Piece(TEXT, 'a2', True, 2),
      Piece(EOS, '', True, 2))


def test_independent_turns_of_vicuna_share_everything_up_to_the_image():
  pieces = templates.render(TWO, templates.get_template('vicuna_v1'),
                            independent_turns=True)
  shared = templates.to_text([p for p in pieces if p.turn == 0])
  assert shared == SYSTEM + ' USER: <image>\n'
  assert templates.to_text(pieces) == text(TWO, 'vicuna_v1')


@pytest.mark.parametrize('turns, name, kwargs, message', [
    ([], 'short', {}, 'no turn'),
    ([Turn('<image>q', 'a')], 'short', {'num_images': 2}, '1 <image>.*2 image'),
    ([Turn('<image>q', 'a')], 'short', {'num_images': 0}, '1 <image>.*0 image'),
    ([Turn('<image>q', '<image>')], 'short', {}, 'an answer contains'),
    ([Turn('<image>q', 'a')], 'vicuna_v1', {'num_voco_tokens': 1}, "use 'voco'"),
    ([Turn('<image>q', 'a')], 'voco', {'num_voco_tokens': -1}, 'must be >= 0'),
    ([Turn('q', 'a')], 'plain', {}, 'exactly one turn and an image'),
    (TWO, 'plain', {}, 'exactly one turn and an image'),
    ([Turn('<image>q', 'a')] * 2, 'short', {'independent_turns': True},
     'marker of its own'),
])
def test_refused(turns, name, kwargs, message):
  with pytest.raises(DataError, match=message):
    text(turns, name, **kwargs)


def test_unknown_template_lists_the_known():
  with pytest.raises(DataError, match=r"'vicuna_v2' is unknown.*'vicuna_v1'"):
    templates.get_template('vicuna_v2')
