"""Ids, loss masks and turn ids, among them LLaVA's and VoCo-LLaMA's own."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer as Inner

from vlm_compress import presets
from vlm_compress.data import encode as encode_lib
from vlm_compress.data import templates
from vlm_compress.data.encode import encode
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Example, Turn, caption_example
from vlm_compress.data.llava_json import pair_turns
from vlm_compress.data.tokenizer import Roles, Tokenizer
from vlm_compress.models.sequence import VISUAL, expand_row

GRID = Example('grid-7', images=(b'png',), caption='a dog, a red apple', turns=(
    Turn('what is at the top left?', 'a dog'),
    Turn('where is the red apple?', 'left')))
# Name in the expected file -> template and VoCo tokens.
UPSTREAM = {'vicuna_v1': ('vicuna_v1', 0), 'plain': ('plain', 0),
            'voco_2': ('voco_v1', 2)}
SAMPLES = [('mix665k', i, name) for i in range(8)
           for name in ('vicuna_v1', 'voco_2')]
SAMPLES += [('pretrain_558k', i, 'plain') for i in range(2)]
JSON_FILES = {'mix665k': 'llava_v1_5_mix665k.json',
              'pretrain_558k': 'blip_laion_cc_sbu_558k.json'}


def words(tokenizer, row, mask=None):
  ids = row.input_ids if mask is None else row.input_ids[mask]
  return ' '.join(tokenizer.tokens(ids))


def check_types(row):
  assert row.input_ids.dtype == row.turn_ids.dtype == np.int32
  assert row.loss_mask.dtype == bool
  assert len(row) == len(row.loss_mask) == len(row.turn_ids)


# Word-level: never skipped.


def test_short_row(word_tokenizer):
  row = encode(GRID, word_tokenizer, 'short')
  check_types(row)
  assert words(word_tokenizer, row) == (
      '<s> <-200> \n what is at the top left ? \n a dog </s> '
      'where is the red apple ? \n left </s>')
  assert words(word_tokenizer, row, row.loss_mask) == 'a dog </s> left </s>'
  assert not row.turn_ids.any()


def test_short_row_with_voco_tokens_and_independent_turns(word_tokenizer):
  row = encode(GRID, word_tokenizer, 'short', num_voco_tokens=2,
               independent_turns=True,
               voco_token_index=word_tokenizer.vocab_size)
  voco = f'<{word_tokenizer.vocab_size}>'
  check_types(row)
  assert words(word_tokenizer, row, row.turn_ids == 0) == (
      f'<s> <-200> \n {voco} {voco} \n')
  assert words(word_tokenizer, row, row.turn_ids == 1) == (
      'what is at the top left ? \n a dog </s>')
  assert words(word_tokenizer, row, row.turn_ids == 2) == (
      'where is the red apple ? \n left </s>')
  assert words(word_tokenizer, row, row.loss_mask) == 'a dog </s> left </s>'
  assert (np.diff(row.turn_ids) >= 0).all()


@pytest.mark.parametrize('name', sorted(set(templates.TEMPLATES) - {'plain'}))
@pytest.mark.parametrize('independent', [False, True])
def test_supervised_tokens_of_every_template(word_tokenizer, name, independent):
  row = encode(GRID, word_tokenizer, name, independent_turns=independent)
  assert words(word_tokenizer, row, row.loss_mask) == 'a dog </s> left </s>'
  assert row.input_ids[0] == word_tokenizer.bos_id
  assert (row.input_ids == -200).sum() == 1
  assert set(row.turn_ids) == ({0, 1, 2} if independent else {0})
  # Numbering the turns changes no id.
  assert row.input_ids.tolist() == encode(
      GRID, word_tokenizer, name).input_ids.tolist()


def test_plain_row_is_supervised_on_caption_and_newline(word_tokenizer):
  row = encode(caption_example(GRID), word_tokenizer, 'plain')
  assert words(word_tokenizer, row) == '<s> <-200> a dog , a red apple \n'
  assert words(word_tokenizer, row, row.loss_mask) == 'a dog , a red apple \n'


@pytest.mark.parametrize('name', ['short', 'vicuna_v1', 'voco'])
def test_prompt_is_the_beginning_of_the_training_row(word_tokenizer, name):
  full = encode(GRID, word_tokenizer, name)
  prompt = encode(GRID, word_tokenizer, name, add_generation_prompt=True)
  n = len(prompt)
  assert prompt.input_ids.tolist() == full.input_ids[:n].tolist()
  assert words(word_tokenizer, full)[-9:] == 'left </s>'
  assert len(full) == n + 2 and full.loss_mask[n:].all()
  assert not prompt.loss_mask[-1]


def test_text_only_row(word_tokenizer):
  example = Example('t', (Turn('what is it', 'a dog'),))
  row = encode(example, word_tokenizer, 'short', num_voco_tokens=4)
  assert words(word_tokenizer, row) == '<s> what is it \n a dog </s>'


def test_turns_instead_of_an_example(word_tokenizer):
  turns = [Turn('<image>\nwhat is it', 'a dog')]
  row = encode(turns, word_tokenizer, 'short', image_token_index=-7)
  assert words(word_tokenizer, row) == '<s> <-7> \n what is it \n a dog </s>'


def test_errors_name_the_example(word_tokenizer):
  bad = Example('grid-8', (Turn('what is <image>', 'a dog'),))
  with pytest.raises(DataError, match="example 'grid-8': 1 <image> marker"):
    encode(bad, word_tokenizer, 'short')
  unknown = Example('grid-9', (Turn('what is it', 'a zebra'),))
  with pytest.raises(DataError, match="example 'grid-9': 'zebra' in"):
    encode(unknown, word_tokenizer, 'short')
  with pytest.raises(DataError, match="template 'nope' is unknown"):
    encode(GRID, word_tokenizer, 'nope')


def test_dummy_prefix_only_after_placeholders_and_eos(tiny_bpe):
  """`_ab`, with SentencePiece's dummy space, begins a text; `ab` goes on."""
  turns = [Turn('<image>ab', 'ab'), Turn('ab', 'ab')]
  row = encode(turns, tiny_bpe, 'short')
  assert words(tiny_bpe, row) == (
      '<s> <-200> _ <0x0A> ab <0x0A> ab </s> _ab <0x0A> ab </s>'
      .replace('_', '\u2581'))
  assert words(tiny_bpe, row, row.loss_mask) == 'ab </s> ab </s>'


