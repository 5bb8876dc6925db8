"""Every floor and peer at a token budget.

A token budget is a layer average: the mean over all decoder layers of the
visual tokens that enter.  Methods that prune inside the decoder read all P
tokens first, so each has a floor of its own below which no count helps; that
is an error here, because a row of another budget compares nothing.

Placements are the papers', of 32 layers; for other depths in proportion, but
for FastV's, which is layer 2 everywhere.  SparseVLM gets fixed counts, because
tokens by rank depend on the prompt and meet no budget.  Its released code has
tables of counts for its published budgets; ours leave the same share of the
tokens at every cut, at any budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from vlm_compress.compress.baselines import fastv, pyramiddrop, sparsevlm
from vlm_compress.compress.baselines.pooling import pooled_grid
from vlm_compress.config import AtpConfig, LlavaConfig, check

ANYWHERE = ('random', 'uniform')  # floors: they cut where what they floor does
IN_FRONT = ('divprune', 'cdpruner')
IN_LAYERS = ('fastv', 'pyramiddrop', 'sparsevlm')
SHORTER = ('avg_pool', 'downsample', 'visionzip')
TRAINING_FREE = (*ANYWHERE, *IN_FRONT, *IN_LAYERS, *SHORTER)
# Floors that come in few sizes: the nearest that is at most TOLERANCE below the budget,
# and any number above.
FEW_SIZES = ('avg_pool', 'downsample')
TOLERANCE = 0.05  # of the budget; counts are whole numbers


def layer_average(config: LlavaConfig) -> float:
  """Visual tokens of an image that enter a layer, mean over the layers.

  Args:
    config: of a model whose counts do not depend on the picture.
  """
  check(config.atp is None or bool(config.atp.fixed_counts), 'the layer average '
        'of a selector without fixed_counts depends on pictures and prompts')
  if config.atp is None:
    return float(config.num_visual_tokens)
  return _average(config, config.atp.prune_after, config.atp.fixed_counts)


def at_budget(base: LlavaConfig, method: str, tokens: float,
              tolerance: float = TOLERANCE,
              prune_after: tuple[int, ...] = ()) -> LlavaConfig:
  """The base model, under a training-free method, at a token budget.

  Args:
    base: a model with or without a method; its own one is taken off.
    method: one of TRAINING_FREE.
    tokens: layer average of visual tokens per image.
    tolerance: how far the nearest counts may be off, as a share of `tokens`;
      those of FEW_SIZES may be any number above.
    prune_after: for ANYWHERE, where they cut; () and (0,) are in front of all
      layers.  For IN_LAYERS another placement than the paper's, for budgets
      below its floor; say so beside the result.

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
  check(prune_after in ((), (0,)) or method in (*IN_LAYERS, *ANYWHERE),
        f'prune_after={prune_after}: {method} acts in front of all layers')
  if method in SHORTER:
    found = dataclasses.replace(plain, resampler=method, num_query_tokens=_nearest(
        _possible(plain, method, tokens), tokens))
  else:
    found = dataclasses.replace(plain, atp=_atp(
        plain, method, tokens, prune_after))
  got = layer_average(found)
  check(abs(got - tokens) <= tolerance * tokens or method in FEW_SIZES and got > tokens,
        f'{method} cannot have a layer average of {tokens:g} tokens on a model of {P} '
        f'visual tokens and {plain.text.num_hidden_layers} layers; the nearest is {got:g}')
  return found


def pooling_count(tokens: float) -> int:
  """The nearest count that pools to a near-square grid, at most TOLERANCE below a budget.

  17 tokens could only be full-height strips, so they are 18, 3 x 6; 16.5 are
  4 x 4, within TOLERANCE.
  """
  good = lambda n: max(pooled_grid(n)) <= 2 * min(pooled_grid(n))
  return _nearest(_not_below([n for n in range(1, 4 * math.ceil(tokens) + 4) if good(n)],
                             tokens), tokens)


def _nearest(counts: list[int], tokens: float) -> int:
  """The count nearest to an average; the larger one of two, in its favour."""
  return min(counts, key=lambda n: (abs(n - tokens), -n))


def _not_below(counts: list[int], tokens: float) -> list[int]:
  """Counts that are no smaller than a budget, or no more than TOLERANCE."""
  return [n for n in counts if n >= (1 - TOLERANCE) * tokens]


def _possible(config: LlavaConfig, method: str, tokens: float) -> list[int]:
  """Counts of visual tokens that a shorter sequence can have."""
  if method == 'avg_pool':
    return [min(pooling_count(tokens), config.num_patches)]
  if method == 'downsample':
    return _not_below([n * n for n in range(1, config.vision.grid_size + 1)], tokens)
  return list(range(2, config.num_patches + 1))


def _atp(config: LlavaConfig, method: str, tokens: float,
         prune_after: tuple[int, ...]) -> AtpConfig:
  """Modules and counts of a method that prunes."""
  M = config.text.num_hidden_layers
  if method == 'fastv':
    ends = prune_after or (fastv.LAYERS,)
  elif method == 'pyramiddrop':
    ends = prune_after or pyramiddrop.stage_ends(M)
  elif method == 'sparsevlm':
    ends = prune_after or _in_proportion(sparsevlm.PRUNED_AFTER, M)
  else:
    ends = prune_after or (0,)
  check(ends[-1] < M and list(ends) == sorted(set(ends)), f'{method} prunes after '
        f'layers {ends}: name layers of {M}, in order')
  counts = (_pyramid_counts(config, tokens, ends) if method == 'pyramiddrop' else
            geometric_counts(config, tokens, ends))
  # With one token behind every cut nothing is chosen any more.
  two = _average(config, ends, [2] * len(ends))
  check(ends[0] == 0 or max(counts) > 1, f'{method} cannot have a layer average of '
        f'{tokens:g} tokens: it cuts after layers {ends} of {M}, where one token would '
        f'be left; with two behind every cut the average is {two:g}')
  return AtpConfig(selector=method, prune_after=ends, fixed_counts=counts,
                   target_tokens=float(tokens))


def _average(config: LlavaConfig, ends: Sequence[int], counts: Sequence[float]) -> float:
  """Layer average of counts that cuts leave."""
  P, M = config.num_visual_tokens, config.text.num_hidden_layers
  return sum(c * (b - a) for c, a, b in zip((P, *counts), (0, *ends), (*ends, M))) / M


def geometric_counts(config: LlavaConfig, tokens: float, ends: Sequence[int]
                     ) -> tuple[int, ...]:
  """Counts whose layer average is nearest, each cut leaving the same share (ours).

  The last count takes up what rounding leaves.

  Args:
    config: gives P and the number of layers.
    tokens: layer average.
    ends: layers behind which tokens are cut; 0 is in front of all.
  """
  P, M = config.num_visual_tokens, config.text.num_hidden_layers
  at = lambda share: [max(1.0, P * share ** s) for s in range(1, len(ends) + 1)]
  share = _share(lambda share: _average(config, ends, at(share)), tokens)
  counts = [_whole(count) for count in at(share)]
  others = _average(config, ends, [*counts[:-1], 0])
  before = counts[-2] if len(counts) > 1 else P
  counts[-1] = min(_whole((tokens - others) * M / (M - ends[-1])), before)
  return tuple(counts)


def _pyramid_counts(config: LlavaConfig, tokens: float, ends: Sequence[int]
                    ) -> tuple[int, ...]:
  """PyramidDrop's, by its own rounding."""
  at = lambda share: pyramiddrop.stage_counts(config.num_visual_tokens, share, len(ends))
  return at(_share(lambda share: _average(config, ends, at(share)), tokens))


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
