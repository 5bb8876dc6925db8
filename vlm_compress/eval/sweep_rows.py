"""A sweep's finished runs as rows: each beside the full model, its bounds and its
floors.  result_schema.py has the fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_compress.config import ConfigError
from vlm_compress.eval import floors, intervals, methods, scoring
from vlm_compress.eval.result_schema import RESULT, ROW, check_fields
from vlm_compress.eval.runs import Run
from vlm_compress.eval.sweep_plan import Cell, is_compressed
from vlm_compress.eval.tables import same_budget

TRAINED_FLOOR = 'avg_pool_linear'
_KEPT = (*RESULT, 'kept_per_layer', 'kept_std_per_layer', 'module_counts', 'rule', 'frames')


def rows(runs: Mapping[Cell, Run], base: str,
         times: Mapping[str, Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
  """A row for every run that could be scored.

  Args:
    runs: the finished runs of a sweep.
    base: name of the checkpoint that the full model and bounds are runs of.
    times: {line: {'seconds', 'ratio'}}, measured on one seed.
  """
  out = []
  for cell, run in runs.items():
    if run.scores is None:
      continue
    row = {'cell': cell.name, 'checkpoint': cell.checkpoint,
           **{name: run.result[name] for name in _KEPT if name in run.result},
           'ratio_to_full': None, 'retention': None, 'agreement': None,
           'agreement_ci95': None, 'differences': {}, 'line': cell.line}
    time = (times or {}).get(cell.line, {})
    row.update(first_token_seconds=time.get('seconds'),
               first_token_ratio=time.get('ratio'))
    row['seed'] = cell.seed
    full = find(runs, cell, base, 'full', None)
    if full is not None:
      row['ratio_to_full'] = scoring.ratio_to_full(row['accuracy'],
                                                   full.result['accuracy'])
      same = _compared(intervals.agreement, run, full)
      if same is not None:
        row.update(agreement=same.mean, agreement_ci95=list(same.ci95))
    row['retention'] = _retention(runs, cell, base, row)
    if is_compressed(cell.method):
      row['differences'] = _differences(runs, cell, run)
    head = intervals.headline_results(run.scores)
    if all(r.score in (0, 1) for r in head):
      row['correct'] = ''.join('01'[int(r.score)] for r in head)
    check_fields(row, ROW, cell.name)
    out.append(row)
  return out


def find(runs: Mapping[Cell, Run], cell: Cell, base: str, method: str,
         budget: float | None) -> Run | None:
  """The base's run of a method at a budget on a cell's benchmark: of its seed, or
  else the one for all seeds; None if there is none that could be scored.
  """
  fits = [(c.seed != cell.seed, c.prune_after, c) for c in runs if (
      c.checkpoint, c.method, c.benchmark, c.budget) == (
          base, method, cell.benchmark, budget)
      and runs[c].scores is not None]
  return runs[min(fits)[2]] if fits else None


def _retention(runs: Mapping[Cell, Run], cell: Cell, base: str,
               row: Mapping[str, Any]) -> float | None:
  """VoCo's, for what has VoCo's budget; see scoring.retention."""
  lower = find(runs, cell, base, 'lower_bound', row['budget'])
  upper = find(runs, cell, base, 'upper_bound', row['budget'])
  if None in (lower, upper, row['budget']) or cell.prune_after:
    return None
  gap = _compared(intervals.difference, upper, lower)
  return None if gap is None else scoring.retention(
      row['accuracy'], lower.result['accuracy'], upper.result['accuracy'],
      gap_ci95=gap.ci95)


def _differences(runs: Mapping[Cell, Run], cell: Cell, run: Run) -> dict[str, Any]:
  """Paired, to the budget's floors that cut in front of all layers or where the
  method cuts, and to one that was trained.

  Over a floor's seeds the mean, and the outermost ends of the intervals.
  """
  gaps: dict[str, list[scoring.Interval]] = {}
  own = tuple((run.config['model']['atp'] or {}).get('prune_after', ()))
  for other, floor in runs.items():
    if other.method in (*methods.FLOORS, TRAINED_FLOOR) and other.line != cell.line and (
        other.benchmark, floor.result['budget']) == (
            cell.benchmark, run.result['budget']) and other.prune_after in ((), own):
      mine, its = (r.result['layer_average_tokens'] for r in (run, floor))
      gap = _compared(intervals.difference, run, floor) if (
          same_budget(mine, its) or its > mine) else None
      if gap is not None:
        name = floors.floor_name(floor.result['method'], other.prune_after,
                                 floor.result['trained'])
        gaps.setdefault(name, []).append(gap)
  return {name: {'mean': float(np.mean([gap.mean for gap in some])),
                 'ci95': [min(gap.ci95[0] for gap in some),
                          max(gap.ci95[1] for gap in some)]}
          for name, some in gaps.items()}


def _compared(what: Any, a: Run, b: Run) -> scoring.Interval | None:
  """None where the two were not asked the same, which the table says anyway."""
  try:
    return what(a.scores, b.scores)
  except ConfigError:
    return None


def flat(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
  """A row's cells of the table."""
  low, high = row['value_ci95']
  values = {**row, 'value_low': low, 'value_high': high}
  return {name: values[name] for name in columns}
