"""Train steps: one function per objective, nothing hidden behind a switch.

Each objective maps (model, params, batch, step) to a scalar loss and metrics.
`make_step` adds gradients and the optimiser, and is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vlm_compress import losses
from vlm_compress.config import LlavaConfig, check
from vlm_compress.models.llava import Llava, PruneOptions
from vlm_compress.models.sequence import Batch, VocoBatch
from vlm_compress.train.optimizer import make_optimizer, merge, schedule
from vlm_compress.train.recipe import Recipe

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes, and the frozen parameters.

  Attributes:
    step: int32[].
    trainable, frozen: flat parameters by path.
    opt_state: of the trainable parameters.
  """
  step: jax.Array
  trainable: dict[str, jax.Array]
  frozen: dict[str, jax.Array]
  opt_state: Any

  @property
  def params(self) -> dict[str, Any]:
    """The parameter tree of the model."""
    return merge(self.trainable, self.frozen)


def mean_loss(sum_and_count: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Sum over all examples / count over all of them."""
  total, count = sum_and_count
  return jnp.sum(total) / jnp.maximum(jnp.sum(count), 1.0)


def instruct_loss(model: Llava, params: Any, batch: Batch, step: jax.Array,
                  recipe: Recipe) -> tuple[jax.Array, Metrics]:
  """Next-token loss of the plain model; also stage 1, alignment."""
  del step, recipe
  logits, _ = model.apply({'params': params}, batch)
  loss = mean_loss(losses.next_token_loss(logits, batch.input_ids,
                                      batch.loss_mask))
  return loss, {'loss_text': loss}


def voco_loss(model: Llava, params: Any, batch: tuple[VocoBatch, Batch | None],
              step: jax.Array, recipe: Recipe, teacher_params: Any = None
              ) -> tuple[jax.Array, Metrics]:
  """VoCo: next-token loss in two passes, plus KL to a teacher if asked for.

  The teacher reads the same text behind uncompressed images (batch[1]), with
  causal attention.
  """
  del step
  compressed, uncompressed = batch
  text = compressed.text
  logits = model.apply({'params': params}, compressed, method='two_pass')
  loss = mean_loss(losses.next_token_loss(logits, text.input_ids, text.loss_mask))
  metrics = {'loss_text': loss}
  weight = model.config.voco.distill_weight
  if weight > 0.0:
    teacher = params if recipe.teacher == 'self' else teacher_params
    teacher_logits, _ = model.apply(
        {'params': jax.lax.stop_gradient(teacher)}, uncompressed)
    kl = mean_loss(losses.distillation_loss(
        logits, _text_only(teacher_logits, uncompressed, text),
        text.loss_mask))
    metrics['loss_distill'] = kl
    loss = loss + weight * kl
  return loss, metrics


def _text_only(logits: jax.Array, batch: Batch, text: Batch) -> jax.Array:
  """Logits of `batch` at the supervised tokens of `text`.

  Both hold the same supervised tokens in the same order, behind different
  numbers of other tokens; KL is taken where a supervised token is predicted.
  """
  def predicted(mask):
    shifted = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    return jnp.argsort(~shifted, axis=1, stable=True)
  source, target = predicted(batch.loss_mask), predicted(text.loss_mask)
  size = min(text.loss_mask.shape[1], logits.shape[1])
  rows = jnp.arange(logits.shape[0])[:, None]
  picked = logits[rows, source[:, :size]]
  return jnp.zeros((*target.shape, logits.shape[-1])).at[
      rows, target[:, :size]].set(picked)


def temperature(config: LlavaConfig, recipe: Recipe, step: jax.Array
                ) -> jax.Array:
  """tau at a step: geometric from temperature_start to temperature_end."""
  atp = config.atp
  progress = jnp.minimum(step / max(recipe.steps - 1, 1), 1.0)
  ratio = atp.temperature_end / atp.temperature_start
  return atp.temperature_start * ratio ** progress


def atp_loss(model: Llava, params: Any, batch: Batch, step: jax.Array,
             recipe: Recipe) -> tuple[jax.Array, Metrics]:
  """ATP: next-token loss under soft masks, plus the budget terms.

  Selectors that keep a fixed number have hard masks and no budget terms; the
  random one draws anew at every step.
  """
  config = model.config.atp
  adaptive = config.selector == 'adaptive'
  tau = temperature(model.config, recipe, step)
  options = PruneOptions(
      temperature=tau, threshold_shift=0.0,  # the shift is for inference
      row_ids=jnp.arange(batch.input_ids.shape[0]),
      seed=(recipe.seed * 1_000_003) % 2 ** 30 + step, hard=not adaptive)
  logits, out = model.apply({'params': params}, batch, prune=options)
  loss = mean_loss(losses.next_token_loss(logits, batch.input_ids,
                                      batch.loss_mask))
  parts = losses.budget_loss(out.prune, out.entering, batch.image_valid,
                             config)
  metrics = {'loss_text': loss, 'layer_average_tokens': parts['layer_average']}
  images = jnp.maximum(jnp.sum(batch.image_valid), 1)
  for module in range(len(config.prune_after)):
    kept = jnp.sum(out.prune.module_keep[module]) / images
    metrics[f'kept_tokens/module_{module}'] = kept
  if adaptive:
    loss = loss + parts['budget_depth'] + parts['budget_target']
    metrics.update(loss_budget_depth=parts['budget_depth'],
                   loss_budget_target=parts['budget_target'], temperature=tau)
    weight = batch.image_valid[..., None]
    theta = jnp.sum(out.prune.thresholds * weight, axis=(1, 2)) / images
    for module in range(len(config.prune_after)):
      metrics[f'threshold_redundancy/module_{module}'] = theta[module, 0]
      metrics[f'threshold_spatial/module_{module}'] = theta[module, 1]
  return loss, metrics


LOSSES: dict[str, Callable] = {'align': instruct_loss,
                               'instruct': instruct_loss,
                               'voco': voco_loss, 'atp': atp_loss}


def make_step(model: Llava, recipe: Recipe, teacher_params: Any = None
              ) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
  """The function of (state, batch) that one training step is.

  Args:
    model: with the method that the stage trains.
    recipe: the stage.
    teacher_params: frozen teacher, for recipe.teacher = 'frozen'.

  Returns:
    A pure function, to be jitted by the loop.
  """
  stage = recipe.stage
  check(stage != 'voco' or model.config.voco is not None,
        'train.stage="voco" needs a model config with voco')
  check(stage != 'atp' or model.config.atp is not None,
        'train.stage="atp" needs a model config with atp')
  distills = stage == 'voco' and model.config.voco.distill_weight > 0.0
  check(distills == (recipe.teacher != 'none'),
        'voco.distill_weight > 0 and train.teacher go together in the voco '
        'stage; set both or neither')
  loss_fn, optimizer = LOSSES[stage], make_optimizer(recipe)
  extra = {'teacher_params': teacher_params} if stage == 'voco' else {}
  rate = schedule(recipe)

  def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
    def objective(trainable):
      return loss_fn(model, merge(trainable, state.frozen), batch, state.step,
                     recipe, **extra)
    (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(
        state.trainable)
    updates, opt_state = optimizer.update(grads, state.opt_state,
                                          state.trainable)
    metrics.update(loss=loss, grad_norm=optax.global_norm(grads),
                   learning_rate=rate(state.step))
    return state.replace(
        step=state.step + 1, opt_state=opt_state,
        trainable=optax.apply_updates(state.trainable, updates)), metrics

  return step
