"""A Q-Former with C queries: the trained baseline of VoCo-LLaMA's Table 1.

Learned queries go through layers of self-attention among the queries,
cross-attention to the visual tokens and an MLP (BLIP-2, arXiv 2301.12597,
section 3.1, without its text branch, which instruction tuning does not use).
Two layers instead of twelve BERT layers, trained from scratch with the same
data and steps as the rest (ours).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_compress.nn.linear import linear

NUM_LAYERS = 2


class QFormer(nn.Module):
  """Visual tokens to num_queries tokens.

  Attributes:
    num_queries: C.
    num_heads: attention heads.
    std: of the initial weights and queries.
    dtype, param_dtype: of activations and of parameters.
  """
  num_queries: int
  num_heads: int
  std: float
  dtype: jnp.dtype
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """float[B, P, D] -> float[B, C, D]."""
    B, _, D = tokens.shape
    kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    queries = self.param('queries', nn.initializers.normal(self.std),
                         (self.num_queries, D), self.param_dtype)
    x = jnp.broadcast_to(queries.astype(self.dtype), (B, self.num_queries, D))
    tokens = nn.LayerNorm(name='tokens_norm', **kinds)(tokens)

    def attend(name, q, kv):
      attention = nn.MultiHeadDotProductAttention(
          self.num_heads, name=name, **kinds,
          kernel_init=nn.initializers.normal(self.std))
      return attention(q, kv)

    for i in range(NUM_LAYERS):
      normed = nn.LayerNorm(name=f'self_norm_{i}', **kinds)(x)
      x = x + attend(f'self_attn_{i}', normed, normed)
      normed = nn.LayerNorm(name=f'cross_norm_{i}', **kinds)(x)
      x = x + attend(f'cross_attn_{i}', normed, tokens)
      hidden = linear(4 * D, ('embed', 'mlp'), name=f'fc1_{i}', std=self.std,
                      use_bias=True, **kinds)(
                          nn.LayerNorm(name=f'mlp_norm_{i}', **kinds)(x))
      x = x + linear(D, ('mlp', 'embed'), name=f'fc2_{i}', std=self.std,
                     use_bias=True, **kinds)(
                         jax.nn.gelu(hidden, approximate=False))
    return x
