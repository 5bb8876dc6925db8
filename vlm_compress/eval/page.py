"""What a report shows, whatever it is written in.

The data of the page, its standing texts, and the cells that HTML and Markdown
have in common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_compress.eval import blocks, tables

TITLE = 'Visual token compression: measured results'
HOW_TO_READ = (
    'Accuracy is exact match on the questions of the headline kinds. Intervals '
    'are 95 % bootstrap intervals that resample images, not questions; with '
    'several seeds they reach from the lowest to the highest end. Budgets are '
    'visual tokens averaged over all decoder layers and instances. Floors '
    '(random tokens, a uniform grid, average pooling) need no method: a method '
    'is worth what it adds to the best floor of its budget. “Training-free” '
    'rows use a decoder that was not trained under their selection. “Of full” '
    'is accuracy divided by the full model’s; retention is (x − LB) / (UB − '
    'LB), left out where the gap UB − LB lies within noise. Prefill counts the '
    'language model, 2 FLOPs for a multiply-add.')
KEPT_CAPTION = (
    'Visual tokens that enter each decoder layer: mean, and one standard '
    'deviation between instances (shaded). Below, where recorded: how many '
    'instances keep how many tokens after each module; the line is the median.')
KEPT_COLUMNS = ('method', 'module', 'mean', 'std', 'p50', 'p90', 'p99')


@dataclasses.dataclass(frozen=True)
class Page:
  """All that the page shows.

  Attributes:
    parts: sections of the table.
    missing: why the table is partial; empty when it is not.
    attribution: of the pictures; addresses in it become links.
    accuracy_url, kept_url: figures as data URLs; kept_url may be None.
    kept_percentiles: rows of KEPT_COLUMNS.
    examples: with a strip of keep maps a method.
    stages: [{'name', 'seconds', 'steps'}].
    config, versions: shown as they are.
  """
  parts: Sequence[tables.Section]
  missing: Sequence[str]
  attribution: str
  accuracy_url: str
  kept_url: str | None
  kept_percentiles: Sequence[Sequence[str]]
  examples: Sequence[blocks.Example]
  stages: Sequence[Mapping[str, Any]]
  config: Mapping[str, Any]
  versions: Mapping[str, Any]


def kind_cells(parts: Sequence[tables.Section]
               ) -> tuple[list[str], list[list[str]]]:
  """Columns and rows of the table by kind: 'accuracy [low, high]', per cent."""
  kinds = tables.kinds(parts)
  counts = {kind: {e.by_kind[kind]['n'] for part in parts for e in part.entries
                   if kind in e.by_kind} for kind in kinds}
  columns = ['method'] + [
      f'{kind} (n = {" / ".join(map(str, sorted(counts[kind])))})'
      for kind in kinds]
  rows = []
  for part in parts:
    for entry in part.entries:
      name = entry.method
      if part.budget is not None:
        name += f', {entry.average_tokens:.3g}'
        name += '' if entry.trained or entry.role == 'bound' else (
            ', training-free')
      rows.append([name] + [_kind_cell(entry.by_kind.get(k)) for k in kinds])
  return columns, rows


def _kind_cell(score: Mapping[str, Any] | None) -> str:
  if score is None:
    return '–'
  low, high = score['ci95']
  return f'{100 * score["accuracy"]:.1f} [{100 * low:.1f}, {100 * high:.1f}]'


def kept_table(page: Page) -> blocks.Table:
  """The table below the figure of kept tokens."""
  return blocks.Table(KEPT_COLUMNS, [
      blocks.Line(tuple(row)) for row in page.kept_percentiles], left=2)


def credit(attribution: str) -> str:
  """Whose the pictures are, and what was done to them."""
  return (f'{attribution} Shown here with dropped cells faded out; these figures are '
          'under the same licence.')


def duration(seconds: float) -> str:
  """'47.2 s', '6 min 00 s' or '1 h 05 min'."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (f'{hours} h {minutes:02d} min' if hours else
          f'{minutes} min {rest:02d} s' if minutes else f'{seconds:.1f} s')


def steps(stage: Mapping[str, Any]) -> str:
  """A stage's steps; a dash for a stage that does not count any."""
  value = stage.get('steps')
  return '–' if value is None else str(value)
