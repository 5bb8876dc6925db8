"""Root-mean-square layer norm (1910.07467), computed in float32."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
  """x / rms(x) * weight.

  Attributes:
    epsilon: added to the mean square.
    param_dtype: dtype of the weight.
  """
  epsilon: float
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """float[..., D] -> float[..., D] in x's dtype."""
    init = nn.with_logical_partitioning(nn.initializers.ones, ('act_embed',))
    weight = self.param('weight', init, (x.shape[-1],), self.param_dtype)
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(mean_square + self.epsilon)
    return (normed * weight.astype(jnp.float32)).astype(x.dtype)
