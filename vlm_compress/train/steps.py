"""Train steps: one function per objective, nothing hidden behind a switch.

Each objective maps (model, params, batch, at, recipe) to a scalar loss and
metrics.  `make_step` adds gradients, which may be accumulated over parts of a
batch, and the optimiser; it is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vlm_compress import losses
from vlm_compress.config import LlavaConfig, check
from vlm_compress.data.images import clip_normalize
from vlm_compress.models.llava import Llava, PruneOptions
from vlm_compress.models.sequence import Batch, VocoBatch
from vlm_compress.sharding import constrain
from vlm_compress.train.optimizer import make_optimizer, merge, schedule
from vlm_compress.train.recipe import Recipe
from vlm_compress.train.state import TrainState

Metrics = dict[str, jax.Array]
PERCENTILES = (50, 99)  # of tokens kept, besides their mean


class At(NamedTuple):
  """Where in training a loss is taken.

  Attributes:
    step: int32[], steps so far.
    draw: int32[], a number for each part of each step: what is drawn differs.
    count, images: float32[], targets and pictures that sums are divided by;
      None takes those that are there.
  """
  step: jax.Array
  draw: jax.Array
  count: jax.Array | None = None
  images: jax.Array | None = None


def mean_loss(sum_and_count: tuple[jax.Array, jax.Array],
              count: jax.Array | None = None) -> jax.Array:
  """Sum over all examples / count over all of them, or a given count."""
  total, counts = sum_and_count
  count = jnp.sum(counts) if count is None else count
  return jnp.sum(total) / jnp.maximum(count, 1.0)


def instruct_loss(model: Llava, params: Any, batch: Batch, at: At,
                  recipe: Recipe) -> tuple[jax.Array, Metrics]:
  """Next-token loss of the plain model; also stage 1, alignment."""
  del recipe
  logits, _ = model.apply({'params': params}, batch)
  loss = mean_loss(losses.next_token_loss(
      logits, batch.input_ids, batch.loss_mask), at.count)
  return loss, {'loss_text': loss}


def voco_loss(model: Llava, params: Any, batch: tuple[VocoBatch, Batch | None],
              at: At, recipe: Recipe, teacher_params: Any = None
              ) -> tuple[jax.Array, Metrics]:
  """VoCo: next-token loss in two passes, plus KL to a teacher if asked for.

  The teacher reads the same text behind uncompressed images (batch[1]), with
  causal attention.
  """
  compressed, uncompressed = batch
  text = compressed.text
  logits = model.apply({'params': params}, compressed, method='two_pass')
  loss = mean_loss(losses.next_token_loss(logits, text.input_ids, text.loss_mask),
                   at.count)
  metrics = {'loss_text': loss}
  weight = model.config.voco.distill_weight
  if weight > 0.0:
    teacher = params if recipe.teacher == 'self' else teacher_params
    teacher_logits, _ = model.apply(
        {'params': jax.lax.stop_gradient(teacher)}, uncompressed)
    kl = mean_loss(losses.distillation_loss(
        logits, _text_only(teacher_logits, uncompressed, text),
        text.loss_mask), at.count)
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


def _percentiles(kept: jax.Array, image_valid: jax.Array) -> jax.Array:
  """PERCENTILES of tokens kept of the pictures that are there; 0 without any."""
  kept = jnp.where(image_valid, jax.lax.stop_gradient(kept), jnp.nan)
  found = jnp.nanpercentile(kept, jnp.asarray(PERCENTILES, jnp.float32))
  return jnp.where(jnp.any(image_valid), found, 0.0)


def atp_loss(model: Llava, params: Any, batch: Batch, at: At,
             recipe: Recipe) -> tuple[jax.Array, Metrics]:
  """ATP: next-token loss under soft masks, plus the budget terms.

  Selectors that keep a fixed number have hard masks and no budget terms; the
  random one draws anew at every step.  The target term is of the layer average
  over the examples that are here: with accumulated gradients, over a part, which
  weighs by its pictures.  So do percentiles of tokens kept.  Metrics of pictures
  are NaN where the batch has none.
  """
  config = model.config.atp
  adaptive = config.selector == 'adaptive'
  tau = temperature(model.config, recipe, at.step)
  options = PruneOptions(
      temperature=tau, threshold_shift=0.0,  # the shift is for inference
      row_ids=jnp.arange(batch.input_ids.shape[0]),
      seed=(recipe.seed * 1_000_003) % 2 ** 30 + at.draw, hard=not adaptive)
  logits, out = model.apply({'params': params}, batch, prune=options)
  loss = mean_loss(losses.next_token_loss(
      logits, batch.input_ids, batch.loss_mask), at.count)
  parts = losses.budget_loss(out.prune, out.entering, batch.image_valid,
                             config)
  here = jnp.sum(batch.image_valid)
  images = here if at.images is None else at.images
  share = here / images  # NaN where there are none at all
  metrics = {'loss_text': loss,
             'layer_average_tokens': share * parts['layer_average']}
  for module in range(len(config.prune_after)):
    kept = jnp.sum(out.prune.module_keep[module], axis=-1)
    metrics[f'kept_tokens/module_{module}'] = jnp.sum(kept) / images
    for percent, value in zip(PERCENTILES, _percentiles(kept, batch.image_valid)):
      metrics[f'kept_tokens_p{percent}/module_{module}'] = share * value
  if adaptive:
    depth, target = parts['budget_depth'], parts['budget_target']
    loss = loss + jnp.where(images > 0, share, 0.0) * (depth + target)
    metrics.update(loss_budget_depth=share * depth,
                   loss_budget_target=share * target, temperature=tau)
    weight = batch.image_valid[..., None]
    theta = jnp.sum(out.prune.thresholds * weight, axis=(1, 2)) / images
    for module in range(len(config.prune_after)):
      metrics[f'threshold_redundancy/module_{module}'] = theta[module, 0]
      metrics[f'threshold_spatial/module_{module}'] = theta[module, 1]
  return loss, metrics


LOSSES: dict[str, Callable] = {'align': instruct_loss,
                               'instruct': instruct_loss,
                               'voco': voco_loss, 'atp': atp_loss}


def encoded(model: Llava, params: Any, batch: Batch) -> Batch:
  """A batch of pixels, uint8[B, I, S, S, 3], with CLIP's features of them.

  A tower that does not learn costs its forward pass only: nothing in it
  depends on what gradients are taken for.
  """
  if batch.features.dtype != jnp.uint8:
    return batch
  return batch.replace(features=model.apply(
      {'params': params}, clip_normalize(batch.features),
      method='vision_features'))


def _encoded(model: Llava, params: Any, batch: Any) -> Any:
  """`encoded`, also for VoCo's pair, whose pictures are the same."""
  if isinstance(batch, Batch):
    return encoded(model, params, batch)
  compressed, uncompressed = batch
  text = encoded(model, params, compressed.text)
  if uncompressed is not None:
    uncompressed = uncompressed.replace(features=text.features)
  return compressed.replace(text=text), uncompressed


