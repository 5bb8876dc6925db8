"""What follows from the number of a step: rates, updates, ATP's temperature.

Expected values are worked out here, not by the functions that training uses.
"""

from __future__ import annotations

import dataclasses
import json
import math

import core_helpers as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import ATP, CONFIG, RECIPE, batches

from vlm_compress import sharding
from vlm_compress.models.inputs import PruneOptions
from vlm_compress.models.llava import Llava
from vlm_compress.train import steps
from vlm_compress.train.loop import fit
from vlm_compress.train.optimizer import make_optimizer
from vlm_compress.train.recipe import Recipe
from vlm_compress.train.state import start_params

SLOPED = Recipe(steps=12, learning_rate=0.02, warmup_steps=4,
                final_learning_rate=0.002, weight_decay=0.0, batch_size=8,
                log_steps=1, checkpoint_steps=3, seed=5)
PROJECTOR = 'multi_modal_projector/'


def rate(recipe, step):
  """Linear from nothing to the peak, then half a cosine to the end."""
  peak, last = recipe.learning_rate, recipe.final_learning_rate
  if step < recipe.warmup_steps:
    return peak * step / recipe.warmup_steps
  share = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
  return last + (peak - last) * (1 + math.cos(math.pi * share)) / 2


def test_the_rates_by_hand():
  got = [rate(SLOPED, step) for step in (0, 1, 4, 8, 12)]
  np.testing.assert_allclose(got, [0.0, 0.005, 0.02, 0.011, 0.002])


def adamw(grads, start, recipe):
  """Parameters behind each step: clipping, and AdamW in float64."""
  x, m, v, out = np.asarray(start, np.float64), 0.0, 0.0, []
  for step, grad in enumerate(np.asarray(grads, np.float64)):
    grad = grad * min(1.0, recipe.clip_norm / np.linalg.norm(grad))
    m = 0.9 * m + 0.1 * grad
    v = recipe.b2 * v + (1 - recipe.b2) * grad ** 2
    unbiased = v / (1 - recipe.b2 ** (step + 1))
    update = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(unbiased) + 1e-8)
    x = x - rate(recipe, step) * (update + recipe.weight_decay * x)
    out.append(x)
  return np.stack(out)


@pytest.mark.parametrize('change', [
    {}, {'weight_decay': 0.3}, {'clip_norm': 0.5}, {'b2': 0.999}])
def test_updates_are_adamw_at_the_rates_of_the_schedule(change):
  """Gradients of several sizes; half-way the state is written and read."""
  recipe = dataclasses.replace(SLOPED, **change)
  rng = np.random.default_rng(0)
  grads = rng.normal(size=(12, 3)) * rng.uniform(0.05, 2.0, size=(12, 1))
  params = {'w': jnp.array([1.0, -2.0, 0.5])}
  state, got = make_optimizer(recipe).init(params), []
  for step, grad in enumerate(grads):
    if step == 6:
      state = jax.tree.map(np.asarray, state)
    updates, state = make_optimizer(recipe).update(
        {'w': jnp.asarray(grad, jnp.float32)}, state, params)
    params = {'w': params['w'] + updates['w']}
    got.append(params['w'])
  want = adamw(grads, [1.0, -2.0, 0.5], recipe)
  np.testing.assert_allclose(np.stack(got), want, rtol=1e-4, atol=1e-5)


@pytest.fixture(name='uphill')
def fixture_uphill(monkeypatch):
  """A loss whose gradient is the same everywhere: updates are the rates."""
  def loss(model, params, batch, at, recipe):
    return 0.01 * sum(jnp.sum(x) for x in jax.tree.leaves(
        params['multi_modal_projector'])), {}
  monkeypatch.setitem(steps.LOSSES, 'instruct', loss)


def run(config, recipe, workdir, **kwargs):
  """A run on one device; parameters by path, and lines of metrics.jsonl."""
  workdir.mkdir(exist_ok=True)
  params = fit(Llava(config), recipe, batches(config), workdir, tensorboard=False,
               mesh=sharding.make_mesh(devices=jax.devices()[:1]), **kwargs)
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return helpers.flat(jax.device_get(params)), [json.loads(x) for x in lines]


def test_a_run_moves_by_the_rates_also_when_resumed(uphill, tmp_path):
  """Interrupted in the middle: goes on with the rates of steps 6 to 11."""
  recipe = dataclasses.replace(SLOPED, trainable=(PROJECTOR,))
  start = helpers.flat(jax.device_get(start_params(Llava(CONFIG), recipe.seed, None)))
  middle, _ = run(CONFIG, recipe, tmp_path, stop_after=6)
  end, lines = run(CONFIG, recipe, tmp_path)
  rates = [rate(recipe, step) for step in range(12)]
  np.testing.assert_allclose([x['learning_rate'] for x in lines], rates, rtol=1e-5)
  moved = 0
  for path in start:
    learns = path.startswith(PROJECTOR)
    moved += learns
    np.testing.assert_allclose(start[path] - middle[path],
                               learns * sum(rates[:6]), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(middle[path] - end[path],
                               learns * sum(rates[6:]), rtol=1e-4, atol=1e-7)
  assert moved == 4


def tau(config, recipe, step):
  """Geometric from the first step to the last."""
  start, end = config.atp.temperature_start, config.atp.temperature_end
  return start * (end / start) ** (step / (recipe.steps - 1))


def test_a_run_anneals_the_temperature(tmp_path):
  """The masks of each step are those of its temperature; nothing else changes."""
  config = dataclasses.replace(ATP, atp=dataclasses.replace(
      ATP.atp, init_theta_r=0.5, criteria='redundant'))
  recipe = dataclasses.replace(
      RECIPE, stage='atp', steps=5, log_steps=1, trainable=('atp/',),
      learning_rate=1e-12, final_learning_rate=0.0, weight_decay=0.0)
  _, lines = run(config, recipe, tmp_path)
  want = [10.0, 10 * 10**0.25, 10 * 10**0.5, 10 * 10**0.75, 100.0]
  np.testing.assert_allclose([tau(config, recipe, step) for step in range(5)], want)
  np.testing.assert_allclose([x['temperature'] for x in lines], want, rtol=1e-5)
  model, stream = Llava(config), batches(config)
  params = start_params(model, recipe.seed, None)

  def average(batch, warm):
    """Visual tokens that enter a layer, of 8 pictures."""
    _, out = helpers.apply(model, params, batch, prune=PruneOptions(
        temperature=np.float32(warm), threshold_shift=np.float32(0.0), hard=False))
    return np.asarray(out.entering).sum() / (2 * 8)
  for step, (line, warm) in enumerate(zip(lines, want, strict=True)):
    batch = next(stream)
    helpers.close(line['layer_average_tokens'], average(batch, warm), 1e-4)
    assert step == 0 or abs(average(batch, warm) - average(batch, want[0])) > 5e-3
