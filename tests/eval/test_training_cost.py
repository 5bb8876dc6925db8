"""FLOPs of training steps: by hand on a model of a few numbers, and by XLA.

By hand, with D = 4, two heads of 2 and one for keys and values, F = 6, V = 10,
two layers and four patches of 2 features:

  a token, one layer   2 D (4 + 2 x 2) + 2 D 4 + 6 D F = 64 + 32 + 144 = 240
  a pair, one layer    4 x 4 = 16
  logits of a token    2 D V = 80
  projector            2 x 4 x D (2 + D) = 192, of it the second layer's 128
"""

from __future__ import annotations

import dataclasses

import core_helpers as helpers
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from core_helpers import BOS, IMAGE, Sample, segment

from vlm_compress.config import (
  AtpConfig,
  ConfigError,
  LlavaConfig,
  TextConfig,
  VisionConfig,
  VocoConfig,
)
from vlm_compress.eval import efficiency
from vlm_compress.eval.training_cost import RowShape, step_cost
from vlm_compress.models import llava
from vlm_compress.models.sequence import split_voco
from vlm_compress.train.optimizer import merge, split
from vlm_compress.train.recipe import Recipe
from vlm_compress.train.steps import LOSSES, At

CONFIG = LlavaConfig(
    vision=VisionConfig(image_size=4, patch_size=2, hidden_size=2, intermediate_size=3,
                        num_hidden_layers=2, num_attention_heads=1),
    text=TextConfig(vocab_size=10, hidden_size=4, intermediate_size=6,
                    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1))
# How many numbers learn; 240 of both layers' matrices make 480 FLOPs a token.
PROJECTOR = {'multi_modal_projector/kernels': 24}
DECODER = {'language_model/layers/kernels': 240, 'language_model/lm_head/kernel': 40,
           'language_model/embed_tokens/embedding': 40}
TOWER = {'vision_tower/kernels': 99}
HEADS = {'atp/linear/kernel': 24}
ROW = RowShape(7)
# 7 tokens, 28 pairs: products, attention, logits.
PRODUCTS, ATTENTION, HEAD = 2 * 7 * 240, 2 * 28 * 16, 7 * 80
FORWARD = PRODUCTS + ATTENTION + HEAD + 192
# Through the decoder, without gradients of its weights.
THROUGH = PRODUCTS + 2 * ATTENTION + HEAD


def cost(stage, row, learns, config=CONFIG, **kwargs):
  found = step_cost(config, stage, row, 1, learns, **kwargs)
  return found.forward, found.backward


@pytest.mark.parametrize('stage, learns, backward', [
    ('instruct', PROJECTOR | DECODER, THROUGH + PRODUCTS + HEAD + 192 + 128),
    ('align', PROJECTOR, THROUGH + 192 + 128),
    ('instruct', DECODER, THROUGH + PRODUCTS + HEAD)])
def test_what_learns_costs_a_backward_pass(stage, learns, backward):
  assert cost(stage, ROW, learns) == (FORWARD, backward)
  three = step_cost(CONFIG, stage, ROW, 3, learns)
  assert (three.forward, three.backward) == (3 * FORWARD, 3 * backward)
  assert three.model == three.hardware == 3 * (FORWARD + backward)
  assert (three.recompute, three.idle) == (0, 0)


def test_numbers_of_the_small_model():
  assert FORWARD == 3360 + 896 + 560 + 192
  assert cost('align', ROW, PROJECTOR)[1] == 3360 + 2 * 896 + 560 + 128 + 192
  assert cost('instruct', ROW, DECODER)[1] == 2 * (3360 + 896 + 560)


def test_tied_embeddings_learn_as_a_head():
  text = dataclasses.replace(CONFIG.text, tie_word_embeddings=True)
  config = dataclasses.replace(CONFIG, text=text)
  learns = {path: n for path, n in DECODER.items() if 'lm_head' not in path}
  assert cost('instruct', ROW, learns, config) == cost('instruct', ROW, DECODER)


