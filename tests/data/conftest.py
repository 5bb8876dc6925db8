"""Fixtures of the data tests: tokenizers and LLaVA's format."""

from __future__ import annotations

import pathlib

import llama_vocab
import pytest

from vlm_compress.convert import vocabulary
from vlm_compress.data import tokenizer as tokenizer_lib


@pytest.fixture(scope='session')
def llama_tokenizer():
  """LLaMA's own tokenizer; skips where its package was not fetched."""
  if llama_vocab.missing():
    pytest.skip(llama_vocab.missing())
  return llama_vocab.load()


@pytest.fixture(scope='session')
def word_tokenizer():
  """A small word-level tokenizer."""
  return tokenizer_lib.word_level([
      'what is at the top left?', 'a red apple, a dog.', 'where is it',
      'A chat between a curious user and an artificial intelligence '
      'assistant of the image. The assistant gives helpful, detailed, and '
      "polite answers to the user's questions. human USER: ASSISTANT:"])


@pytest.fixture(scope='session')
def tiny_bpe():
  """A tokenizer that works like LLaMA's, with two merges."""
  vocab = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)),
           '\u2581', 'a', 'b', 'ab', '\u2581ab']
  return tokenizer_lib.Tokenizer(vocabulary.llama_bpe(
      vocab, [('a', 'b'), ('\u2581', 'ab')]))


@pytest.fixture(scope='session')
def llava_files() -> pathlib.Path:
  """Folder with invented rows in LLaVA's format, images and expected ids."""
  return pathlib.Path(__file__).parents[1] / 'data_files' / 'llava'
