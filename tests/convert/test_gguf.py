"""GGUF language models: weights, sizes and refusals, on files made here.

The files are written as llama.cpp writes them: its names, its order of q's and
k's rows, quantised matrices.  tests/parity has a real one.
"""

from __future__ import annotations

import json
import shutil

import core_helpers as helpers
import gguf
import numpy as np
import pytest
import safetensors.numpy
from gguf import GGMLQuantizationType as Kind
from PIL import Image

from vlm_compress.cli import __main__ as cli
from vlm_compress.convert import files, from_hf, gguf_files
from vlm_compress.convert.tensors import TensorFiles
from vlm_compress.data.tokenizer import load as load_tokenizer
from vlm_compress.data.tokenizer import word_level

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, KV, HEAD = 300, 32, 48, 2, 4, 2, 8
SIZES = {'vocab_size': VOCABULARY, 'context_length': 64,
         'embedding_length': HIDDEN, 'block_count': LAYERS,
         'feed_forward_length': INNER, 'rope.dimension_count': HEAD,
         'attention.head_count': HEADS, 'attention.head_count_kv': KV,
         'attention.layer_norm_rms_epsilon': 1e-5, 'rope.freq_base': 5e4}
DECODER = 'language_model/'


def weights(*, head=True, bias=False):
  """Hugging Face's names -> float32."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  out = {'model.embed_tokens.weight': draw(VOCABULARY, HIDDEN),
         'model.norm.weight': draw(HIDDEN)}
  if head:
    out['lm_head.weight'] = draw(VOCABULARY, HIDDEN)
  for layer in range(LAYERS):
    start = f'model.layers.{layer}.'
    for name, rows in (('q', HEADS * HEAD), ('k', KV * HEAD), ('v', KV * HEAD)):
      out[f'{start}self_attn.{name}_proj.weight'] = draw(rows, HIDDEN)
      if bias:
        out[f'{start}self_attn.{name}_proj.bias'] = draw(rows)
    out[f'{start}self_attn.o_proj.weight'] = draw(HIDDEN, HEADS * HEAD)
    for name in ('gate', 'up'):
      out[f'{start}mlp.{name}_proj.weight'] = draw(INNER, HIDDEN)
    out[f'{start}mlp.down_proj.weight'] = draw(HIDDEN, INNER)
    for name in ('input', 'post_attention'):
      out[f'{start}{name}_layernorm.weight'] = draw(HIDDEN)
  return out


def interleaved(rows, heads):
  """As llama.cpp's conversion moves the rows of q and k."""
  return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(
      rows.shape)


def write(path, tensors, *, arch='llama', sizes=None, store=None, fields=None,
          extra=(), bools=None):
  """A GGUF file of Hugging Face's tensors.

  store(key, array) gives the Kind that a tensor is stored in, float32 if None.
  """
  writer = gguf.GGUFWriter(path, arch)
  for key, value in {**SIZES, **(sizes or {})}.items():
    if value is not None:
      add = {float: writer.add_float32, str: writer.add_string,
             bool: writer.add_bool}.get(type(value), writer.add_uint32)
      add(f'{arch}.{key}', value)
  add_vocabulary(writer, bools or {'tokenizer.ggml.add_bos_token': True})
  for key, value in (fields or {}).items():
    (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], LAYERS)
  stored = {}
  for key, array in tensors.items():
    heads = {'q_proj': HEADS, 'k_proj': KV}.get(key.split('.')[-2])
    if arch == 'llama' and heads:
      array = interleaved(array, heads)
    stored[names.get_name(key, try_suffixes=('.weight', '.bias'))] = (
        array, store(key, array) if store else None)
  for name, array in extra:
    stored[name] = array, None
  for name, (array, kind) in stored.items():
    if kind is None:
      writer.add_tensor(name, array)
    else:
      writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def add_vocabulary(writer, bools):
  """Bytes as letters, and special tokens behind them."""
  from tokenizers import pre_tokenizers
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  texts = [*letters, '<begin>', '<end>', '<fill>', 'ab']
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('smollm')
  writer.add_token_list(texts)
  writer.add_token_types([1] * 256 + [3, 3, 3, 1])
  writer.add_token_merges(['a b'])
  writer.add_bos_token_id(256)
  writer.add_eos_token_id(257)
  writer.add_pad_token_id(258)
  for key, value in bools.items():
    writer.add_bool(key, value)


