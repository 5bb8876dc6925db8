"""Tokenizers: word-level for small models, LLaMA's BPE with its true ids."""

from __future__ import annotations

import json
import pickle

import pytest

from vlm_compress.data import tokenizer as tokenizer_lib
from vlm_compress.data.errors import DataError


def test_word_level_ids_do_not_depend_on_order():
  texts = ['what is here?\na cat', 'a dog, a cat.']
  one, two = (tokenizer_lib.word_level(t) for t in (texts, texts[::-1]))
  assert one.tokens(range(one.vocab_size)) == [
      '<pad>', '<s>', '</s>', '<unk>', '\n',
      ',', '.', '?', 'a', 'cat', 'dog', 'here', 'is', 'what']
  assert two.encode(texts[0]) == one.encode(texts[0])
  assert (one.pad_id, one.bos_id, one.eos_id, one.unk_id) == (0, 1, 2, 3)
  assert one.newline_ids == (4,)


def test_word_has_one_id_wherever_it_stands(word_tokenizer):
  apple, = word_tokenizer.encode('apple')
  for text in ('a red apple', 'apple, dog', 'what?\napple', 'apple\nwhat'):
    for first in (True, False):
      assert word_tokenizer.encode(text, first=first).count(apple) == 1


@pytest.mark.parametrize('text', [
    'what is at the top left?\na red apple.', 'a red apple, a dog.',
    'where is it?', '\nred\n', 'apple', ''])
def test_word_level_round_trip(word_tokenizer, text):
  assert word_tokenizer.decode(word_tokenizer.encode(text)) == text


def test_unknown_word_fails_with_the_word(word_tokenizer):
  with pytest.raises(DataError, match="'pear' in 'a pear, red'"):
    word_tokenizer.encode('a pear, red')


def test_unknown_word_is_unk_when_not_strict(tmp_path, word_tokenizer):
  word_tokenizer.save(tmp_path / 'tokenizer.json')
  loose = tokenizer_lib.load(tmp_path / 'tokenizer.json', strict=False)
  assert loose.encode('pear')[0] == loose.unk_id


def test_decode_leaves_out_specials_and_placeholders(word_tokenizer):
  t = word_tokenizer
  ids = [t.bos_id, -200, t.vocab_size, 32000, *t.encode('a dog'), t.eos_id,
         t.pad_id]
  assert t.decode(ids) == 'a dog'
  assert t.tokens(ids[:3]) == ['<s>', '<-200>', f'<{t.vocab_size}>']


def test_save_load_and_pickle_keep_the_ids(tmp_path, word_tokenizer):
  path = tmp_path / 'tokenizer.json'
  word_tokenizer.save(path)
  assert [p.name for p in tmp_path.iterdir()] == ['tokenizer.json']
  text = 'what is at the top left?\na red apple.'
  for copy in (tokenizer_lib.load(path),
               pickle.loads(pickle.dumps(word_tokenizer))):
    assert copy.encode(text) == word_tokenizer.encode(text)
    assert copy.vocab_size == word_tokenizer.vocab_size


def test_load_says_what_is_wrong(tmp_path):
  with pytest.raises(FileNotFoundError, match='nothing.json does not exist'):
    tokenizer_lib.load(tmp_path / 'nothing.json')
  bad = tmp_path / 'bad.json'
  bad.write_text('{"version": ')
  with pytest.raises(DataError, match='bad.json is no tokenizer.json'):
    tokenizer_lib.load(bad)


def test_specials_are_required(tmp_path):
  from tokenizers import Tokenizer, models
  path = tmp_path / 'tokenizer.json'
  Tokenizer(models.WordLevel({'<s>': 0, 'a': 1}, unk_token='<s>')).save(
      str(path))
  with pytest.raises(DataError, match='tokenizer.json: .*no </s> token'):
    tokenizer_lib.load(path)


def test_bpe_dummy_prefix_only_in_front(tiny_bpe):
  t = tiny_bpe
  assert t.tokens(t.encode('ab')) == ['\u2581ab']
  assert t.tokens(t.encode('ab', first=False)) == ['ab']
  assert t.tokens(t.encode(' ab', first=False)) == ['\u2581ab']
  assert t.tokens(t.encode('\n')) == ['\u2581', '<0x0A>']
  assert t.newline_ids == (3 + 10,)
  assert t.encode('') == t.encode('', first=False) == []
  assert t.pad_id == t.unk_id == 0  # as LLaVA pads


def test_special_token_in_a_text_is_ordinary_text(tiny_bpe):
  t = tiny_bpe
  assert t.eos_id not in t.encode('a</s>b')
  assert t.decode(t.encode('a</s>b')) == 'a</s>b'


def named(tmp_path, text, config):
  """A word-level tokenizer with other names, and what stands beside it."""
  from tokenizers import Tokenizer, models, pre_tokenizers
  vocab = {'<|im_end|>': 0, '<|im_start|>': 1, '<|pad|>': 2, **{
      word: i for i, word in enumerate(text.split(), 3)}}
  inner = Tokenizer(models.WordLevel(vocab, unk_token='<|pad|>'))
  inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  inner.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'tokenizer_config.json').write_text(
      config if isinstance(config, str) else json.dumps(config))
  return tmp_path / 'tokenizer.json'


