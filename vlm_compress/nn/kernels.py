"""Fused attention, and which implementation serves a call.

Dense attention (nn/attention.py) can do everything: biases, keep masks, single
queries.  Two others keep the T x S logits out of main memory, each where it can:

  jax     jax.nn.dot_product_attention, on GPUs cuDNN's kernel
  splash  the Pallas kernel for TPUs, which also leaves out what a causal mask
          hides; anywhere else it is interpreted, for tests

All of them return the output and the log-sum-exp of the masked logits, and both
have gradients.  A query without any allowed key gets zeros and MASK_VALUE here
(dense: a mean of values), and moves nothing.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlm_compress import sharding
from vlm_compress.config import IMPLEMENTATIONS, check

# Finite, so that a row without any allowed key gives no NaN.
MASK_VALUE = -1e30
BLOCK = 128  # queries or keys; splash needs multiples
_BACKWARD_BLOCK = 256  # queries
_HALF = (jnp.bfloat16, jnp.float16)


def choose(implementation: str, num_queries: int, num_keys: int, causal: bool,
           plain: bool, dtype: jnp.dtype) -> str:
  """The implementation of one call: what was asked for if it can do the call.

  | asked  | served by                                           | else  |
  |--------|-----------------------------------------------------|-------|
  | dense  | dense                                               |       |
  | jax    | jax if plain and T > 1                              | dense |
  | splash | splash if plain and T > 1 and causal                | dense |
  | auto   | TPU: splash if it can and T and S are >= BLOCK      | dense |
  |        | GPU: jax if it can and dtype is bfloat16 or float16 | dense |
  |        | CPU: dense                                          |       |

  An override concerns the calls that a kernel can do, so that one setting is
  right for prefill, decoding and soft masks.  A single query is a
  matrix-vector product, which no kernel makes faster.  cuDNN has no float32,
  and without cuDNN 'jax' stores the logits, of which dense skips half.

  Args:
    implementation: one of IMPLEMENTATIONS.
    num_queries, num_keys: T and S.
    causal: the mask is a masks.Causal.
    plain: there is no bias and no keep.
    dtype: of the queries.

  Returns:
    'dense', 'jax' or 'splash'.

  Raises:
    ConfigError: the name is unknown.
  """
  check(implementation in IMPLEMENTATIONS,
        f'attention_implementation={implementation!r}: use one of '
        f'{IMPLEMENTATIONS}')
  if implementation == 'auto':
    platform = _platform()
    if platform == 'tpu' and min(num_queries, num_keys) >= BLOCK:
      implementation = 'splash'
    elif platform == 'gpu' and dtype in _HALF:
      implementation = 'jax'
    else:
      implementation = 'dense'
  can = plain and num_queries > 1 and (causal or implementation != 'splash')
  return implementation if can else 'dense'


def _platform() -> str:
  """'cpu', 'gpu' or 'tpu': of the mesh's devices, which need not be here."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def fused(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
          ) -> tuple[jax.Array, jax.Array]:
  """Attention through jax.nn.dot_product_attention.

  The log-sum-exp is not its residual, which is rounded to k's dtype (bfloat16:
  off by 0.03 at 8) and has no gradient.  It is computed from q and k, a block
  of queries at a time; under jit it costs nothing where nobody reads it.

  Args:
    q: float[B, T, N, H], k and v: float[B, S, K, H], of one dtype.
    mask: bool[B, T, S].

  Returns:
    float[B, T, N, H] in that dtype, and float32[B, T, N].
  """
  # jax's own default is XLA everywhere.
  implementation = 'cudnn' if _cudnn_serves(q, k) else 'xla'
  out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None],
                                     implementation=implementation)
  block = jax.checkpoint(_block)  # else training would store all logits
  lse = [block(q[:, start:start + BLOCK], k, v, mask[:, start:start + BLOCK])[1]
         for start in range(0, q.shape[1], BLOCK)]
  # Above all for gradients: to cuDNN a mask is a bias like any other.
  out = jnp.where(jnp.any(mask, axis=2)[..., None, None], out, 0)
  return out, jnp.concatenate(lse, axis=1)


def _cudnn_serves(q: jax.Array, k: jax.Array) -> bool:
  """What cuDNN does with a mask, gradients included, on any of its GPUs."""
  H = q.shape[3]
  return (_platform() == 'gpu' and q.dtype in _HALF
          and H % 8 == 0 and H <= 128
          and q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0)