@pytest.fixture(scope='module', name='clip')
def fixture_clip(tmp_path_factory):
  """A directory with a CLIP tower alone."""
  root = tmp_path_factory.mktemp('clip')
  from test_conversion import TOKENIZER, random_params
  config = helpers.tiny(image_token_index=95)
  files.save_model(root / 'ours', random_params(config), config, TOKENIZER)
  assert run('export', '--from', root / 'ours', '--to', root / 'hf') == 0
  tensors = safetensors.numpy.load_file(root / 'hf' / files.WEIGHTS)
  (root / 'clip').mkdir()
  safetensors.numpy.save_file(
      {k: v for k, v in tensors.items() if k.startswith('vision_tower')},
      root / 'clip' / files.WEIGHTS)
  values = json.loads((root / 'hf' / files.CONFIG).read_text())
  (root / 'clip' / files.CONFIG).write_text(json.dumps(values['vision_config']))
  return root / 'clip'


def run(*argv):
  return cli.main([str(word) for word in argv])


def converted(path, clip, to, *more):
  """The decoder's parameters of a converted file."""
  assert run('convert', '--llm', path, '--vision', clip, '--to', to, *more) == 0
  tensors = safetensors.numpy.load_file(to / files.WEIGHTS)
  return {k.removeprefix(DECODER): v for k, v in tensors.items()
          if k.startswith(DECODER)}


def refused(capsys, path, clip, to, *more):
  capsys.readouterr()
  assert run('convert', '--llm', path, '--vision', clip, '--to', to, *more) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: ')
  assert not [p for p in to.parent.iterdir() if to.name in p.name]
  return lines[0]


@pytest.mark.parametrize('arch', ['llama', 'qwen2'])
@pytest.mark.parametrize('head', [True, False])
def test_float_weights_come_back_exactly(arch, head, clip, tmp_path):
  tensors = weights(head=head, bias=arch == 'qwen2')
  got = converted(write(tmp_path / 'a.gguf', tensors, arch=arch), clip,
                  tmp_path / 'to')
  for layer in range(LAYERS):
    for name in 'qkv':
      start = f'model.layers.{layer}.self_attn.{name}_proj'
      np.testing.assert_array_equal(
          got[f'layers/self_attn/{name}_proj/kernel'][layer],
          tensors[f'{start}.weight'].T)
      if arch == 'qwen2':
        np.testing.assert_array_equal(
            got[f'layers/self_attn/{name}_proj/bias'][layer],
            tensors[f'{start}.bias'])
    np.testing.assert_array_equal(
        got['layers/mlp/down_proj/kernel'][layer],
        tensors[f'model.layers.{layer}.mlp.down_proj.weight'].T)
    np.testing.assert_array_equal(
        got['layers/post_attention_layernorm/weight'][layer],
        tensors[f'model.layers.{layer}.post_attention_layernorm.weight'])
  np.testing.assert_array_equal(got['embed_tokens/embedding'],
                                tensors['model.embed_tokens.weight'])
  assert ('lm_head/kernel' in got) == head
  text = files.load_config(tmp_path / 'to').text
  assert (text.vocab_size, text.hidden_size, text.intermediate_size,
          text.num_hidden_layers, text.num_attention_heads,
          text.num_key_value_heads, text.size_per_head, text.rms_norm_eps,
          text.rope_theta, text.max_position_embeddings, text.attention_bias,
          text.tie_word_embeddings) == (
              VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, KV, HEAD, 1e-5, 5e4,
              64, arch == 'qwen2', not head)


