"""Checkpoints: everything a run needs to go on as if nothing had happened."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from vlm_compress.atomic import write_text
from vlm_compress.config import ConfigError


def claim_workdir(workdir: pathlib.Path, config: dict[str, Any]) -> None:
  """Marks a directory as this configuration's, or checks that it is.

  A directory in which nothing has been trained yet (a mistake was found in
  time) can be claimed again.

  Raises:
    ConfigError: the directory belongs to another configuration; the message
      lists the fields that differ.
  """
  path = workdir / 'config.json'
  config = json.loads(json.dumps(config))
  if not path.exists():
    write_text(path, json.dumps(config, indent=1, sort_keys=True))
    return
  try:
    found = json.loads(path.read_text())
  except json.JSONDecodeError as e:
    raise ConfigError(f'{path} is not readable JSON ({e}); delete the '
                      'directory or choose another --workdir') from e
  if found != config and _is_untouched(workdir):
    write_text(path, json.dumps(config, indent=1, sort_keys=True))
  elif found != config:
    raise ConfigError(
        f'{workdir} belongs to another configuration ('
        f'{", ".join(differences(found, config)) or "other fields"}); choose '
        'another --workdir or delete this one')


def _is_untouched(workdir: pathlib.Path) -> bool:
  """Nothing but data, logs and an empty store of checkpoints is there."""
  entries = {p.name for p in workdir.iterdir()} - {
      'config.json', 'seconds.txt', 'metrics.jsonl', 'tensorboard', 'data',
      'features'}
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

  A checkpoint holds the train state and the position of the data iterator.
  It appears under its final name only when complete; what a killed process
  left behind is ignored.
  """

  def __init__(self, directory: pathlib.Path, keep: int = 2):
    self._manager = ocp.CheckpointManager(
        directory.absolute(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False),
        item_names=('state', 'data'))

  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, data_state: dict[str, Any]) -> None:
    """Writes a checkpoint; one that exists already is left alone."""
    if step == self.latest_step():
      return
    self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave(data_state)))

  def restore(self, state: Any) -> tuple[Any, dict[str, Any]]:
    """The newest checkpoint, with the shapes and shardings of `state`.

    Raises:
      ConfigError: the checkpoint holds other parameters than the model.
    """
    step = self.latest_step()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract),
          data=ocp.args.JsonRestore()))
    except (ValueError, KeyError) as e:
      first_line = str(e).strip().splitlines()[0]
      raise ConfigError(
          f'{self._manager.directory}/{step} does not fit this model '
          f'({first_line}); use the configuration it was trained with or '
          'another --workdir') from e
    return restored['state'], restored['data']

  def close(self) -> None:
    """Waits for writes."""
    self._manager.close()
