"""Training: one step of VoCo in two passes and under its mask, and of ATP's
soft masks, beside the plain model's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_compress import losses
from vlm_compress.config import AtpConfig, LlavaConfig, TextConfig, VisionConfig, VocoConfig
from vlm_compress.eval.benchmark.subjects import BOS, NEWLINE, NUM_TEXT, WORD
from vlm_compress.eval.benchmark.timing import alternate, median_ms, peak_rise, spread
from vlm_compress.models.llava import Llava, init_params
from vlm_compress.models.sequence import expand_row, make_batch, split_voco
from vlm_compress.presets import prune_after_for
from vlm_compress.train import steps
from vlm_compress.train.optimizer import make_optimizer
from vlm_compress.train.recipe import Recipe

PLAIN = 'plain model'
NUM_TARGETS, VOCO_TOKENS = 10, 8


def config_of(hidden_size: int = 1024, num_layers: int = 4) -> LlavaConfig:
  """576 visual tokens, a decoder that two cores can train."""
  text = TextConfig(vocab_size=4096, hidden_size=hidden_size,
                    intermediate_size=hidden_size * 11 // 4,
                    num_hidden_layers=num_layers,
                    num_attention_heads=hidden_size // 64,
                    num_key_value_heads=hidden_size // 64)
  return LlavaConfig(vision=VisionConfig(), text=text,
                     voco_token_index=text.vocab_size, remat=True)


def measure(config: LlavaConfig, num_rows: int, repeats: int,
            tick: Callable[[str], Any] = lambda name: None
            ) -> list[dict[str, Any]]:
  """Times training steps.

  Args:
    config: of the plain model.
    num_rows: B.
    repeats: rounds that count.
    tick: called with the name of what has been run.

  Returns:
    A row per method: step_ms, temp_bytes (the compiler's count of what a step
    needs besides its arguments and results), peak_bytes and ratios to the
    plain model.
  """
  runs, temporaries = {}, {}
  for name, (model, loss, batch) in _methods(config, num_rows).items():
    run, temp = _step(model, loss, batch)
    runs[name], temporaries[name] = run, temp
  seconds = alternate(runs, repeats, tick=tick)
  rows = [{'method': name, 'dtype': config.dtype, 'batch': num_rows,
           'step_ms': median_ms(seconds[name]), 'spread': spread(seconds[name]),
           'temp_bytes': temporaries[name], 'peak_bytes': peak_rise(runs[name])}
          for name in runs]
  plain = next(row for row in rows if row['method'] == PLAIN)
  for row in rows:
    row['time_ratio'] = row['step_ms'] / plain['step_ms']
    row['memory_ratio'] = row['temp_bytes'] / plain['temp_bytes']
  return rows


def _methods(config: LlavaConfig, num_rows: int) -> dict[str, tuple]:
  """name -> (model, loss of (params, batch), batch)."""
  recipe = Recipe()
  voco = dataclasses.replace(config, voco=VocoConfig(VOCO_TOKENS))
  atp = dataclasses.replace(config, atp=AtpConfig(
      prune_after=prune_after_for(config.text.num_hidden_layers),
      target_tokens=float(config.num_visual_tokens)))
  plain_batch = _batch(config, num_rows, 0)
  masked_batch = _batch(voco, num_rows, VOCO_TOKENS)
  split = split_voco(masked_batch, voco, NUM_TEXT + 1)
  step = steps.At(jnp.int32(0), jnp.int32(0))

  def masked(params, batch):
    logits, _ = Llava(voco).apply({'params': params}, batch, mask='voco')
    return steps.mean_loss(losses.next_token_loss(logits, batch.input_ids,
                                              batch.loss_mask))
  return {
      PLAIN: (Llava(config), lambda p, b: steps.instruct_loss(
          Llava(config), p, b, step, recipe)[0], plain_batch),
      'VoCo, two passes': (Llava(voco), lambda p, b: steps.voco_loss(
          Llava(voco), p, (b, None), step, recipe)[0], split),
      'VoCo, one masked pass': (Llava(voco), masked, masked_batch),
      'ATP, soft masks': (Llava(atp), lambda p, b: steps.atp_loss(
          Llava(atp), p, b, step, recipe)[0], plain_batch)}


def _batch(config: LlavaConfig, num_rows: int, num_voco_tokens: int) -> Any:
  image = [config.image_token_index, NEWLINE]
  if num_voco_tokens:
    image += [config.voco_token_index] * num_voco_tokens + [NEWLINE]
  ids = [BOS, *image] + [WORD] * NUM_TEXT
  targets = [i >= len(ids) - NUM_TARGETS for i in range(len(ids))]
  row = expand_row(ids, targets, [0] * len(ids), config)
  rng = np.random.default_rng(0)
  features = rng.standard_normal(
      (num_rows, 1, config.num_patches, config.vision.hidden_size), np.float32)
  return make_batch([row] * num_rows, list(features),
                    length=len(row['positions']), num_images=1)


def _step(model: Llava, loss: Callable, batch: Any
          ) -> tuple[Callable[[], Any], int]:
  """A compiled AdamW step that goes on from its own result, and its memory."""
  optimizer = make_optimizer(Recipe())

  def step(params, state, batch):
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value
  params = nn.unbox(jax.jit(lambda key: init_params(model, key))(
      jax.random.key(0)))
  held = [params, jax.jit(optimizer.init)(params)]
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*held, batch).compile()

  def run():
    *held[:], value = compiled(*held, batch)
    return value
  return run, compiled.memory_analysis().temp_size_in_bytes
