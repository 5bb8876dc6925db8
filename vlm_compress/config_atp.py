"""Configuration of what chooses visual tokens in the decoder.

ATP's modules, the floors and the peers are selectors of one mechanism: which
tokens stay, behind which layers.
"""

from __future__ import annotations

import dataclasses

from vlm_compress.config_checks import check, check_positive

# Selectors that rank all tokens in front of the decoder, without attention.
ORDERED = ('random', 'uniform', 'divprune', 'cdpruner')
SELECTORS = ('adaptive', 'fixed', *ORDERED, 'fastv', 'pyramiddrop', 'sparsevlm')
SCORE_NORMS = ('relative', 'minmax', 'rank')
SCORES = ('both', 'self', 'cross')
CROSS_QUERIES = ('all', 'last')
CRITERIA = ('both', 'redundant', 'spatial')


@dataclasses.dataclass(frozen=True)
class AtpConfig:
  """ATP-LLaVA (arXiv 2412.00447), its floors and peers: modules between
  decoder layers.

  Attributes:
    prune_after: a module sits after each of these layers (1 = the first; 0,
      before all layers, only for selectors that do not look at attention).
    selector: 'adaptive' is ATP; 'fixed' keeps `fixed_counts` tokens by
      redundancy score; 'random' and 'uniform' keep as many without looking.
      Peers, each in its file of compress/baselines: 'fastv', 'pyramiddrop',
      'sparsevlm', 'divprune', 'cdpruner'.
    fixed_counts: tokens left by each module, for all selectors but adaptive;
      sparsevlm without any finds them by rank.
    rank_scale: lambda of SparseVLM's number of deletions, without fixed_counts.
    scores: which importance scores make the redundancy score.
    score_norm: how raw scores are brought to (0, 1).
    cross_queries: whose attention makes the cross score: 'all' prompt text
      behind the image, or its 'last' token, which has read the whole question
      (ours, as FastV and PyramidDrop look).
    criteria: 'both', or only 'redundant' or 'spatial' pruning (ablations).
    sap_strides: strides of the nested uniform grids, coarse ones last;
      () takes the chain of divisors 1 | 2 | 4 ... or 1 | 3 | 6 ... that fits.
    sap_lambda: lambda of the spatial score 1 - lambda R_g.
    threshold_hidden_size: width of the shared Linear of a module.
    init_theta_r, init_theta_s: thresholds at the start of training.
    straight_through: hard mask forward, soft gradient.
    target_tokens: N_target, layer-average visual tokens per image.
    lambda_atp, lambda_target: weights of the two budget terms.
    temperature_start, temperature_end: tau, annealed geometrically.
    threshold_shift: added to the logit of both thresholds at inference.
    capacities: visual tokens per image that segments are compiled for; () for
      the default of models.segments.capacity_ladder.
  """
  prune_after: tuple[int, ...] = (4, 14, 24)
  selector: str = 'adaptive'
  fixed_counts: tuple[int, ...] = ()
  rank_scale: float = 1.0
  scores: str = 'both'
  score_norm: str = 'relative'
  cross_queries: str = 'all'
  criteria: str = 'both'
  sap_strides: tuple[int, ...] = ()
  sap_lambda: float = 3.0
  threshold_hidden_size: int = 128
  init_theta_r: float = 0.1
  init_theta_s: float = 0.9
  straight_through: bool = False
  target_tokens: float = 144.0
  lambda_atp: float = 0.02
  lambda_target: float = 0.2
  temperature_start: float = 10.0
  temperature_end: float = 100.0
  threshold_shift: float = 0.0
  capacities: tuple[int, ...] = ()

  def __post_init__(self):
    check(all(a < b for a, b in zip((0, *self.capacities), self.capacities)),
          f'atp.capacities={self.capacities}: increasing, at least 1')
    first = 0 if self.selector in ORDERED else 1
    check(len(self.prune_after) > 0 and self.prune_after[0] >= first and
          all(a < b for a, b in zip(self.prune_after, self.prune_after[1:])),
          f'atp.prune_after={self.prune_after}: increasing layer numbers, '
          f'the first at least {first}')
    for name, value, allowed in (
        ('selector', self.selector, SELECTORS), ('scores', self.scores, SCORES),
        ('score_norm', self.score_norm, SCORE_NORMS),
        ('cross_queries', self.cross_queries, CROSS_QUERIES),
        ('criteria', self.criteria, CRITERIA)):
      check(value in allowed, f'atp.{name}={value!r}: use one of {allowed}')
    check(0.0 < self.rank_scale <= 1.0,
          f'atp.rank_scale={self.rank_scale}: above 0, at most 1')
    if self.selector == 'adaptive':
      check(not self.fixed_counts,
            'atp.fixed_counts has no meaning for atp.selector="adaptive"')
    elif self.fixed_counts or self.selector != 'sparsevlm':
      check(len(self.fixed_counts) == len(self.prune_after) and
            all(c >= 1 for c in self.fixed_counts),
            f'atp.selector={self.selector!r} needs atp.fixed_counts, one '
            f'positive count for each of prune_after={self.prune_after}')
      check(all(a >= b for a, b in zip(self.fixed_counts,
                                       self.fixed_counts[1:])),
            f'atp.fixed_counts={self.fixed_counts} must not increase: a token '
            'that is gone does not come back')
    for name in ('init_theta_r', 'init_theta_s'):
      value = getattr(self, name)
      check(0.0 < value < 1.0, f'atp.{name}={value}: strictly between 0 and 1')
    check_positive('atp', self, 'threshold_hidden_size', 'target_tokens')
    for name in ('lambda_atp', 'lambda_target'):
      check(getattr(self, name) >= 0.0, f'atp.{name}: not negative')
    check(0.0 < self.temperature_start <= self.temperature_end,
          'atp.temperature_start: positive, and at most temperature_end')
