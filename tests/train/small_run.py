"""A run that takes a second, for tests; and as a program, which can be killed.

  python tests/train/small_run.py WORKDIR [STEPS] [PROCESSES ID PORT]

Prints `step N` behind every step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import traceback

import jax
import numpy as np

from vlm_compress import sharding
from vlm_compress.cli import distributed
from vlm_compress.config import AtpConfig, LlavaConfig, TextConfig, VisionConfig
from vlm_compress.data.examples import Example, Turn
from vlm_compress.data.input_pipeline import make_dataset
from vlm_compress.data.rows import RowSpec, plain_collate, row_maker
from vlm_compress.data.tokenizer import word_level
from vlm_compress.models.llava import Llava
from vlm_compress.train.loop import data_share, fit
from vlm_compress.train.preemption import Preempted
from vlm_compress.train.recipe import Recipe

WORDS = 'apple dog cat red blue what is at the top left right'.split()
TOKENIZER = word_level([' '.join(WORDS), 'USER: ASSISTANT:', '?', '.'])
CONFIG = LlavaConfig(
    vision=VisionConfig(image_size=4, patch_size=2, hidden_size=8,
                        intermediate_size=8, num_hidden_layers=2,
                        num_attention_heads=2),
    text=TextConfig(vocab_size=TOKENIZER.vocab_size, hidden_size=16,
                    intermediate_size=16, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1,
                    max_position_embeddings=64, initializer_range=0.1))
ATP = dataclasses.replace(CONFIG, atp=AtpConfig(
    prune_after=(1,), target_tokens=3.0, threshold_hidden_size=4))
RECIPE = Recipe(steps=7, batch_size=8, learning_rate=1e-2, warmup_steps=1,
                log_steps=2, checkpoint_steps=2, seed=5)
SPEC = RowSpec(length=24, one_turn=True)


def examples():
  rng = np.random.default_rng(0)
  return [Example(str(i), tuple(
      Turn(f'what is at the {side}?', str(rng.choice(WORDS)))
      for side in ('left', 'right')), images=(b'picture',))
          for i in range(21)]


FEATURES = np.random.default_rng(1).normal(size=(21, 4, 8)).astype(np.float32)


def batches(config, batch_size=8, seed=5, share=(0, 1)):
  """Of one process: share is (index, number of processes)."""
  return make_dataset(
      examples(), row_maker(SPEC, TOKENIZER, config, FEATURES),
      batch_size=batch_size // share[1], seed=seed,
      collate=plain_collate(SPEC), process_index=share[0],
      process_count=share[1])


def one_device():
  """A mesh."""
  return sharding.make_mesh(devices=jax.devices()[:1])


def run(config, recipe, workdir, stream=None, **kwargs):
  """`fit` on one device, without event files."""
  workdir.mkdir(exist_ok=True)
  kwargs = dict(tensorboard=False, mesh=one_device()) | kwargs
  return fit(Llava(config), recipe,
             batches(config) if stream is None else stream, workdir,
             **kwargs)


def metrics_of(workdir):
  """Lines of metrics.jsonl."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


class Said:
  """Batches of an iterator; says how many there were."""

  def __init__(self, inner, first=0):
    self.inner, self.count = inner, first
    self.get_state, self.set_state = inner.get_state, inner.set_state

  def __next__(self):
    print(f'batch {self.count}', flush=True)
    self.count += 1
    return next(self.inner)


def main(workdir: str, steps: str = '7', processes: str = '1', index: str = '0',
         port: str = '0') -> int:
  """The run; returns the exit code."""
  if int(processes) > 1:
    distributed.start(argparse.Namespace(
        distributed=False, coordinator=f'localhost:{port}',
        num_processes=int(processes), process_id=int(index)))
  recipe = dataclasses.replace(RECIPE, steps=int(steps))
  mesh = sharding.make_mesh(fsdp=2 if jax.device_count() > 1 else 1)
  folder = pathlib.Path(workdir)
  folder.mkdir(exist_ok=True)
  share = data_share(mesh, recipe.batch_size)
  try:
    params = fit(Llava(CONFIG), recipe, Said(batches(CONFIG, share=share)),
                 folder, mesh=mesh, tensorboard=False,
                 message=lambda line: print(line, flush=True))
  except Preempted as notice:
    print(notice, flush=True)
    return 0
  whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(params)
  if jax.process_index() == 0:
    leaves = jax.tree.leaves(jax.tree.map(
        lambda x: np.asarray(x.addressable_data(0)).ravel(), whole))
    np.save(folder / 'params.npy', np.concatenate(leaves))
  print('done', flush=True)
  return 0


if __name__ == '__main__':
  try:
    sys.exit(main(*sys.argv[1:]))
  except Exception:
    traceback.print_exc()
    distributed.leave(1)
    raise
