"""Checkpoints of other formats: what is recognised, and what is refused.

The sources are made by our own export and renamed, so that this needs no
torch; tests/parity compares with checkpoints that transformers wrote.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil

import core_helpers as helpers
import flax.linen as nn
import jax
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
from PIL import Image

from vlm_compress.cli import __main__ as cli
from vlm_compress.convert import files
from vlm_compress.convert.tensors import INDEX, TensorFiles, TensorWriter
from vlm_compress.data.tokenizer import load as load_tokenizer
from vlm_compress.data.tokenizer import word_level
from vlm_compress.models.llava import Llava, init_params

CONFIG = helpers.tiny(image_token_index=95)
DECODER, TOWER = 'language_model.model.', 'vision_tower.vision_model.'


# 93 of the 96 rows, and two short of the id of an image.
TOKENIZER = word_level(f'w{i}' for i in range(88))


def random_params(config):
  shapes = nn.unbox(jax.eval_shape(
      lambda key: init_params(Llava(config), key, with_vision=True),
      jax.random.key(0)))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), shapes)


@pytest.fixture(scope='module', name='ours')
def fixture_ours(tmp_path_factory):
  """A model directory with a CLIP tower."""
  path = tmp_path_factory.mktemp('ours') / 'model'
  files.save_model(path, random_params(CONFIG), CONFIG, TOKENIZER)
  return path


@pytest.fixture(scope='module', name='exported')
def fixture_exported(ours, tmp_path_factory):
  """The same in Hugging Face's format."""
  path = tmp_path_factory.mktemp('exported') / 'hf'
  assert run('export', '--from', ours, '--to', path) == 0
  return path


@pytest.fixture(name='source')
def fixture_source(exported, tmp_path):
  shutil.copytree(exported, tmp_path / 'source')
  return tmp_path / 'source'


def run(*argv):
  return cli.main([str(word) for word in argv])


def refused(capsys, *argv):
  """The one line of a command that fails, which leaves nothing behind."""
  to = argv[argv.index('--to') + 1]
  capsys.readouterr()
  assert run(*argv) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: ')
  assert not [p for p in to.parent.iterdir() if to.name in p.name]
  return lines[0]


def weights(directory):
  return safetensors.numpy.load_file(directory / files.WEIGHTS)


def rewrite(directory, change):
  tensors = weights(directory)
  tensors = change(tensors) or tensors
  safetensors.numpy.save_file(
      {k: np.ascontiguousarray(v) for k, v in tensors.items()},
      directory / files.WEIGHTS)


def reconfigure(directory, change):
  path = directory / files.CONFIG
  values = json.loads(path.read_text())
  change(values)
  path.write_text(json.dumps(values))


def same(a, b):
  a, b = weights(a), weights(b)
  a = {k: v for k, v in a.items() if 'post_layernorm' not in k}
  b = {k: v for k, v in b.items() if 'post_layernorm' not in k}
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_export_and_convert_give_the_model_back(ours, exported, tmp_path):
  assert run('convert', '--from', exported, '--to', tmp_path / 'back') == 0
  same(tmp_path / 'back', ours)
  assert files.load_config(tmp_path / 'back') == dataclasses.replace(
      CONFIG, voco_token_index=96, text=dataclasses.replace(
          CONFIG.text, initializer_range=0.1))
  back = load_tokenizer(tmp_path / 'back' / files.TOKENIZER)
  assert (back.vocab_size, back.encode('w5 w60'), back.bos_id, back.eos_id) == (
      TOKENIZER.vocab_size, TOKENIZER.encode('w5 w60'), 1, 2)
  assert run('export', '--from', tmp_path / 'back', '--to',
             tmp_path / 'again') == 0
  for key, value in weights(exported).items():
    np.testing.assert_array_equal(weights(tmp_path / 'again')[key], value)


def test_placeholders_are_no_words(source, tmp_path):
  """In the real LLaVA-1.5 both would be 32000 by default."""
  reconfigure(source, lambda v: v.update(image_token_index=96))
  assert run('convert', '--from', source, '--to', tmp_path / 'to') == 0
  config = files.load_config(tmp_path / 'to')
  assert (config.image_token_index, config.voco_token_index) == (96, 97)


