"""PyramidDrop (arXiv 2410.17247): keep a part of the visual tokens, each time.

The decoder's layers are split into four stages; at the end of each but the
last the visual tokens are ranked by the attention of the last instruction
token, and the first lambda (0.5) of them go on (section 3.2).

As in the authors' code, queries and keys are those that the NEXT layer makes
of the hidden states, of all tokens that are still there, so a score says what
the layer in front of which tokens are dropped would look at; heads are
averaged after the softmax; counts are int(P lambda^s).

Differences, all deliberate: kept tokens keep their positions, where the
authors number them anew after each stage, so that keys already in caches and
new ones agree; every image of a row is ranked for itself; while training the
query is the last token of the prompt, as at inference, where the authors
average over all turns.

Cost: projections of the next layer for all tokens and one query's products
with all keys, `efficiency.selector_flops`.
"""

from __future__ import annotations

NUM_STAGES = 4
RATIO = 0.5  # lambda


def stage_ends(num_layers: int) -> tuple[int, ...]:
  """Layers behind which tokens are dropped: 25, 50 and 75 % of all."""
  return tuple(round(num_layers * s / NUM_STAGES) for s in range(1, NUM_STAGES))


def stage_counts(num_visual_tokens: int, ratio: float = RATIO,
                 num_drops: int = NUM_STAGES - 1) -> tuple[int, ...]:
  """Visual tokens left at the end of each stage but the last, at least 1."""
  return tuple(max(1, int(num_visual_tokens * ratio ** s))
               for s in range(1, num_drops + 1))
