"""One LLaMA decoder layer: RMSNorm, grouped-query attention, SwiGLU.

Parameter names are Hugging Face's.  The layer gets positions and masks; it
makes none.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_compress.config import LoraConfig, TextConfig
from vlm_compress.nn.attention import attention_and_lse
from vlm_compress.nn.linear import linear
from vlm_compress.nn.norms import RMSNorm
from vlm_compress.nn.rope import rope
from vlm_compress.sharding import constrain


class LayerState(NamedTuple):
  """What attention of a layer leaves behind.

  Attributes:
    q: float[B, T, N, H], k and v: float[B, T, K, H], of the row's own tokens;
      q and k rotated.  With `write_at`, k and v are the whole buffers.
    lse: float32[B, T, N], see `attention_and_lse`.
  """
  q: jax.Array
  k: jax.Array
  v: jax.Array
  lse: jax.Array


def _projection(layer: Attention | MLP, features: int,
                axes: tuple[str, str], name: str, use_bias: bool = False
                ) -> nn.Dense:
  """A projection of a layer, with its adapter if it is a target of LoRA."""
  lora = layer.lora
  adapted = lora is not None and name in lora.targets
  return linear(features, axes, name=name, std=layer.config.initializer_range,
                use_bias=use_bias, dtype=layer.dtype,
                param_dtype=layer.param_dtype,
                low_rank=(lora.rank, lora.scale) if adapted else None)


class Attention(nn.Module):
  """Self-attention over earlier keys and this row's own.

  Attributes:
    config: sizes.
    dtype, param_dtype: of activations and of parameters.
    implementation: of attention; see nn.kernels.
    lora: adapters, or None.
  """
  config: TextConfig
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  implementation: str = 'auto'
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x, positions, mask, bias, earlier, read_shift, keep,
               write_at):
    """See DecoderLayer; returns its output and its LayerState."""
    cfg = self.config
    B, T, _ = x.shape
    N, K, H = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.size_per_head

    def project(heads, name, axis):
      dense = _projection(self, heads * H, ('embed', axis), name,
                          cfg.attention_bias)
      return dense(x).reshape(B, T, heads, H)

    q = rope(project(N, 'q_proj', 'heads'), positions, cfg.rope_theta)
    k = rope(project(K, 'k_proj', 'kv_heads'), positions, cfg.rope_theta)
    v = project(K, 'v_proj', 'kv_heads')
    q = constrain(q, 'batch', 'length', 'heads', None)
    all_k, all_v = k, v
    if read_shift is not None:
      moved = rope(k, read_shift, cfg.rope_theta)
      all_k = jnp.concatenate([k, moved], axis=1)
      all_v = jnp.concatenate([v, v], axis=1)
    if write_at is not None:
      k, v = (jax.lax.dynamic_update_slice(
          buffer, new.astype(buffer.dtype), (0, write_at, 0, 0))
              for buffer, new in zip(earlier, (k, v)))
      all_k, all_v = k.astype(q.dtype), v.astype(q.dtype)
    elif earlier is not None:
      all_k = jnp.concatenate([earlier[0].astype(k.dtype), all_k], axis=1)
      all_v = jnp.concatenate([earlier[1].astype(v.dtype), all_v], axis=1)
    out, lse = attention_and_lse(q, all_k, all_v, mask, bias, keep,
                                 self.implementation)
    out = out.reshape(B, T, N * H)
    out = _projection(self, cfg.hidden_size, ('heads', 'embed'), 'o_proj')(out)
    return out, LayerState(q, k, v, lse)


class MLP(nn.Module):
  """SwiGLU: down(silu(gate(x)) * up(x)); attributes as of Attention."""
  config: TextConfig
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x):
    """float[B, T, D] -> float[B, T, D]."""
    cfg = self.config
    wide = lambda name: _projection(
        self, cfg.intermediate_size, ('embed', 'mlp'), name)(x)
    hidden = jax.nn.silu(wide('gate_proj')) * wide('up_proj')
    hidden = constrain(hidden, 'batch', 'length', 'mlp')
    return _projection(self, cfg.hidden_size, ('mlp', 'embed'),
                       'down_proj')(hidden)


class DecoderLayer(nn.Module):
  """Pre-norm decoder layer.

  Attributes:
    config: sizes.
    dtype, param_dtype: of activations and of parameters.
    implementation: of attention; see nn.kernels.
    lora: adapters, or None.
  """
  config: TextConfig
  dtype: jnp.dtype
  param_dtype: jnp.dtype
  implementation: str = 'auto'
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x, positions, mask, bias=None, earlier=None,
               read_shift=None, keep=None, write_at=None):
    """Runs the layer.

    Args:
      x: float[B, T, D].
      positions: int32[B, T].
      mask: bool[B, T, S] or Causal, S = earlier tokens + T (+ T with
        read_shift).
      bias: float32[B, T, S] or None.
      earlier: rotated keys and values of earlier tokens,
        float[B, ., K, H] each, or None.
      read_shift: int32[B, T] or None.  If given, every key stands twice in
        S: first at its position, then at its position plus this, and the mask
        says which query reads which copy.
      keep: float32[B, T, S] or None; see `attention_and_lse`.
      write_at: int32[] or None.  If given, `earlier` are buffers of S tokens
        into which the keys and values of this row's T tokens are written,
        from this place on, instead of being put behind them.

    Returns:
      float[B, T, D] and LayerState.
    """
    cfg = self.config
    kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype,
                 lora=self.lora)
    norm = lambda name: RMSNorm(cfg.rms_norm_eps, self.param_dtype, name=name)
    attended, state = Attention(
        cfg, name='self_attn', implementation=self.implementation, **kinds)(
            norm('input_layernorm')(x), positions, mask, bias, earlier,
            read_shift, keep, write_at)
    x = x + attended
    x = x + MLP(cfg, name='mlp', **kinds)(norm('post_attention_layernorm')(x))
    return constrain(x, 'batch', 'length', 'act_embed'), state
