"""Importance scores against their definition, token by token, in numpy."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from vlm_compress.compress.importance import cross_queries, normalise, received_attention
from vlm_compress.nn import attention as attention_lib
from vlm_compress.nn.attention import attention_and_lse
from vlm_compress.nn.masks import Causal, causal_mask

B, T, N, K, H = 2, 21, 4, 2, 8


def _row():
  """BOS, image 1 (6 tokens), 2 text, image 2 (6), 4 text, 2 padding."""
  images = np.array([0] + [1] * 6 + [0] * 2 + [2] * 6 + [0] * 4 + [0] * 2)
  valid = np.arange(T) < 19
  prompt = np.isin(np.arange(T), [7, 8, 15, 16])  # 17, 18: the answer
  return images, valid, prompt


def _inputs(seed=0, soft=False):
  rng = np.random.default_rng(seed)
  images, valid, prompt = (np.stack([x] * B) for x in _row())
  valid[1, 18] = False
  q = rng.normal(size=(B, T, N, H)).astype(np.float32)
  k = rng.normal(size=(B, T, K, H)).astype(np.float32)
  weight = (images > 0) * (
      rng.random((B, T)) if soft else rng.random((B, T)) < 0.7)
  mask = np.asarray(causal_mask(valid, np.zeros((B, T), int)))
  bias = rng.normal(size=(B, T, T)).astype(np.float32) if soft else None
  return dict(q=q, k=k, mask=mask, bias=bias, image_ids=images,
              visual_weight=weight.astype(np.float32),
              prompt_weight=prompt.astype(np.float32))


def _by_definition(q, k, mask, bias, image_ids, visual_weight, prompt_weight):
  """Mean probability received from the queries that can see a token."""
  out = np.zeros((2, B, T))
  for b in range(B):
    probs = np.zeros((T, T))
    for n in range(N):
      logits = q[b, :, n].astype(np.float64) @ k[b, :, n // (N // K)].T
      logits = logits / np.sqrt(H) + (0 if bias is None else bias[b])
      weights = np.exp(logits) * mask[b]
      probs += weights / np.maximum(weights.sum(1, keepdims=True), 1e-30) / N
    for j in range(T):
      for which in (0, 1):
        total = count = 0.0
        for t in range(T):
          weight = prompt_weight[b, t]
          if which == 0:
            same = image_ids[b, t] == image_ids[b, j]
            weight = visual_weight[b, t] * same
          if mask[b, t, j]:
            total, count = total + weight * probs[t, j], count + weight
        out[which, b, j] = total / count if count > 0 else 0.0
  return out


@functools.partial(jax.jit, static_argnames='block_size')
def _scores(inputs, block_size=256):
  return received_attention(**{'lse': None, **inputs}, block_size=block_size)


def _saved(inputs):
  """The same inputs with the log-sum-exp that attention leaves behind."""
  v = np.zeros_like(inputs['k'])
  _, lse = attention_and_lse(inputs['q'], inputs['k'], v, inputs['mask'],
                             inputs['bias'])
  return {**inputs, 'lse': np.asarray(lse)}


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('block_size', [5, 256])
def test_equals_the_definition(soft, block_size):
  inputs = _inputs(soft=soft)
  want = _by_definition(**inputs)
  assert want[0].max() > 0.05 and want[1].max() > 0.05
  for given in (inputs, _saved(inputs)):
    got = np.stack(_scores(given, block_size))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize('max_groups', [1, 8])
@pytest.mark.parametrize('block_size', [4, 5, 21, 256])
def test_a_mask_that_nobody_stores(block_size, max_groups, monkeypatch):
  """Blocks of a causal mask leave out the keys behind them; few groups of
  blocks are what long rows have.
  """
  monkeypatch.setattr(attention_lib, 'MAX_GROUPS', max_groups)
  _scores.clear_cache()
  inputs = _saved(_inputs())
  causal = {**inputs, 'mask': Causal(inputs['mask'][:, -1])}
  np.testing.assert_array_equal(np.asarray(causal['mask'].dense(T)),
                                inputs['mask'])
  np.testing.assert_allclose(np.stack(_scores(causal, block_size)),
                             _by_definition(**_inputs()), rtol=0, atol=1e-6)


def test_a_row_with_576_visual_tokens():
  """Blocks against the formula at once, in float64."""
  rng = np.random.default_rng(0)
  length, heads, size = 640, 2, 16
  q, k = (rng.standard_normal((1, length, heads, size), np.float32) for _ in 'qk')
  valid = np.ones((1, length), bool)
  valid[0, -7:] = False
  ids = np.where((np.arange(length) >= 35) & (np.arange(length) < 611), 1, 0)[None]
  visual = (ids == 1).astype(np.float32)
  prompt = ((np.arange(length) >= 611) & valid[0])[None].astype(np.float32)
  got = np.stack(jax.jit(received_attention)(
      q, k, None, Causal(valid), None, ids, visual, prompt))
  logits = np.einsum('tnh,snh->nts', np.float64(q[0]), k[0]) / size ** 0.5
  mask = np.tril(np.ones((length, length), bool)) & valid[0]
  probs = np.where(mask, np.exp(logits), 0.0)
  probs = (probs / probs.sum(-1, keepdims=True)).mean(0)
  same_image = ids[0][:, None] == ids[0]
  for score, weight in zip(got, (visual[0][:, None] * same_image,
                                 prompt[0][:, None])):
    want = (probs * weight).sum(0) / np.maximum((mask * weight).sum(0), 1e-6)
    np.testing.assert_allclose(score[0], want, rtol=0, atol=1e-6)
  assert got[0].max() > 0.005


def test_the_saved_log_sum_exp_is_used():
  inputs = _saved(_inputs())
  louder = {**inputs, 'lse': inputs['lse'] - np.log(2.0, dtype=np.float32)}
  np.testing.assert_allclose(np.stack(_scores(louder)),
                             2 * np.stack(_scores(inputs)), rtol=1e-5)


def test_memory_does_not_grow_with_the_square():
  """Temporaries at 4 times the tokens: 4 times as much, not 16 times."""
  def temporaries(T):
    shaped = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
    ids = jax.ShapeDtypeStruct((1, T), np.int32)
    mask = Causal(jax.ShapeDtypeStruct((1, T), bool))
    run = jax.jit(lambda *a: received_attention(*a, block_size=64))
    compiled = run.lower(shaped(1, T, 8, 8), shaped(1, T, 8, 8), shaped(1, T, 8),
                         mask, None, ids, shaped(1, T), shaped(1, T)).compile()
    return compiled.memory_analysis().temp_size_in_bytes
  assert temporaries(2048) < 6 * temporaries(512) < 8 * 2048 * 2048 * 4


@pytest.mark.parametrize('block_size', [1, 4, 7, 20])
def test_blocks_do_not_matter(block_size):
  inputs = _inputs(soft=True)
  np.testing.assert_allclose(np.stack(_scores(inputs, block_size)),
                             np.stack(_scores(inputs)), atol=1e-6)


def test_images_do_not_vote_for_each_other():
  inputs = _inputs()
  changed = {**inputs, 'q': inputs['q'].copy()}
  changed['q'][:, 9:15] += 1.0  # queries of image 2
  before, after = _scores(inputs)[0], _scores(changed)[0]
  np.testing.assert_array_equal(before[:, 1:7], after[:, 1:7])
  assert np.abs(before[:, 9:15] - after[:, 9:15]).max() > 1e-4


def test_dropped_queries_have_no_vote():
  inputs = _inputs()
  inputs['visual_weight'][:, 3] = 0.0
  changed = {**inputs, 'q': inputs['q'].copy()}
  changed['q'][:, 3] += 1.0
  np.testing.assert_array_equal(_scores(inputs)[0], _scores(changed)[0])


def test_answers_and_padding_have_no_vote():
  """Answer tokens do not exist when thresholds are computed."""
  inputs = _inputs()
  changed = {**inputs, 'q': inputs['q'].copy()}
  changed['q'][:, 17:] += 3.0
  for before, after in zip(_scores(inputs), _scores(changed)):
    np.testing.assert_array_equal(before, after)
  changed['q'][:, 16] += 3.0  # the last prompt token has one
  after = _scores(changed)[1]
  assert np.abs(_scores(inputs)[1] - after)[:, 1:15].max() > 1e-3


def test_image_without_prompt_behind_it_has_no_cross_score():
  inputs = _inputs()
  inputs['prompt_weight'][:, 9:] = 0.0
  cross = _scores(inputs)[1]
  assert (np.asarray(cross[:, 9:15]) == 0.0).all()
  assert (np.asarray(cross[:, 1:7]) > 0.0).all()


def test_flat_attention_favours_early_tokens_by_a_known_factor():
  """The mean over queries leaves it: the first of 64 scores 4.7 times the last."""
  zeros = np.zeros((1, 64, 1, 4), np.float32)
  ones = np.ones((1, 64), np.float32)
  mask = np.tril(np.ones((1, 64, 64), bool))
  score, _ = received_attention(zeros, zeros, None, mask, None,
                                ones.astype(np.int32), ones, ones)
  want = np.array([(1 / np.arange(j, 65)).sum() / (65 - j)
                   for j in range(1, 65)])
  np.testing.assert_allclose(score[0], want, rtol=1e-5)
  assert round(float(score[0, 0] / score[0, -1]), 1) == 4.7


def test_queries_of_the_cross_score():
  """All prompt text, or the last of it; nothing where there is no prompt."""
  prompt = np.array([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0],
                     [1, 0, 0, 1, 1, 1]], bool)
  np.testing.assert_array_equal(cross_queries(prompt, 'all'), prompt)
  np.testing.assert_array_equal(
      cross_queries(prompt, 'last'),
      [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]])


def test_relative_by_hand():
  score = np.array([1.0, 2.0, 3.0, 9.0], np.float32)
  keep = np.array([1.0, 1.0, 1.0, 0.0], np.float32)
  # mean of the kept scores is 2: x = 1/2, 1, 3/2
  np.testing.assert_allclose(normalise(score, keep, 'relative'),
                             [1 / 3, 1 / 2, 3 / 5, 0.0], rtol=1e-6)


def test_relative_with_soft_mask_by_hand():
  score = np.array([1.0, 2.0], np.float32)
  keep = np.array([1.0, 0.5], np.float32)
  mean = (1.0 + 1.0) / 1.5
  np.testing.assert_allclose(
      normalise(score, keep, 'relative'),
      [1 / mean / (1 + 1 / mean), 2 / mean / (1 + 2 / mean) * 0.5], rtol=1e-6)


def test_relative_has_no_scale():
  score = np.random.default_rng(0).random((3, 8)).astype(np.float32) + 0.1
  keep = np.ones_like(score)
  np.testing.assert_allclose(normalise(1e-3 * score, keep, 'relative'),
                             normalise(score, keep, 'relative'), rtol=1e-5)


def test_minmax_by_hand():
  score = np.array([1.0, 2.0, 5.0, 9.0, 0.0], np.float32)
  keep = np.array([1.0, 1.0, 1.0, 0.0, 0.0], np.float32)
  np.testing.assert_allclose(normalise(score, keep, 'minmax'),
                             [0.0, 0.25, 1.0, 0.0, 0.0], rtol=1e-6)


def test_rank_by_hand():
  score = np.array([5.0, 1.0, 3.0, 9.0, 3.0], np.float32)
  keep = np.array([1.0, 1.0, 1.0, 0.0, 1.0], np.float32)
  # ranks among the kept four: 1 < 3 = 3 < 5
  np.testing.assert_allclose(normalise(score, keep, 'rank'),
                             [1.0, 0.25, 0.5, 0.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize('how', ['relative', 'minmax', 'rank'])
def test_an_image_that_is_not_there_gives_zeros(how):
  score = np.array([[1.0, 2.0], [0.0, 0.0]], np.float32)
  for keep in (np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)):
    got = np.asarray(normalise(score, keep, how))
    assert np.isfinite(got).all() and (got >= 0).all() and (got <= 1).all()
    if not keep.any():
      assert (got == 0).all()


@pytest.mark.parametrize('how', ['relative', 'minmax', 'rank'])
def test_normalising_keeps_the_order(how):
  score = np.random.default_rng(1).random((4, 16)).astype(np.float32)
  got = normalise(score, np.ones_like(score), how)
  np.testing.assert_array_equal(np.argsort(got, -1), np.argsort(score, -1))