def test_a_tower_on_pixels():
  """One of its two layers runs: 5 tokens, 192 FLOPs of patches in front.

  A layer is 8 x 5 x 2^2 + 4 x 5^2 x 2 + 4 x 5 x 2 x 3 = 480.  Where it learns
  the projector's first layer needs its input's gradient, too: 64.
  """
  row = dataclasses.replace(ROW, has_pixels=True)
  forward, backward = cost('align', row, PROJECTOR)
  assert (forward, backward) == (FORWARD + 192 + 480, THROUGH + 192 + 128)
  forward, backward = cost('align', row, PROJECTOR | TOWER)
  assert (forward, backward) == (
      FORWARD + 672, THROUGH + 192 + 128 + 64 + 2 * 672)
  assert cost('align', row, TOWER)[1] == THROUGH + 192 + 2 * 672


def voco(**fields):
  return dataclasses.replace(CONFIG, voco=VocoConfig(1, **fields))


# Two pictures: 2 + 4 + 1 tokens each, then 5 tokens of text behind 2 keys.
VOCO_ROW = RowShape(0, 5, 2)
VOCO_PRODUCTS, VOCO_HEAD = 2 * 240 * (7 + 7 + 5), 5 * 80
VOCO_ATTENTION = 2 * 16 * (28 + 28 + 15 + 5 * 2)


def test_vocos_two_passes():
  forward = VOCO_PRODUCTS + VOCO_ATTENTION + VOCO_HEAD + 2 * 192
  backward = 2 * (VOCO_PRODUCTS + VOCO_ATTENTION + VOCO_HEAD) + 2 * (192 + 128)
  assert cost('voco', VOCO_ROW, PROJECTOR | DECODER, voco()) == (forward, backward)
  assert cost('voco', VOCO_ROW, {}, voco())[1] == (
      VOCO_PRODUCTS + 2 * VOCO_ATTENTION + VOCO_HEAD)
  # Text that sees BOS and the newline of each picture, too: 5 x 2 x 2 pairs.
  seen = cost('voco', VOCO_ROW, {}, voco(text_sees_prefix=True))[0]
  assert seen - forward == 2 * 16 * 20
  with pytest.raises(ConfigError, match='needs a config with voco'):
    cost('voco', VOCO_ROW, {})


def test_a_teacher_reads_the_whole_row_forward_only():
  alone = cost('voco', VOCO_ROW, DECODER, voco())
  row = dataclasses.replace(VOCO_ROW, length=15)
  taught = cost('voco', row, DECODER, voco(distill_weight=1.0), has_teacher=True)
  teacher = 2 * 15 * 240 + 2 * 120 * 16 + 15 * 80 + 2 * 192
  assert taught == (alone[0] + teacher, alone[1])


ATP = dataclasses.replace(CONFIG, atp=AtpConfig(
    prune_after=(1,), target_tokens=3.0, threshold_hidden_size=3))
# A module: 4 visual keys with visual (10 pairs) and 3 text queries (12), 2 x 4
# each, and Linear(8, 3) with two Linear(3, 1).
SELECTOR = 2 * 4 * (10 + 12) + 2 * 3 * (8 + 2)


def test_atps_modules():
  forward, backward = cost('atp', ROW, PROJECTOR | DECODER | HEADS, ATP)
  assert forward == FORWARD + SELECTOR
  assert backward == THROUGH + PRODUCTS + HEAD + 192 + 128 + 2 * SELECTOR


def test_a_frozen_decoder_needs_gradients_behind_the_first_module_only():
  """One layer of two; the loop computes the other one's all the same."""
  found = step_cost(ATP, 'atp', ROW, 1, HEADS)
  one = (PRODUCTS + 2 * ATTENTION) / 2
  assert found.backward == one + HEAD + 2 * SELECTOR and found.idle == one
  assert found.hardware == found.model + one
  assert step_cost(ATP, 'atp', ROW, 1, HEADS | PROJECTOR).idle == 0