def test_a_sentencepiece_model_becomes_a_tokenizer(source, tmp_path, capsys):
  model = io.BytesIO()
  train = sentencepiece.SentencePieceTrainer.train
  train(sentence_iterator=iter(['a cat and a dog'] * 9), model_writer=model,
        model_type='bpe', vocab_size=24, minloglevel=2, hard_vocab_limit=False,
        required_chars='\n',
        normalization_rule_name='identity', remove_extra_whitespaces=False)
  (source / 'tokenizer.model').write_bytes(model.getvalue())
  (source / files.TOKENIZER).unlink()
  assert run('convert', '--from', source, '--to', tmp_path / 'to') == 0
  assert 'tokenizer.json is built' in capsys.readouterr().out
  tokenizer = load_tokenizer(tmp_path / 'to' / files.TOKENIZER, strict=False)
  theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  assert tokenizer.encode('a dog') == theirs.encode('a dog')
  assert (tmp_path / 'to/tokenizer.model').is_file()
  (source / 'tokenizer.model').write_bytes(b'text')
  line = refused(capsys, 'convert', '--from', source, '--to', tmp_path / 'to2')
  assert 'tokenizer.model is truncated or no sentencepiece model' in line


def in_memory(tensors):
  """Names as transformers has them in memory, one of them without the inner
  `vision_model`."""
  moved = ((DECODER, 'model.language_model.'), (TOWER, 'model.vision_tower.'),
           ('language_model.lm_head', 'lm_head'), ('multi', 'model.multi'))
  return {next((new + k.removeprefix(old) for old, new in moved
                if k.startswith(old)), k): v for k, v in tensors.items()}


