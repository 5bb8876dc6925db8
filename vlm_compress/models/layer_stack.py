"""The decoder layers as one scan, with pruning modules between them.

Parameters of all layers are stacked (leading axis M) whatever the method.  A
module between two layers runs under `lax.cond` inside the same scan: shapes
stay fixed while masks are trained, and the program stays as small as that of
one layer.
"""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vlm_compress.compress import atp, selection
from vlm_compress.config import LoraConfig, TextConfig
from vlm_compress.models.llama import DecoderLayer
from vlm_compress.nn.attention import attention_probs
from vlm_compress.nn.masks import Causal
from vlm_compress.nn.rope import rope


@flax.struct.dataclass
class StackInputs:
  """What all layers share.

  Attributes:
    positions: int32[B, T].
    mask: bool[B, T, T], among this row's tokens; or Causal, where nothing
      below is set.
    read_shift: int32[B, T] or None: text reads a token's key at its position
      plus this.  Only rows with several compressed images need it.
    reads: bool[B, T], queries that read at shifted positions.
    earlier_mask: bool[B, T, S] or None, among earlier tokens.
    prune: inputs of the pruning modules, or None.
    collect: attention maps of every layer are returned (analysis).
  """
  positions: jax.Array
  mask: jax.Array | Causal
  read_shift: jax.Array | None = None
  reads: jax.Array | None = None
  earlier_mask: jax.Array | None = None
  prune: atp.PruneInputs | None = None
  collect: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class StackOutputs:
  """What the layers leave behind.

  Attributes:
    keys, values: float[M, B, T, K, H], keys rotated.
    entering: float32[M, B, I, P] keep mask of the visual tokens that enter
      each layer, or None without pruning.
    prune: final state of the pruning modules, or None.
    attention: float32[M, B, T, S], mean over heads, or None.
  """
  keys: jax.Array
  values: jax.Array
  entering: jax.Array | None
  prune: atp.PruneState | None
  attention: jax.Array | None


class _Body(nn.Module):
  """One step of the scan: a layer, then perhaps a module."""
  config: TextConfig
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  implementation: str
  lora: LoraConfig | None

  @nn.compact
  def __call__(self, carry, per_layer, shared):
    x, state = carry
    module, earlier, earlier_keep = per_layer
    mask, bias, entering, keep = shared.mask, None, None, None
    ahead = shared.prune is not None and shared.prune.looks_ahead
    if ahead:  # `module` is the one in front of this layer
      state = self._look_ahead(x, state, module, shared)
    if shared.prune is not None:
      entering = state.keep
      mask, bias = atp.masked_by_keep(state.keep, shared.prune, mask)
    own_mask, own_bias = mask, bias
    if shared.prune is not None and shared.prune.straight_through:
      mask, keep = shared.mask, atp.straight_through_keep(state.keep,
                                                          shared.prune)
    if shared.read_shift is not None:
      reads = shared.reads[:, :, None]
      mask = jnp.concatenate([mask & ~reads, mask & reads], axis=2)
    if earlier is not None:
      readable = shared.earlier_mask & earlier_keep[:, None, :]
      mask = jnp.concatenate([readable, mask], axis=2)
    layer = DecoderLayer(self.config, self.dtype, self.param_dtype,
                         self.implementation, self.lora)
    nn.share_scope(self, layer)
    x, (q, k, v, lse) = layer(x, shared.positions, mask, bias, earlier,
                         shared.read_shift, keep)
    if shared.prune is not None and not ahead:
      # Where attention had another mask than scores have, so is its lse.
      own_lse = None if keep is not None or earlier is not None else lse
      state, x = jax.lax.cond(
          module >= 0,
          lambda s, x: selection.choose(s, module, x, q, k, own_lse, own_mask,
                                        own_bias, shared.prune),
          lambda s, x: (s, x), state, x)
    maps = None
    if shared.collect:
      maps = self._maps(q, k, own_mask, own_bias, shared)
    return (x, state), (k, v, entering, maps)

  def _look_ahead(self, x, state, module, shared):
    """The module in front of this layer, by this layer's queries and keys."""
    layer = DecoderLayer(self.config, self.dtype, self.param_dtype,
                         self.implementation, self.lora, parent=None)
    params = {'params': self.variables['params']}

    def run(state):
      mask, _ = atp.masked_by_keep(state.keep, shared.prune, shared.mask)
      # Of the layer, only what makes q and k remains in the program.
      _, (q, k, *_) = layer.apply(params, x, shared.positions, mask)
      return atp.prune(state, module, q, k, None, mask, None, shared.prune)
    return jax.lax.cond(module >= 0, run, lambda s: s, state)

  def _maps(self, q, k, mask, bias, shared):
    """Attention among this row's tokens, mean over heads."""
    if shared.read_shift is None:
      return jnp.mean(attention_probs(q, k, mask, bias), axis=(1, 2))
    # Every key stands twice, at two positions; a query reads one of them.
    moved = rope(k, shared.read_shift, self.config.rope_theta)
    reads = shared.reads[:, :, None]
    mask = jnp.concatenate([mask & ~reads, mask & reads], axis=2)
    probs = attention_probs(q, jnp.concatenate([k, moved], axis=1), mask)
    probs = jnp.mean(probs, axis=(1, 2))
    return sum(jnp.split(probs, 2, axis=2))


