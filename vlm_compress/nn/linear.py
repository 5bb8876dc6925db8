"""A Dense layer whose kernel carries logical axis names."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp


def linear(features: int, axes: tuple[str | None, str | None], *, name: str, std: float,
           use_bias: bool = False, dtype: jnp.dtype = jnp.float32,
           param_dtype: jnp.dtype = jnp.float32) -> nn.Dense:
  """nn.Dense with a normal(std) kernel partitioned along `axes`."""
  return nn.Dense(
      features, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype,
      name=name,
      kernel_init=nn.with_logical_partitioning(
          nn.initializers.normal(std), axes),
      bias_init=nn.with_logical_partitioning(
          nn.initializers.zeros, (axes[1],)))
