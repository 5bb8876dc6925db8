"""Every field of a recipe changes something that can be seen.

The test runs over `dataclasses.fields`, so a new field without a probe fails,
and so does a field that nobody reads.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from unittest import mock

import core_helpers as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample

from vlm_compress import sharding
from vlm_compress.config import ConfigError
from vlm_compress.models import llava
from vlm_compress.train import loop, optimizer, state, steps
from vlm_compress.train.loop import fit
from vlm_compress.train.recipe import Recipe
from vlm_compress.train.watch import NAMES, Watch

PLAIN = helpers.tiny()
RECIPE = Recipe(steps=10, warmup_steps=2, log_steps=1, checkpoint_steps=1)


def _rates(recipe):
  rate = optimizer.schedule(recipe)
  return [float(rate(i)) for i in range(12)]


def _updates(recipe):
  """Two updates of a parameter by a large and a small gradient."""
  adam = optimizer.make_optimizer(recipe)
  params = {'w': jnp.array([1.0, -2.0])}
  moments, out = adam.init(params), []
  for grad in (jnp.array([30.0, 4.0]), jnp.array([0.01, 0.02]),
               jnp.array([0.02, -0.01])):
    update, moments = adam.update({'w': grad}, moments, params)
    out.append(update['w'])
  return np.stack(out)


def _trainable(recipe):
  return sorted(optimizer.split({'a': {'x': 1}, 'b': {'y': 2}},
                                recipe.trainable)[0])


def _stage_step(recipe):
  try:
    steps.make_step(llava.Llava(PLAIN), recipe)
    return 'built'
  except ConfigError as e:
    return str(e)


def _fresh_params(recipe):
  params = state.start_params(llava.Llava(PLAIN), recipe.seed, None)
  return np.asarray(params['language_model']['lm_head']['kernel'])


class _Nothing:
  """An iterator over empty batches."""
  __next__ = get_state = lambda self: {}


def _written(recipe):
  """Steps in the log and among the checkpoints of a run that does nothing."""
  step = lambda state, *_: (state.replace(step=state.step + 1),
                            dict.fromkeys(NAMES, jnp.float32(state.step)))
  with (tempfile.TemporaryDirectory() as folder,
        mock.patch.object(loop, 'make_step', lambda *_: step)):
    workdir = pathlib.Path(folder)
    fit(llava.Llava(PLAIN), dataclasses.replace(recipe, steps=5), _Nothing(),
        workdir, mesh=sharding.make_mesh(devices=jax.devices()[:1]),
        tensorboard=False)
    return ((workdir / 'metrics.jsonl').read_text().count('\n'),
            sorted(p.name for p in (workdir / 'checkpoints').iterdir()))


def _refusal(recipe):
  with pytest.raises(ConfigError) as e:
    fit(llava.Llava(PLAIN), recipe, iter(()), pathlib.Path('nowhere'))
  return str(e.value)


def _program(recipe):
  """The step as it is traced."""
  model = llava.Llava(PLAIN)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  batch = helpers.batch([Sample((BOS, IMAGE, 6, 7), 1)] * recipe.batch_size,
                        PLAIN, length=24, num_images=1)
  return str(jax.make_jaxpr(steps.make_step(model, recipe))(
      state.abstract_state(model, recipe, mesh), batch)).count('scan[')


def _leap(recipe):
  with tempfile.TemporaryDirectory() as folder:
    try:
      with Watch(pathlib.Path(folder), recipe) as watch:
        for step, loss in enumerate([1.0] * 12 + [5.0, 1.0]):
          watch.step(step, None, dict.fromkeys(NAMES, jnp.float32(loss)))
      return 'went on'
    except ConfigError as e:
      return str(e).partition(';')[0]


RECIPE_PROBES = {
    'stage': ('voco', _stage_step), 'steps': (12, _rates),
    'batch_size': (3, _refusal), 'learning_rate': (1e-3, _rates),
    'warmup_steps': (3, _rates), 'final_learning_rate': (1e-4, _rates),
    'b2': (0.9, _updates), 'weight_decay': (0.5, _updates),
    'clip_norm': (0.01, _updates), 'trainable': (('a/',), _trainable),
    'seed': (1, _fresh_params), 'teacher': ('self', _stage_step),
    'accumulate_steps': (2, _program), 'spike_factor': (3.0, _leap),
    'log_steps': (3, _written), 'checkpoint_steps': (3, _written),
    'keep_checkpoints': (4, _written), 'keep_best': (1, _written)}


def test_probes_name_no_field_that_is_gone():
  assert set(RECIPE_PROBES) == {f.name for f in dataclasses.fields(Recipe)}


@pytest.mark.parametrize(
    'name', [field.name for field in dataclasses.fields(Recipe)])
def test_every_recipe_field_changes_something(name):
  assert name in RECIPE_PROBES, f'Recipe.{name} has no probe: who reads it?'
  value, look = RECIPE_PROBES[name]
  base = RECIPE
  if name in ('batch_size', 'accumulate_steps'):
    base = dataclasses.replace(RECIPE, batch_size=2)
  changed = dataclasses.replace(base, **{name: value})
  assert helpers.differs(look(base), look(changed))
