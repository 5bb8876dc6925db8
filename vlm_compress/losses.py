"""Losses, each as a sum and a count per example; the caller reduces."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlm_compress.compress.atp import PruneState
from vlm_compress.config import AtpConfig


def next_token_loss(logits: jax.Array, input_ids: jax.Array,
                    loss_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of the supervised tokens, each predicted by its left one.

  Args:
    logits: float32[B, T, V].
    input_ids: int32[B, T].
    loss_mask: bool[B, T], the token is a target.

  Returns:
    sum in nats and number of targets, float32[B] each.
  """
  log_probs = jax.nn.log_softmax(logits[:, :-1])
  picked = jnp.take_along_axis(log_probs, input_ids[:, 1:, None], axis=-1)
  weight = loss_mask[:, 1:].astype(jnp.float32)
  return -jnp.sum(picked[..., 0] * weight, axis=1), jnp.sum(weight, axis=1)


def distillation_loss(student_logits: jax.Array, teacher_logits: jax.Array,
                      loss_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """KL(teacher || student) at the supervised tokens (VoCo-LLaMA, Eq. 1).

  Args:
    student_logits, teacher_logits: float32[B, T, V]; no gradient flows to the
      teacher.
    loss_mask: bool[B, T], as in next_token_loss.

  Returns:
    sum in nats and number of targets, float32[B] each.
  """
  teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits[:, :-1]))
  student = jax.nn.log_softmax(student_logits[:, :-1])
  kl = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
  weight = loss_mask[:, 1:].astype(jnp.float32)
  return jnp.sum(kl * weight, axis=1), jnp.sum(weight, axis=1)


def budget_loss(state: PruneState, entering: jax.Array, image_valid: jax.Array,
                config: AtpConfig) -> dict[str, jax.Array]:
  """ATP-LLaVA's two budget terms (Eqs. 12-14).

  lambda_atp sum_l (N_l / P) (l / M) + lambda_target |N - N_target| / P, with
  N_l the tokens kept after the module of depth l and N the layer average.
  Both are batch means: a target per instance would punish adaptivity.
  Normalisation by P and M is ours.  Rows without pictures count nowhere, and a
  batch of nothing else costs nothing.

  Args:
    state: final state of the modules.
    entering: float32[M, B, I, P].
    image_valid: bool[B, I].
    config: placement, target and weights.

  Returns:
    'budget_depth' and 'budget_target', weighted, and 'layer_average', all
    float32[].
  """
  num_layers, P = entering.shape[0], entering.shape[-1]
  seen = jnp.any(image_valid)
  images = jnp.maximum(jnp.sum(image_valid), 1)
  kept = jnp.sum(state.module_keep, axis=(1, 2, 3)) / images
  depth = jnp.asarray(config.prune_after, jnp.float32) / num_layers
  total = jnp.sum(jnp.mean(jnp.sum(entering, axis=-1), axis=0))
  average = total / images
  return {
      'budget_depth': config.lambda_atp * jnp.sum(kept / P * depth),
      'budget_target': config.lambda_target * seen * jnp.abs(
          average - config.target_tokens) / P,
      'layer_average': average}
