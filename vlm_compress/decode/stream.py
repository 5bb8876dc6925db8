"""Generation one token at a time, for somebody who waits for the words.

The same tokens as generate.py's, whose loop is one compiled program: here a
Python loop hands every token out as soon as it is there.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator

import jax
import numpy as np

from vlm_compress.decode.sampling import sample
from vlm_compress.decode.segmented import Prefilled, SegmentedModel


def tokens(model: SegmentedModel, state: Prefilled, *, max_new_tokens: int,
           end_ids: Collection[int], temperature: float = 0.0,
           top_p: float = 1.0, seed: int = 0) -> Iterator[list[int | None]]:
  """Generates behind prefilled prompts.

  Args:
    model: the model.
    state: of the prompts, with room for max_new_tokens - 1 tokens or more; it
      is used up.
    max_new_tokens: longest answer.
    end_ids: each ends the answer of a row, and is not given out.
    temperature, top_p, seed: see `generate`.

  Yields:
    One token id per row, None for those that have ended; until all have.
  """
  key, ended = jax.random.key(seed), np.zeros(len(state.positions), bool)
  for step in range(max_new_tokens):
    chosen = _pick(state.logits, key, np.int32(step), temperature, top_p)
    values = np.asarray(chosen)
    ended |= np.isin(values, list(end_ids))
    if ended.all():
      return
    yield [None if end else int(v) for v, end in zip(values, ended)]
    if step + 1 < max_new_tokens:
      model.extend(chosen, state)


def compile_ahead(model: SegmentedModel, batch_size: int) -> None:
  """Compiles the greedy choice of `tokens` for so many rows."""
  logits = np.zeros((batch_size, model.config.text.vocab_size), np.float32)
  _pick(jax.device_put(logits, model.programs.out), jax.random.key(0),
        np.int32(0), 0.0, 1.0)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _pick(logits: jax.Array, key: jax.Array, step: jax.Array,
          temperature: float, top_p: float) -> jax.Array:
  return sample(logits, jax.random.fold_in(key, step), temperature, top_p)
