"""The tokenizer files of an export: ids, BOS, placeholder, what ends an answer.

tests/parity opens them with transformers.
"""

from __future__ import annotations

import dataclasses
import json

import core_helpers as helpers
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from test_conversion import (  # noqa: F401  (fixtures)
    CONFIG,
    TOKENIZER,
    fixture_exported,
    fixture_ours,
    fixture_source,
    random_params,
    reconfigure,
    refused,
    run,
    weights,
)
from test_gguf import fixture_clip  # noqa: F401
from test_gguf import weights as gguf_weights
from test_gguf import write as write_gguf

from vlm_compress.config import AtpConfig, VocoConfig
from vlm_compress.convert import files
from vlm_compress.convert.processor import Processor, load_processor
from vlm_compress.convert.tensors import ADAPTERS
from vlm_compress.data.tokenizer import load as load_tokenizer
from vlm_compress.data.tokenizer import word_level

ROWS = CONFIG.text.vocab_size
TABLE = 'language_model.model.embed_tokens.weight'


def read(path):
  return json.loads(path.read_text())


def export(tmp_path, *, words=88, index=-200, change=lambda directory: None,
           **fields):
  """Directories of a model with so many words and of its export."""
  config = dataclasses.replace(CONFIG, image_token_index=index, **fields)
  files.save_model(tmp_path / 'ours', random_params(config), config,
                   word_level(f'w{i}' for i in range(words)),
                   processor=Processor('short', 'crop'))
  change(tmp_path / 'ours')
  assert run('export', '--from', tmp_path / 'ours', '--to', tmp_path / 'hf') == 0
  return tmp_path / 'ours', tmp_path / 'hf'


@pytest.mark.parametrize('words,index,want,rows', [
    (88, -200, 93, ROWS),    # the first row that no word has
    (90, -200, 95, ROWS),    # the last one
    (91, -200, 96, ROWS + 1),  # there is none: one row more
    (91, 96, 96, ROWS + 1),  # just behind the table
    (88, 93, 93, ROWS)])     # a row that the model names itself
def test_the_placeholder_has_a_name(words, index, want, rows, tmp_path, capsys):
  ours, hf = export(tmp_path, words=words, index=index)
  theirs = tokenizers.Tokenizer.from_file(str(hf / files.TOKENIZER))
  config = read(hf / files.CONFIG)
  assert theirs.token_to_id('<image>') == config['image_token_index'] == want
  assert theirs.encode('w3 <image> w5').ids.count(want) == 1
  assert config['text_config']['vocab_size'] == rows
  table = weights(hf)[TABLE]
  assert table.shape[0] == rows and not table[ROWS:].any()
  np.testing.assert_array_equal(
      table[:ROWS], weights(ours)['language_model/embed_tokens/embedding'])
  said = capsys.readouterr().out
  assert ('was added to the vocabulary' in said) == (rows > ROWS)
  assert 'lacks' not in said


@pytest.mark.parametrize('index,extra', [(95, 0), (96, 1), (-1, 1), (300, 1)])
def test_without_a_tokenizer(index, extra, tmp_path, capsys):
  _, hf = export(tmp_path, index=index,
                 change=lambda d: (d / files.TOKENIZER).unlink())
  want = ROWS if extra else index
  said = capsys.readouterr().out
  assert 'no tokenizer.json;' in said and f'<image> has the id {want}' in said
  assert read(hf / files.CONFIG)['image_token_index'] == want
  assert len(weights(hf)[TABLE]) == ROWS + extra


def test_a_tokenizer_of_another_model(tmp_path, capsys):
  files.save_model(tmp_path / 'ours', random_params(CONFIG), CONFIG,
                   word_level(f'w{i}' for i in range(92)))
  line = refused(capsys, 'export', '--from', tmp_path / 'ours', '--to',
                 tmp_path / 'to')
  assert "1 tokens such as ['w91'] have no row" in line and '96' in line


def test_where_it_can_have_none_that_is_said(tmp_path, capsys):
  _, hf = export(tmp_path, words=80, index=93)
  assert 'lacks <image>, and id 93 is not' in capsys.readouterr().out
  theirs = tokenizers.Tokenizer.from_file(str(hf / files.TOKENIZER))
  assert theirs.token_to_id('<image>') is None


