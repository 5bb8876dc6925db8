"""Result rows grouped by token budget, with their floors, as table cells.

A compressed method means something only beside what needs no method at equal
budget.  So rows are grouped into sections of equal layer-average tokens, and
a section whose floors are missing is an error and not a table.

A result row is one dict per (method, budget, seed), see REQUIRED.  Optional:
kept_per_layer and kept_std_per_layer float[layers]; kept_counts
int[instances][modules], tokens kept after each module, whose names are in
module_labels; differences, {floor: {'mean', 'ci95'}}, the paired difference to
a floor of the same budget, where an untrained floor is named 'random
(training-free)'.  Rows of a sweep besides: checkpoint; line, the same in rows
that differ in the seed only; variant, what tells lines of one method apart;
placement, the layers behind which tokens are cut; budget, the tokens that were
asked for, of each of `frames` pictures (1), which then makes the sections.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_compress.config import check

Row = Mapping[str, Any]

REQUIRED = ('method', 'trained', 'input_visual_tokens', 'layer_average_tokens',
            'prefill_flops', 'kv_bytes', 'accuracy', 'ci95', 'by_kind', 'n',
            'ratio_to_full', 'retention', 'seed')
# Floors -> names of methods that count as them.
FLOORS = {'random': ('random',), 'uniform grid': ('uniform grid',),
          'average pooling': ('average pooling', 'average pooling + linear'),
          'image downsampling': ('image downsampling',)}
REFERENCES = ('full', 'upper bound', 'question only', 'text only')
BOUNDS = ('lower bound',)
ROLES = ('reference', 'method', 'bound', 'floor')
# Budgets are equal when they differ by no more than this share, or by half a
# token: an adaptive method reaches its budget on average only.
TOLERANCE, TOLERANCE_TOKENS = 0.10, 0.5


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line of the table: a method at a budget, averaged over its seeds.

  Attributes:
    method, trained: as in the rows; trained means under this selection.
    role: one of ROLES.
    input_tokens, average_tokens: visual tokens at the input, and averaged
      over layers.
    flops, kv_bytes: of one prefill.
    accuracy: mean over seeds, 0..1.
    ci95: of one seed its interval; of several the lowest low and highest
      high, which is wider than each.
    by_kind: {kind: {'accuracy', 'ci95', 'n'}}, averaged in the same way.
    n: questions.
    ratio, retention: mean over seeds; None when a seed has none.
    rows: the rows behind this line.
    checkpoint, variant, placement: as in the rows, or empty.
    asked: the rows' budget, or None.
  """
  method: str
  trained: bool
  role: str
  input_tokens: float
  average_tokens: float
  flops: float
  kv_bytes: float
  accuracy: float
  ci95: tuple[float, float]
  by_kind: dict[str, dict[str, Any]]
  n: int
  ratio: float | None
  retention: float | None
  rows: tuple[Row, ...]
  checkpoint: str = ''
  variant: str = ''
  placement: tuple[int, ...] = ()
  asked: float | None = None

  @property
  def name(self) -> str:
    """'random', or 'random (cut after 4, 14)' where there is another."""
    return f'{self.method} ({self.variant})' if self.variant else self.method


@dataclasses.dataclass(frozen=True)
class Section:
  """Lines of one budget.

  Attributes:
    budget: layer-average tokens; None for the references on top.
    entries: references or methods first, then bounds, then floors, best first.
  """
  budget: float | None
  entries: tuple[Entry, ...]

  def of_role(self, role: str) -> list[Entry]:
    """The section's lines of one role."""
    return [entry for entry in self.entries if entry.role == role]


def role_of(method: str) -> str:
  """What a row is: 'reference', 'bound', 'floor' or 'method'."""
  for role, names in (('reference', REFERENCES), ('bound', BOUNDS)):
    if any(re.match(rf'{name}\b', method) for name in names):
      return role
  return 'floor' if any(method in names for names in FLOORS.values()
                        ) else 'method'


def is_full(entry: Entry) -> bool:
  """Whether a line is the uncompressed model."""
  return re.match(r'full\b', entry.method) is not None


def same_budget(a: float, b: float) -> bool:
  """Whether two layer averages count as one budget."""
  allowed = max(TOLERANCE_TOKENS, TOLERANCE * min(a, b))
  return abs(a - b) <= allowed + 1e-9  # 17.6 - 16 is a little over 1.6.


def check_rows(rows: Sequence[Row]) -> None:
  """Raises ConfigError for a row that lacks a field or cannot be."""
  check(len(rows) > 0, 'report: no result rows; evaluate a method first')
  for index, row in enumerate(rows):
    name = f'report row {index} ({row.get("method", "no method")})'
    missing = [field for field in REQUIRED if field not in row]
    check(not missing, f'{name}: field(s) {missing} are missing')
    for field in ('accuracy', 'layer_average_tokens', 'prefill_flops',
                  'kv_bytes'):
      value = row[field]
      check(isinstance(value, numbers.Real) and math.isfinite(value) and
            value >= 0, f'{name}: {field}={value} is no finite number >= 0')
    low, high = row['ci95']
    check(low - 1e-9 <= row['accuracy'] <= min(high, 1.0) + 1e-9,
          f'{name}: accuracy={row["accuracy"]} must lie within '
          f'ci95={list(row["ci95"])} and be a share, not per cent')