def _counts(batch: Any) -> tuple[jax.Array, jax.Array]:
  """Tokens that a loss is taken of, and pictures."""
  text = batch if isinstance(batch, Batch) else batch[0].text
  return (jnp.sum(text.loss_mask[:, 1:].astype(jnp.float32)),
          jnp.sum(text.image_valid.astype(jnp.float32)))


def _parts(batch: Any, num_parts: int) -> Any:
  """Leaves of shape [num_parts, B / num_parts, ...].

  A part has every num_parts-th row, so that each device keeps its own.
  """
  def split_rows(x):
    x = x.reshape(len(x) // num_parts, num_parts, *x.shape[1:]).swapaxes(0, 1)
    return constrain(x, None, 'batch', *[None] * (x.ndim - 2))
  return jax.tree.map(split_rows, batch)


def accumulate(gradients: Callable, trainable: Any, batch: Any, step: jax.Array,
               num_parts: int) -> tuple[tuple[jax.Array, Metrics], Any]:
  """Loss, metrics and gradients of a batch, part by part.

  Every part is divided by the targets (and pictures) of the whole batch, so
  that the result is that of the batch at once, whatever their number in each.

  Args:
    gradients: (trainable, batch, At) -> ((loss, metrics), gradients).
    trainable, batch, step: its arguments.
    num_parts: how many; the size of the batch is a multiple of it.
  """
  if num_parts == 1:
    return gradients(trainable, batch, At(step, step))
  counts = [count / num_parts for count in _counts(batch)]
  mean = lambda x, y: jax.tree.map(lambda a, b: a + b / num_parts, x, y)

  def add(total, part):
    index, rows = part
    return mean(total, gradients(trainable, rows, At(
        step, step * num_parts + index, *counts))), None
  parts = _parts(batch, num_parts)
  shapes = jax.eval_shape(gradients, trainable, jax.tree.map(
      lambda x: x[0], parts), At(step, step, *counts))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(add, zeros, (jnp.arange(num_parts), parts))[0]


def make_step(model: Llava, recipe: Recipe
              ) -> Callable[..., tuple[TrainState, Metrics]]:
  """The function of (state, batch, teacher) that one training step is.

  Args:
    model: with the method that the stage trains.
    recipe: the stage.

  Returns:
    A pure function, to be jitted by the loop; teacher is the parameters of a
    frozen teacher, for recipe.teacher = 'frozen', else None.
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
  rate = schedule(recipe)

  def step(state: TrainState, batch: Any, teacher: Any = None
           ) -> tuple[TrainState, Metrics]:
    extra = {'teacher_params': teacher} if stage == 'voco' else {}

    def objective(trainable, rows, at):
      params = merge(trainable, state.frozen)
      return loss_fn(model, params, _encoded(model, params, rows), at, recipe,
                     **extra)
    (loss, metrics), grads = accumulate(
        jax.value_and_grad(objective, has_aux=True), state.trainable, batch,
        state.step, recipe.accumulate_steps)
    updates, opt_state = optimizer.update(grads, state.opt_state,
                                          state.trainable)
    metrics.update(loss=loss, grad_norm=optax.global_norm(grads),
                   update_norm=optax.global_norm(updates),
                   learning_rate=rate(state.step))
    return state.replace(
        step=state.step + 1, opt_state=opt_state,
        trainable=optax.apply_updates(state.trainable, updates)), metrics

  return step
