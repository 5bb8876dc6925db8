"""Vocabularies of other formats: the ids are those of their own libraries."""

from __future__ import annotations

import io
import json
import random
import sys

import pytest
import sentencepiece
import wheel_files
from sentencepiece import sentencepiece_model_pb2
from tokenizer_texts import BY_HAND, WORDS, many_texts
from tokenizers import pre_tokenizers

from vlm_compress.config import ConfigError
from vlm_compress.convert import gguf_files, vocabulary
from vlm_compress.data.errors import DataError
from vlm_compress.data.tokenizer import Roles, Tokenizer, load


def trained(**changes):
  """A small sentencepiece model with LLaMA's settings, as bytes."""
  out = io.BytesIO()
  rng = random.Random(1)
  lines = [' '.join(rng.choice(WORDS) for _ in range(20)) for _ in range(300)]
  settings = {
      'model_type': 'bpe', 'vocab_size': 420, 'byte_fallback': True,
      'split_digits': True, 'normalization_rule_name': 'identity',
      'add_dummy_prefix': True, 'remove_extra_whitespaces': False,
      'allow_whitespace_only_pieces': True, 'character_coverage': 0.999,
      'minloglevel': 2, **changes}
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([*lines, *(' ' * n for n in range(20))]),
      model_writer=out, **settings)
  return out.getvalue()


@pytest.fixture(scope='module')
def small():
  return trained()


def write(tmp_path, model):
  (tmp_path / 'tokenizer.model').write_bytes(model)
  return tmp_path / 'tokenizer.model'


def both(path):
  """Our tokenizer and sentencepiece's for the same file."""
  inner, roles = vocabulary.from_sentencepiece(path)
  return Tokenizer(inner, strict=False), roles, (
      sentencepiece.SentencePieceProcessor(model_file=str(path)))


def compare_ids(ours, theirs, texts):
  assert ours.vocab_size == theirs.vocab_size()
  assert ours.tokens(range(ours.vocab_size)) == [
      theirs.id_to_piece(i) for i in range(theirs.vocab_size())]
  wrong = [t for t in texts if ours.encode(t) != theirs.encode(t)]
  assert not wrong, (len(wrong), wrong[:3], ours.tokens(ours.encode(wrong[0])),
                     theirs.encode(wrong[0], out_type=str))


@pytest.mark.parametrize('changes', [
    {}, {'add_dummy_prefix': False}, {'split_digits': False},
    {'byte_fallback': False, 'vocab_size': 200}, {'pad_id': 3}])
def test_ids_of_small_models(changes, tmp_path):
  path = write(tmp_path, trained(**changes))
  ours, roles, theirs = both(path)
  compare_ids(ours, theirs, many_texts())
  assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())
  assert (roles['bos_token'], roles['eos_token'], roles['pad_token']) == (
      '<s>', '</s>', '<pad>' if 'pad_id' in changes else None)
  if changes.get('byte_fallback', True):  # else unknown pieces have a picture
    for text in BY_HAND:
      assert ours.decode(ours.encode(text)) == text.replace('\u2581', ' ')


def test_ids_of_mistral():
  path = wheel_files.extracted(wheel_files.MISTRAL)
  ours, _, theirs = both(path)
  rng = random.Random(2)
  pieces = [theirs.id_to_piece(i).replace('\u2581', ' ')
            for i in range(259, 32000)]
  texts = many_texts(count=2000) + [
      ''.join(rng.choice(pieces) for _ in range(rng.randint(1, 15)))
      for _ in range(6000)]
  compare_ids(ours, theirs, texts)
  assert ours.encode('Hello world') == [22557, 1526]
  # a text that goes on has no space in front
  for first, text in ((True, '\u2581grabbed'), (False, 'grabbed')):
    assert ''.join(ours.tokens(ours.encode('grabbed', first=first))) == text


def test_unknown_characters_fail_by_name(tmp_path):
  path = write(tmp_path, trained(byte_fallback=False, vocab_size=200,
                                 required_chars='\n'))
  ours = Tokenizer(vocabulary.from_sentencepiece(path)[0])
  with pytest.raises(DataError, match='\N{GRINNING FACE}.*not in the vocabulary'):
    ours.encode('the \N{GRINNING FACE}')


def edited(model, change):
  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  change(proto)
  return proto.SerializeToString()


def set_kind(token_id, kind):
  return lambda m: setattr(m.pieces[token_id], 'type', kind)


