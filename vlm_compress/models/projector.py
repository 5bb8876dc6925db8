"""The two-layer MLP between vision features and the decoder (LLaVA-1.5)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_compress.nn.linear import linear


class Projector(nn.Module):
  """linear_2(gelu(linear_1(x))).

  Attributes:
    hidden_size: D of the decoder.
    act: 'gelu' (exact erf) or 'gelu_tanh'.
    std: of the initial weights.
    dtype, param_dtype: of activations and of parameters.
  """
  hidden_size: int
  act: str
  std: float
  dtype: jnp.dtype
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """float[..., Dv] -> float[..., D]."""
    dense = lambda name, axes: linear(
        self.hidden_size, axes, name=name, std=self.std, use_bias=True,
        dtype=self.dtype, param_dtype=self.param_dtype)
    hidden = dense('linear_1', (None, 'mlp'))(features.astype(self.dtype))
    hidden = jax.nn.gelu(hidden, approximate=self.act == 'gelu_tanh')
    return dense('linear_2', ('mlp', 'embed'))(hidden)
