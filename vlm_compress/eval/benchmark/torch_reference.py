"""The outside reference: transformers' LLaMA in torch, with the same weights.

In float32 torch reads the very arrays that jax has, as transposed views, so both
fit into memory; in bfloat16 it has copies in its own layout.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.eval.benchmark import subjects


def available() -> str | None:
  """None if torch and transformers can be imported, else why not."""
  try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
  except ImportError as error:
    return f'{error.name} is not installed (extra [parity])'
  return None


def build(subject: subjects.Subject) -> Any:
  """transformers' model of the subject's decoder."""
  import torch
  import transformers
  text = subject.plain.text
  config = transformers.LlamaConfig(
      vocab_size=text.vocab_size, hidden_size=text.hidden_size,
      intermediate_size=text.intermediate_size, head_dim=text.size_per_head,
      num_hidden_layers=text.num_hidden_layers,
      num_attention_heads=text.num_attention_heads,
      num_key_value_heads=text.num_key_value_heads,
      max_position_embeddings=text.max_position_embeddings,
      rms_norm_eps=text.rms_norm_eps, rope_theta=text.rope_theta,
      attention_bias=text.attention_bias,
      tie_word_embeddings=text.tie_word_embeddings)
  with torch.device('meta'):
    model = transformers.LlamaForCausalLM(config)
  model.load_state_dict(dict(_state(subject.model, _to_torch)), strict=True,
                        assign=True)
  # Buffers have no values on the meta device; angles are computed anew.
  model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
  return model.eval()


def _state(model: SegmentedModel, convert: Any):
  """(transformers' name, tensor) of every parameter."""
  language = model.rest['language_model']
  embedding = convert(language['embed_tokens']['embedding'])
  yield 'model.embed_tokens.weight', embedding
  yield 'model.norm.weight', convert(language['norm']['weight'])
  yield 'lm_head.weight', (convert(language['lm_head']['kernel'], True)
                           if 'lm_head' in language else embedding)
  for i, layer in enumerate(model.layers):
    at = f'model.layers.{i}.'
    for part in ('self_attn', 'mlp'):
      for name, values in layer[part].items():
        yield f'{at}{part}.{name}.weight', convert(values['kernel'], True)
        if 'bias' in values:
          yield f'{at}{part}.{name}.bias', convert(values['bias'])
    for name in ('input_layernorm', 'post_attention_layernorm'):
      yield f'{at}{name}.weight', convert(layer[name]['weight'])


def _to_torch(x: Any, transposed: bool = False) -> Any:
  import torch
  array = np.asarray(x)
  if array.dtype == jnp.bfloat16:
    array = array.view(np.uint16)
    array = np.array(array.T if transposed else array, order='C')
    return torch.from_numpy(array).view(torch.bfloat16)
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'The given NumPy array is not writable')
    tensor = torch.from_numpy(array)
  return tensor.T if transposed else tensor


class Reference:
  """Prefill and decode with the same number of tokens in every layer.

  Args:
    model: from `build`.
    subject: gives text and pictures.
    num_rows: B.
    num_visual: visual tokens in front of the decoder; the first so many of P
      (how they were chosen costs nothing here).
  """

  def __init__(self, model: Any, subject: subjects.Subject, num_rows: int,
               num_visual: int):
    self.model, self.num_visual = model, num_visual
    batch = subjects.prompt_batch(subject, num_rows)
    tokens, _, _ = subject.model.start(batch, None)
    keep = np.flatnonzero(batch.visual_slots[0] < num_visual)
    self.embeds = _to_torch(tokens.x[:, keep])
    self.num_rows, self.cache = num_rows, None

  def prefill(self) -> Any:
    """Logits of the next token, float[B, V], as torch's tensor."""
    import torch
    with torch.inference_mode():
      out = self.model(inputs_embeds=self.embeds, use_cache=True,
                       logits_to_keep=1)
    self.cache = out.past_key_values
    return out.logits[:, 0]

  def decode(self, steps: int = 10) -> Any:
    """So many more tokens behind the last prefill."""
    import torch
    if self.cache is None:
      self.prefill()
    token = torch.zeros((self.num_rows, 1), dtype=torch.long)
    with torch.inference_mode():
      for _ in range(steps):
        out = self.model(input_ids=token, past_key_values=self.cache,
                         use_cache=True)
    return out.logits[:, 0]
