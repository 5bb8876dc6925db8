"""How fast a run is, and what of it is padding: what depends on the machine,
kept apart from metrics.jsonl, which an interrupted run must reproduce.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlm_compress import resident
from vlm_compress.config import LlavaConfig
from vlm_compress.eval.hardware import chip_of
from vlm_compress.eval.training_cost import RowShape, StepCost, step_cost
from vlm_compress.models.sequence import Batch
from vlm_compress.train.recipe import Recipe
from vlm_compress.train.state import TrainState


def row_shape(batch: Any) -> RowShape:
  """The slots of a batch's rows; VoCo's pair has those of both passes."""
  if isinstance(batch, Batch):
    return RowShape(batch.input_ids.shape[1], 0, batch.image_valid.shape[1],
                    batch.features.dtype == np.uint8)
  compressed, uncompressed = batch
  text = row_shape(compressed.text)
  whole = 0 if uncompressed is None else uncompressed.input_ids.shape[1]
  return RowShape(whole, text.length, text.num_images, text.has_pixels)


def _read(batch: Any) -> tuple[int, int]:
  """Tokens that the decoder reads of a batch, and the slots they stand in."""
  if isinstance(batch, Batch):
    return int(np.sum(batch.valid)), batch.valid.size
  compressed = batch[0]
  segment, images = len(compressed.segment_ids), compressed.text.image_valid
  tokens, slots = _read(compressed.text)
  return tokens + segment * int(np.sum(images)), slots + segment * images.size


class Throughput:
  """Counts steps, and gives rates since it was asked last.

  Tokens are those that the decoder reads, padding left out: of VoCo both
  passes, BOS and newline of every compressed picture included, but not what a
  teacher reads.
  Model FLOPs utilisation is FLOPs by formula (eval/training_cost.py) / time /
  the chips' published peak; it is left out where that is not known.
  """

  def __init__(self, config: LlavaConfig, recipe: Recipe, state: TrainState,
               mesh: Mesh):
    self._config, self._recipe = config, recipe
    self._trainable = {path: x.size for path, x in state.trainable.items()}
    self._chips, self._chip = mesh.size, chip_of(mesh.devices.flat[0].device_kind)
    self._costs: dict[RowShape, StepCost] = {}
    self._start()

  def _start(self) -> None:
    self._since = time.perf_counter()
    self._steps = 0
    self._tokens = self._slots = self._flops = 0.0

  def step(self, batch: Any) -> None:
    """Counts a step on this process's rows of a batch."""
    text = batch if isinstance(batch, Batch) else (
        batch[0].text if isinstance(batch, tuple) else None)
    self._steps += 1
    if text is None:
      return
    tokens, slots = _read(batch)
    # Processes may hold the same part of a batch: parts count, not processes.
    parts = self._recipe.batch_size / len(text.valid)
    self._tokens += parts * tokens
    self._slots += parts * slots
    shape = row_shape(batch)
    if shape not in self._costs:
      self._costs[shape] = step_cost(
          self._config, self._recipe.stage, shape, self._recipe.batch_size,
          self._trainable, self._recipe.teacher != 'none')
    self._flops += self._costs[shape].model

  def rates(self) -> dict[str, float]:
    """Of the whole batch, taking its other parts for as full as one's own."""
    seconds = time.perf_counter() - self._since
    out = {'steps_per_second': self._steps / seconds,
           'examples_per_second': self._steps * self._recipe.batch_size / seconds,
           'tokens_per_second': self._tokens / seconds,
           'model_flops_per_second': self._flops / seconds,
           'memory_bytes': memory_bytes()}
    if self._slots:
      out['padding_waste'] = 1.0 - self._tokens / self._slots
    if self._chip is not None:
      out['mfu'] = out['model_flops_per_second'] / (
          self._chips * self._chip.flops)
    self._start()
    return out


def memory_bytes() -> float:
  """Peak of the fullest device of this process; of the process on a CPU."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s['peak_bytes_in_use'] for s in stats if 'peak_bytes_in_use' in s]
  if peaks:
    return float(max(peaks))
  return float(resident.peak())


def summary(state: TrainState) -> str:
  """What a state holds, in a line."""
  def total(tree):
    leaves = jax.tree.leaves(tree)
    return sum(x.size for x in leaves), sum(x.nbytes for x in leaves)
  learns, frozen = total(state.trainable)[0], total(state.frozen)[0]
  size = sum(total(part)[1] for part in (state.trainable, state.frozen))
  return (f'{(learns + frozen) / 1e6:,.2f} M parameters, {learns / 1e6:,.2f} M of '
          f'them learn; {size / 2**20:,.1f} MiB, and '
          f'{total(state.opt_state)[1] / 2**20:,.1f} MiB of the optimiser, over '
          'all devices')