def test_a_tokenizer_without_bos(word_tokenizer, tmp_path):
  word_tokenizer.save(tmp_path / 'tokenizer.json')
  without = Tokenizer(Inner.from_file(str(tmp_path / 'tokenizer.json')),
                      roles=Roles(bos=None))
  row, usual = (encode(GRID, t, 'short') for t in (without, word_tokenizer))
  check_types(row)
  for name in ('input_ids', 'loss_mask', 'turn_ids'):
    np.testing.assert_array_equal(getattr(row, name), getattr(usual, name)[1:])
  tokens = expand_row(row.input_ids.tolist(), row.loss_mask.tolist(),
                      row.turn_ids.tolist(), presets.preset('tiny'))
  assert tokens['token_types'][0] == VISUAL
  with pytest.raises(DataError, match="example 'grid-7': VoCo tokens .* BOS.*"
                     'add_bos_token'):
    encode(GRID, without, 'short', num_voco_tokens=2)


# LLaMA's vocabulary: skipped where its package was not fetched.


def sample(llava_files, part, index):
  raw = json.loads((llava_files / JSON_FILES[part]).read_text())[index]
  expected = json.loads((llava_files / 'expected_train.json').read_text())
  assert raw['id'] == expected[part][index]['id']
  return pair_turns(raw['conversations']), expected[part][index]


def test_samples_are_all_the_expected_ones(llava_files):
  expected = json.loads((llava_files / 'expected_train.json').read_text())
  assert sorted(SAMPLES) == sorted(
      (part, i, name) for part, rows in expected.items()
      for i, row in enumerate(rows) for name in UPSTREAM if name in row)


@pytest.mark.parametrize('part, index, name', SAMPLES)
def test_text_of_upstream(llava_files, part, index, name):
  turns, expected = sample(llava_files, part, index)
  template, num_voco_tokens = UPSTREAM[name]
  pieces = templates.render(turns, templates.get_template(template),
                            num_voco_tokens=num_voco_tokens)
  assert templates.to_text(pieces) == expected[name]['text']
  answers = templates.to_text([p for p in pieces if p.supervised])
  assert answers.replace('</s> ', '</s>').strip(' ') == ''.join(
      expected[name]['supervised'])


