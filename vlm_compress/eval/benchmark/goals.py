"""What the benchmark was hoped to show, beside what it shows."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vlm_compress.eval.benchmark.inference import FULL

Rows = Mapping[str, Mapping[str, Any]]
PRUNED, COMPRESSED, CACHED = 'ATP 25 %', 'VoCo 1', 'VoCo 1, cached'
OUTSIDE = 'transformers'


class Goal(NamedTuple):
  """A number of the rows of one subject, dtype and batch.

  Attributes:
    name: of the goal.
    measure: takes method -> row; None where a row that it needs is missing.
    compare: number and `asked` -> whether the goal is reached.
    asked: what the number should be.
    form: how a number is written.
  """
  name: str
  measure: Callable[[Rows], float | None]
  compare: Callable[[float, float], bool]
  asked: float
  form: str

  @property
  def sign(self) -> str:
    """Of the comparison."""
    return '≤' if self.compare is operator.le else '≥'


def _row(rows: Rows, method: str) -> Mapping[str, Any]:
  """Of a method; {} if it is missing, or missed its number of tokens."""
  row = rows.get(method, {})
  return row if row.get('reached', True) else {}


def _time(above: str, below: str) -> Callable[[Rows], float | None]:
  def measure(rows: Rows) -> float | None:
    found = _row(rows, above), _row(rows, below)
    return found[0]['prefill_ms'] / found[1]['prefill_ms'] if all(found) else None
  return measure


def _memory(rows: Rows) -> float | None:
  """The largest peak of our methods, by the full model's."""
  ours = [row['peak_bytes'] for method, row in rows.items()
          if method != FULL and not method.startswith(OUTSIDE)]
  if not rows[FULL]['peak_bytes'] or None in ours or not ours:
    return None
  return max(ours) / rows[FULL]['peak_bytes']


def _outside(rows: Rows) -> float | None:
  """Our full model by transformers with as many tokens."""
  same = [row for method, row in rows.items() if method.startswith(OUTSIDE)
          and row['visual_tokens'] == rows[FULL]['visual_tokens']]
  return rows[FULL]['prefill_ms'] / same[0]['prefill_ms'] if same else None


def _selector(part: str, whole: str) -> Callable[[Rows], float | None]:
  """The largest part that choosing tokens takes of a method's prefill."""
  def measure(rows: Rows) -> float | None:
    return max((row[part] / row[whole] for row in rows.values()
                if row[part] > 0), default=None)
  return measure


GOALS = (
    Goal('ATP at 25 %: prefill time ratio / FLOP ratio', lambda rows: _row(
        rows, PRUNED).get('time_over_flops'), operator.le, 1.15, '{:.2f}'),
    Goal('ATP at 25 %: prefill, times as fast as full', _time(FULL, PRUNED),
         operator.ge, 2.5, '{:.2f}'),
    Goal('VoCo, cached: prefill, times as fast as without a cache',
         _time(COMPRESSED, CACHED), operator.ge, 5.0, '{:.2f}'),
    Goal('VoCo, cached: part of the full prefill FLOPs', lambda rows: _row(
        rows, CACHED).get('flop_ratio'), operator.le, 0.052, '{:.3f}'),
    Goal('largest part of the selector in prefill time',
         _selector('selector_ms', 'prefill_ms'), operator.le, 0.05, '{:.3f}'),
    Goal('largest part of the selector in prefill FLOPs',
         _selector('selector_flops', 'prefill_flops'), operator.le, 0.02,
         '{:.4f}'),
    Goal('largest peak memory of a method / full', _memory, operator.le, 1.0,
         '{:.2f}'),
    Goal('full prefill time / transformers', _outside, operator.le, 1.0,
         '{:.2f}'))
COLUMNS = ('goal', 'asked')


def table(groups: Mapping[str, Sequence[Mapping[str, Any]]]
          ) -> Iterator[list[str]]:
  """A line per goal, a column per group; a number in bold reaches its goal.

  Args:
    groups: name -> rows of one subject, dtype and batch.
  """
  found = [{row['method']: row for row in rows} for rows in groups.values()]
  for goal in GOALS:
    yield [goal.name, f'{goal.sign} {goal.asked:g}',
           *(_cell(goal, goal.measure(rows)) for rows in found)]


def _cell(goal: Goal, value: float | None) -> str:
  if value is None:
    return '–'
  text = goal.form.format(value)
  return f'**{text}**' if goal.compare(value, goal.asked) else text