def test_a_word_may_be_the_placeholder(tmp_path):
  _, hf = export(tmp_path, index=20)
  said = read(hf / 'processor_config.json')
  theirs = tokenizers.Tokenizer.from_file(str(hf / files.TOKENIZER))
  assert theirs.token_to_id(said['image_token']) == 20


def test_a_name_with_another_id_is_said(tmp_path, capsys):
  def change(directory):
    reconfigure(directory, lambda v: v.update(image_token_index=95))
    inner = tokenizers.Tokenizer.from_file(str(directory / files.TOKENIZER))
    inner.add_special_tokens(['<image>'])
    inner.save(str(directory / files.TOKENIZER))
  export(tmp_path, change=change)
  assert '<image> has the id 93, but images stand at id 95' in (
      capsys.readouterr().out)


def test_all_that_a_processor_needs(tmp_path):
  _, hf = export(tmp_path)
  said = read(hf / 'processor_config.json')
  assert said['image_processor'] == read(hf / 'preprocessor_config.json')
  assert said['image_processor']['do_pad'] is False
  assert {k: v for k, v in said.items() if k != 'image_processor'} == {
      'processor_class': 'LlavaProcessor', 'image_token': '<image>',
      'patch_size': CONFIG.vision.patch_size, 'num_additional_image_tokens': 1,
      'vision_feature_select_strategy': 'default'}


def test_without_a_processor_pictures_are_padded_and_that_is_said(
    tmp_path, capsys):
  _, hf = export(tmp_path, change=lambda d: (d / 'processor.json').unlink())
  assert 'no processor.json; pictures are padded' in capsys.readouterr().out
  assert read(hf / 'processor_config.json')['image_processor']['do_pad']


def set_roles(**values):
  return lambda d: (d / 'tokenizer_config.json').write_text(json.dumps(values))


@pytest.mark.parametrize('change,bos', [
    (lambda d: None, True), (set_roles(add_bos_token=True), True),
    (set_roles(tokenizer_class='LlamaTokenizer'), True),
    (set_roles(add_bos_token=False), False),
    (set_roles(tokenizer_class='PreTrainedTokenizerFast'), False)])
def test_bos_is_put_in_front_where_we_do(change, bos, tmp_path):
  ours, hf = export(tmp_path, change=change)
  theirs = tokenizers.Tokenizer.from_file(str(hf / files.TOKENIZER))
  tokenizer = load_tokenizer(ours / files.TOKENIZER)
  ids = tokenizer.encode('w1 w2')
  assert (tokenizer.bos_id == 1) == bos
  assert theirs.encode('w1 w2').ids == [1] * bos + ids
  assert theirs.encode('w1', 'w2').ids == [1] * bos + ids[:1] + [1] * bos + ids[1:]
  roles = read(hf / 'tokenizer_config.json')
  assert (roles['tokenizer_class'], roles['add_bos_token']) == (
      'PreTrainedTokenizerFast', bos)
  assert (roles['bos_token'], roles['eos_token'], roles['unk_token']) == (
      '<s>' if bos else None, '</s>', '<unk>')
  again = load_tokenizer(hf / files.TOKENIZER)
  assert (again.bos_id, again.encode('w1 w2')) == (tokenizer.bos_id, ids)


def test_a_post_processor_that_is_there_stays(tmp_path):
  from tokenizers import processors
  def change(directory, steps):
    path = str(directory / files.TOKENIZER)
    inner = tokenizers.Tokenizer.from_file(path)
    inner.post_processor = steps
    inner.save(path)
  bos = processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 1)])
  for name, steps in (('a', bos), ('b', processors.Sequence([bos])),
                      ('c', processors.ByteLevel(trim_offsets=False))):
    _, hf = export(tmp_path / name, change=lambda d, s=steps: change(d, s))
    theirs = tokenizers.Tokenizer.from_file(str(hf / files.TOKENIZER))
    assert theirs.encode('w1 w2').ids.count(1) == 1, name