def with_buffers(tensors):
  tensors[f'{DECODER}layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(4)
  tensors[f'{TOWER}embeddings.position_ids'] = np.arange(17)[None]


@pytest.mark.parametrize('change', [in_memory, with_buffers])
def test_other_spellings(change, ours, source, tmp_path):
  rewrite(source, change)
  assert run('convert', '--from', source, '--to', tmp_path / 'got') == 0
  same(tmp_path / 'got', ours)


def shard(directory):
  """Two files and an index."""
  tensors = weights(directory)
  (directory / files.WEIGHTS).unlink()
  names = sorted(tensors)
  halves = {'a.safetensors': names[::2], 'b.safetensors': names[1::2]}
  for name, keys in halves.items():
    safetensors.numpy.save_file({k: tensors[k] for k in keys}, directory / name)
  (directory / INDEX).write_text(json.dumps({'weight_map': {
      key: name for name, keys in halves.items() for key in keys}}))


def test_shards(ours, source, tmp_path, capsys):
  shard(source)
  assert run('convert', '--from', source, '--to', tmp_path / 'got') == 0
  same(tmp_path / 'got', ours)
  argv = ('convert', '--from', source, '--to', tmp_path / 'to')
  index = json.loads((source / INDEX).read_text())
  index['weight_map']['another'] = 'a.safetensors'
  (source / INDEX).write_text(json.dumps(index))
  assert "no ['another']" in refused(capsys, *argv)
  del index['weight_map']['another']
  (source / INDEX).write_text(json.dumps(index))
  (source / 'b.safetensors').unlink()
  assert 'b.safetensors is missing' in refused(capsys, *argv)
  index['weight_map']['another'] = '../outside.safetensors'
  (source / INDEX).write_text(json.dumps(index))
  assert 'not in its own directory' in refused(capsys, *argv)


def test_tied_heads(ours, source, tmp_path, capsys):
  argv = ('convert', '--from', source, '--to', tmp_path / 'to')
  head = 'language_model.lm_head.weight'
  tie = lambda v: v.update(tie_word_embeddings=True)
  reconfigure(source, tie)
  assert f'{head} differs' in refused(capsys, *argv)
  rewrite(source, lambda t: t.update({head: t[f'{DECODER}embed_tokens.weight']}))
  assert run(*argv) == 0  # written twice, the same
  assert files.load_config(tmp_path / 'to').text.tie_word_embeddings
  assert 'language_model/lm_head/kernel' not in weights(tmp_path / 'to')
  reconfigure(source, lambda v: (v.update(tie_word_embeddings=False),
                                 v['text_config'].pop('tie_word_embeddings')))
  rewrite(source, lambda t: {k: v for k, v in t.items() if k != head})
  line = refused(capsys, *argv[:-1], tmp_path / 'to2')
  assert 'no lm_head.weight' in line and 'tie_word_embeddings' in line


UP = f'{DECODER}layers.1.mlp.up_proj.weight'


@pytest.mark.parametrize('change,words', [
    (lambda t: {k: v for k, v in t.items() if k != UP},
     ['1 tensor(s) missing', UP]),
    (lambda t: t.update({f'{UP}.scale': np.ones(2, np.float32)}),
     ['does not have', f'{UP}.scale']),
    (lambda t: t.update({UP: np.ones((48, 31), np.float32)}),
     [UP, '(48, 31)', 'language_model/layers/mlp/up_proj/kernel', '(32, 48)']),
    (lambda t: t.update({UP: np.ones(48, np.float32)}), [UP, '(48,)']),
    (lambda t: t.update({UP: t[UP].astype(np.float16)}), ['float16', '--dtype']),
    (lambda t: t.update({UP: np.ones((48, 32), np.int8)}), [UP, 'I8']),
    (lambda t: t.update({UP: np.ones((48, 32), np.int64)}), [UP, 'int64']),
    (lambda t: {k: v.astype(np.float64) for k, v in t.items()},
     ['float64', '--dtype']),
    (lambda t: t.update({'model.language_model.embed_tokens.weight':
                         np.ones((96, 32), np.float32)}), ['two of decoder'])])
def test_weights_that_do_not_fit(change, words, source, tmp_path, capsys):
  rewrite(source, change)
  line = refused(capsys, 'convert', '--from', source, '--to', tmp_path / 'to')
  assert all(word in line for word in words), line


@pytest.mark.parametrize('change,words', [
    (lambda v: v['text_config'].update(rope_scaling={
        'rope_type': 'linear', 'factor': 2.0}), ['rope_scaling', 'linear']),
    (lambda v: v['text_config'].update(surprise=1), ['surprise', 'unknown']),
    (lambda v: v['text_config'].update(hidden_act='gelu'), ["'gelu'", 'silu']),
    (lambda v: v['text_config'].update(attention_bias=True), ['o_proj']),
    (lambda v: v['text_config'].update(model_type='mamba'), ['mamba', 'llama']),
    (lambda v: v['vision_config'].update(model_type='siglip'), ['siglip']),
    (lambda v: v.update(vision_feature_layer=[-2, -5]), ['several']),
    (lambda v: v['text_config'].update(num_hidden_layers=5), ['missing']),
    (lambda v: v['text_config'].update(num_hidden_layers=3), ['layers.3.']),
    (lambda v: v['text_config'].update(vocab_size=97), ['embed_tokens', '97'])])
def test_configs_that_do_not_fit(change, words, source, tmp_path, capsys):
  reconfigure(source, change)
  line = refused(capsys, 'convert', '--from', source, '--to', tmp_path / 'to')
  assert all(word in line for word in words), line


def test_files_that_are_not_what_they_seem(ours, source, tmp_path, capsys):
  argv = ('convert', '--from', source, '--to', tmp_path / 'to')
  assert 'has a vision tower of its own' in refused(
      capsys, *argv, '--vision', source)
  whole = (source / files.WEIGHTS).read_bytes()
  (source / files.WEIGHTS).write_bytes(whole[:-10])
  assert 'truncated' in refused(capsys, *argv)
  (source / files.WEIGHTS).unlink()
  (source / 'pytorch_model.bin').write_bytes(b'\x80\x02.')
  line = refused(capsys, *argv)
  assert 'pytorch_model.bin is a pickle' in line and 'weights_only=True' in line
  full = tmp_path / 'full'
  full.mkdir()
  (full / 'mine').touch()
  assert run('export', '--from', ours, '--to', full) == 2
  assert 'not empty' in capsys.readouterr().err
  assert [p.name for p in full.iterdir()] == ['mine']


def test_a_language_model_needs_a_tower(source, tmp_path, capsys):
  rewrite(source, lambda t: {
      k.replace(DECODER, 'model.').replace('language_model.lm_head', 'lm_head'): v
      for k, v in t.items() if k.startswith('language_model')})
  reconfigure(source, lambda v: (lambda text: (v.clear(), v.update(text)))(
      v['text_config']))
  line = refused(capsys, 'convert', '--from', source, '--to', tmp_path / 'to')
  assert '--vision' in line


def test_methods_go_beside_the_export(tmp_path, capsys):
  config = dataclasses.replace(helpers.atp_config(), image_token_index=-200)
  files.save_model(tmp_path / 'atp', random_params(config), config,
                   word_level(f'w{i}' for i in range(91)))
  assert run('export', '--from', tmp_path / 'atp', '--to', tmp_path / 'hf') == 0
  said = capsys.readouterr().out
  side = safetensors.numpy.load_file(
      tmp_path / 'hf' / 'vlm_compress_adapters.safetensors')
  assert side.keys() == {k for k in weights(tmp_path / 'atp')
                         if k.startswith('atp/')} and len(side) == 6
  assert all(key in said for key in side)
  # there was no id for the placeholder: one row more, zeros
  table = weights(tmp_path / 'hf')[f'{DECODER}embed_tokens.weight']
  assert table.shape == (97, 32) and not table[96].any() and table[95].any()
  assert json.loads((tmp_path / 'hf/config.json').read_text())[
      'image_token_index'] == 96


def test_the_writer_knows_what_is_missing(tmp_path):
  specs = {'a': ((2, 3), 'float32'), 'b': ((), 'float32')}
  writer = TensorWriter(tmp_path / 'x.safetensors', specs)
  rows = np.arange(6, dtype=np.float32).reshape(2, 3)
  writer.write('a', rows[1], 1)
  with pytest.raises(ValueError, match='a: .*2, 3'):
    writer.write('a', rows.T)
  writer.write('b', np.float32(7).reshape(()))
  with pytest.raises(ValueError, match=r"not written.*'a'"):
    writer.close()
  writer = TensorWriter(tmp_path / 'x.safetensors', specs)
  writer.write('a', rows[1], 1)
  writer.write('a', rows[0], 0)
  writer.write('b', np.float32(7).reshape(()))
  writer.close()
  tensors = TensorFiles(tmp_path / 'x.safetensors')
  np.testing.assert_array_equal(tensors.read('a'), rows)
  assert tensors.read('b') == 7 and tensors.dtype('b') == 'float32'


def test_a_converted_model_answers_as_the_original(tmp_path, capsys):
  tokenizer = word_level('what is this a cat dog red blue'.split())
  config = helpers.tiny(text=dataclasses.replace(
      CONFIG.text, vocab_size=tokenizer.vocab_size))
  params = random_params(config)
  files.save_model(tmp_path / 'first', params, config, tokenizer)
  assert run('export', '--from', tmp_path / 'first', '--to', tmp_path / 'hf') == 0
  assert run('convert', '--from', tmp_path / 'hf', '--to', tmp_path / 'back') == 0
  rng = np.random.default_rng(0)
  Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8)).save(
      tmp_path / 'picture.png')

  def answer(model):
    capsys.readouterr()
    code = run('generate', '--checkpoint', model, '--image',
               tmp_path / 'picture.png', '--prompt', 'what is this',
               '--template', 'short',
               '--max-new-tokens', 5)
    return code, capsys.readouterr()
  first, back = answer(tmp_path / 'first'), answer(tmp_path / 'back')
  assert first[0] == back[0] == 0
  assert first[1].out.strip() and first[1].out == back[1].out
  del params['vision_tower']
  files.save_model(tmp_path / 'blind', params, config, tokenizer)
  code, said = answer(tmp_path / 'blind')
  assert code == 2 and 'no weights of its CLIP tower' in said.err
