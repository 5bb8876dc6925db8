"""The training loop, to be read from top to bottom.

Every process of a run calls `fit` with the same arguments and its own rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vlm_compress import remote, sharding
from vlm_compress.config import LlavaConfig, check
from vlm_compress.models.llava import Llava
from vlm_compress.train.checkpoint import CheckpointStore
from vlm_compress.train.metrics import GROWING, MetricLog, Profile
from vlm_compress.train.outbox import Outbox
from vlm_compress.train.preemption import Notice, Preempted
from vlm_compress.train.recipe import Recipe
from vlm_compress.train.shapes import reads_pixels
from vlm_compress.train.state import (
  Given,
  TrainState,
  abstract_state,
  make_state,
  start_params,
)
from vlm_compress.train.steps import make_step
from vlm_compress.train.throughput import summary
from vlm_compress.train.watch import Watch

Message = Callable[[str], Any]


def check_mesh(config: LlavaConfig, recipe: Recipe, mesh: Mesh) -> None:
  """Whether a model and its batches can be spread over a mesh.

  Raises:
    ConfigError: rows, heads or hidden sizes do not divide.
  """
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  parts = recipe.accumulate_steps
  check(recipe.batch_size % (shards * parts) == 0,
        f'train.batch_size={recipe.batch_size} does not divide over '
        f'{shards} devices (mesh.data x mesh.fsdp)' + (
            f' x train.accumulate_steps={parts}' if parts > 1 else ''))
  sharding.check_sizes(config, mesh, with_vision=reads_pixels(config.vision))


def data_share(mesh: Mesh, batch_size: int) -> tuple[int, int]:
  """Which part of every batch this process reads: (index, number of parts).

  Processes whose devices hold the same rows read the same part.  The rows of a
  part need not be neighbours: on a pod, a host's chips are a square, and the
  mesh winds through it.

  Raises:
    ConfigError: some rows of this process are another's, too, but not all.
  """
  held: dict[int, set[tuple[int, int, int]]] = {}
  for device, index in sharding.batch_sharding(mesh).devices_indices_map(
      (batch_size,)).items():
    held.setdefault(device.process_index, set()).add(index[0].indices(batch_size))
  return share_of(held, jax.process_index())


def share_of(held: dict[int, set[Any]], process: int) -> tuple[int, int]:
  """(index, number of parts) of a process, see `data_share`.

  Args:
    held: the pieces of a batch that each process's devices hold.
    process: one of them.

  Raises:
    ConfigError: the pieces of two processes are neither the same nor others.
  """
  parts = sorted({tuple(sorted(pieces)) for pieces in held.values()})
  pieces = sum(len(part) for part in parts)
  check(pieces == len(set().union(*held.values()))
        and pieces == len(parts) * len(parts[0]),
        f'process {process} shares some rows of a batch with others, but not '
        'all; choose mesh.data x mesh.fsdp as a multiple of the number of '
        'processes, or 1')
  return parts.index(tuple(sorted(held[process]))), len(parts)


def put(batch: Any, mesh: Mesh, num_parts: int) -> Any:
  """A process's rows as one of so many parts of the batch of all processes."""
  placed = sharding.batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(
      placed, np.asarray(x), (len(x) * num_parts, *np.shape(x)[1:])), batch)


def first_state(model: Llava, recipe: Recipe, mesh: Mesh,
                store: CheckpointStore, batches: Any, given: Given,
                message: Message, with_vision: bool
                ) -> tuple[TrainState, list[float]]:
  """The state to go on from: a checkpoint, given parameters, or fresh ones; and
  the last losses.
  """
  found = store.restore(abstract_state(model, recipe, mesh, with_vision), message)
  if found is None:
    return make_state(model, recipe, mesh, given, message, with_vision), []
  state, position = found
  batches.set_state(position['batches'])
  message(f'resumed at step {int(state.step)} of {recipe.steps}')
  return state, position['losses']


