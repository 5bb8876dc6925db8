"""Losses by hand."""

from __future__ import annotations

import core_helpers as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample
from scipy.special import log_softmax

from vlm_compress import losses
from vlm_compress.compress.atp import PruneState
from vlm_compress.config import AtpConfig

B, T, V = 2, 5, 7


def _logits(seed):
  return np.random.default_rng(seed).normal(size=(B, T, V)).astype(np.float32)


IDS = np.array([[1, 2, 3, 4, 5], [6, 5, 4, 3, 2]])
MASK = np.array([[0, 0, 1, 1, 0], [1, 1, 0, 0, 1]], bool)


def test_next_token_loss_by_hand():
  """Token t is predicted at t - 1; a target at 0 has nothing before it."""
  logits = _logits(0)
  log_probs = log_softmax(logits.astype(np.float64), -1)
  total, count = losses.next_token_loss(logits, IDS, MASK)
  want = [-log_probs[0, 1, 3] - log_probs[0, 2, 4],
          -log_probs[1, 0, 5] - log_probs[1, 3, 2]]
  np.testing.assert_allclose(total, want, rtol=1e-6)
  np.testing.assert_array_equal(count, [2, 2])


def test_rows_without_targets_count_nothing():
  total, count = losses.next_token_loss(_logits(0), IDS, np.zeros_like(MASK))
  assert not np.asarray(total).any() and not np.asarray(count).any()


def test_distillation_by_hand():
  student, teacher = _logits(1), _logits(2)
  s, t = (log_softmax(x.astype(np.float64), -1) for x in (student, teacher))
  kl = (np.exp(t) * (t - s)).sum(-1)
  total, count = losses.distillation_loss(student, teacher, MASK)
  np.testing.assert_allclose(
      total, [kl[0, 1] + kl[0, 2], kl[1, 0] + kl[1, 3]], rtol=1e-5)
  np.testing.assert_array_equal(count, [2, 2])


def test_distillation_is_zero_for_equals_and_teaches_the_student_only():
  student, teacher = _logits(1), _logits(2)
  total, _ = losses.distillation_loss(student, student + 3.0, MASK)
  np.testing.assert_allclose(total, 0.0, atol=1e-6)
  loss = lambda s, t: losses.distillation_loss(s, t, MASK)[0].sum()
  to_student, to_teacher = jax.grad(loss, (0, 1))(student, teacher)
  assert np.abs(to_student).max() > 1e-2 and not np.asarray(to_teacher).any()


def _entering():
  """Three layers, two rows of two images, P = 4; row 1 has one image."""
  entering = np.zeros((3, 2, 2, 4), np.float32)
  for layer, counts in enumerate([((4, 4), (4, 0)), ((4, 4), (4, 0)),
                                  ((2, 1), (3, 0))]):
    for b in (0, 1):
      for i in (0, 1):
        entering[layer, b, i, :counts[b][i]] = 1.0
  return entering, np.array([[True, True], [True, False]])


@pytest.mark.parametrize('target', [2.0, 4.0])
def test_budget_by_hand(target):
  """Module after layer 2 of 3; kept 2, 1 and 3 of 4; batch means."""
  entering, image_valid = _entering()
  config = AtpConfig(prune_after=(2,), target_tokens=target, lambda_atp=0.1,
                     lambda_target=0.3)
  state = PruneState(keep=entering[2], module_keep=entering[2:],
                     thresholds=jnp.zeros((1, 2, 2, 2)),
                     redundancy=jnp.zeros((1, 2, 2, 4)))
  got = losses.budget_loss(state, entering, image_valid, config)
  average = (10 / 3 + 9 / 3 + 11 / 3) / 3
  np.testing.assert_allclose(got['layer_average'], average, rtol=1e-6)
  np.testing.assert_allclose(got['budget_depth'], 0.1 * (2 / 4) * (2 / 3),
                             rtol=1e-6)
  np.testing.assert_allclose(got['budget_target'],
                             0.3 * abs(average - target) / 4, rtol=1e-6)


def test_rows_without_pictures_have_no_budget():
  entering, image_valid = _entering()
  config = AtpConfig(prune_after=(2,), target_tokens=2.0)

  def budget(entering, image_valid):
    state = PruneState(keep=entering[2], module_keep=entering[2:],
                       thresholds=jnp.zeros((1, 2, 2, 2)),
                       redundancy=jnp.zeros((1, 2, 2, 4)))
    return losses.budget_loss(state, entering, image_valid, config)
  want, more = budget(entering, image_valid), budget(
      np.pad(entering, ((0, 0), (0, 2), (0, 0), (0, 0))),
      np.pad(image_valid, ((0, 2), (0, 0))))
  for name, value in want.items():
    assert value > 0
    np.testing.assert_allclose(more[name], value, rtol=1e-6)
  none = budget(np.zeros_like(entering), np.zeros_like(image_valid))
  assert none['budget_depth'] == none['budget_target'] == 0.0


def test_target_is_of_the_batch_and_not_of_the_instance():
  """One image keeps 4 and one 2: the mean is on target, nothing to pay."""
  entering = np.ones((1, 2, 1, 4), np.float32)
  entering[0, 1, 0, 2:] = 0.0
  state = PruneState(keep=entering[0], module_keep=entering,
                     thresholds=jnp.zeros((1, 2, 1, 2)),
                     redundancy=jnp.zeros((1, 2, 1, 4)))
  config = AtpConfig(prune_after=(1,), target_tokens=3.0)
  got = losses.budget_loss(state, entering, np.ones((2, 1), bool), config)
  np.testing.assert_allclose(got['budget_target'], 0.0, atol=1e-7)


def test_packed_turns_cost_what_separate_rows_cost():
  config = helpers.tiny()
  model, params = helpers.build(config)
  turns = [((7, 8, 9), 2), ((10, 11), 1), ((12, 13, 14, 15), 3)]
  head = (BOS, IMAGE, 6)
  ids, turn_ids, mask = list(head), [0] * 3, [False] * 3
  for t, (tokens, answer) in enumerate(turns, 1):
    ids += tokens
    turn_ids += [t] * len(tokens)
    mask += [i >= len(tokens) - answer for i in range(len(tokens))]
  from vlm_compress.models.sequence import expand_row, make_batch
  packed = expand_row(ids, mask, turn_ids, config)
  separate = [Sample(head + tokens, answer) for tokens, answer in turns]
  rows = [packed] + [helpers.row(s, config) for s in separate]
  images = [helpers.features(separate[0], config)] * 4
  batch = make_batch(rows, images, length=30, num_images=1)
  logits, _ = helpers.apply(model, params, batch)
  total, count = losses.next_token_loss(logits, batch.input_ids,
                                        batch.loss_mask)
  # every turn's first answer token has its own question in front
  np.testing.assert_array_equal(count, [6, 2, 1, 3])
  helpers.close(total[0], np.asarray(total[1:]).sum(), 1e-5)
