"""Model directories: what does not fit is named, file and field."""

from __future__ import annotations

import json

import core_helpers as helpers
import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy

from vlm_compress import sharding
from vlm_compress.config import ConfigError
from vlm_compress.convert import files
from vlm_compress.convert.processor import PROCESSOR, Processor, load_processor
from vlm_compress.convert.tensors import TensorFiles
from vlm_compress.models import llava
from vlm_compress.models.llava import Llava, init_params

CONFIG = helpers.atp_config()


class NoTokenizer:
  def save(self, path):
    open(path, 'w').close()


@pytest.fixture(scope='module')
def params():
  shapes = nn.unbox(jax.eval_shape(
      lambda key: init_params(Llava(CONFIG), key), jax.random.key(0)))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), shapes)


@pytest.fixture
def model(params, tmp_path):
  files.save_model(tmp_path / 'model', params, CONFIG, NoTokenizer())
  return tmp_path / 'model'


def change_config(model, change):
  values = json.loads((model / files.CONFIG).read_text())
  change(values)
  (model / files.CONFIG).write_text(json.dumps(values))


def test_save_and_load(model, params):
  assert files.load_config(model) == CONFIG
  jax.tree.map(np.testing.assert_array_equal, files.load_params(model), params)


def test_parameters_that_the_model_does_not_use_do_no_harm(model):
  change_config(model, lambda values: values.update(atp=None))
  assert 'atp' in files.load_params(model)


def test_onto_a_mesh_every_device_reads_its_shards(tmp_path, monkeypatch):
  config = helpers.atp_config()
  shapes = nn.unbox(files.abstract_params(config, with_vision=True))
  rng = np.random.default_rng(0)
  whole = jax.tree.map(lambda x: np.float32(0.1 * rng.normal(size=x.shape)),
                       shapes)
  files.save_model(tmp_path / 'model', whole, config, NoTokenizer())
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  read, part = [], TensorFiles.part

  def count(self, key, index):
    value = part(self, key, index)
    read.append((key, value.shape))
    return value
  monkeypatch.setattr(TensorFiles, 'part', count)
  monkeypatch.setattr(TensorFiles, 'read', lambda *_: pytest.fail('read whole'))
  placed = files.load_params(tmp_path / 'model', mesh)
  jax.tree.map(np.testing.assert_array_equal, placed, whole)
  up = placed['language_model']['layers']['mlp']['up_proj']['kernel']
  assert up.sharding.spec == jax.sharding.PartitionSpec(None, 'fsdp', 'tensor')
  name = 'language_model/layers/mlp/up_proj/kernel'
  assert {shape for key, shape in read if key == name} == {(4, 16, 24)}
  want = sharding.tree_shardings(
      files.abstract_params(config, with_vision=True), mesh)
  assert jax.tree.map(lambda x: x.sharding, placed) == want
  # computing with them gives what the whole parameters give
  batch = llava.example_batch(config)
  model = jax.jit(lambda p: Llava(config).apply({'params': p}, batch)[0])
  np.testing.assert_allclose(model(placed), model(whole), atol=1e-5)


def test_another_shape_is_named(model):
  change_config(model, lambda v: v['text'].update(intermediate_size=40))
  with pytest.raises(ConfigError) as caught:
    files.load_params(model)
  message = str(caught.value)
  assert 'model.safetensors: parameter language_model/' in message
  assert '48' in message and '40' in message and '\n' not in message


def test_a_missing_parameter_is_named(model, params):
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  name = next(n for n in flat if n.startswith('atp/'))
  safetensors.numpy.save_file(
      {n: x for n, x in flat.items() if n != name}, model / files.WEIGHTS)
  with pytest.raises(ConfigError, match=f'has no parameter {name}'):
    files.load_params(model)


@pytest.mark.parametrize('text, words', [
    ('[1, 2]', ['JSON list', 'an object']),
    ('3', ['JSON int']),
    ('null', ['JSON NoneType']),
    ('{"text": 3}', ['text=3', 'object']),
    ('{"vision": [1]}', ['vision=[1]', 'object']),
    ('{"text": {"vocab_size": "many"}}', ['vocab_size', 'many', 'int']),
    ('{"text": {"hidden_size": 2.5}}', ['hidden_size=2.5', 'int']),
    ('{"text": {"rope_theta": true}}', ['rope_theta=True', 'float']),
    ('{"remat": 1}', ['remat=1', 'bool']),
    ('{"atp": {"prune_after": 3}}', ['prune_after=3', 'tuple']),
    ('{"atp": {"prune_after": ["a"]}}', ['prune_after']),
    ('{"voco_token_index": null}', ['voco_token_index=None', 'int']),
    ('{', ['not readable JSON'])])
def test_config_that_is_no_config_is_one_line(tmp_path, text, words):
  (tmp_path / files.CONFIG).write_text(text)
  with pytest.raises(ConfigError) as caught:
    files.load_config(tmp_path)
  message = str(caught.value)
  assert message.startswith(str(tmp_path / files.CONFIG))
  assert all(word in message for word in words), message
  assert '\n' not in message


def test_a_whole_number_is_a_float(tmp_path):
  values = {'text': {'rope_theta': 10000}}
  (tmp_path / files.CONFIG).write_text(json.dumps(values))
  assert files.load_config(tmp_path).text.rope_theta == 10000


def test_the_processor_is_saved_before_the_config_says_done(params, tmp_path,
                                                            monkeypatch):
  model, processor = tmp_path / 'model', Processor('vicuna_v1', 'crop')
  write, order = files._replace, []
  monkeypatch.setattr(files, '_replace', lambda path, by: (
      order.append((path.name, (model / PROCESSOR).exists())), write(path, by)))
  files.save_model(model, params, CONFIG, NoTokenizer(), processor=processor)
  assert load_processor(model) == processor
  assert order[-1] == (files.CONFIG, True)
  # another model in its place does not inherit it
  files.save_model(model, params, CONFIG, NoTokenizer())
  assert load_processor(model) is None


@pytest.mark.parametrize('text, words', [
    ('[1]', ['JSON list', "'template'"]),
    ('{', ['not readable JSON']),
    ('{}', ['the field template is missing']),
    ('{"template": 3}', ['template=3']),
    ('{"template": ""}', ["template=''"]),
    ('{"template": "plain", "image_aspect_ratio": "stretch"}',
     ["image_aspect_ratio='stretch'", "('pad', 'crop')"]),
    ('{"template": "plain", "mode": "pad"}', ["['mode']", 'known'])])
def test_a_processor_that_is_none_is_one_line(tmp_path, text, words):
  (tmp_path / PROCESSOR).write_text(text)
  with pytest.raises(ConfigError) as caught:
    load_processor(tmp_path)
  message = str(caught.value)
  assert message.startswith(str(tmp_path / PROCESSOR))
  assert all(word in message for word in words), message
  assert '\n' not in message
