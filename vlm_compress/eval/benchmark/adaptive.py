"""Adaptive counts meet static shapes: what rounding up to a rung costs, for
prompts alone, in batches as they come, and in batches made anew (regroup).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vlm_compress.config import LlavaConfig
from vlm_compress.decode.prefilled import entering
from vlm_compress.decode.regroup import SlotCount, count_slots, prefill_regrouped
from vlm_compress.eval.benchmark import subjects
from vlm_compress.eval.benchmark.inference import TOLERANCE
from vlm_compress.eval.benchmark.timing import alternate, median_ms
from vlm_compress.eval.calibration import calibrate
from vlm_compress.models.inputs import PruneOptions
from vlm_compress.models.segments import capacity_ladder
from vlm_compress.models.sequence import Batch


def measure(subject: subjects.Subject, *, share: float, batch_size: int,
            repeats: int, tick: Callable[[str], Any] = lambda name: None
            ) -> dict[str, Any]:
  """One prompt about each picture of the subject.

  Args:
    subject: the model; its pictures are the queue.
    share: layer average of visual tokens as part of P.
    batch_size: prompts at a time.
    repeats: rounds that count.
    tick: called with the name of what has been run.

  Returns:
    Plain JSON types: reached, whether the average is the share's within
    TOLERANCE; kept [Q, L] tokens after each module; ladder; rung_waste
    [L], slots of the rungs / kept visual tokens of prompts alone; per mode
    (alone, batch, regrouped) slot waste, with text and over all layers, and
    milliseconds per prompt.
  """
  model, config = subject.model, subject.atp
  num_prompts = len(subject.features) // batch_size * batch_size
  whole = subjects.prompt_batch(subject, num_prompts)
  rows = lambda start, count: jax.tree.map(
      lambda x: x[start:start + count], whole)
  batches = [rows(i, batch_size) for i in range(0, num_prompts, batch_size)]
  singles = [rows(i, 1) for i in range(num_prompts)]

  def count(shift: float) -> np.ndarray:
    options = PruneOptions(threshold_shift=shift)
    return np.concatenate([entering(config, model.prefill(
        batch, options).pruning).sum(2).T for batch in batches])
  target = share * config.num_visual_tokens
  found = calibrate(count, target, config, tolerance=TOLERANCE * target)
  options = PruneOptions(threshold_shift=found.shift)
  counts = {'alone': SlotCount(), 'batch': SlotCount(), 'regrouped': SlotCount()}

  def in_order(name: str, some: list[Batch]) -> Any:
    states = [model.prefill(batch, options) for batch in some]
    for state in states:
      counts[name].merge(count_slots(model, state))
    return [state.logits for state in states]

  def regrouped() -> Any:
    queue = ((list(range(i * batch_size, (i + 1) * batch_size)), batch)
             for i, batch in enumerate(batches))
    return [done.state.logits for done in prefill_regrouped(
        model, queue, options, 0, counts['regrouped'])]
  seconds = alternate({'alone': lambda: in_order('alone', singles),
                       'batch': lambda: in_order('batch', batches),
                       'regrouped': regrouped}, repeats, tick=tick)
  modes = {name: {'waste': counts[name].waste,
                  'ms_per_prompt': median_ms(value) / num_prompts}
           for name, value in seconds.items()}
  return {'subject': subject.name, 'dtype': config.dtype, 'share': share,
          'batch': batch_size, 'achieved': found.achieved,
          'reached': found.reached, 'modes': modes,
          'programs': len(model.programs),
          **_rungs(config, count(found.shift))}


def _rungs(config: LlavaConfig, tokens: np.ndarray) -> dict[str, Any]:
  """What float32[Q, M] tokens per layer are rounded up to."""
  placed = list(config.atp.prune_after)
  ladder = np.asarray(capacity_ladder(config))
  kept = tokens[:, placed]
  rungs = ladder[np.searchsorted(ladder, kept)]
  return {'kept': kept.tolist(), 'prune_after': placed,
          'ladder': ladder.tolist(),
          'rung_waste': (rungs.sum(0) / kept.sum(0)).tolist(),
          'num_layers': config.text.num_hidden_layers,
          'num_visual_tokens': config.num_visual_tokens}
