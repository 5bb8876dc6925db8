"""Keep maps and attention of a small random model against other routes to
the same numbers: the evaluator, and attention computed by hand.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from vlm_compress import api
from vlm_compress.analysis import capture
from vlm_compress.config import (
  AtpConfig,
  ConfigError,
  LlavaConfig,
  TextConfig,
  VocoConfig,
)
from vlm_compress.convert.files import save_model
from vlm_compress.data import tokenizer as tokenizer_lib
from vlm_compress.data.examples import Example, Turn
from vlm_compress.eval import evaluator
from vlm_compress.models.llava import Llava, init_params
from vlm_compress.presets import efficientnet_lite0

TOKENIZER = tokenizer_lib.word_level(['what is at top left ? a dog owl'])
QUESTION = 'what is at top left ?'
# As long as keep_maps' longest answer, so that the evaluator cuts no earlier.
EXAMPLE = Example('e', (Turn(QUESTION, 'a dog ' * 7, 'what'),), (b'',))
GRID, LAYERS = 4, 4
P = GRID ** 2


def make(**method) -> api.Vlm:
  """A random model, drawn without compiling; thresholds are about 0.5."""
  config = LlavaConfig(
      vision=efficientnet_lite0(16 * GRID),
      text=TextConfig(vocab_size=TOKENIZER.vocab_size, hidden_size=32,
                      intermediate_size=48, num_hidden_layers=LAYERS,
                      num_attention_heads=4, num_key_value_heads=2,
                      max_position_embeddings=128),
      **method)
  model = Llava(config)
  shapes = nn.meta.unbox(jax.eval_shape(
      functools.partial(init_params, model), jax.random.key(0)))
  rng = np.random.default_rng(0)
  draw = lambda path, x: np.float32(
      (0.05 if path[0].key == 'atp' else 0.2) * rng.normal(size=x.shape) +
      (path[-1].key == 'weight'))
  return api.Vlm(config, jax.tree.map_with_path(draw, shapes), TOKENIZER)


@pytest.fixture(scope='module')
def features() -> np.ndarray:
  return np.random.default_rng(0).normal(size=(P, 112)).astype(np.float32)


@pytest.fixture(scope='module')
def pruned() -> api.Vlm:
  # lambda 16 leaves no spatial score above 0: redundancy scores decide.
  return make(atp=AtpConfig(prune_after=(1, 3), target_tokens=8.0,
                            sap_lambda=16.0))


@pytest.fixture(scope='module')
def voco() -> api.Vlm:
  return make(voco=VocoConfig(num_voco_tokens=2))


def test_load_gives_what_was_saved(tmp_path, pruned, features):
  save_model(tmp_path, pruned.params, pruned.config, pruned.tokenizer)
  loaded = api.load(tmp_path)
  assert loaded.config == pruned.config
  assert loaded.tokenizer.encode(QUESTION) == TOKENIZER.encode(QUESTION)
  jax.tree.map(np.testing.assert_array_equal, loaded.params,
               dict(pruned.params))
  ours = capture.keep_maps(pruned, EXAMPLE, features, QUESTION)
  again = capture.keep_maps(loaded, EXAMPLE, features, QUESTION)
  jax.tree.map(np.testing.assert_array_equal, ours, again)


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors',
                                  'tokenizer.json'])
def test_load_names_the_missing_file(tmp_path, pruned, name):
  save_model(tmp_path, pruned.params, pruned.config, pruned.tokenizer)
  (tmp_path / name).unlink()
  with pytest.raises(ConfigError, match=name):
    api.load(tmp_path)


def test_keep_maps_are_those_of_the_evaluator(pruned, features):
  maps = capture.keep_maps(pruned, EXAMPLE, features, QUESTION)
  method = evaluator.Method('ATP', pruned.config, pruned.params)
  answers = evaluator.answer(
      method, [EXAMPLE], features[None],
      [evaluator.Question(0, EXAMPLE.turns[0])], TOKENIZER, batch_size=2)
  assert maps['keep'].dtype == bool
  np.testing.assert_array_equal(maps['keep'].reshape(2, P),
                                answers.module_keep[0])
  np.testing.assert_allclose(maps['thresholds'], answers.thresholds[0],
                             rtol=1e-6)
  np.testing.assert_array_equal(maps['entering'], answers.entering[0])
  assert maps['answer'] == answers.texts[0]


def test_keep_maps_agree_with_each_other(pruned, features):
  maps = capture.keep_maps(pruned, EXAMPLE, features, QUESTION)
  first, second = maps['keep']
  assert 0 < second.sum() < first.sum() < P
  assert not (second & ~first).any()
  np.testing.assert_array_equal(
      maps['entering'], [P, first.sum(), first.sum(), second.sum()])
  scores = maps['redundancy']
  assert (scores[0] > 0).all() and not scores[1][~first].any()
  np.testing.assert_array_equal(scores[0] > maps['thresholds'][0, 0], first)


def test_threshold_shift_is_a_dial(pruned, features):
  kept = [capture.keep_maps(pruned, EXAMPLE, features, QUESTION,
                            threshold_shift=shift)['keep'].sum()
          for shift in (-9.0, 0.0, 9.0)]
  assert kept[0] == 2 * P > kept[1] > kept[2] == 2


def test_keep_maps_need_modules(voco, features):
  with pytest.raises(ConfigError, match='ATP'):
    capture.keep_maps(voco, EXAMPLE, features, QUESTION)


def first_layer_attention(loaded, features) -> np.ndarray:
  """float[T, T] of the first layer, straight from the definition."""
  config = loaded.config.text
  batch = capture._prompt(loaded, EXAMPLE, features, QUESTION, 'short', 0)
  x = np.asarray(loaded.model.apply({'params': loaded.params}, batch,
                                    method='embed'), np.float64)[0]
  layer = jax.tree.map(lambda v: np.asarray(v[0], np.float64),
                       loaded.params['language_model']['layers'])
  x = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + config.rms_norm_eps)
  x = x * layer['input_layernorm']['weight']
  T, H = len(x), config.size_per_head
  angle = np.arange(T)[:, None] * config.rope_theta ** (
      -np.arange(H // 2) / (H // 2))
  turn = np.exp(1j * angle)[:, None]

  def rotated(name):
    y = (x @ layer['self_attn'][name]['kernel']).reshape(T, -1, H)
    z = (y[..., :H // 2] + 1j * y[..., H // 2:]) * turn
    return np.concatenate([z.real, z.imag], -1)
  q, k = rotated('q_proj'), rotated('k_proj')
  k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
  logits = np.einsum('tnh,snh->nts', q, k) / np.sqrt(H)
  valid = (np.arange(T)[:, None] >= np.arange(T)) & (
      batch.token_types[0] != 0)
  weight = np.where(valid, np.exp(logits), 0.0)
  return (weight / weight.sum(-1, keepdims=True)).mean(0)


def test_attention_is_that_of_the_definition(voco, features):
  # BOS, 16 visual tokens, newline, six words, newline.
  found = capture.attention_to_image(voco, EXAMPLE, features, QUESTION)
  rows = first_layer_attention(voco, features)[P + 1:P + 9].mean(0)
  np.testing.assert_allclose(found['text_to_visual'][0].ravel(),
                             rows[1:P + 1], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found['visual'][0], rows[1:P + 1].sum(),
                             rtol=1e-4)
  np.testing.assert_allclose(found['text'][0], rows[0] + rows[P + 1:].sum(),
                             rtol=1e-4)


@pytest.mark.parametrize('mask, num_voco, expected', [
    ('causal', 0, {'visual', 'text'}), ('causal', 2, {'visual', 'voco', 'text'}),
    ('voco', 2, {'voco', 'text'}), ('voco', 1, {'voco', 'text'})])
def test_shares_sum_to_one(voco, features, mask, num_voco, expected):
  found = capture.attention_to_image(voco, EXAMPLE, features, QUESTION, mask,
                                     num_voco)
  kinds = ('visual', 'voco', 'text')
  total = sum(found[kind] for kind in kinds)
  np.testing.assert_allclose(total, np.ones(LAYERS), rtol=1e-5)
  assert {kind for kind in kinds if (found[kind] > 0).all()} == expected
  assert all((found[kind] == 0).all() for kind in set(kinds) - expected)
  assert found['text_to_visual'].shape == (LAYERS, GRID, GRID)
  np.testing.assert_allclose(found['text_to_visual'].sum((1, 2)),
                             found['visual'], rtol=1e-5)
  from_voco = found['voco_to_visual'].sum((1, 2))
  assert (0 < from_voco).all() == (num_voco > 0) and (from_voco < 1).all()


def test_nobody_looks_at_pruned_tokens(pruned, features):
  keep = capture.keep_maps(pruned, EXAMPLE, features, QUESTION)['keep']
  looks = capture.attention_to_image(pruned, EXAMPLE, features,
                                     QUESTION)['text_to_visual']
  assert (looks[0] > 0).all()
  for layer, module in ((1, 0), (2, 0), (3, 1)):
    np.testing.assert_array_equal(looks[layer] > 0, keep[module])


@pytest.mark.parametrize('mask, num_voco, match', [
    ('voco', 0, 'num_voco_tokens'), ('voco', 3, 'at most 2'),
    ('diagonal', 0, 'mask=')])
def test_attention_refuses_what_does_not_fit(voco, features, mask, num_voco,
                                             match):
  with pytest.raises(ConfigError, match=match):
    capture.attention_to_image(voco, EXAMPLE, features, QUESTION, mask,
                               num_voco)


def test_attention_needs_the_grid(features):
  loaded = make(resampler='avg_pool', num_query_tokens=4)
  with pytest.raises(ConfigError, match='grid'):
    capture.attention_to_image(loaded, EXAMPLE, features, QUESTION)


def test_kept_statistics_by_hand():
  keep = np.zeros((4, 2, 8), bool)
  for question, count in enumerate((1, 2, 3, 6)):
    keep[question, 0, :count] = True
    keep[question, 1, :1] = True
  entering = np.array([[8, 1, 1], [8, 2, 1], [8, 3, 1], [8, 6, 1]], np.float32)
  theta = np.full((4, 2, 2), 0.25, np.float32)
  answers = evaluator.Answers([''] * 4, entering, keep, theta,
                              np.ones(4, np.int32), np.ones(4, np.int32))
  found = capture.kept_statistics(answers)
  np.testing.assert_allclose(found['mean'], [3, 1])
  np.testing.assert_allclose(found['std'], [np.sqrt(3.5), 0])
  np.testing.assert_allclose(found['p50'], [2.5, 1])
  np.testing.assert_allclose(found['p90'], [5.1, 1])
  np.testing.assert_allclose(found['p99'], [5.91, 1])
  np.testing.assert_allclose([found['min'][0], found['max'][0]], [1, 6])
  np.testing.assert_allclose(found['entering_mean'], [8, 3, 1])
  np.testing.assert_allclose(found['layer_average'], [10 / 3, 11 / 3, 4, 5])
  np.testing.assert_allclose(found['theta_mean'], np.full((2, 2), 0.25))
  no_modules = dataclasses.replace(answers, module_keep=keep[:, :0],
                                   thresholds=theta[:, :0])
  assert capture.kept_statistics(no_modules)['p99'].shape == (0,)
  with pytest.raises(ValueError, match='no questions'):
    capture.kept_statistics(dataclasses.replace(answers, texts=[]))
