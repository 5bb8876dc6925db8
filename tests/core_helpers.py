"""Tiny models, rows and batches that the tests of the core share.

Everything compiled is jitted once per model and shape and kept for the whole
test session: on a small machine compiling is nearly all the time there is.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from vlm_compress import config as config_lib
from vlm_compress import presets
from vlm_compress.models import llava, sequence

# Compiling is what takes the time here, not running.
jax.config.update('jax_disable_most_optimizations', True)

BOS, NEWLINE = 1, 5
IMAGE, VOCO = -200, 200  # placeholders, outside the tiny vocabulary


def tiny(**fields) -> config_lib.LlavaConfig:
  """The preset `tiny` (P = 16, M = 4, V = 96), with fields replaced."""
  fields = {'voco_token_index': VOCO, **fields}
  return dataclasses.replace(presets.preset('tiny'), **fields)


def voco_config(num_voco_tokens: int = 2, text=None, **fields):
  """A tiny model with VoCo; `fields` of VocoConfig, `text` of TextConfig."""
  voco = config_lib.VocoConfig(num_voco_tokens, **fields)
  return tiny(voco=voco, text=dataclasses.replace(
      presets.preset('tiny').text, **(text or {})))


def atp_config(**fields):
  """A tiny ATP model that prunes about half at each of three modules."""
  fields = {'prune_after': (1, 2, 3), 'target_tokens': 8.0,
            'init_theta_r': 0.44, 'init_theta_s': 0.5, **fields}
  return tiny(atp=config_lib.AtpConfig(**fields))


@functools.cache
def _fresh(model: llava.Llava, seed: int):
  init = jax.jit(lambda key: llava.init_params(model, key))
  return nn.unbox(init(jax.random.key(seed)))


def build(config, seed: int = 0, unroll: int = 1):
  """(model, params); thresholds differ between instances and modules.

  Fresh heads give every instance nearly the initial thresholds, so their
  last layers are drawn anew, larger; so is what is zero in fresh adapters.
  """
  model = llava.Llava(config, unroll=unroll)
  params = _fresh(llava.Llava(config), seed)
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  rng = np.random.default_rng(seed + 1)
  for path in [path for path in flat if path.endswith('/lora_b')]:
    flat[path] = jax.numpy.asarray(
        rng.normal(0.0, 0.1, flat[path].shape), flat[path].dtype)
  if 'atp' not in params:
    return model, flax.traverse_util.unflatten_dict(flat, sep='/')
  rng = np.random.default_rng(seed)
  for name in ('redundancy', 'spatial'):
    kernel = flat[f'atp/{name}/kernel']
    flat[f'atp/{name}/kernel'] = jax.numpy.asarray(
        rng.normal(0.0, 0.04, kernel.shape), kernel.dtype)
  # Scores move towards the mean as pruning goes on; later modules ask for more.
  bias = flat['atp/redundancy/bias']
  flat['atp/redundancy/bias'] = bias + jax.numpy.linspace(
      0.0, 0.24, len(bias), dtype=bias.dtype)[:, None]
  return model, flax.traverse_util.unflatten_dict(flat, sep='/')


@functools.partial(jax.jit, static_argnums=0,
                   static_argnames=('method', 'mask', 'collect'))
def apply(model, params, *args, method=None, **kwargs):
  """model.apply, jitted once per model, shapes and static arguments."""
  return model.apply({'params': params}, *args, method=method, **kwargs)


@dataclasses.dataclass(frozen=True)
class Sample:
  """One row before expansion.

  Attributes:
    ids: token ids with placeholders.
    answer: the last so many tokens are targets.
    turns: turn ids; () is all 0.
    seed: of its images.
  """
  ids: tuple[int, ...]
  answer: int = 0
  turns: tuple[int, ...] = ()
  seed: int = 0

  @property
  def num_images(self) -> int:
    """Image placeholders in the row."""
    return self.ids.count(IMAGE)

  def loss_mask(self) -> list[bool]:
    """One bool per id."""
    return [i >= len(self.ids) - self.answer for i in range(len(self.ids))]


def segment(num_voco_tokens: int) -> tuple[int, ...]:
  """An image with its VoCo tokens, as all templates lay it out."""
  return (IMAGE, NEWLINE) + (VOCO,) * num_voco_tokens + (NEWLINE,)


def row(sample: Sample, config):
  """The expanded row of a sample."""
  return sequence.expand_row(
      list(sample.ids), sample.loss_mask(),
      list(sample.turns) or [0] * len(sample.ids), config)


def features(sample: Sample, config) -> np.ndarray:
  """The sample's images, float32[images, P', Dv]."""
  rng = np.random.default_rng(1000 + sample.seed)
  shape = (sample.num_images, config.num_patches, config.vision.hidden_size)
  return rng.normal(size=shape).astype(np.float32)


def batch(samples, config, *, length: int, num_images: int,
          pad_left: bool = False):
  """Samples as a Batch."""
  return sequence.make_batch(
      [row(s, config) for s in samples],
      [features(s, config) for s in samples], length=length,
      num_images=num_images, pad_left=pad_left)


def flat(tree) -> dict:
  """A nested parameter tree by path."""
  return flax.traverse_util.flatten_dict(tree, sep='/')


def differs(a, b) -> bool:
  """Whether two results are not the same; arrays to 1e-6."""
  if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
    return a.shape != b.shape or np.abs(a - b).max() > 1e-6
  return a != b


def close(actual, expected, tolerance: float = 1e-5) -> None:
  """Asserts equality within an absolute and relative tolerance."""
  np.testing.assert_allclose(np.asarray(actual), np.asarray(expected),
                             rtol=tolerance, atol=tolerance)


class Compilations:
  """Counts what jax compiles, whoever asks for it."""

  def __enter__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def _listen(self, name, *_, **__):
    self.count += name == '/jax/core/compile/backend_compile_duration'

  def __exit__(self, *_):
    jax.monitoring.unregister_event_duration_listener(self._listen)