@pytest.mark.parametrize('change,words', [
    (lambda m: setattr(m.trainer_spec, 'model_type', 1), 'UNIGRAM'),
    (lambda m: setattr(m.normalizer_spec, 'remove_extra_whitespaces', True),
     'remove_extra_whitespaces'),
    (lambda m: setattr(m.normalizer_spec, 'precompiled_charsmap', b'x'),
     'normalisation'),
    (lambda m: setattr(m.trainer_spec, 'treat_whitespace_as_suffix', True),
     'treat_whitespace_as_suffix'),
    (set_kind(300, 4), 'user-defined'), (set_kind(265, 5), 'unused piece'),
    (set_kind(2, 1), 'end-of-sequence'), (set_kind(0, 1), 'unknown one'),
    (set_kind(9, 1), '255 byte pieces'),
    (lambda m: setattr(m.pieces[301], 'piece', m.pieces[300].piece), 'twice'),
    (lambda m: m.ClearField('pieces'), 'no sentencepiece model')])
def test_models_that_are_refused(change, words, small, tmp_path):
  path = write(tmp_path, edited(small, change))
  with pytest.raises(ConfigError, match=words) as caught:
    vocabulary.from_sentencepiece(path)
  assert str(path) in str(caught.value)


def test_damaged_models_are_refused(small, tmp_path):
  for data in (small[:-40], b'IQ== 0\nIg== 1\n'):  # the second is tiktoken's
    with pytest.raises(ConfigError, match='no sentencepiece model'):
      vocabulary.from_sentencepiece(write(tmp_path, data))


def test_files_of_a_directory(small, tmp_path):
  write(tmp_path, small)
  files = vocabulary.build(tmp_path, None, 420)
  assert sorted(files) == ['tokenizer.json', 'tokenizer_config.json']
  with pytest.raises(ConfigError, match='420 tokens.*419 rows'):
    vocabulary.build(tmp_path, None, 419)
  assert vocabulary.build(tmp_path, None, 500) == files  # padded
  (tmp_path / 'added_tokens.json').write_text(
      json.dumps({'<voco>': 421, '[PAD]': 420}))
  (tmp_path / 'tokenizer_config.json').write_text('{"pad_token": "[PAD]"}')
  files = vocabulary.build(tmp_path, None, 422)
  assert sorted(files) == ['tokenizer.json']
  (tmp_path / 'tokenizer.json').write_text(files['tokenizer.json'])
  tokenizer = load(tmp_path / 'tokenizer.json')
  assert (tokenizer.vocab_size, tokenizer.pad_id) == (421, 420)
  assert not {420, 421} & set(tokenizer.encode('[PAD] <voco> <image> </s>'))
  assert vocabulary.build(tmp_path, None, 421) == {}
  with pytest.raises(ConfigError, match='421 tokens.*420 rows'):
    vocabulary.build(tmp_path, None, 420)


@pytest.mark.parametrize('added,words', [
    ({'[PAD]': 421}, r"'\[PAD\]' has id 421.*is 420"), ([1], 'no readable'),
    ({'</s>': 420}, "'</s>' has id 420")])
def test_added_tokens_that_do_not_fit(added, words, small, tmp_path):
  write(tmp_path, small)
  (tmp_path / 'added_tokens.json').write_text(json.dumps(added))
  with pytest.raises(ConfigError, match=words):
    vocabulary.build(tmp_path, None, 500)


# GGUF ---------------------------------------------------------------------


def scored(model):
  """The metadata that a GGUF has of a sentencepiece model."""
  pieces = sentencepiece_model_pb2.ModelProto.FromString(model).pieces
  return {f'tokenizer.ggml.{key}': value for key, value in {
      'model': 'llama', 'tokens': [p.piece for p in pieces],
      'scores': [p.score for p in pieces],
      'token_type': [p.type for p in pieces]}.items()}


def test_a_gguf_with_scores(small, tmp_path):
  inner, roles = vocabulary.from_gguf(scored(small), tmp_path)
  compare_ids(Tokenizer(inner), sentencepiece.SentencePieceProcessor(
      model_proto=small), many_texts())
  assert (roles['bos_token'], roles['eos_token'], roles['add_bos_token']) == (
      '<s>', '</s>', True)
  inner, roles = vocabulary.from_gguf({
      **scored(small), 'tokenizer.ggml.add_space_prefix': False,
      'tokenizer.ggml.add_bos_token': False}, tmp_path)
  proto = edited(small, lambda m: setattr(m.normalizer_spec, 'add_dummy_prefix',
                                          False))
  compare_ids(Tokenizer(inner), sentencepiece.SentencePieceProcessor(
      model_proto=proto), many_texts())
  assert roles['add_bos_token'] is False


