"""Peers that prune: masks, shorter rows and cached decoding are one thing."""

from __future__ import annotations

import dataclasses

import core_helpers as helpers
import jax
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample

from vlm_compress.decode.prefilled import entering, text_slots
from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.models.inputs import PruneOptions
from vlm_compress.models.llama import DecoderLayer
from vlm_compress.nn.kv_cache import grow
from vlm_compress.nn.masks import causal_mask

LENGTH, IMAGES, STEPS = 44, 2, 6
PROMPTS = ((BOS, IMAGE, 6, 7, 8, 9), (BOS, 5, IMAGE, 7, 8, IMAGE, 6, 9, 10),
           (BOS, 6, 7, 8), (BOS, 4, 11, IMAGE, 12, 13))
ANSWERS = np.random.default_rng(0).integers(6, 90, (4, STEPS), np.int32)


def _peer(selector, prune_after, counts=(), **fields):
  return helpers.atp_config(selector=selector, prune_after=prune_after,
                            fixed_counts=counts, **fields)


PEERS = {
    'fastv': _peer('fastv', (2,), (5,)),
    'pyramiddrop': _peer('pyramiddrop', (1, 2, 3), (8, 4, 2)),
    'sparsevlm': _peer('sparsevlm', (1, 2, 3), (9, 6, 3)),
    'sparsevlm by rank': _peer('sparsevlm', (1, 2), rank_scale=0.6),
    'divprune': _peer('divprune', (0,), (5,)),
    'cdpruner': _peer('cdpruner', (0, 2), (6, 3))}
COUNTS = {'fastv': [16, 16, 5, 5], 'pyramiddrop': [16, 8, 4, 2],
          'sparsevlm': [16, 9, 6, 3], 'divprune': [5] * 4,
          'cdpruner': [6, 6, 3, 3]}
# Many programs, which differ in few lines.
SOME = [name if name in ('divprune', 'pyramiddrop', 'sparsevlm') else
        pytest.param(name, marks=pytest.mark.slow) for name in PEERS]
_MODELS = {}


def batch_of(config, rows=range(4), pad_left=False):
  return helpers.batch([Sample(PROMPTS[i], seed=i) for i in rows], config,
                       length=LENGTH, num_images=IMAGES, pad_left=pad_left)


def masked(config, batch, answers):
  """Logits of the prompt's and of every later token, nothing dropped."""
  model, params = helpers.build(config)
  logits, cache, out = helpers.apply(model, params, batch, method='prefill',
                                     prune=PruneOptions())
  cache, found = grow(cache, STEPS), [logits]
  for token in answers.T:
    logits, cache = helpers.apply(model, params, token, cache, method='extend')
    found.append(logits)
  return np.stack(found), out


def in_segments(config, batch, answers):
  """The same on rows that get shorter."""
  if config not in _MODELS:
    _MODELS[config] = SegmentedModel(config, helpers.build(config)[1])
  state = _MODELS[config].prefill(batch, PruneOptions(), room=STEPS)
  found = [state.logits]
  for token in answers.T:
    found.append(_MODELS[config].extend(token, state))
  return np.stack(found), state


@pytest.mark.parametrize('name', SOME)
def test_shorter_rows_are_the_mask(name):
  config = PEERS[name]
  batch = batch_of(config)
  want, out = masked(config, batch, ANSWERS)
  got, state = in_segments(config, batch, ANSWERS)
  helpers.close(got, want)
  np.testing.assert_array_equal(state.pruning.state.module_keep,
                                out.prune.module_keep)
  counts = np.asarray(out.entering).sum(-1)
  np.testing.assert_array_equal(entering(config, state.pruning), counts)
  if name in COUNTS:
    np.testing.assert_array_equal(
        counts, np.reshape(COUNTS[name], (4, 1, 1)) * batch.image_valid)
  else:
    seen = counts[:, batch.image_valid]
    assert len(np.unique(seen[2])) > 1 and (seen[2] < 16).all()
  assert state.slots[-1] - text_slots(batch) <= 16  # it really got shorter
  for slots, cache in zip(state.slots, state.caches):
    assert {k.shape[1] for k in cache.keys} == {slots + STEPS}
  plain = dataclasses.replace(config, atp=None)
  model, params = helpers.build(plain)
  logits = helpers.apply(model, params, batch, method='prefill')[0]
  assert np.abs(got[0] - logits).max() > 1e-2


