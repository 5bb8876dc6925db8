"""The training loop, to be read from top to bottom."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlm_compress import sharding
from vlm_compress.config import check
from vlm_compress.models.llava import Llava, init_params
from vlm_compress.train.checkpoint import CheckpointStore
from vlm_compress.train.metrics import MetricLog
from vlm_compress.train.optimizer import make_optimizer, merge, split
from vlm_compress.train.recipe import Recipe
from vlm_compress.train.steps import TrainState, make_step


def start_params(model: Llava, seed: int, given: dict[str, Any] | None,
                 message=None) -> Any:
  """Parameters to begin with: given ones, fresh ones for what is missing.

  Args:
    model: the model.
    seed: of the fresh ones.
    given: a parameter tree that may lack a method's own parameters, or have
      more than the model uses.
    message: called with a line that names what is fresh.

  Returns:
    Unboxed parameters.

  Raises:
    ConfigError: a given parameter has the wrong shape.
  """
  # jitted: eager initialisation would compile every operation by itself
  fresh = nn.unbox(jax.jit(lambda key: init_params(model, key))(
      jax.random.key(seed)))
  if given is None:
    return fresh
  new, old = split(fresh, ())[0], split(given, ())[0]
  for path in new.keys() & old.keys():
    check(new[path].shape == old[path].shape,
          f'parameter {path} has shape {old[path].shape} in the checkpoint, '
          f'but the model needs {new[path].shape}')
  missing = sorted(new.keys() - old.keys())
  if missing and message is not None:
    message(f'fresh parameters: {", ".join(missing)}')
  return merge({p: jnp.asarray(old.get(p, x)) for p, x in new.items()}, {})


def place_state(model: Llava, recipe: Recipe, params: Any, mesh: Mesh
                ) -> TrainState:
  """Splits parameters, shards them, and makes the optimiser's state."""
  boxed = jax.eval_shape(lambda key: init_params(model, key),
                         jax.random.key(0))
  params = jax.device_put(params, sharding.tree_shardings(boxed, mesh))
  # The step donates its state: never the caller's arrays.
  params = jax.tree.map(jnp.copy, params)
  trainable, frozen = split(params, recipe.trainable)
  opt_state = jax.jit(make_optimizer(recipe).init)(trainable)
  return TrainState(step=jnp.int32(0), trainable=trainable, frozen=frozen,
                    opt_state=opt_state)


def fit(model: Llava, recipe: Recipe, batches: Any, workdir: pathlib.Path, *,
        params: dict[str, Any] | None = None, mesh: Mesh | None = None,
        tensorboard: bool = True, message=None, stop_after: int | None = None
        ) -> dict[str, Any]:
  """Trains one stage, resuming where an earlier call was interrupted.

  Args:
    model: with the method that the stage trains.
    recipe: steps, optimiser, what learns.
    batches: iterator with get_state and set_state (a grain iterator).
    workdir: checkpoints and metrics go here.
    params: to start from; fresh where None or missing.
    mesh: devices; all of them along `data` by default.
    tensorboard: write event files too.
    message: called with lines for the user.
    stop_after: return after this many steps in all (tests of resuming).

  Returns:
    The parameters after the last step.
  """
  mesh = sharding.make_mesh() if mesh is None else mesh
  num_shards = mesh.shape['data'] * mesh.shape['fsdp']
  check(recipe.batch_size % num_shards == 0,
        f'train.batch_size={recipe.batch_size} does not divide over '
        f'{num_shards} devices (data x fsdp)')
  with jax.set_mesh(mesh):
    params = start_params(model, recipe.seed, params, message)
    state = place_state(model, recipe, params, mesh)
    store = CheckpointStore(workdir / 'checkpoints')
    if store.latest_step() is not None:
      state, data_state = store.restore(state)
      batches.set_state(data_state)
      if message is not None:
        message(f'resumed at step {int(state.step)} of {recipe.steps}')
    first = int(state.step)
    teacher = params if recipe.teacher == 'frozen' else None
    step_fn = jax.jit(make_step(model, recipe, teacher), donate_argnums=0)
    last = recipe.steps if stop_after is None else min(recipe.steps, stop_after)
    log = MetricLog(workdir, first, recipe.steps, recipe.stage, tensorboard)
    batch_sharding = sharding.batch_sharding(mesh)
    try:
      for step in range(first + 1, last + 1):
        batch = jax.device_put(next(batches), batch_sharding)
        state, metrics = step_fn(state, batch)
        log.step(step)
        saves = step % recipe.checkpoint_steps == 0 or step == last
        logs = step % recipe.log_steps == 0 or step == last
        if saves or logs:  # no checkpoint of parameters that are lost
          metrics = _checked(jax.device_get(metrics), step)
        if logs:
          log.write(step, metrics)
        if saves:
          store.save(step, state, batches.get_state())
    finally:
      log.close()
      store.close()
    return jax.device_get(state.params)


def _checked(metrics: dict[str, Any], step: int) -> dict[str, Any]:
  check(bool(jnp.isfinite(metrics['loss'])),
        f'the loss is {metrics["loss"]} at step {step}; lower '
        'train.learning_rate')
  return metrics
