"""Checkpoints: everything a run needs to go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from vlm_compress import remote
from vlm_compress.atomic import write_text
from vlm_compress.config import ConfigError, check

RETRY_SECONDS = (1.0, 5.0)  # before a checkpoint that can't be read is tried again
_FINE, _DAMAGED, _UNREADABLE = range(3)
# tensorstore raises ValueError for these, too.
_MAY_PASS = re.compile(r'\b(UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|'
                       r'PERMISSION_DENIED|UNAUTHENTICATED|ABORTED|CANCELLED)\b')


def claim_workdir(workdir: remote.Path, config: dict[str, Any],
                  allow_change: bool = False) -> list[str]:
  """Marks a directory as this configuration's, or checks that it is.

  A directory in which nothing has been trained yet (a mistake was found in
  time) can be claimed again.

  Args:
    workdir: the directory.
    config: plain types.
    allow_change: go on with another configuration than the run began with.

  Returns:
    The fields that changed.

  Raises:
    ConfigError: the directory belongs to another configuration; the message
      lists the fields that differ.
  """
  path = workdir / 'config.json'
  config = json.loads(json.dumps(config))
  if not path.exists():
    write_text(path, json.dumps(config, indent=1, sort_keys=True))
    return []
  try:
    found = json.loads(path.read_text())
  except json.JSONDecodeError as e:
    raise ConfigError(f'{path} is not readable JSON ({e}); delete the '
                      'directory or choose another --workdir') from e
  changed = differences(found, config)
  check(not changed or allow_change or _is_untouched(workdir), f'{workdir} '
        f'belongs to another configuration ({", ".join(changed)}); choose '
        'another --workdir, delete this one, or go on with the other '
        'configuration all the same: --allow-config-change')
  if changed:
    write_text(path, json.dumps(config, indent=1, sort_keys=True))
  return changed


def _is_untouched(workdir: remote.Path) -> bool:
  """Nothing but data, logs and an empty store of checkpoints is there."""
  entries = {p.name for p in workdir.iterdir()
             if not p.name.startswith(remote.PROBE)} - {
      'config.json', 'seconds.txt', 'metrics.jsonl', 'throughput.jsonl',
      'parameters.txt', 'tensorboard', 'data', 'features', 'init_digest.json'}
  return not entries or entries == {'checkpoints'} and not any(
      (workdir / 'checkpoints').iterdir())


def differences(old: Any, new: Any, path: str = '') -> list[str]:
  """'field: old -> new' for every field that differs."""
  if isinstance(old, dict) and isinstance(new, dict):
    out = []
    for key in sorted(set(old) | set(new)):
      out += differences(old.get(key), new.get(key), f'{path}.{key}'.strip('.'))
    return out
  return [] if old == new else [f'{path}: {old} -> {new}']


class CheckpointStore:
  """Numbered checkpoints of one run.

  A checkpoint holds the train state, the position of the data iterator and
  the loss.  Everything random follows from seed and step, so there is no
  generator to be saved.  It is written in the background, and appears under
  its final name only when complete: what a killed process left is ignored.

  Every process of a run makes one and calls the same functions.
  """

  def __init__(self, directory: remote.Path, keep: int = 2,
               keep_best: int = 0):
    """Opens or creates the directory.

    Args:
      directory: of the checkpoints.
      keep: newest ones that are kept.
      keep_best: besides, so many with the lowest loss.
    """
    loss = lambda metrics: -metrics['loss']
    policies = ocp.checkpoint_managers
    self._directory = (directory if remote.is_remote(directory)
                       else directory.absolute())
    with self._readable('opened'):
      self._manager = ocp.CheckpointManager(
          self._directory, options=ocp.CheckpointManagerOptions(
              best_fn=loss, preservation_policy=policies.AnyPreservationPolicy([
                  policies.LatestN(keep), policies.BestN(
                      get_metric_fn=loss, n=keep_best)])),
          item_handlers={'state': ocp.StandardCheckpointHandler(),
                         'data': ocp.JsonCheckpointHandler()})

  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, data_state: dict[str, Any],
           loss: float) -> None:
    """Begins to write a checkpoint; one that exists already is left alone.

    Raises:
      ConfigError: this one, or the one before, cannot be written.
    """
    if step == self.latest_step():
      return
    with self._readable('written'):
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          data=ocp.args.JsonSave(data_state)), metrics={'loss': loss})

  def wait(self) -> None:
    """Until what was begun is complete.

    Raises:
      ConfigError: it cannot be written.
    """
    with self._readable('written'):
      self._manager.wait_until_finished()

  def restore(self, state: Any, message: Callable[[str], Any] | None = None
              ) -> tuple[Any, dict[str, Any]] | None:
    """The newest checkpoint that can be read, onto the devices of `state`.

    Only what a checkpoint itself says can prove it damaged: errors of the file
    system, or a lack of memory, may pass, and nothing is put aside for them.
    Processes agree before anything is moved.

    Args:
      state: shapes, dtypes and shardings; the mesh may be another than that
        of the run that saved.
      message: called with a warning for one that is damaged, which is put
        aside.

    Returns:
      State and position of the data, or None where there is no checkpoint.

    Raises:
      ConfigError: the newest one holds other parameters than the model, or
        cannot be read although nothing says that it is damaged, or all are
        damaged.
    """
    while (step := self.latest_step()) is not None:
      name = self._directory / str(step)
      found, outcome, why = self._read(step, state)
      outcome = _worst(outcome)
      why = why or 'another process says so'
      check(outcome != _UNREADABLE, f'{name} cannot be read ({why}); it stays '
            'where it is: run again when disk and memory are in order')
      if outcome == _FINE:
        return found['state'], found['data']
      self._put_aside(step)
      if message is not None:
        message(f'warning: {name} is damaged ({why}); it is ignored, and now in '
                f'{self._aside}')
    check(not (self._aside.is_dir() and any(self._aside.iterdir())),
          f'no checkpoint can be read: all that there were are in {self._aside}; '
          'begin anew in another --workdir, or delete them')
    return None

  def _read(self, step: int, state: Any) -> tuple[Any, int, str]:
    """A checkpoint or None, how it went, and why."""
    for seconds in (*RETRY_SECONDS, None):
      try:
        self._compare(step, state)
        found = self._manager.restore(step, args=ocp.args.Composite(
            state=ocp.args.StandardRestore(state),
            data=ocp.args.JsonRestore()))
        return found, _FINE, ''
      except ConfigError:
        raise
      except Exception as e:  # of tensorstore, json and the file system
        proves = isinstance(e, (ValueError, KeyError, TypeError, FileNotFoundError))
        if proves and not _MAY_PASS.search(str(e)):
          return None, _DAMAGED, _line(e)
        if seconds is None:
          return None, _UNREADABLE, _line(e)
        time.sleep(seconds)
    raise AssertionError  # the last try returns

  def _compare(self, step: int, state: Any) -> None:
    """Parameters of a checkpoint against those of the model."""
    saved = self._manager.item_metadata(step)['state']
    for part in ('trainable', 'frozen'):
      have = {path: tuple(x.shape) for path, x in (saved[part] or {}).items()}
      want = {path: x.shape for path, x in getattr(state, part).items()}
      other = sorted(path for path in {*have, *want}
                     if have.get(path) != want.get(path))
      if other:
        raise ConfigError(
            f'{self._directory / str(step)} does not fit this model ({part} '
            f'{other[0]}: {have.get(other[0])} there, {want.get(other[0])} '
            'here); use the configuration it was trained with or another '
            '--workdir')

  @property
  def _aside(self) -> remote.Path:
    return self._directory.with_name('damaged_checkpoints')

  def _put_aside(self, step: int) -> None:
    if jax.process_index() == 0:
      remote.mkdir(self._aside)
      target = self._aside / str(step)
      while target.exists():
        target = target.with_name(f'{target.name}_')
      remote.move(self._directory / str(step), target)
    multihost_utils.sync_global_devices(f'put aside {step}')
    self._manager.reload()

  @contextlib.contextmanager
  def _readable(self, what: str) -> Iterator[None]:
    """Errors of Orbax in a line, with a remedy."""
    try:
      yield
    except Exception as e:
      raise ConfigError(
          f'{self._directory}: a checkpoint cannot be {what} ({_line(e)}); make '
          'sure that there is space and that it may be written to, and run '
          'again: it goes on from the newest complete one') from e

  def close(self) -> None:
    """Waits for writes.

    Raises:
      ConfigError: what was begun cannot be written.
    """
    with self._readable('written'):
      self._manager.close()


def _worst(outcome: int) -> int:
  """Of the outcomes of all processes."""
  if jax.process_count() == 1:
    return outcome
  return int(np.max(multihost_utils.process_allgather(np.int32(outcome))))


def _line(error: Exception) -> str:
  """What an error says, at most a line."""
  lines = str(error).strip().splitlines()
  return lines[0][:200] if lines else type(error).__name__