def test_what_ends_an_answer(tmp_path):
  _, hf = export(tmp_path / 'a')
  want = {'bos_token_id': 1, 'eos_token_id': 2}
  assert read(hf / files.GENERATION) == want
  text = read(hf / files.CONFIG)['text_config']
  assert {k: text[k] for k in want} == want
  said = {'eos_token_id': [2, 5], 'pad_token_id': 500, 'top_p': 0.5}
  _, hf = export(tmp_path / 'b', change=lambda d: (
      d / files.GENERATION).write_text(json.dumps(said)))
  assert read(hf / files.GENERATION) == said
  text = read(hf / files.CONFIG)['text_config']
  assert text['eos_token_id'] == [2, 5] and 'pad_token_id' not in text
  _, hf = export(tmp_path / 'c', change=lambda d: (
      d / files.GENERATION).write_text('{"top_p": 0.5, "eos_token_id": null}'))
  assert read(hf / files.GENERATION) == {**want, 'top_p': 0.5}


def test_a_gguf_says_what_ends_an_answer(clip, tmp_path):
  path = write_gguf(tmp_path / 'a.gguf', gguf_weights())
  assert run('convert', '--llm', path, '--vision', clip, '--to',
             tmp_path / 'ours') == 0
  want = {'bos_token_id': 256, 'eos_token_id': 257, 'pad_token_id': 258}
  assert read(tmp_path / 'ours' / files.GENERATION) == want
  assert run('export', '--from', tmp_path / 'ours', '--to', tmp_path / 'hf') == 0
  assert read(tmp_path / 'hf' / files.GENERATION) == want
  text = read(tmp_path / 'hf' / files.CONFIG)['text_config']
  assert {k: text[k] for k in want} == want
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'hf/tokenizer.json'))
  assert theirs.encode('ab').ids == [256, 259]


@pytest.mark.parametrize('name,text', [
    ('tokenizer.json', '{'), ('tokenizer.json', '[]'), ('tokenizer.json', '{}'),
    ('tokenizer.json', '{"model": 3}'),
    ('tokenizer.json', '{"model": {"vocab": {}}, "post_processor": 3}'),
    ('tokenizer_config.json', '['), ('tokenizer_config.json', '[]'),
    ('tokenizer_config.json', '{"eos_token": "nope"}'),
    ('tokenizer_config.json', '{"pad_token": "nope"}'),
    ('generation_config.json', '{'), ('generation_config.json', '[]'),
    ('processor_config.json', '[]'), ('processor.json', '{')])
def test_damaged_files_are_one_line(name, text, ours, tmp_path, capsys):
  import shutil
  shutil.copytree(ours, tmp_path / 'ours')
  (tmp_path / 'ours' / name).write_text(text)
  line = refused(capsys, 'export', '--from', tmp_path / 'ours', '--to',
                 tmp_path / 'to')
  assert str(tmp_path / 'ours' / name) in line


def test_voco_there_and_back(source, tmp_path, capsys):
  """As its authors' directory has it: a row, and a token of that name."""
  name = {'content': '<voco>', 'special': True, 'lstrip': False,
          'rstrip': False, 'normalized': False, 'single_word': False}
  inner = tokenizers.Tokenizer.from_file(str(source / files.TOKENIZER))
  inner.add_special_tokens(['<voco>'])
  inner.save(str(source / files.TOKENIZER))
  for file, values in (
      ('added_tokens.json', {'<voco>': 93}),
      ('special_tokens_map.json', {'additional_special_tokens': [name]}),
      ('tokenizer_config.json', {'added_tokens_decoder': {'93': name},
                                 'additional_special_tokens': ['<voco>']})):
    (source / file).write_text(json.dumps(values))
  reconfigure(source, lambda v: v.update(image_token_index=-200))
  one, two = tmp_path / 'one', tmp_path / 'two'
  assert run('convert', '--from', source, '--to', one, '--num-voco-tokens', 3,
             '--template', 'voco') == 0
  assert run('export', '--from', one, '--to', tmp_path / 'hf') == 0
  left = [p.name for p in (tmp_path / 'hf').glob('*.json') if '<voco>' in p.read_text()]
  assert not left and not (tmp_path / 'hf/added_tokens.json').exists()
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'hf/tokenizer.json'))
  assert theirs.token_to_id('<image>') == 93
  assert run('convert', '--from', tmp_path / 'hf', '--to', two) == 0
  config = files.load_config(two)
  assert config.voco == files.load_config(one).voco == VocoConfig(3)
  # the placeholder of images is a row now
  assert (config.text.vocab_size, config.image_token_index,
          config.voco_token_index) == (94, 93, 94)
  np.testing.assert_array_equal(weights(two)['voco_embedding'],
                                weights(one)['voco_embedding'])
  assert load_processor(two) == load_processor(one) == Processor('voco', 'pad')
  assert 'leave out --num-voco-tokens' in refused(
      capsys, 'convert', '--from', tmp_path / 'hf', '--to', tmp_path / 'never',
      '--num-voco-tokens', 3)