@pytest.mark.parametrize('name', SOME)
def test_a_row_does_not_depend_on_its_batch(name):
  """Other rows, order and side of padding; and alone."""
  config = PEERS[name]
  want, state = in_segments(config, batch_of(config), ANSWERS)
  kept = np.asarray(state.pruning.state.module_keep)
  for rows, left in (([3], False), ([3, 2, 1, 0], True)):
    got, other = in_segments(config, batch_of(config, rows, left), ANSWERS[rows])
    helpers.close(got, want[:, rows])
    np.testing.assert_array_equal(other.pruning.state.module_keep, kept[:, rows])
  chosen = kept[-1][batch_of(config).image_valid]
  assert len({tuple(row) for row in chosen}) == 4  # four pictures, four choices


@pytest.mark.parametrize('name,by', [('fastv', 1), ('pyramiddrop', 2)])
def test_whose_attention_ranks(name, by):
  """FastV asks the layer that was just run, PyramidDrop the one behind it."""
  config = _peer(name, (2,), (5,))
  batch = batch_of(config)
  _, out = masked(config, batch, ANSWERS[:, :0])
  plain = dataclasses.replace(config, atp=None)
  model, params = helpers.build(plain)
  _, maps = helpers.apply(model, params, batch, collect=True)
  for row, image in ((0, 0), (1, 0), (1, 1), (3, 0)):
    last = np.flatnonzero(batch.prompt_mask[row])[-1]
    slots = batch.visual_slots[row]
    seen = np.asarray(maps.attention)[by, row, last][
        (slots >= 16 * image) & (slots < 16 * image + 16)]
    helpers.close(out.prune.redundancy[0, row, image], seen)
    kept = np.sort(np.argsort(-seen)[:5])
    np.testing.assert_array_equal(
        np.flatnonzero(out.prune.keep[row, image]), kept)


def test_merged_tokens_are_means_of_hidden_states():
  """SparseVLM with one text token: raters, score and merging, by hand."""
  config = _peer('sparsevlm', (1,), (6,))
  batch = batch_of(config, [3])
  _, out = masked(config, batch, ANSWERS[3:, :0])
  plain = dataclasses.replace(config, atp=None)
  model, params = helpers.build(plain)
  x = np.asarray(helpers.apply(model, params, batch, method='embed'))[0]
  visual = np.flatnonzero(batch.visual_slots[0] >= 0)
  prompt = np.flatnonzero(batch.prompt_mask[0])
  similar = np.exp(x[visual] @ x[prompt].T)
  share = (similar / similar.sum(1, keepdims=True)).mean(0)
  raters = prompt[share > share.mean()]
  assert len(raters) == 1  # of two prompt tokens
  _, maps = helpers.apply(model, params, batch, collect=True)
  score = np.asarray(maps.attention)[0, 0][raters][:, visual].mean(0)
  helpers.close(out.prune.redundancy[0, 0, 0], score)
  # 11 go: int(3.3) + 1 = 4 candidates, one cluster: 5 and 1 are left.
  best = np.argsort(-score)
  left = np.flatnonzero(out.prune.keep[0, 0])
  assert set(best[:5]) < set(left) and len(left) == 6
  assert set(left) - set(best[:5]) < set(best[5:9])
  # What enters the next layer: the mean of the four, where one of them was.
  language, text = params['language_model'], config.text
  layer = DecoderLayer(text, np.float32, np.float32)
  run = jax.jit(lambda i, x: layer.apply(
      {'params': jax.tree.map(lambda p: p[i], language['layers'])}, x,
      batch.positions, causal_mask(batch.valid, batch.turn_ids)))
  behind = np.array(run(0, x[None])[0])
  centre = visual[(set(left) - set(best[:5])).pop()]
  behind[0, centre] = behind[0, visual[best[5:9]]].mean(0)
  stays = np.concatenate([visual[left], prompt])
  helpers.close(np.asarray(out.keys)[1, 0, stays],
                run(1, behind)[1].k[0, stays])