@pytest.mark.parametrize('part, index, name', SAMPLES)
def test_ids_and_labels_of_upstream(llama_tokenizer, llava_files, part, index,
                                    name):
  turns, expected = sample(llava_files, part, index)
  template, num_voco_tokens = UPSTREAM[name]
  row = encode(turns, llama_tokenizer, template, num_voco_tokens)
  labels = np.where(row.loss_mask, row.input_ids, -100)
  assert row.input_ids.tolist() == expected[name]['input_ids']
  assert labels.tolist() == expected[name]['labels']


@pytest.mark.parametrize('key', ['short/vicuna_v1', 'short/voco',
                                 'mc/vicuna_v1', 'mc/voco'])
def test_prompts_of_upstream(llama_tokenizer, llava_files, key):
  expected = json.loads(
      (llava_files / 'expected_prompts.json').read_text())[key]
  question = {
      'short': 'What is this?\n'
               'Answer the question using a single word or phrase.',
      'mc': "Which one?\nA. red\nB. blue\nAnswer with the option's letter "
            'from the given choices directly.'}[key.split('/')[0]]
  name, count = (('voco_v1', 2) if key.endswith('voco') else ('vicuna_v1', 0))
  turns = [Turn('<image>\n' + question)]
  pieces = templates.render(turns, templates.get_template(name),
                            num_voco_tokens=count, add_generation_prompt=True)
  row = encode(turns, llama_tokenizer, name, count,
               add_generation_prompt=True)
  assert templates.to_text(pieces) == expected['text']
  assert row.input_ids.tolist() == expected['input_ids']
  assert not row.loss_mask.any()


def test_pieces_give_the_ids_of_the_whole_text(llama_tokenizer):
  """A cut in front of a space or behind a newline changes no LLaMA id."""
  parts = ['a', ' ', '  ', '\n', 'the', '\xe9', '1', '.', ',', 'ASSISTANT:',
           ' USER: ', '\N{LLAMA}', '<0x0A>', '</s>', '\u2581', '\t']
  rng = random.Random(0)
  for _ in range(500):
    question, answer = (
        ''.join(rng.choices(parts, k=rng.randint(1, 8))) for _ in range(2))
    whole = f'USER: {question} ASSISTANT: {answer}'
    pieces = [templates.Piece(templates.TEXT, f'USER: {question} ASSISTANT:'),
              templates.Piece(templates.TEXT, f' {answer}', True)]
    row = encode_lib.encode_pieces(pieces, llama_tokenizer)
    assert row.input_ids.tolist() == [1, *llama_tokenizer.encode(whole)]
    behind = encode_lib.encode_pieces(
        [templates.Piece(templates.TEXT, '\n'),
         templates.Piece(templates.TEXT, answer, turn=1)], llama_tokenizer)
    assert behind.input_ids.tolist() == [
        1, *llama_tokenizer.encode('\n' + answer)]


def test_role_words_in_an_answer_stay_supervised(llama_tokenizer):
  """Deliberate: upstream masks the whole sample, see templates.py."""
  turns = [Turn('q', 'He said ASSISTANT: yes ASSISTANT: no'), Turn('r', 's')]
  row = encode(turns, llama_tokenizer, 'vicuna_v1')
  assert llama_tokenizer.decode(row.input_ids[row.loss_mask]) == (
      'He said ASSISTANT: yes ASSISTANT: no s')


def test_empty_answer_is_its_end_only(llama_tokenizer):
  row = encode([Turn('q', '')], llama_tokenizer, 'vicuna_v1')
  assert row.input_ids[row.loss_mask].tolist() == [llama_tokenizer.eos_id]


@pytest.mark.parametrize('name', ['vicuna_v1', 'voco', 'short'])
def test_numbering_turns_changes_no_llama_id(llama_tokenizer, name):
  kwargs = {} if name == 'vicuna_v1' else {'num_voco_tokens': 2}
  one, two = (encode(GRID, llama_tokenizer, name, independent_turns=i, **kwargs)
              for i in (False, True))
  assert one.input_ids.tolist() == two.input_ids.tolist()
  assert one.loss_mask.tolist() == two.loss_mask.tolist()
  assert set(two.turn_ids) == {0, 1, 2}