@jax.custom_vjp
def splash(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array
           ) -> tuple[jax.Array, jax.Array]:
  """Causal attention through the Pallas kernel for TPUs.

  The T queries are the last T of the S keys, as in masks.Causal.  Under the
  mesh of `jax.set_mesh`, every device computes its rows and heads: the compiler
  cannot divide a kernel by itself.

  The kernel that leaves a log-sum-exp has no gradient, so this has its own, of
  ordinary operations.

  Args:
    q: float[B, T, N, H], k and v: float[B, S, K, H], of one dtype.
    valid: bool[B, S], False for padding.

  Returns:
    float[B, T, N, H] in that dtype, and float32[B, T, N].
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return _splash_on_a_device(q, k, v, valid)
  batch = _mesh_axes('batch', q.shape[0], mesh)
  heads = _mesh_axes('kv_heads', k.shape[2], mesh)
  by_head = PartitionSpec(batch, None, heads)
  return jax.shard_map(
      _splash_on_a_device, check_vma=False,
      in_specs=(by_head, by_head, by_head, PartitionSpec(batch)),
      out_specs=(by_head, by_head))(q, k, v, valid)


def _mesh_axes(name: str, size: int, mesh: Any) -> Any:
  """Mesh axes of a logical axis, or None (replicated) if they do not divide it.
  """
  axes = sharding.RULES[name]
  names = (axes,) if isinstance(axes, str) else axes
  return axes if size % math.prod(mesh.shape[a] for a in names) == 0 else None


def _splash_on_a_device(q: jax.Array, k: jax.Array, v: jax.Array,
                        valid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`splash` without a mesh.

  Lengths are padded at their ends, which leaves the offset between queries and
  keys as it is.  Padded queries come last and are cut off; padded keys are
  invalid.  All queries are of segment 1, padding too: like dense attention,
  they see the valid keys before them.
  """
  (B, T, N, H), S = q.shape, k.shape[1]
  rows, columns = (-(-length // BLOCK) * BLOCK for length in (T, S))
  pad = lambda x, length: jnp.pad(
      x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
  by_head = lambda x, length: pad(x, length).swapaxes(1, 2)
  arrays = (by_head((q * H ** -0.5).astype(q.dtype), rows),
            by_head(k, columns), by_head(v, columns),
            jnp.ones((B, rows), jnp.int32),
            pad(valid.astype(jnp.int32), columns))

  # An experimental module: only who uses it depends on it.
  from jax.experimental.pallas.ops.tpu import splash_attention as pallas

  def run(q, k, v, *segment_ids, interpret):
    # Made anew in each trace, whose constants it holds.  The work, examining
    # the blocks of the mask, is cached in there (2,048 tokens: 0.03 s once).
    kernel = pallas.make_splash_mha_single_device(
        pallas.MultiHeadMask([pallas.CausalMask((rows, columns), S - T)] * N),
        block_sizes=pallas.BlockSizes(_block_size(rows), _block_size(columns)),
        save_residuals=True, mask_value=MASK_VALUE, interpret=interpret)
    return jax.vmap(kernel)(q, k, v, pallas.SegmentIds(*segment_ids))

  # What the program is compiled for decides, not where that happens.
  out, (lse,) = jax.lax.platform_dependent(
      *arrays, tpu=functools.partial(run, interpret=False),
      default=functools.partial(run, interpret=True))
  out, lse = (x.swapaxes(1, 2)[:, :T] for x in (out, lse))
  sees = jnp.cumsum(valid, axis=1)[:, S - T:] > 0
  return jnp.where(sees[..., None, None], out, 0), lse


def _block_size(length: int) -> int:
  """The largest block that needs no more padding."""
  return next(size for size in (4 * BLOCK, 2 * BLOCK, BLOCK)
              if length % size == 0)


def _splash_forward(q, k, v, valid):
  return splash(q, k, v, valid), (q, k, v, valid)


def _splash_backward(saved, cotangents):
  """Gradients of both outputs, a block of queries at a time.

  Blocks are steps of a loop: unrolled, they would compile for a minute.
  """
  q, k, v, valid = saved
  T, S = q.shape[1], k.shape[1]
  size = min(_BACKWARD_BLOCK, T)
  starts = jnp.arange(0, T, size)
  # Zeros behind the end: queries without cotangents.
  padded = [jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2))
            for x in (q, *cotangents)]

  def step(sums, start):
    q, *cotangents = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
                      for x in padded)
    last = S - T + start + jnp.arange(size)[:, None]
    seen = valid[:, None] & (jnp.arange(S) <= last)
    dq, *gradients = jax.vjp(functools.partial(_block, seen=seen), q, k, v)[1](
        tuple(cotangents))
    return [total + x for total, x in zip(sums, gradients)], dq

  sums = [jnp.zeros(x.shape, jnp.float32) for x in (k, v)]
  (dk, dv), dq = jax.lax.scan(step, sums, starts)
  dq = jnp.moveaxis(dq, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :T]
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


splash.defvjp(_splash_forward, _splash_backward)


def _block(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array
           ) -> tuple[jax.Array, jax.Array]:
  """Plain attention of a few queries: what the kernels are equal to.

  Args:
    q: float[B, T, N, H], k and v: float[B, S, K, H].
    seen: bool[B, T, S].

  Returns:
    float[B, T, N, H] in v's dtype, zero where a query sees nothing, and
    float32[B, T, N].
  """
  (B, T, N, H), K = q.shape, k.shape[2]
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  seen = seen[:, None, None]
  logits = dot('BTKGH,BSKH->BKGTS', q.reshape(B, T, K, N // K, H), k)
  logits = jnp.where(seen, logits * H ** -0.5, MASK_VALUE)
  lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  probs = jnp.where(seen, jnp.exp(logits - lse), 0.0).astype(v.dtype)
  out = dot('BKGTS,BSKH->BTKGH', probs, v).astype(v.dtype)
  return out.reshape(q.shape), jnp.moveaxis(lse[..., 0], 3, 1).reshape(B, T, N)
