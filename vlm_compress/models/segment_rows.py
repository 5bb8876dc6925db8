"""Rows taken out of batches between segments, and made into new batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlm_compress.compress import atp
from vlm_compress.models.segments import UNUSED, Pruning, SegmentCache, Tokens


def take_row(tokens: Tokens, pruning: Pruning, index: jax.Array, num_slots: int
             ) -> tuple[Tokens, Pruning]:
  """One row of a batch, cut to `num_slots` slots or filled up to them."""
  take = lambda y, axis=0: jax.lax.dynamic_slice_in_dim(y, index, 1, axis)
  inputs, state = pruning.inputs, pruning.state

  def fit(y, unused):
    y = take(y)[:, :num_slots]
    spare = ((0, 0), (0, num_slots - y.shape[1])) + ((0, 0),) * (y.ndim - 2)
    return jnp.pad(y, spare, constant_values=unused)
  return jax.tree.map(fit, tokens, UNUSED), Pruning(
      inputs.replace(image_valid=take(inputs.image_valid),
                     order=take(inputs.order)),
      atp.PruneState(keep=take(state.keep),
                     module_keep=take(state.module_keep, 1),
                     thresholds=take(state.thresholds, 1),
                     redundancy=take(state.redundancy, 1)))


def stack_rows(rows: Sequence[tuple[Tokens, Pruning]]) -> tuple[Tokens, Pruning]:
  """A batch of rows that `take_row` has taken."""
  tokens, prunings = zip(*rows)
  one = prunings[0]
  join = lambda get, axis=0: jnp.concatenate([get(p) for p in prunings], axis)
  return stack(tokens), Pruning(
      one.inputs.replace(image_valid=join(lambda p: p.inputs.image_valid),
                         order=join(lambda p: p.inputs.order)),
      atp.PruneState(keep=join(lambda p: p.state.keep),
                     module_keep=join(lambda p: p.state.module_keep, 1),
                     thresholds=join(lambda p: p.state.thresholds, 1),
                     redundancy=join(lambda p: p.state.redundancy, 1)))


def take_cache(cache: SegmentCache, index: jax.Array, num_slots: int
               ) -> SegmentCache:
  """One row of a cache, with empty slots at its end up to `num_slots`."""
  def take(y):
    y = jax.lax.dynamic_slice_in_dim(y, index, 1, 0)
    spare = num_slots - y.shape[1]
    return jnp.pad(y, ((0, 0), (0, spare)) + ((0, 0),) * (y.ndim - 2))
  return jax.tree.map(take, cache)


def stack(rows: Sequence[Any]) -> Any:
  """Joins trees of one row each."""
  return jax.tree.map(lambda *y: jnp.concatenate(y), *rows)
