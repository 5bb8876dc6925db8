"""Dense layers whose parameters carry logical axis names, plain or adapted."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

# As PEFT and the authors' code draw A: uniform within 1 / sqrt(in).
_DRAW_A = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def linear(features: int, axes: tuple[str | None, str | None], *, name: str, std: float,
           use_bias: bool = False, dtype: jnp.dtype = jnp.float32,
           param_dtype: jnp.dtype = jnp.float32,
           low_rank: tuple[int, float] | None = None) -> nn.Dense:
  """nn.Dense with a normal(std) kernel partitioned along `axes`.

  Args:
    features: size of the output.
    axes: logical axes of input and output.
    name: of the module; None where setup names it.
    std: of the kernel.
    use_bias: add a bias, zeros at first.
    dtype, param_dtype: of activations and of parameters.
    low_rank: rank and scale of a low-rank update beside the kernel, or None.
  """
  settings = dict(
      features=features, use_bias=use_bias, dtype=dtype,
      param_dtype=param_dtype, name=name,
      kernel_init=nn.with_logical_partitioning(
          nn.initializers.normal(std), axes),
      bias_init=nn.with_logical_partitioning(
          nn.initializers.zeros, (axes[1],)))
  if low_rank is None:
    return nn.Dense(**settings)
  rank, scale = low_rank
  return LowRankDense(axes=axes, rank=rank, scale=scale, **settings)


class LowRankDense(nn.Dense):
  """nn.Dense plus scale (x A) B (LoRA, arXiv 2106.09685).

  B is zeros at first, so that a fresh layer gives what its kernel alone gives.

  Attributes:
    axes: logical axes of input and output; the rank is never split.
    rank: columns of A, rows of B.
    scale: of the update.
  """
  axes: tuple[str | None, str | None] = (None, None)
  rank: int = 1
  scale: float = 1.0

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """float[..., in] -> float[..., features]."""
    out = super().__call__(inputs)
    a = self.param(
        'lora_a', nn.with_logical_partitioning(_DRAW_A, (self.axes[0], None)),
        (inputs.shape[-1], self.rank), self.param_dtype)
    b = self.param(
        'lora_b', nn.with_logical_partitioning(
            nn.initializers.zeros, (None, self.axes[1])),
        (self.rank, self.features), self.param_dtype)
    x, a, b = self.promote_dtype(inputs, a, b, dtype=self.dtype)
    return out + self.scale * ((x @ a) @ b)
