"""Generation: prefill once, then one token per step from the cache."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vlm_compress.decode.sampling import sample
from vlm_compress.models.layer_stack import StackOutputs
from vlm_compress.models.llava import Llava, PruneOptions
from vlm_compress.models.sequence import Batch, VocoBatch
from vlm_compress.nn.kv_cache import KVCache, grow


@flax.struct.dataclass
class Generated:
  """What `generate` returns.

  Attributes:
    tokens: int32[B, N], eos_id from the first end of sequence, or the limit,
      on.
    outputs: of the prefill (keep masks, thresholds), without its keys.
  """
  tokens: jax.Array
  outputs: StackOutputs


def generate(model: Llava, params: Any, batch: Batch | VocoBatch, *,
             max_new_tokens: int, eos_id: int, mask: str = 'causal',
             prune: PruneOptions | None = None, temperature: float = 0.0,
             top_p: float = 1.0, seed: jax.Array | int = 0,
             limit: jax.Array | None = None) -> Generated:
  """Generates until every row has ended or max_new_tokens are there.

  Args:
    model, params: the model.
    batch: prompts; a VocoBatch is prefilled in two passes.
    max_new_tokens: N, static.
    eos_id: ends a row.
    mask, prune: see `Llava.hidden`.
    temperature: 0 is greedy; top_p: nucleus; seed: of sampling.
    limit: int32[], stop after this many tokens; unlike max_new_tokens, another
      one needs no new compilation.

  Returns:
    Tokens and the prefill's outputs.
  """
  if isinstance(batch, VocoBatch):
    logits, cache, outputs = model.apply({'params': params}, batch,
                                         method='prefill_two_pass')
  else:
    logits, cache, outputs = model.apply({'params': params}, batch, mask=mask,
                                         prune=prune, method='prefill')
  tokens, _ = continue_from(model, params, logits,
                            grow(cache, max_new_tokens - 1),
                            max_new_tokens=max_new_tokens, eos_id=eos_id,
                            temperature=temperature, top_p=top_p, seed=seed,
                            limit=limit)
  return Generated(tokens, outputs.replace(keys=None, values=None))


def answer_ids(tokens: jax.Array, eos_id: int) -> list[int]:
  """int32[N] generated tokens of one row, up to the end of sequence."""
  ids = np.asarray(tokens).tolist()
  return ids[:ids.index(eos_id)] if eos_id in ids else ids


def continue_from(model: Llava, params: Any, logits: jax.Array,
                  cache: KVCache, *, max_new_tokens: int, eos_id: int,
                  temperature: float = 0.0, top_p: float = 1.0,
                  seed: jax.Array | int = 0, limit: jax.Array | None = None
                  ) -> tuple[jax.Array, KVCache]:
  """Generates from a prefilled cache with max_new_tokens - 1 free slots.

  Args:
    logits: float32[B, V] of the first new token.
    cache: of the prompt.
    limit: as in generate.

  Returns:
    int32[B, N] and the cache.
  """
  B = logits.shape[0]
  key = jax.random.key(seed)
  pick = lambda logits, step: sample(logits, jax.random.fold_in(key, step),
                                     temperature, top_p)
  first = pick(logits, 0)
  tokens = jnp.full((B, max_new_tokens), eos_id, jnp.int32)
  tokens = tokens.at[:, 0].set(first)

  end = max_new_tokens if limit is None else jnp.minimum(limit, max_new_tokens)

  def unfinished(state):
    step, _, last, _, ended = state
    return (step < end) & ~jnp.all(ended | (last == eos_id))

  def extend(state):
    step, tokens, last, cache, ended = state
    ended = ended | (last == eos_id)
    logits, cache = model.apply({'params': params}, last, cache,
                                method='extend')
    last = jnp.where(ended, eos_id, pick(logits, step))
    return step + 1, tokens.at[:, step].set(last), last, cache, ended

  state = (jnp.int32(1), tokens, first, cache, jnp.zeros(B, bool))
  _, tokens, _, cache, _ = jax.lax.while_loop(unfinished, extend, state)
  return tokens, cache
