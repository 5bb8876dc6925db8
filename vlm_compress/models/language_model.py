"""The LLaMA decoder: embedding, stacked layers, final norm, head."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_compress.config import LlavaConfig
from vlm_compress.models.layer_stack import LayerStack, StackInputs
from vlm_compress.nn.linear import linear
from vlm_compress.nn.norms import RMSNorm


class LanguageModel(nn.Module):
  """Decoder over embeddings.

  Attributes:
    config: the text part, lora, dtypes and remat are read.
    unroll: see LayerStack.
  """
  config: LlavaConfig
  unroll: int = 1

  def setup(self):
    text = self.config.text
    dtype = jnp.dtype(self.config.dtype)
    param_dtype = jnp.dtype(self.config.param_dtype)
    self.embed_tokens = nn.Embed(
        text.vocab_size, text.hidden_size, dtype=dtype,
        param_dtype=param_dtype,
        embedding_init=nn.with_logical_partitioning(
            nn.initializers.normal(text.initializer_range),
            ('vocab', 'embed')))
    remat = self.config.remat_policy if self.config.remat else None
    self.stack = LayerStack(text, dtype, param_dtype, remat,
                            self.unroll, self.config.attention_implementation,
                            self.config.lora)
    nn.share_scope(self, self.stack)
    self.norm = RMSNorm(text.rms_norm_eps, param_dtype)
    if not text.tie_word_embeddings:
      self.lm_head = linear(text.vocab_size, ('embed', 'vocab'), name=None,
                            std=text.initializer_range, dtype=dtype,
                            param_dtype=param_dtype)

  def embed(self, input_ids: jax.Array) -> jax.Array:
    """int32[B, T] -> float[B, T, D]."""
    return self.embed_tokens(input_ids)

  def __call__(self, x: jax.Array, shared: StackInputs, earlier=None,
               earlier_keep=None):
    """Hidden states after the final norm, and StackOutputs; see LayerStack."""
    x, outputs = self.stack(x, shared, earlier, earlier_keep)
    return self.norm(x), outputs

  def logits(self, hidden: jax.Array) -> jax.Array:
    """float[..., D] -> float32[..., V]."""
    if self.config.text.tie_word_embeddings:
      return self.embed_tokens.attend(hidden).astype(jnp.float32)
    return self.lm_head(hidden).astype(jnp.float32)
