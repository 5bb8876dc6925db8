"""Methods by name: how a checkpoint is run at a budget of visual tokens.

The one table that `evaluate` and sweeps take names from.  A method that needs
no training is a function of the base model's config and the budget; add it
here, in METHODS.  Floors are such methods, too.

A budget is the mean over decoder layers of the visual tokens that enter them;
VoCo's is C, what text can read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from vlm_compress.compress.baselines import budget as peers
from vlm_compress.config import LlavaConfig, check
from vlm_compress.eval.calibration import check_dial, check_target

FLOORS = ('random', 'uniform', 'avg_pool', 'downsample')
# Methods whose cuts can be placed.
PLACED = (*peers.ANYWHERE, *peers.IN_LAYERS)
# VoCo-LLaMA's baselines (Table 1): a checkpoint each, trained at one count.
RESAMPLERS = ('qformer', 'avg_pool_linear')


@dataclasses.dataclass(frozen=True)
class MethodConfig:
  """How a checkpoint is run.

  Attributes:
    label: as eval/tables.py names it.
    config: the checkpoint's config with the method.
    runs_as: 'full', 'voco', 'atp' or 'upper_bound', for batches.answer_batches.
    trained: the checkpoint was trained under this selection of tokens.
    budget: visual tokens that were asked for; None for the full model.
    needs_shift: the thresholds must be shifted to reach the budget.
  """
  label: str
  config: LlavaConfig
  runs_as: str
  trained: bool
  budget: float | None
  needs_shift: bool = False


def method_config(name: str, base: LlavaConfig, budget: float | None = None,
                  prune_after: tuple[int, ...] | None = None) -> MethodConfig:
  """A method of METHODS.

  Args:
    name: of the method.
    base: config of the checkpoint.
    budget: visual tokens; None for full, or for what a checkpoint was trained
      for.
    prune_after: for PLACED, layers behind which tokens are cut; None is in front
      of all layers, and of peers the paper's placement.

  Raises:
    ConfigError: unknown name, or a model or budget that does not fit.
  """
  check(name in METHODS, f'method {name!r} is unknown; use one of {", ".join(METHODS)}')
  check(prune_after in (None, (0,)) or name in PLACED, f'prune_after={prune_after}: where '
        f'tokens are cut can be chosen for {", ".join(PLACED)}, not for {name}')
  check(budget is None or 0 < budget <= base.num_patches, f'a budget of {budget} tokens: '
        f'more than 0 and at most {base.num_patches}')
  return METHODS[name](base, budget, prune_after)


def _plain(base: LlavaConfig, **fields) -> LlavaConfig:
  return dataclasses.replace(base, **{'voco': None, 'atp': None, **fields})


def label(config: LlavaConfig) -> str:
  """What a model without VoCo tokens is called in a report."""
  if config.atp is not None:
    return {'random': 'random', 'uniform': 'uniform grid',
            'fixed': 'ATP scores, fixed count', 'adaptive': 'ATP',
            'fastv': 'FastV', 'pyramiddrop': 'PyramidDrop',
            'sparsevlm': 'SparseVLM', 'divprune': 'DivPrune',
            'cdpruner': 'CDPruner'}[config.atp.selector]
  return {'none': 'full', 'avg_pool': 'average pooling', 'qformer': 'Q-Former',
          'avg_pool_linear': 'average pooling + linear',
          'downsample': 'image downsampling',
          'visionzip': 'VisionZip'}[config.resampler]


def _full(base, budget, prune_after):
  check(budget is None, f'method full has no budget, but {budget} was asked for')
  check(base.resampler == 'none', f'the model has resampler={base.resampler!r} and '
        'reads fewer visual tokens; there is no full model in it')
  plain = _plain(base)
  return MethodConfig(label(plain), plain, 'full', True, None)


def _with_voco(name: str, runs_as: str, trained: bool) -> Callable:
  def build(base, budget, prune_after):
    check(base.voco is not None, f'{name}: the model has no VoCo tokens; name one that has')
    most = base.voco.num_voco_tokens
    count = most if budget is None else budget
    check(count == int(count) and 1 <= count <= most, f'{name}: a budget of {count:g} '
          f'VoCo tokens; the model was made for 1 to {most}')
    voco = dataclasses.replace(base.voco, num_voco_tokens=int(count))
    if runs_as == 'upper_bound':
      return MethodConfig(f'{name}, C={int(count)}', _plain(base, voco=voco), runs_as,
                          trained, None)
    return MethodConfig(name, _plain(base, voco=voco), runs_as, trained, float(count))
  return build


def _atp(base, budget, prune_after):
  check_dial(base)
  if budget is not None:
    check_target(base, budget)
  return MethodConfig('ATP', base, 'atp', True,
                      base.atp.target_tokens if budget is None else float(budget),
                      needs_shift=budget is not None)


def _resampler(kind: str) -> Callable:
  """What is trained with a resampler of its own."""
  def build(base, budget, prune_after):
    check(base.resampler == kind, f'method {kind}: the model was not trained with it '
          f'(resampler={base.resampler!r}); name one that was')
    count = float(base.num_query_tokens)
    check(budget in (None, count), f'method {kind}: the model has {count:g} visual tokens '
          f'for an image and can have no other number; {budget} were asked for')
    plain = _plain(base)
    return MethodConfig(label(plain), plain, 'full', True, count)
  return build


def _peer(name: str) -> Callable:
  def build(base, budget, prune_after):
    check(budget is not None, f'method {name} needs a budget of visual tokens')
    check(base.resampler == 'none', f'method {name} needs the full grid of visual '
          f'tokens; the model has resampler={base.resampler!r}')
    config = peers.at_budget(base, name, budget, prune_after=prune_after or ())
    runs_as = 'full' if config.atp is None else 'atp'
    return MethodConfig(label(config), config, runs_as, False, float(budget))
  return build


METHODS: dict[str, Callable[..., MethodConfig]] = {
    'full': _full,
    'voco': _with_voco('VoCo', 'voco', True),
    'lower_bound': _with_voco('lower bound (LB)', 'voco', False),
    'upper_bound': _with_voco('upper bound (UB)', 'upper_bound', True),
    'atp': _atp,
    **{name: _resampler(name) for name in RESAMPLERS},
    **{name: _peer(name) for name in peers.TRAINING_FREE},
}
# What needs no floors beside it.
OF_BASE = ('full', 'lower_bound', 'upper_bound', *FLOORS)


def with_shift(method: MethodConfig, shift: float) -> MethodConfig:
  """The same with thresholds shifted."""
  atp = dataclasses.replace(method.config.atp, threshold_shift=shift)
  return dataclasses.replace(method, needs_shift=False, config=dataclasses.replace(
      method.config, atp=atp))