@pytest.mark.parametrize('resampler', ['avg_pool_linear', 'qformer'])
def test_what_shortens_the_sequence_learns(resampler):
  config = dataclasses.replace(CONFIG, resampler=resampler, num_query_tokens=2)
  learns = PROJECTOR | {'resampler/kernel': 16}
  # Pooled in front of the projector, it maps 2 tokens instead of 4.
  projector = 96 if resampler == 'avg_pool_linear' else 192
  extra = efficiency.resampler_flops(config)
  assert extra > 0 and cost('instruct', ROW, learns, config) == (
      FORWARD - 192 + projector + extra, THROUGH + projector * 5 / 3 + 2 * extra)


# Against the compiler's count ------------------------------------------------

M, START = 2, At(jnp.int32(0), jnp.int32(0))
BOTH = ('language_model/', 'multi_modal_projector/')


def _wide(**fields):
  """Wide layers, beside which what no formula counts is small."""
  text = TextConfig(vocab_size=160, hidden_size=128, intermediate_size=320,
                    num_hidden_layers=M, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=64)
  return helpers.tiny(text=text, **fields)


def _batch(config, voco):
  image = segment(2) if voco else (IMAGE,)
  samples = [Sample((BOS, *image, *range(6, 13)), 3, seed=i) for i in range(2)]
  batch = helpers.batch(samples, config, length=32 if voco else 24, num_images=1)
  return (split_voco(batch, config, 8), None) if voco else batch


def _counts(config, stage, learns):
  """XLA's and our FLOPs of loss and gradients, unrolled; attention is dense."""
  model, recipe = llava.Llava(config, unroll=M), Recipe(stage=stage, batch_size=2)
  params = nn.unbox(jax.eval_shape(
      lambda key: llava.init_params(model, key), jax.random.key(0)))
  trainable, frozen = split(params, learns)
  batch = _batch(config, stage == 'voco')

  def gradients(trainable, frozen, batch):
    return jax.grad(lambda t: LOSSES[stage](
        model, merge(t, frozen), batch, START, recipe)[0])(trainable)
  compiled = jax.jit(gradients).lower(trainable, frozen, batch).compile()
  row = RowShape(0, 8) if stage == 'voco' else RowShape(24)
  ours = step_cost(config, stage, row, 2, {p: x.size for p, x in trainable.items()})
  passes = [(20, 0), (8, 2)] if stage == 'voco' else [(24, 0)]
  masked = sum(efficiency.dense_pairs(*p) - efficiency.causal_pairs(*p) for p in passes)
  dense = 3 * 2 * M * float(efficiency.layer_flops(config.text, 0, masked))
  return compiled.cost_analysis()['flops'], ours.model + dense


@pytest.fixture(scope='module', name='all_learns')
def fixture_all_learns():
  return _counts(_wide(), 'instruct', BOTH)


def test_the_compiler_counts_as_much(all_learns):
  theirs, ours = all_learns
  assert 1.0 <= theirs / ours < 1.05, theirs / ours


def test_the_compiler_saves_what_freezing_saves(all_learns):
  """Less by the gradients of the decoder's weights, which are products only."""
  theirs, ours = _counts(_wide(), 'align', BOTH[1:])
  saved = (all_learns[0] - theirs) / (all_learns[1] - ours)
  assert 0.98 < saved < 1.05, saved


def test_the_compiler_counts_vocos_passes():
  """Nobody reads the last product of the first pass, and XLA leaves it out."""
  config = _wide(voco=VocoConfig(2))
  theirs, ours = _counts(config, 'voco', BOTH)
  unread = 2 * 20 * 2 * 128 * 320
  assert 1.0 <= theirs / (ours - unread) < 1.05, theirs / (ours - unread)