def sections(rows: Sequence[Row]) -> list[Section]:
  """Rows as sections: references first, then budgets from large to small.

  A section is a budget that was asked for, where the rows say which; of others,
  methods define the budgets, and floors and bounds go to the nearest one.
  """
  check_rows(rows)
  entries = [_entry(group) for group in _join_seeds(rows)]
  budgets: list[float] = []
  for role in ('method', 'bound', 'floor'):
    for entry in entries:
      if entry.role == role and entry.asked is None and not any(
          same_budget(entry.average_tokens, b) for b in budgets):
        budgets.append(entry.average_tokens)
  members = collections.defaultdict(list)
  for entry in entries:
    key = (None if entry.role == 'reference' else entry.asked if entry.asked is not None
           else min(budgets, key=lambda b, e=entry: abs(b - e.average_tokens)))
    members[key].append(entry)
  order = sorted(members, key=lambda b: -math.inf if b is None else -b)
  return [Section(budget, tuple(_sorted(members[budget]))) for budget in order]


def percent(share: float) -> str:
  """0.9812 -> '98.1 %'."""
  return f'{100 * share:.1f} %'


def quantity(value: float, unit: str) -> str:
  """1.25e9, 'FLOP' -> '1.25 GFLOP' (decimal prefixes)."""
  for factor, prefix in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if value >= factor:
      return f'{value / factor:.3g} {prefix}{unit}'
  return f'{value:.3g} {unit}'


COLUMNS = ('method', 'training', 'tokens in', 'tokens avg', 'prefill',
           'KV cache', 'accuracy', '95 % interval', 'of full', 'retention',
           'n', 'seeds')


def cells(entry: Entry) -> tuple[str, ...]:
  """The line's cells, in the order of COLUMNS."""
  low, high = entry.ci95
  return (entry.name, 'trained' if entry.trained else 'training-free',
          f'{entry.input_tokens:.4g}', f'{entry.average_tokens:.1f}',
          quantity(entry.flops, 'FLOP'), quantity(entry.kv_bytes, 'B'),
          percent(entry.accuracy), f'{100 * low:.1f} – {100 * high:.1f}',
          '–' if entry.ratio is None else percent(entry.ratio),
          '–' if entry.retention is None else f'{entry.retention:.3f}',
          str(entry.n), str(len(entry.rows)))


def title(part: Section, full_tokens: float | None) -> str:
  """Heading of a section."""
  if part.budget is None:
    return 'References'
  share = f', {100 * part.budget / full_tokens:.0f} % of full' if (
      full_tokens) else ''
  noun = 'token' if part.budget == 1 else 'tokens'
  return f'Budget: {part.budget:.3g} {noun} on average{share}'


def full_tokens(parts: Sequence[Section]) -> float | None:
  """Layer-average tokens of the full model, if it is in the table."""
  return next((entry.average_tokens for part in parts for entry in part.entries
               if is_full(entry)), None)


def kinds(parts: Sequence[Section]) -> list[str]:
  """All question kinds, sorted."""
  return sorted({kind for part in parts for entry in part.entries
                 for kind in entry.by_kind})


def _join_seeds(rows: Sequence[Row]) -> list[list[Row]]:
  """Rows that differ in the seed only, and in the budget reached by it."""
  told = lambda row: (row['method'], row['trained'], row.get('line'))
  groups: list[list[Row]] = []
  for row in rows:
    for group in groups:
      first = group[0]
      if (told(first) == told(row) and
          same_budget(first['layer_average_tokens'],
                      row['layer_average_tokens']) and
          row['seed'] not in [other['seed'] for other in group]):
        group.append(row)
        break
    else:
      groups.append([row])
  return groups


def _entry(rows: Sequence[Row]) -> Entry:
  first = rows[0]
  # A kind that one seed lacks is left out rather than averaged over others.
  shared = [k for k in first['by_kind'] if all(k in r['by_kind'] for r in rows)]
  return Entry(
      method=first['method'], trained=bool(first['trained']),
      role=role_of(first['method']),
      input_tokens=_mean([row['input_visual_tokens'] for row in rows]),
      average_tokens=_mean([row['layer_average_tokens'] for row in rows]),
      flops=_mean([row['prefill_flops'] for row in rows]),
      kv_bytes=_mean([row['kv_bytes'] for row in rows]),
      **_scores(rows),
      by_kind={k: _scores([row['by_kind'][k] for row in rows]) for k in shared},
      ratio=_mean([row['ratio_to_full'] for row in rows]),
      retention=_mean([row['retention'] for row in rows]), rows=tuple(rows),
      checkpoint=first.get('checkpoint') or '', variant=first.get('variant') or '',
      placement=tuple(first.get('placement') or ()), asked=None if first.get('budget') is None else
      first['budget'] * first.get('frames', 1))


def _scores(rows: Sequence[Row]) -> dict[str, Any]:
  return {'accuracy': _mean([row['accuracy'] for row in rows]),
          'ci95': (min(row['ci95'][0] for row in rows),
                   max(row['ci95'][1] for row in rows)),
          'n': rows[0]['n']}


def _mean(values: Sequence[float | None]) -> float | None:
  return None if None in values else sum(values) / len(values)


def _sorted(entries: Sequence[Entry]) -> list[Entry]:
  """By role; floors from best to worst, others as given."""
  return sorted(entries, key=lambda entry: (
      ROLES.index(entry.role),
      -entry.accuracy if entry.role == 'floor' else 0.0))
