"""Streamed text: what was given out stays true, and nothing is lost."""

from __future__ import annotations

import core_helpers as helpers
import pytest
import tokenizers
from tokenizers import decoders, models

from vlm_compress.config import ConfigError
from vlm_compress.convert.vocabulary import llama_bpe
from vlm_compress.data.examples import Turn
from vlm_compress.data.prompts import TextStream, prompt_row
from vlm_compress.data.tokenizer import Tokenizer, word_level

SPACE = '\u2581'
BYTES = [f'<0x{i:02X}>' for i in range(256)]
LLAMA = Tokenizer(llama_bpe(
    ['<unk>', '<s>', '</s>', *BYTES, SPACE, 'a', 'b', f'{SPACE}a'],
    [(SPACE, 'a')]))


def byte_level() -> Tokenizer:
  """One token per byte, as GPT-2's and Qwen's tokenizers end up with."""
  kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
  chars, extra = {}, 256
  for byte in range(256):
    chars[byte] = chr(byte) if byte in kept else chr(extra)
    extra += byte not in kept
  vocab = {c: i for i, c in enumerate(['<s>', '</s>', *chars.values()])}
  inner = tokenizers.Tokenizer(models.BPE(vocab, []))
  inner.decoder = decoders.ByteLevel()
  inner.add_special_tokens(['<s>', '</s>'])
  return Tokenizer(inner)


BYTE_LEVEL = byte_level()
WORDS = word_level(['a cat, a dog. is it ?'])


def llama_ids(data: bytes) -> list[int]:
  return [3 + b for b in data]


A, SPACE_A = 260, 262  # 'a' and ' a'


@pytest.mark.parametrize('tokenizer, ids, text', [
    (LLAMA, [SPACE_A, *llama_ids('éß😀'.encode()), A, SPACE_A], 'aéß😀a a'),
    (LLAMA, [A, *llama_ids('😀'.encode()[:3]), A], None),  # never completed
    (LLAMA, [A, *llama_ids('é'.encode() + b'\xc3'), A], None),  # spoils the é
    (LLAMA, [A, *llama_ids('é'.encode())], 'aé'),  # ends in a byte
    (LLAMA, [A, *llama_ids(b'\xc3')], 'a\ufffd'),
    (LLAMA, [], ''),
    (BYTE_LEVEL, [2 + b for b in 'aé😀, b'.encode()], 'aé😀, b'),
    (BYTE_LEVEL, [2 + b for b in b'a\xf0\x9f'], None),
    (WORDS, WORDS.encode('a cat, is it\n\na dog.'), 'a cat, is it\n\na dog.'),
    (WORDS, [WORDS.pad_id, *WORDS.encode('a dog'), 2, 9999], 'a dog')])
def test_pieces_are_certain_and_make_the_text(tokenizer, ids, text):
  whole, stream, given = tokenizer.decode(ids), TextStream(tokenizer), ''
  assert text is None or whole == text
  for token in ids:
    given += stream.push(token)
    assert whole.startswith(given)
  assert given + stream.finish() == whole


def test_words_come_at_once_and_parts_of_characters_do_not():
  stream = TextStream(WORDS)
  assert [stream.push(i) for i in WORDS.encode('a cat, a dog')] == [
      'a', ' cat', ',', ' a', ' dog']
  stream = TextStream(BYTE_LEVEL)
  assert [stream.push(2 + b) for b in 'aé.'.encode()] == ['a', '', 'é', '.']


def test_a_tokenizer_with_more_words_than_the_model_is_refused():
  config = helpers.tiny()
  words = word_level([f'w{i}' for i in range(100)])
  assert prompt_row('w1', 0, words, config, 'short')['input_ids'].size == 3
  with pytest.raises(ConfigError, match='tokenizer.json gives the id 1.*=96'):
    prompt_row([Turn('w99')], 0, words, config, 'short')