IM = {'bos_token': '<|im_start|>', 'eos_token': {'content': '<|im_end|>'}}


@pytest.mark.parametrize('config,ids', [
    (IM, (1, 0, 2)), ({**IM, 'pad_token': None}, (1, 0, 2)),
    ({**IM, 'pad_token': '<|im_end|>'}, (1, 0, 0)),
    ({**IM, 'bos_token': None}, (None, 0, 2)),
    ({**IM, 'add_bos_token': False}, (None, 0, 2)),
    ({**IM, 'tokenizer_class': 'GPT2Tokenizer'}, (None, 0, 2)),
    ({**IM, 'tokenizer_class': 'GPT2Tokenizer', 'add_bos_token': True},
     (1, 0, 2))])
def test_other_names_of_the_roles(tmp_path, config, ids):
  tokenizer = tokenizer_lib.load(named(tmp_path, 'a b', config))
  roles = lambda t: (t.bos_id, t.eos_id, t.pad_id)
  assert roles(tokenizer) == ids
  assert tokenizer.decode([i for i in ids if i is not None] + [3, 4]) == 'a b'
  (tmp_path / 'again').mkdir()
  tokenizer.save(tmp_path / 'again' / 'tokenizer.json')
  again = tokenizer_lib.load(tmp_path / 'again' / 'tokenizer.json')
  assert roles(again) == roles(pickle.loads(pickle.dumps(again))) == ids


@pytest.mark.parametrize('kind,template,bos', [
    ('PreTrainedTokenizerFast', False, None),
    ('PreTrainedTokenizerFast', True, 1), ('LlamaTokenizerFast', False, 1),
    (None, False, 1)])
def test_bos_is_what_the_post_processor_says(tmp_path, kind, template, bos):
  path = named(tmp_path, 'a b', {**IM, 'tokenizer_class': kind})
  if template:
    spec = json.loads(path.read_text())
    spec['post_processor'] = {
        'type': 'TemplateProcessing', 'single': [
            {'SpecialToken': {'id': '<|im_start|>', 'type_id': 0}},
            {'Sequence': {'id': 'A', 'type_id': 0}}], 'pair': [
                {'Sequence': {'id': 'A', 'type_id': 0}},
                {'Sequence': {'id': 'B', 'type_id': 1}}],
        'special_tokens': {'<|im_start|>': {
            'id': '<|im_start|>', 'ids': [1], 'tokens': ['<|im_start|>']}}}
    path.write_text(json.dumps(spec))
  assert tokenizer_lib.load(path).bos_id == bos


@pytest.mark.parametrize('config,words', [
    ({**IM, 'eos_token': None}, 'tokenizer_config.json: eos_token is null'),
    ({**IM, 'pad_token': '<x>'}, 'no <x> token.*tokenizer_config.json'),
    ({'bos_token': ''}, 'no <s> token.*may be null'),
    ({**IM, 'bos_token': 7}, 'tokenizer_config.json is no readable'),
    ('[1]', 'tokenizer_config.json is no readable'),
    ('{', 'tokenizer_config.json is no readable')])
def test_roles_that_are_refused(tmp_path, config, words):
  with pytest.raises(DataError, match=words):
    tokenizer_lib.load(named(tmp_path, 'a b', config))


@pytest.mark.parametrize('scheme', ['always', 'first'])
def test_metaspace_prefix_of_newer_files(tmp_path, scheme):
  """Newer LLaMA files carry the dummy prefix in a Metaspace step."""
  from tokenizers import Tokenizer, models, pre_tokenizers
  vocab = {'<unk>': 0, '<s>': 1, '</s>': 2, '\u2581': 3, 'a': 4, '\u2581a': 5}
  inner = Tokenizer(models.BPE(vocab, [('\u2581', 'a')], unk_token='<unk>'))
  inner.pre_tokenizer = pre_tokenizers.Metaspace(
      prepend_scheme=scheme, split=False)
  inner.save(str(tmp_path / 'tokenizer.json'))
  t = tokenizer_lib.load(tmp_path / 'tokenizer.json', strict=False)
  assert (t.encode('a'), t.encode('a', first=False)) == ([5], [4])


@pytest.mark.parametrize('text, ids', [
    ('Hello world', [15043, 3186]),
    ('grabbed', [2646, 1327, 287]),
    ('\N{LLAMA}', [29871, 243, 162, 169, 156]),
    (' grabbed', [29871, 2646, 1327, 287]),
    (' ' * 11 + 'grabbed', [9651, 2646, 1327, 287]),
    ('\n', [29871, 13]),
    (' \n', [259, 13]),
    ('ax\n####\nboo', [4853, 13, 4136, 13, 833, 29877]),
    ('\u9547', [29871, 30411]),
    ('\ua64a\N{LLAMA}', [29871, 237, 156, 141, 243, 162, 169, 156]),
])
def test_llama_published_ids(llama_tokenizer, text, ids):
  assert llama_tokenizer.encode(text) == ids
  assert llama_tokenizer.decode(ids) == text


def test_llama_special_ids(llama_tokenizer):
  t = llama_tokenizer
  assert (t.bos_id, t.eos_id, t.pad_id, t.vocab_size) == (1, 2, 0, 32000)
  assert t.newline_ids == (13,)