def module_schedule(prune_after: tuple[int, ...], num_layers: int) -> np.ndarray:
  """int32[M]: index of the module behind each layer, or -1."""
  schedule = np.full(num_layers, -1, np.int32)
  for module, layer in enumerate(prune_after):
    if layer > 0:  # a module in front of all layers is in the initial state
      schedule[layer - 1] = module
  return schedule


class LayerStack(nn.Module):
  """All decoder layers.

  Attributes:
    config: sizes.
    dtype, param_dtype: of activations and of parameters.
    remat: layers are recomputed in the backward pass, but for what this policy
      of jax.checkpoint_policies keeps; None keeps all.
    unroll: layers per scan step; M makes a program without a loop, in which
      the compiler counts every FLOP.
    implementation: of attention; see nn.kernels.
    lora: adapters, or None.
  """
  config: TextConfig
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  remat: str | None = None
  unroll: int = 1
  implementation: str = 'auto'
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x: jax.Array, shared: StackInputs,
               earlier: tuple[jax.Array, jax.Array] | None = None,
               earlier_keep: jax.Array | None = None
               ) -> tuple[jax.Array, StackOutputs]:
    """Runs all layers.

    Args:
      x: float[B, T, D].
      shared: masks, positions, pruning.
      earlier: keys and values of earlier tokens, float[M, B, S, K, H].
      earlier_keep: bool[M, B, S], which of them each layer may read.

    Returns:
      float[B, T, D] and StackOutputs.
    """
    num_layers = self.config.num_hidden_layers
    prune_after = shared.prune.config.prune_after if shared.prune else ()
    schedule = module_schedule(prune_after, num_layers)
    if shared.prune is not None and shared.prune.looks_ahead:
      schedule = np.roll(schedule, 1)
    schedule = jnp.asarray(schedule)
    body = _Body
    if self.remat is not None:
      body = nn.remat(body, prevent_cse=False,
                      policy=getattr(jax.checkpoint_policies, self.remat))
    scan = nn.scan(body, variable_axes={'params': 0},
                   split_rngs={'params': True},
                   in_axes=(0, nn.broadcast), out_axes=0, length=num_layers,
                   unroll=self.unroll,
                   metadata_params={nn.PARTITION_NAME: 'layers'})
    state = atp.initial_state(shared.prune) if shared.prune else None
    (x, state), (k, v, entering, maps) = scan(
        self.config, self.dtype, self.param_dtype, self.implementation,
        self.lora, name='layers')(
            (x, state), (schedule, earlier, earlier_keep), shared)
    return x, StackOutputs(keys=k, values=v, entering=entering, prune=state,
                           attention=maps)