def byte_level(**fields):
  """Metadata of a byte-level vocabulary with two merges."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  fields = {'model': 'gpt2', 'pre': 'gpt-2', 'eos_token_id': 257,
            'tokens': [*letters, '<begin>', '<end>', 'ab', '12', '<tool>'],
            'token_type': [1] * 256 + [3, 3, 1, 1, 4], 'merges': ['a b', '1 2'],
            **fields}
  return {f'tokenizer.ggml.{key}': value for key, value in fields.items()}


@pytest.mark.parametrize('pre,text,words', [
    ('gpt-2', "I'll ab12  x\n y", ['I', "'", 'l', 'l', 'Ġ', 'ab', '12', 'Ġ',
                                   'Ġ', 'x', 'Ċ', 'Ġ', 'y']),
    ('smollm', 'ab12 12', ['ab', '1', '2', 'Ġ', '1', '2']),
    ('qwen2', 'ab12 12', ['ab', '1', '2', 'Ġ', '1', '2']),
    ('gpt-2', 'a<tool>b', ['a', '<tool>', 'b']),
    ('gpt-2', 'a<end>', ['a', '<', 'e', 'n', 'd', '>'])])
def test_words_of_byte_level_vocabularies(pre, text, words, tmp_path):
  inner, roles = vocabulary.from_gguf(byte_level(pre=pre), tmp_path)
  ours = Tokenizer(inner, roles=Roles(None, roles['eos_token']))
  assert ours.tokens(ours.encode(text)) == words
  assert ours.decode(ours.encode(text)) == text
  assert roles['bos_token'] is None and not roles['add_bos_token']


def test_qwen2_composes_and_gpt2_does_not(tmp_path):
  text = 'cafe\u0301'
  for pre, back in (('qwen2', 'caf\u00e9'), ('gpt-2', text)):
    inner, _ = vocabulary.from_gguf(byte_level(pre=pre), tmp_path)
    assert inner.decode(inner.encode(text).ids) == back


def test_bytes_without_a_token_do_not_vanish(tmp_path):
  fields = byte_level()
  tokens = fields['tokenizer.ggml.tokens']
  tokens[tokens.index('Ċ')] = 'xy'
  with pytest.raises(ConfigError, match='1 of the 256 byte tokens'):
    vocabulary.from_gguf(fields, tmp_path)
  fields['tokenizer.ggml.unknown_token_id'] = 256
  inner, _ = vocabulary.from_gguf(fields, tmp_path)
  ours = Tokenizer(inner, strict=False, roles=Roles(None, '<end>'))
  assert ours.encode('a\n') == [*ours.encode('a'), 256]
  with pytest.raises(DataError, match='is not in the vocabulary'):
    Tokenizer(inner, roles=Roles(None, '<end>')).encode('a\n')


@pytest.mark.parametrize('fields,words', [
    ({'model': 'bert'}, "'bert' is not supported"),
    ({'pre': 'llama-bpe'}, "'llama-bpe' is not supported.*qwen2"),
    ({'pre': None}, 'None is not supported'),
    ({'merges': ['a q?']}, 'merges do not fit'),
    ({'token_type': [1]}, 'one value per token'),
    ({'eos_token_id': None}, 'no tokenizer.ggml.eos_token_id'),
    ({'bos_token_id': 261}, 'bos_token_id=261, but there are 261 tokens'),
    ({'tokens': None}, 'no vocabulary'),
    ({'remove_extra_whitespaces': True}, 'remove_extra_whitespaces')])
def test_gguf_vocabularies_that_are_refused(fields, words, tmp_path):
  with pytest.raises(ConfigError, match=words):
    vocabulary.from_gguf(byte_level(**fields), tmp_path / 'a.gguf')


@pytest.mark.parametrize('package,call', [
    ('sentencepiece', lambda path: vocabulary.from_sentencepiece(path)),
    ('tokenizers', lambda path: vocabulary.from_gguf(byte_level(), path))])
def test_without_the_packages(package, call, small, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ConfigError, match=rf'{package}.*\.\[convert\]'):
    call(write(tmp_path, small))


def test_vocabulary_of_smollm2(tmp_path):
  path = wheel_files.extracted(wheel_files.SMOLLM2)
  metadata = gguf_files.GgufFile(path).metadata
  for name, text in vocabulary.build(path, metadata, 49152).items():
    (tmp_path / name).write_text(text, encoding='utf-8')
  ours = load(tmp_path / 'tokenizer.json')
  assert ours.vocab_size == 49152
  assert ours.tokens([0, 1, 2]) == ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
  assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id) == (None, 2, 2, 0)
  assert ours.tokens(ours.encode('The capital of 2024')) == [
      'The', 'Ġcapital', 'Ġof', 'Ġ', '2', '0', '2', '4']
  for text in many_texts():
    if '\x00' not in text:
      assert ours.decode(ours.encode(text)) == text
  assert not set(range(17)) & set(ours.encode('<|im_start|>a<|im_end|><image>'))
  config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  assert config['bos_token'] == '<|im_start|>' and not config['add_bos_token']
  with pytest.raises(ConfigError, match='49152 tokens.*49000 rows'):
    vocabulary.build(path, metadata, 49000)
