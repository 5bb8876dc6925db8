"""Generation one token at a time, for somebody who waits for the words.

The same tokens as generate.py's, whose loop is one compiled program: here
prefill and one step are programs of their own, and a Python loop hands every
token out as soon as it is there.  Programs are kept per model and shapes, so
prompts that are padded to few lengths share them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any

import jax

from vlm_compress.decode.sampling import sample
from vlm_compress.models.inputs import CompressedImages, PruneOptions, place
from vlm_compress.models.llava import Llava
from vlm_compress.models.sequence import Batch
from vlm_compress.nn.kv_cache import KVCache, grow


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill(model: Llava, params: Any, batch: Batch,
            prune: PruneOptions | None, num_slots: int
            ) -> tuple[jax.Array, KVCache, jax.Array | None]:
  """Runs a prompt.

  Args:
    model, params: the model.
    batch: one row.
    prune: see `Llava.hidden`.
    num_slots: free slots in the cache, one for each token but the last.

  Returns:
    float32[1, V] logits of the first new token, the cache, and float32[M, 1,
    I, P], which visual tokens enter each layer (None without pruning).
  """
  logits, cache, out = model.apply({'params': params}, batch, prune=prune,
                                   method='prefill')
  return logits, grow(cache, num_slots), out.entering


@functools.partial(jax.jit, static_argnums=(0, 6))
def prefill_compressed(model: Llava, params: Any, text: Batch,
                       images: CompressedImages, image_valid: jax.Array,
                       voco_positions: jax.Array, num_slots: int
                       ) -> tuple[jax.Array, KVCache]:
  """Runs a prompt behind compressed images; the first two of `prefill`.

  Args:
    model, params, num_slots: as there.
    text: one row without its compression segments (`VocoBatch.text`).
    images, image_valid, voco_positions: see `place`.
  """
  prefix = place(images, image_valid, voco_positions,
                 model.config.text.rope_theta)
  logits, cache, _ = model.apply({'params': params}, text, prefix,
                                 method='prefill_compressed')
  return logits, grow(cache, num_slots)


def tokens(model: Llava, params: Any, logits: jax.Array, cache: KVCache, *,
           max_new_tokens: int, end_ids: Collection[int], temperature: float = 0.0,
           top_p: float = 1.0, seed: int = 0) -> Iterator[int]:
  """Generates behind a prefilled prompt of one row.

  Args:
    model, params: the model.
    logits: float32[1, V] of the first new token.
    cache: of the prompt, with max_new_tokens - 1 free slots or more; it is
      used up.
    max_new_tokens: longest answer.
    end_ids: each ends the answer, and is not given out.
    temperature, top_p, seed: see `generate`.

  Yields:
    Token ids.
  """
  key = jax.random.key(seed)
  token = _first(logits, key, temperature, top_p)
  for step in range(1, max_new_tokens + 1):
    value = int(token[0])
    if value in end_ids:
      return
    yield value
    if step < max_new_tokens:
      token, cache = _next(model, params, token, cache, key, step, temperature,
                           top_p)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _first(logits: jax.Array, key: jax.Array, temperature: float, top_p: float
           ) -> jax.Array:
  return sample(logits, jax.random.fold_in(key, 0), temperature, top_p)


@functools.partial(jax.jit, static_argnums=(0, 6, 7), donate_argnums=3)
def _next(model: Llava, params: Any, token: jax.Array, cache: KVCache,
          key: jax.Array, step: jax.Array, temperature: float, top_p: float
          ) -> tuple[jax.Array, KVCache]:
  """int32[1], the token behind `token`; the cache is updated in place."""
  logits, cache = model.apply({'params': params}, token, cache,
                              method='extend')
  key = jax.random.fold_in(key, step)
  return sample(logits, key, temperature, top_p), cache
