"""Attention masks as functions of arrays; no layer builds a mask.

True = may attend.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Causal:
  """A causal mask as what it is made of, so that nobody has to store it.

  The T queries are the last T of the S keys; each sees the valid keys up to
  and including itself.  Two queries behind one earlier key:

    q 1 1 .
    q 1 1 1

  Attributes:
    valid: bool[B, S], False for padding.
  """
  valid: jax.Array

  def dense(self, num_queries: int) -> jax.Array:
    """bool[B, T, S] for T queries."""
    S = self.valid.shape[1]
    last = jnp.arange(S - num_queries, S)[:, None]
    return (jnp.arange(S) <= last) & self.valid[:, None, :]


def causal_mask(valid: jax.Array, group_ids: jax.Array) -> jax.Array:
  """Causal attention inside a row that holds independent groups.

  Group 0 is seen by everybody; group g >= 1 sees group 0 and itself.  An
  ordinary row has only group 0.  Four tokens of groups 0 0 1 2:

    g0 1 . . .
    g0 1 1 . .
    g1 1 1 1 .
    g2 1 1 . 1

  Args:
    valid: bool[B, S], False for padding.
    group_ids: int32[B, S].

  Returns:
    bool[B, S, S].
  """
  S = valid.shape[1]
  causal = jnp.arange(S)[:, None] >= jnp.arange(S)[None, :]
  return causal & valid[:, None, :] & same_group(group_ids, group_ids)


def same_group(query_groups: jax.Array, key_groups: jax.Array) -> jax.Array:
  """bool[B, T, S]: the key is of group 0 or of the query's group."""
  keys = key_groups[:, None, :]
  return (keys == 0) | (keys == query_groups[:, :, None])