@pytest.mark.parametrize('kind', [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
def test_quantised_weights_are_dequantised(kind, clip, tmp_path):
  tensors = weights()
  fits = lambda array: array.ndim == 2 and array.shape[1] % 32 == 0
  path = write(tmp_path / 'a.gguf', tensors,
               store=lambda key, a: kind if fits(a) else None)
  got = converted(path, clip, tmp_path / 'to')
  for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj'):
    for layer in range(LAYERS):
      array = tensors[f'model.layers.{layer}.self_attn.{name}.weight']
      # blocks lie along a row, so the order of rows changes no block
      want = gguf.dequantize(gguf.quantize(array, kind), kind)
      np.testing.assert_array_equal(
          got[f'layers/self_attn/{name}/kernel'][layer], want.T)
      assert 0 < np.abs(want - array).max() < 0.5
  assert files.load_config(tmp_path / 'to').param_dtype == 'float32'


def test_the_interface_is_that_of_safetensors(clip, tmp_path):
  tensors = weights()
  store = lambda key, a: (None if a.ndim == 1 else Kind.Q8_0
                          if a.shape[1] == 32 else Kind.BF16)
  file = gguf_files.GgufFile(write(tmp_path / 'a.gguf', tensors, store=store))
  safetensors.numpy.save_file(tensors, tmp_path / 'a.safetensors')
  other = TensorFiles(tmp_path / 'a.safetensors')
  assert file.keys == other.keys
  for key in file.keys:
    assert file.shape(key) == other.shape(key) == file.read(key).shape
    assert file.dtype(key) == str(file.read(key).dtype)
    rows = slice(1, 4)
    np.testing.assert_array_equal(file.part(key, rows), file.read(key)[rows])
  assert {file.dtype(k) for k in file.keys} == {'float32', 'bfloat16'}
  down = 'model.layers.0.mlp.down_proj.weight'
  np.testing.assert_allclose(file.read(down).astype(np.float32),
                             tensors[down], rtol=2 ** -8)


def test_mixed_dtypes_want_a_decision(clip, tmp_path, capsys):
  path = write(tmp_path / 'a.gguf', weights(),
               store=lambda key, a: Kind.F16 if a.ndim == 2 else None)
  assert '--dtype' in refused(capsys, path, clip, tmp_path / 'to')
  got = converted(path, clip, tmp_path / 'to', '--dtype', 'float16')
  assert {v.dtype for v in got.values()} == {np.dtype(np.float16)}


def test_a_directory_with_one_file(clip, tmp_path, capsys):
  source = tmp_path / 'source'
  source.mkdir()
  path = write(source / 'a.gguf', weights())
  want = converted(path, clip, tmp_path / 'want')
  got = converted(source, clip, tmp_path / 'got')
  assert want.keys() == got.keys()
  assert all(np.array_equal(got[k], want[k]) for k in want)
  shutil.copy(path, source / 'b.gguf')
  assert '2 .gguf files' in refused(capsys, source, clip, tmp_path / 'to')
  assert 'does not exist' in refused(capsys, source / 'c.gguf', clip,
                                     tmp_path / 'to')
  line = refused(capsys, source / 'a.gguf', source / 'b.gguf', tmp_path / 'to')
  assert 'b.gguf' in line


def test_its_vocabulary_becomes_a_tokenizer(clip, tmp_path, capsys):
  converted(write(tmp_path / 'a.gguf', weights()), clip, tmp_path / 'to')
  assert 'tokenizer.json is built' in capsys.readouterr().out
  tokenizer = load_tokenizer(tmp_path / 'to' / files.TOKENIZER)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, 258)
  assert tokenizer.tokens(tokenizer.encode('cab 12')) == [
      'c', 'ab', '\u0120', '1', '2']
  text = '<begin> what <image>?<end>'
  assert not {256, 257, 258} & set(tokenizer.encode(text))
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_beside_it_is_kept(clip, tmp_path, capsys):
  source = tmp_path / 'source'
  source.mkdir()
  write(source / 'a.gguf', weights())
  (source / 'generation_config.json').write_text('{"eos_token_id": 2}')
  word_level(['a']).save(source / 'tokenizer.json')
  converted(source, clip, tmp_path / 'to')
  assert 'is built' not in capsys.readouterr().out
  assert load_tokenizer(tmp_path / 'to/tokenizer.json').vocab_size == 6
  assert not (tmp_path / 'to/tokenizer_config.json').exists()
  word_level(f'w{i}' for i in range(296)).save(source / 'tokenizer.json')
  line = refused(capsys, source, clip, tmp_path / 'to2')
  assert '301 tokens' in line and '300 rows' in line


def test_a_converted_file_answers(clip, tmp_path, capsys):
  """Also without BOS, as its tokenizer then says."""
  Image.new('RGB', (30, 20), 'red').save(tmp_path / 'a.png')
  for begin in (0, 1):
    path = write(tmp_path / 'a.gguf', weights(), bools={
        'tokenizer.ggml.add_bos_token': bool(begin)}, sizes={'context_length': 99})
    converted(path, clip, tmp_path / f'to{begin}')
    tokenizer = load_tokenizer(tmp_path / f'to{begin}' / files.TOKENIZER)
    assert tokenizer.bos_id == (256 if begin else None)
    capsys.readouterr()
    assert run('generate', '--checkpoint', tmp_path / f'to{begin}', '--image',
               tmp_path / 'a.png', '--prompt', 'what <end>?', '--template',
               'short',
               '--max-new-tokens', 5) == 0


@pytest.mark.parametrize('sizes,words', [
    ({'rope.scaling.type': 'yarn'}, ['rope.scaling.type', 'yarn', 'none']),
    ({'rope.scaling.factor': 4.0}, ['rope.scaling.factor', '4.0']),
    ({'rope.dimension_count': 4}, ['rope.dimension_count=4', '8']),
    ({'expert_count': 8}, ['expert_count=8']),
    ({'attention.sliding_window': 32}, ['sliding_window=32']),
    ({'attention.value_length': 16}, ['value_length=16']),
    ({'logit_scale': 0.5}, ['llama.logit_scale', 'unknown']),
    ({'vocab_size': 299}, ['vocab_size=299', '300']),
    ({'block_count': 3}, ['missing', 'model.layers.2.']),
    ({'embedding_length': 64, 'attention.key_length': HEAD},
     ['shape', '(300, 32)']),
    ({'context_length': None}, ['llama.context_length is missing']),
    ({'attention.head_count': 0}, ['head_count=0', 'positive'])])
def test_sizes_that_are_refused(sizes, words, clip, tmp_path, capsys):
  path = write(tmp_path / 'a.gguf', weights(), sizes=sizes)
  line = refused(capsys, path, clip, tmp_path / 'to')
  assert all(word in line for word in words), line


@pytest.mark.parametrize('options,words', [
    ({'extra': [('rope_freqs.weight', np.ones(4, np.float32))]},
     ['rope_freqs', 'RoPE']),
    ({'extra': [('blk.0.attn_q_norm.weight', np.ones(8, np.float32))]},
     ['blk.0.attn_q_norm.weight', 'unknown']),
    ({'extra': [('blk.0.attn_output.bias', np.ones(32, np.float32))]},
     ['o_proj.bias', 'does not have']),
    ({'fields': {'split.count': 3}}, ['one of 3 parts']),
    ({'fields': {'tokenizer.ggml.eos_token_id': 999}},
     ['eos_token_id=999', '260 tokens']),
    ({'fields': {'tokenizer.ggml.pre': 'deepseek-llm'}},
     ["'deepseek-llm'", 'smollm', 'tokenizer.json']),
    ({'fields': {'general.type': 'adapter'}}, ['general.type', 'adapter']),
    ({'store': lambda key, a: Kind.F64 if 'down' in key else None},
     ['down_proj', 'F64'])])
def test_files_that_are_refused(options, words, clip, tmp_path, capsys,
                                monkeypatch):
  if 'store' in options:  # the package's quantize() does not write F64
    monkeypatch.setattr(gguf, 'quantize', lambda a, kind: a.astype(np.float64))
  if 'fields' in options:  # written twice is refused by the writer
    monkeypatch.setattr(gguf.GGUFWriter, 'add_key_value', overwrite)
  path = write(tmp_path / 'a.gguf', weights(), **options)
  line = refused(capsys, path, clip, tmp_path / 'to')
  assert all(word in line for word in words), line


def overwrite(self, key, value, kind, sub_type=None):
  """GGUFWriter.add_key_value for a key that may be there."""
  self.kv_data[0][key] = gguf.gguf_writer.GGUFValue(
      value=value, type=kind, sub_type=sub_type)


def test_damaged_files(clip, tmp_path, capsys):
  whole = write(tmp_path / 'a.gguf', weights()).read_bytes()
  for end in (len(whole) - 100, len(whole) // 2, 700, 20, 5):
    (tmp_path / 'b.gguf').write_bytes(whole[:end])
    assert 'b.gguf is truncated' in refused(
        capsys, tmp_path / 'b.gguf', clip, tmp_path / 'to')
  (tmp_path / 'b.gguf').write_bytes(b'PK' + whole[2:])
  assert 'no GGUF file' in refused(capsys, tmp_path / 'b.gguf', clip,
                                   tmp_path / 'to')
  other = whole.replace(b'general.architecture' + b'\x08\0\0\0\5\0\0\0\0\0\0\0llama',
                        b'general.architecture' + b'\x08\0\0\0\5\0\0\0\0\0\0\0gemma')
  assert other != whole
  (tmp_path / 'b.gguf').write_bytes(other)
  line = refused(capsys, tmp_path / 'b.gguf', clip, tmp_path / 'to')
  assert "'gemma'" in line and 'llama and qwen2' in line


def test_one_tensor_at_a_time(clip, tmp_path, monkeypatch):
  """Planning dequantises nothing, converting each tensor once."""
  path = write(tmp_path / 'a.gguf', weights(),
               store=lambda key, a: Kind.Q8_0 if a.shape[-1] == 32
               and a.ndim == 2 else None)
  plan = from_hf.make_plan(path, clip)
  count, real = [], gguf.dequantize
  monkeypatch.setattr(gguf, 'dequantize',
                      lambda data, kind: count.append(data.shape) or real(data, kind))
  from_hf.convert(plan, tmp_path / 'to')
  assert len(count) == 2 + 6 * LAYERS


def test_without_the_package(clip, tmp_path, capsys, monkeypatch):
  path = write(tmp_path / 'a.gguf', weights())
  import sys
  monkeypatch.setitem(sys.modules, 'gguf', None)
  line = refused(capsys, path, clip, tmp_path / 'to')
  assert 'needs the package gguf' in line and '.[convert]' in line
