"""Whether a run's disk has room for what the run will write, asked before it begins.

A full disk would otherwise be found when a checkpoint is written, with every
device of the run waiting, hours after the mistake was made.
"""

from __future__ import annotations

import math
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax
from jax.sharding import Mesh

from vlm_compress import remote
from vlm_compress.config import check
from vlm_compress.eval.tables import quantity
from vlm_compress.models.llava import Llava
from vlm_compress.train.recipe import Recipe
from vlm_compress.train.state import abstract_state


def check_space(workdir: remote.Path, model: Llava, recipe: Recipe, mesh: Mesh,
                with_vision: bool = False) -> None:
  """Compares the free space with the checkpoints and the model still to come.

  A bucket has no end; there it is TMPDIR that must hold the model, which is
  written there before it is uploaded.  The limits of a quota are not seen.

  Args:
    workdir: of the run; it exists, or is in a bucket.
    model: of the run.
    recipe: says how many checkpoints there are at once.
    mesh, with_vision: see `abstract_state`.

  Raises:
    ConfigError: there is too little.
  """
  state = abstract_state(model, recipe, mesh, with_vision)
  one, final = _bytes(state), _bytes((state.trainable, state.frozen))
  if remote.is_remote(workdir):
    folder = pathlib.Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    check(free >= final, f'TMPDIR={folder} (disk {_mount(folder)}) has '
          f'{quantity(free, "B")} free, but {quantity(final, "B")} are needed: the '
          'model is written there before it is put into the bucket; free space '
          'there, or set TMPDIR to a folder on another disk')
    return
  steps = _complete(workdir / 'checkpoints')
  number = checkpoints_to_come(recipe, steps)
  free, need = shutil.disk_usage(workdir).free, number * one + final
  there = f' ({len(steps)} more are there)' if steps else ''
  check(free >= need, f'the disk {_mount(workdir)} of --workdir={workdir} has '
        f'{quantity(free, "B")} free, but {quantity(need, "B")} are needed: '
        f'{number} checkpoint(s) of {quantity(one, "B")}{there} and the model, '
        f'{quantity(final, "B")}; free space there, lower '
        f'train.keep_checkpoints={recipe.keep_checkpoints} (and train.keep_best='
        f'{recipe.keep_best}; one more is there while it is written), or choose '
        'another --workdir')


def checkpoints_to_come(recipe: Recipe, steps: list[int]) -> int:
  """How many checkpoints more there will be at once than there are.

  The newest appears before the oldest goes.  One that SIGTERM asks for takes
  the place of one that was due.

  Args:
    recipe: when one is saved, and how many are kept.
    steps: of the complete ones that are there.
  """
  done = max(steps, default=0)
  saves = (math.ceil(recipe.steps / recipe.checkpoint_steps)
           - done // recipe.checkpoint_steps) if done < recipe.steps else 0
  most = recipe.keep_checkpoints + recipe.keep_best + 1
  return max(0, min(most - len(steps), saves))


def _bytes(tree: Any) -> int:
  """Of all arrays; on the disk they are compressed, and a little smaller."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _complete(checkpoints: pathlib.Path) -> list[int]:
  """Steps of the checkpoints in a folder; half-written ones have other names."""
  if not checkpoints.is_dir():
    return []
  return [int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()]


def _mount(path: pathlib.Path) -> pathlib.Path:
  """Where the disk of a path is mounted."""
  path = path.resolve()
  while not os.path.ismount(path):
    path = path.parent
  return path