def test_atp_there_and_back(tmp_path, capsys):
  config = helpers.atp_config(score_norm='rank')
  ours, hf = export(tmp_path, atp=config.atp)
  two = tmp_path / 'two'
  assert run('convert', '--from', hf, '--to', two) == 0
  assert files.load_config(two).atp == config.atp != AtpConfig()
  mine, back = weights(ours), weights(two)
  assert {k for k in mine if 'atp/' in k} == {k for k in back if 'atp/' in k}
  for key in mine:
    if 'atp/' in key:
      np.testing.assert_array_equal(mine[key], back[key])
  path = hf / ADAPTERS
  side = safetensors.numpy.load_file(path)
  with safetensors.safe_open(path, framework='numpy') as file:
    header = file.metadata()
  argv = ('convert', '--from', hf, '--to', tmp_path / 'to')
  key = next(iter(side))
  for changed, said, words in (
      ({**side, 'foo': np.ones(2, np.float32)}, header, ["'foo'", ADAPTERS]),
      ({k: v for k, v in side.items() if k != key}, header, [key, 'missing']),
      ({**side, key: np.ones(1, np.float32)}, header, [key, 'shape']),
      ({**side, key: side[key].astype(np.float16)}, header, ['--dtype', ADAPTERS]),
      (side, {}, [ADAPTERS, 'export the model again']),
      (side, {'vlm_compress': '{}'}, [ADAPTERS, 'export the model again']),
      (side, {'vlm_compress': '{"voco": null, "template": null, "atp": '
              '{"surprise": 1}}'}, [ADAPTERS, 'surprise'])):
    safetensors.numpy.save_file(changed, path, said)
    line = refused(capsys, *argv)
    assert all(word in line for word in words), line


def test_tensors_of_no_model_are_refused(ours, tmp_path, capsys):
  from test_conversion import rewrite
  files.save_model(tmp_path / 'ours', random_params(CONFIG), CONFIG, TOKENIZER)
  rewrite(tmp_path / 'ours', lambda t: t.update({'foo': np.ones(2, np.float32)}))
  line = refused(capsys, 'export', '--from', tmp_path / 'ours', '--to',
                 tmp_path / 'to')
  assert "'foo'" in line and 'model.safetensors' in line


def test_the_last_norm_of_the_tower(ours, tmp_path, capsys):
  """It is made up where it is lost, which is said; half of it is damage."""
  from test_conversion import rewrite
  assert run('export', '--from', ours, '--to', tmp_path / 'hf') == 0
  said, start = capsys.readouterr().out, 'vision_tower.vision_model.post_layernorm'
  assert f'{start}.weight, {start}.bias: written as ones and zeros' in said
  made = weights(tmp_path / 'hf')
  np.testing.assert_array_equal(made[f'{start}.weight'], 1)
  np.testing.assert_array_equal(made[f'{start}.bias'], 0)
  files.save_model(tmp_path / 'half', random_params(CONFIG), CONFIG, TOKENIZER)
  size = CONFIG.vision.hidden_size
  rewrite(tmp_path / 'half', lambda t: t.update({
      'vision_tower/post_layernorm/weight': np.ones(size, np.float32)}))
  assert "post_layernorm/weight'] of" in refused(
      capsys, 'export', '--from', tmp_path / 'half', '--to', tmp_path / 'to')