def fit(model: Llava, recipe: Recipe, batches: Any, workdir: remote.Path, *,
        params: Given = None, mesh: Mesh | None = None,
        tensorboard: bool = True, message: Message | None = None,
        stop_after: int | None = None, with_vision: bool = False,
        profile_steps: tuple[int, int] | None = None) -> dict[str, Any]:
  """Trains one stage, resuming where an earlier call was interrupted.

  Args:
    model: with the method that the stage trains.
    recipe: steps, optimiser, what learns.
    batches: iterator with get_state and set_state (a grain iterator), over
      this process's part of each batch, see `data_share`.
    workdir: checkpoints and metrics go here; on a disk, or on gs:// as
      remote.to_path gives it.
    params: to start from; fresh where None or missing.  A tree stays the
      caller's; a function is called only if there is no checkpoint.
    mesh: devices; all of them along `data` by default.
    tensorboard: write event files too; message: takes lines for the user.
    stop_after: return after this many steps in all (tests of resuming).
    with_vision: batches hold pixels, and the CLIP tower is in the state.
    profile_steps: first and last step of a profiler trace.

  Returns:
    The parameters after the last step, spread over the mesh.

  Raises:
    Preempted: SIGTERM came; there is a checkpoint of this moment.
    ConfigError: what does not fit, or cannot be written; or the loss is no
      number or leaps.
  """
  mesh = sharding.make_mesh() if mesh is None else mesh
  say = (lambda line: None) if message is None else message
  check_mesh(model.config, recipe, mesh)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    store = CheckpointStore(workdir / 'checkpoints', recipe.keep_checkpoints,
                            recipe.keep_best)
    stack.callback(store.close)
    state, losses = first_state(model, recipe, mesh, store, batches, params, say,
                                with_vision)
    first = int(state.step)
    last = recipe.steps if stop_after is None else min(recipe.steps, stop_after)
    say(f'{summary(state)} (parameters.txt)')
    outbox = stack.enter_context(_outbox(workdir))
    log = MetricLog(outbox.directory, first, recipe, model.config, state, mesh,
                    tensorboard)
    stack.callback(log.close)
    run = _stepper(model, recipe, mesh, params, with_vision)
    tools = _Tools(say, store, log, outbox, stack.enter_context(Watch(workdir, recipe)),
                   stack.enter_context(Notice(jax.process_count() == 1)))
    tools.watch.go_on(losses)
    trace = Profile(outbox.directory, profile_steps)
    stack.callback(trace.close)
    for step in range(first + 1, last + 1):
      trace.step(step)
      state = _step(run, state, batches, step, last, recipe, tools)
  return state.params


def _outbox(workdir: remote.Path) -> Outbox:
  """Of the files that grow; the first process goes on with those of before."""
  return Outbox(workdir, GROWING if jax.process_index() == 0 else ())


class _Tools(NamedTuple):
  """What looks at every step."""
  say: Message
  store: CheckpointStore
  log: MetricLog
  outbox: Outbox
  watch: Watch
  notice: Notice


def _step(run: Callable, state: TrainState, batches: Any, step: int, last: int,
          recipe: Recipe, tools: _Tools) -> TrainState:
  """One step, and what is due behind it."""
  batch = next(batches)
  state, metrics = run(state, batch)
  tools.watch.step(step, batch, metrics)
  tools.log.step(step, batch)
  stops = tools.notice.reached(step)
  saves = step % recipe.checkpoint_steps == 0 or step == last or stops
  logs = step % recipe.log_steps == 0 or step == last
  if saves or logs:  # no checkpoint of parameters that are lost
    metrics = tools.watch.checked(metrics)
  if logs:
    tools.log.write(step, metrics)
  if saves or tools.outbox.is_due():
    tools.log.flush()
    tools.outbox.try_send(tools.say)
  if saves:
    tools.store.save(step, state, {'batches': batches.get_state(),
                                   'losses': tools.watch.losses}, metrics['loss'])
  if stops and step < last:
    tools.store.wait()
    raise Preempted(f'stopped on SIGTERM: a checkpoint of step {step} of '
                    f'{recipe.steps} is complete; run the same command again to go on')
  return state


def _stepper(model: Llava, recipe: Recipe, mesh: Mesh, given: Given,
             with_vision: bool) -> Callable[[TrainState, Any], tuple]:
  """The compiled step, on this process's rows of a batch."""
  step = jax.jit(make_step(model, recipe), donate_argnums=0)
  teacher = _teacher(model, recipe, mesh, given, with_vision)
  num_parts = data_share(mesh, recipe.batch_size)[1]
  return lambda state, batch: step(state, put(batch, mesh, num_parts), teacher)


def _teacher(model: Llava, recipe: Recipe, mesh: Mesh, given: Given,
             with_vision: bool) -> Any:
  """Parameters of a frozen teacher: those that training began with."""
  if recipe.teacher != 'frozen':
    return None
  tree = given(mesh) if callable(given) else given
  return start_params(model, recipe.seed, tree, mesh=mesh,
                      with_vision=with_vision)
