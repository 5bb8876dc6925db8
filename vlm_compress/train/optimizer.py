"""Schedule, AdamW, and which parameters learn."""

from __future__ import annotations

import fnmatch
from typing import Any

import flax.traverse_util
import optax

from vlm_compress.config import check
from vlm_compress.train.recipe import Recipe

Tree = dict[str, Any]


def schedule(recipe: Recipe) -> optax.Schedule:
  """Linear warm-up, then cosine to the final learning rate."""
  return optax.warmup_cosine_decay_schedule(
      0.0, recipe.learning_rate, recipe.warmup_steps, recipe.steps,
      recipe.final_learning_rate)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
  """Global-norm clipping and AdamW over the trainable parameters."""
  return optax.chain(
      optax.clip_by_global_norm(recipe.clip_norm),
      optax.adamw(schedule(recipe), b2=recipe.b2,
                  weight_decay=recipe.weight_decay))


def split(params: Tree, names: tuple[str, ...]) -> tuple[Tree, Tree]:
  """Parameters that learn and parameters that do not.

  Gradients and optimiser state exist for the first only.

  Args:
    params: nested parameters.
    names: of those that learn, as Recipe.trainable has them; () is all.

  Returns:
    Two flat dicts by path; see `merge`.

  Raises:
    ConfigError: a name that matches nothing.
  """
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  for name in names:
    check(any(_matches(path, name) for path in flat),
          f'train.trainable={name!r} matches no parameter; a name is the start '
          'of a path, or a pattern with * for a whole one; top-level names are '
          f'{sorted(params)}')
  learns = lambda path: not names or any(_matches(path, name) for name in names)
  return ({p: x for p, x in flat.items() if learns(p)},
          {p: x for p, x in flat.items() if not learns(p)})


def _matches(path: str, name: str) -> bool:
  """A name with a * is a pattern for the whole path, another one its start."""
  return fnmatch.fnmatchcase(path, name) if '*' in name else path.startswith(name)


def merge(trainable: Tree, frozen: Tree) -> Tree:
  """Inverse of `split`."""
  return flax.traverse_util.unflatten_dict({**trainable, **frozen}, sep='/')
