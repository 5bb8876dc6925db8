"""What the peers' selectors add to a prefill, in FLOPs.

By the same rules as `efficiency.py`: matrix products are counted, comparisons,
sorting and softmax are not.  Products with tokens that are not needed (a full
canvas where a part of it is left) are not counted either.  Not counted because
it has no fixed number: the singular values of SparseVLM's rank, used only
without given counts; nor keys of text in front of the image, 2NH a token.
"""

from __future__ import annotations

import numpy as np

from vlm_compress.config import LlavaConfig


def peer_flops(config: LlavaConfig, visual: np.ndarray,
               prompt_tokens: np.ndarray) -> np.ndarray:
  """Summed over modules; n visual tokens, T prompt tokens, D hidden size.

  * divprune: cosine similarities in front of the decoder, 2 P^2 D per image;
  * cdpruner: the same, relevance 2 P D + T D, and R^2 P for R greedy steps;
  * fastv: one query and n + T keys, 2NH (n + T);
  * pyramiddrop: the same, and the next layer's queries and keys of all tokens,
    2D (N + K) H (n + T), which that layer makes again of those that are left;
  * sparsevlm: similarities of embeddings, 2 P T D; attention from all T prompt
    tokens, 2NH n T, though only raters are asked; distances among the m
    clustered ones, 2 m^2 D.

  Args:
    config: with one of these selectors.
    visual: float[..., M], visual tokens that enter each layer, of all images.
    prompt_tokens: float[...] or a number, prompt text behind the image.

  Returns:
    float[...] FLOPs.
  """
  atp, text, P = config.atp, config.text, config.num_visual_tokens
  D, T = text.hidden_size, np.asarray(prompt_tokens, np.float64)
  queries = text.num_attention_heads * text.size_per_head
  first = atp.fixed_counts[0] if atp.prune_after[0] == 0 else P
  images = visual[..., 0] / first
  if atp.selector in ('divprune', 'cdpruner'):
    flops = images * 2.0 * P ** 2 * D
    if atp.selector == 'cdpruner':
      flops = flops + images * (2.0 * P * D + T * D + atp.fixed_counts[0] ** 2 * P)
    return flops
  behind = np.array(atp.prune_after)
  n, left, T = visual[..., behind - 1], visual[..., behind], T[..., None]
  if atp.selector == 'sparsevlm':
    each = images[..., None]  # clusters are of one image
    members = np.where(n > left, _clustered((n - left) / each), 0.0)
    modules = 2.0 * queries * n * T + 2.0 * each * members ** 2 * D
    return modules.sum(-1) + images * 2.0 * P * T[..., 0] * D
  modules = 2.0 * queries * (n + T)
  if atp.selector == 'pyramiddrop':
    keys = text.num_key_value_heads * text.size_per_head
    modules = modules + 2.0 * D * (queries + keys) * (n + T)
  return modules.sum(-1)


def _clustered(fewer: np.ndarray) -> np.ndarray:
  """SparseVLM's tokens to be clustered where an image has so many fewer afterwards:
  those that go are more by the clusters that come back.
  """
  gone = np.asarray(fewer, np.float64)
  for _ in range(8):  # a tenth of three tenths each time
    members = np.floor(0.3 * gone) + 1
    gone = fewer + np.floor(members / 10) + 1
  return np.floor(0.3 * gone) + 1
