"""Every floor and peer at a token budget.

A token budget is a layer average: the mean over all decoder layers of the
visual tokens that enter.  Methods that prune inside the decoder read all P
tokens first, so each has a floor of its own below which no count helps; that
is an error here, because a row of another budget compares nothing.

Placements are the papers', of 32 layers; for other depths in proportion, but
for FastV's, which is layer 2 everywhere.  SparseVLM gets fixed counts, as its
released code has for its published budgets: tokens by rank depend on the
prompt and meet no budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from vlm_compress.compress.baselines import fastv, pyramiddrop, sparsevlm
from vlm_compress.compress.baselines.pooling import pooled_grid
from vlm_compress.config import AtpConfig, LlavaConfig, check

IN_FRONT = ('random', 'uniform', 'divprune', 'cdpruner')
IN_LAYERS = ('fastv', 'pyramiddrop', 'sparsevlm')
SHORTER = ('avg_pool', 'downsample', 'visionzip')
TRAINING_FREE = (*IN_FRONT, *IN_LAYERS, *SHORTER)
TOLERANCE = 0.05  # of the budget; counts are whole numbers


def layer_average(config: LlavaConfig) -> float:
  """Visual tokens of an image that enter a layer, mean over the layers.

  Args:
    config: of a model whose counts do not depend on the picture.
  """
  check(config.atp is None or bool(config.atp.fixed_counts), 'the layer average '
        'of a selector without fixed_counts depends on pictures and prompts')
  P, M = config.num_visual_tokens, config.text.num_hidden_layers
  if config.atp is None:
    return float(P)
  ends = [0, *config.atp.prune_after, M]
  counts = [P, *config.atp.fixed_counts]
  return sum(c * (b - a) for c, a, b in zip(counts, ends, ends[1:])) / M


def at_budget(base: LlavaConfig, method: str, tokens: float,
              tolerance: float = TOLERANCE,
              prune_after: tuple[int, ...] = ()) -> LlavaConfig:
  """The base model, under a training-free method, at a token budget.

  Args:
    base: a model with or without a method; its own one is taken off.
    method: one of TRAINING_FREE.
    tokens: layer average of visual tokens per image.
    tolerance: how far the nearest counts may be off, as a share of `tokens`.
    prune_after: another placement than the paper's, for budgets below its
      floor; say so beside the result.  Only for methods of IN_LAYERS.

  Returns:
    A config with the parameters of `base` but for its VoCo rows, ATP heads or
    resampler, which nobody reads.

  Raises:
    ConfigError: the method is unknown, impossible for this tower, or cannot
      reach the budget; the message says what it can.
  """
  plain = dataclasses.replace(base, voco=None, atp=None, resampler='none',
                              num_query_tokens=0)
  check(method in TRAINING_FREE, f'method={method!r}: use one of {TRAINING_FREE}')
  P = plain.num_visual_tokens
  check(0 < tokens <= P, f'tokens={tokens:g}: a layer average between 0 and the '
        f'{P} visual tokens of an image')
  check(not prune_after or method in IN_LAYERS, f'prune_after={prune_after}: '
        f'{method} acts in front of all layers')
  if method in SHORTER:
    count = (pooling_count(tokens) if method == 'avg_pool' else
             _nearest(_possible(plain, method), tokens))
    found = dataclasses.replace(plain, resampler=method, num_query_tokens=count)
  else:
    found = dataclasses.replace(plain, atp=_atp(
        plain, method, tokens, prune_after))
  got = layer_average(found)
  check(abs(got - tokens) <= tolerance * tokens, f'{method} cannot have a layer '
        f'average of {tokens:g} tokens on a model of {P} visual tokens and '
        f'{plain.text.num_hidden_layers} layers; the nearest is {got:g}')
  return found


def pooling_count(tokens: float) -> int:
  """The count nearest to a budget that pools to a near-square grid.

  17 tokens could only be full-height strips; 16 are 4 x 4.  Ties go up, in the
  floor's favour.
  """
  good = lambda n: max(pooled_grid(n)) <= 2 * min(pooled_grid(n))
  return _nearest([n for n in range(1, 4 * math.ceil(tokens) + 4) if good(n)], tokens)


def _nearest(counts: list[int], tokens: float) -> int:
  """The count nearest to an average; the larger one of two, in its favour."""
  return min(counts, key=lambda n: (abs(n - tokens), -n))


def _possible(config: LlavaConfig, method: str) -> list[int]:
  """Counts of visual tokens that a smaller picture or VisionZip can give."""
  if method == 'downsample':
    return [n * n for n in range(1, config.vision.grid_size + 1)]
  return list(range(2, config.num_patches + 1))


def _atp(config: LlavaConfig, method: str, tokens: float,
         prune_after: tuple[int, ...]) -> AtpConfig:
  """Modules and counts of a method that prunes."""
  P, M = config.num_visual_tokens, config.text.num_hidden_layers
  if method in IN_FRONT:
    ends = (0,)
  elif method == 'fastv':
    ends = prune_after or (fastv.LAYERS,)
  elif method == 'pyramiddrop':
    ends = prune_after or pyramiddrop.stage_ends(M)
  else:
    ends = prune_after or _in_proportion(sparsevlm.PRUNED_AFTER, M)
  if method == 'pyramiddrop':
    counts = lambda share: pyramiddrop.stage_counts(P, share, len(ends))
  else:
    counts = lambda share: tuple(
        _whole(P * share ** s) for s in range(1, len(ends) + 1))
  check(ends[-1] < M and len(set(ends)) == len(ends), f'{method} prunes after '
        f'layers {ends}, but the model has {M} layers')
  with_counts = lambda share: AtpConfig(
      selector=method, prune_after=ends, fixed_counts=counts(share),
      target_tokens=float(tokens))
  average = lambda share: layer_average(
      dataclasses.replace(config, atp=with_counts(share)))
  return with_counts(_share(average, tokens))


def _whole(count: float) -> int:
  return max(1, math.floor(count + 0.5))


def _in_proportion(layers_of_32: tuple[int, ...], num_layers: int
                   ) -> tuple[int, ...]:
  """Layers at the same depths of another decoder, at least one apart."""
  ends = []
  for layer in layers_of_32:
    at_least = ends[-1] + 1 if ends else 1
    ends.append(max(at_least, round(layer * num_layers / 32)))
  return tuple(ends)


def _share(average: Callable[[float], float], tokens: float) -> float:
  """The share per module whose average is nearest, which it grows with."""
  low, high = 0.0, 1.0
  for _ in range(50):
    middle = (low + high) / 2
    low, high = (middle, high) if average(middle) < tokens else (low, middle)
  return min((low, high), key=lambda share: abs(average(share) - tokens))
