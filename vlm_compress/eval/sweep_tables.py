"""A sweep's rows as tables: one benchmark each, methods beside their floors.

Rows are those of result_schema.py.  Values are in the benchmark's own scale, so a
table of MME is in points and one of GQA in per cent.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_compress.config import ConfigError
from vlm_compress.eval import blocks, figures, floors, tables

Row = Mapping[str, Any]

COLUMNS = ('method', 'tokens avg', 'tokens in', 'prefill', 'KV cache', 'first token',
           'value, 95 % interval', 'of full', 'retention', 'agrees with full', 'n', 'seeds')
HOW_TO_READ = (
    'Values are in the scale named above each table, with 95 % bootstrap intervals that '
    'resample pictures (or questions that are scored together). With several seeds all '
    'numbers are means over them, the interval reaches from the lowest end to the highest, '
    'and the last column has the lowest and highest value of a seed. n is the number of '
    'questions that the value is over.',
    '“Tokens avg” are visual tokens that enter a decoder layer, mean over layers and '
    'questions; “tokens in” those that enter the first. Those of VoCo are what text reads.',
    'Prefill counts the language model, 2 FLOPs for a multiply-add, and is a mean over '
    'questions, as is the KV cache. VoCo’s has the compression of all visual tokens, so '
    'that at its FLOPs the full model is the floor; a picture that is kept pays once. '
    'Selectors add to what a floor of as many tokens costs.',
    '“First token” is the time of a question up to the logits of its answer’s first token, '
    'in one batch of questions about different pictures, and its ratio to the full model: '
    'medians of rounds in which all lines take turns in one process, on the first seed’s '
    'models, as they are served: rows are padded to few lengths, and cut ones to a rung of '
    'the ladder. Texts and vision features are ready; VoCo compresses. What VisionZip does '
    'in the tower, and what a smaller picture saves there, is not in it.',
    '“Of full” is the value divided by the full model’s (ATP-LLaVA’s ratio); retention is '
    '(x − LB) / (UB − LB) (VoCo-LLaMA), left out where there are no bounds or their gap '
    'lies within noise; “agrees with full” is the share of questions answered as the full '
    'model did, right or wrong.',
    'Floors (random tokens, a uniform grid, average pooling, a smaller picture) need no '
    'method: a method is worth what it adds to the best of them. Pooled and smaller '
    'pictures have few sizes: the nearest that is at most 5 % below the budget. '
    'Differences are to floors in front of all layers and “at its cuts”, where the method '
    'cuts, and to trained pooling; a better floor elsewhere, or one of about as many FLOPs, '
    'is named. “Training-free” lines use a decoder that was not trained under their '
    'selection.')


@dataclasses.dataclass(frozen=True)
class Bench:
  """The table of a benchmark.

  Attributes:
    key, split, rule: which questions, and how they were scored.
    metric, scale: what the value is.
    most: value at a share of 1: 100, or what MME's tasks add up to.
    n_benchmark: questions it has; partial: some were left out.
    parts: sections of the table, with its entries.
    problems: why it is no fair comparison.
  """
  key: str
  split: str
  rule: str
  metric: str
  scale: str
  most: float
  n_benchmark: int
  partial: bool
  parts: tuple[tables.Section, ...]
  problems: tuple[str, ...]

  @property
  def name(self) -> str:
    """'gqa', or 'vqav2, val'."""
    return self.key + (f', {self.split}' if self.split else '')

  @property
  def asked(self) -> str:
    """'800 of 1,600 questions were asked'."""
    counts = sorted({row['n_asked'] for entry in self.entries for row in entry.rows})
    return (f'{" / ".join(f"{n:,}" for n in counts)} of {self.n_benchmark:,} questions '
            'were asked')

  @property
  def stem(self) -> str:
    """Of its figures' files: letters, digits and '-'."""
    return ''.join(c if c.isalnum() else '-' for c in '-'.join(
        filter(None, (self.key, self.split, self.rule))))

  @property
  def entries(self) -> list[tables.Entry]:
    """All lines, in the order of the table."""
    return [entry for part in self.parts for entry in part.entries]

  def show(self, share: float) -> str:
    """A share in the benchmark's scale, without a unit."""
    return f'{self.most * share:.1f}'

  def interval(self, low: float, high: float) -> str:
    """'[61.1, 62.7]'."""
    return f'[{self.show(low)}, {self.show(high)}]'


def benches(rows: Sequence[Row], allow_partial: bool) -> list[Bench]:
  """The tables of a sweep, in the order of the rows.

  Args:
    rows: of result_schema.py, besides with `placement`, see `tables`.
    allow_partial: accept tables without their floors, marked as partial.

  Raises:
    ConfigError: a row that cannot be, or floors are missing; names all tables.
  """
  groups: dict[tuple, list[Row]] = collections.defaultdict(list)
  for row in rows:
    groups[row['benchmark'], row['split'], row['rule']].append(row)
  out = []
  for (key, split, rule), some in groups.items():
    parts = tuple(tables.sections(_told_apart(some)))
    first = some[0]
    out.append(Bench(
        key, split, rule, first['metric'], first['scale'], float(first['scale_max']),
        first['n_benchmark'], any(row['partial'] for row in some), parts,
        (*floors.problems(parts, floors.NEEDED_OF_SWEEPS), *_other_scales(some))))
  found = [f'{bench.name}: {line}' for bench in out for line in bench.problems]
  if found and not allow_partial:
    raise ConfigError(
        f'report of the sweep: {"; ".join(found)}. Evaluate what is missing, or allow a '
        'partial report, which is then marked as such')
  return out


def _other_scales(rows: Sequence[Row]) -> list[str]:
  most = sorted({row['scale_max'] for row in rows})
  return [] if len(most) == 1 else [
      f'the values have different scales, at most {most}: other tasks were answered']


def _told_apart(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """Rows with `variant`: what tells lines of one method apart.

  That is the checkpoint, and where tokens are cut, and only where there are
  several in this table.
  """
  kinds = lambda field: {method: len({row.get(field, ()) for row in rows
                                      if row['method'] == method})
                         for method in {row['method'] for row in rows}}
  checkpoints, placements = kinds('checkpoint'), kinds('placement')
  out = []
  for row in rows:
    words = [row['checkpoint']] if checkpoints[row['method']] > 1 else []
    if placements[row['method']] > 1:
      places = row.get('placement', ())
      words.append(f'cut after {", ".join(map(str, places))}' if places else
                   'cut before layer 1')
    out.append({**row, 'variant': '; '.join(words)})
  return out


# ------------------------------------------------------------------ tables


def main_table(bench: Bench) -> blocks.Table:
  """Methods beside their floors, with what they cost."""
  full, colours = tables.full_tokens(bench.parts), figures.method_colours(bench.parts)
  lines = []
  for part in bench.parts:
    lines.append(blocks.Line((tables.title(part, full),), 'heading'))
    lines += [blocks.Line(cells(bench, entry), entry.role, colours.get(
        entry.name, figures.GREY if entry.role == 'floor' else figures.INK))
              for entry in part.entries]
  scale = 'per cent' if bench.most == 100 else f'points, at most {bench.most:g} here'
  return blocks.Table(COLUMNS, lines, note=f'{bench.metric}, {scale}; scored by the rule '
                      f'“{bench.rule}”.')


def cells(bench: Bench, entry: tables.Entry) -> tuple[blocks.Cell, ...]:
  """A line's cells, in the order of COLUMNS."""
  same = mean(entry, 'agreement')
  values = [row['value'] for row in entry.rows]
  return ((entry.name, tag(entry)), f'{entry.average_tokens:.1f}',
          f'{entry.input_tokens:.4g}', tables.quantity(entry.flops, 'FLOP'),
          tables.quantity(entry.kv_bytes, 'B'),
          _first_token(entry),
          (f'{sum(values) / len(values):.1f}', bench.interval(*entry.ci95)),
          '–' if entry.ratio is None else tables.percent(entry.ratio),
          '–' if entry.retention is None else f'{entry.retention:.3f}',
          '–' if same is None else (tables.percent(same), _agreement_interval(entry)),
          (f'{entry.n:,}', 'partial' if any(row['partial'] for row in entry.rows) else ''),
          str(len(values)) if len(values) == 1 else (
              str(len(values)), f'{min(values):.1f} – {max(values):.1f}'))


def _first_token(entry: tables.Entry) -> blocks.Cell:
  seconds, ratio = (mean(entry, f'first_token_{what}') for what in ('seconds', 'ratio'))
  return '–' if seconds is None else (f'{1000 * seconds:.3g} ms', f'{ratio:.2f} × full')


def _agreement_interval(entry: tables.Entry) -> str:
  found = [row['agreement_ci95'] for row in entry.rows]
  if None in found:
    return ''
  return (f'[{100 * min(low for low, _ in found):.1f}, '
          f'{100 * max(high for _, high in found):.1f}]')


def tag(entry: tables.Entry) -> str:
  """'floor, training-free' and the like."""
  words = [entry.role] if entry.role in ('floor', 'bound') else []
  if not entry.trained and entry.role in ('floor', 'method'):
    words.append('training-free')
  return ', '.join(words)


def mean(entry: tables.Entry, field: str) -> float | None:
  """Of a field over seeds; None where one has none."""
  found = [row.get(field) for row in entry.rows]
  return None if None in found else sum(found) / len(found)


def difference_table(bench: Bench) -> blocks.Table | None:
  """Each method minus each floor of its budget; None without any."""
  names = list(dict.fromkeys(
      name for part in bench.parts for entry in part.of_role('method')
      for row in entry.rows for name in row['differences']))
  lines = []
  for part in bench.parts:
    for entry in part.of_role('method'):
      found = [_difference(bench, floors.paired(entry, name)) for name in names]
      lines.append(blocks.Line((
          (entry.name, f'{entry.average_tokens:.3g} tokens'), *found), 'method'))
  if not names:
    return None
  return blocks.Table(('method minus …', *names), lines, note=(
      'Differences of the value in points, both runs resampled together, with 95 % '
      'intervals. “no difference shown” where the interval holds 0; – where the two were '
      'not compared.'))


def _difference(bench: Bench, found: tuple[float, float, float] | None) -> blocks.Cell:
  if found is None:
    return '–'
  middle, low, high = (bench.most * share for share in found)
  unsure = ' no difference shown' if low <= 0 <= high else ''
  return f'{middle:+.1f}', f'[{low:+.1f}, {high:+.1f}]{unsure}'


def kind_tables(bench: Bench) -> list[tuple[str, blocks.Table]]:
  """(heading, table) for each budget: kinds of questions by method.

  The full model is in all of them, so that each is read alone.
  """
  kinds = tables.kinds(bench.parts)
  full = [entry for entry in bench.entries if tables.is_full(entry)]
  out = []
  for part in bench.parts:
    entries = list(part.entries)
    if part.budget is not None:
      entries = full + entries
    if not any(entry.by_kind for entry in entries) or (
        part.budget is None and len(bench.parts) > 1 and entries == full):
      continue
    lines = [blocks.Line(((kind, _counts(entries, kind)), *[
        _kind(bench, entry, kind) for entry in entries])) for kind in kinds]
    out.append((tables.title(part, tables.full_tokens(bench.parts)), blocks.Table(
        ('kind', *[(entry.name, tag(entry)) for entry in entries]), lines)))
  return out


def _counts(entries: Sequence[tables.Entry], kind: str) -> str:
  counts = sorted({e.by_kind[kind]['n'] for e in entries if kind in e.by_kind})
  return f'n = {" / ".join(f"{n:,}" for n in counts)}'


def _kind(bench: Bench, entry: tables.Entry, kind: str) -> blocks.Cell:
  score = entry.by_kind.get(kind)
  if score is None:
    return '–'
  low, high = score['ci95']
  return f'{100 * score["accuracy"]:.1f}', f'[{100 * low:.1f}, {100 * high:.1f}]'


def overview(found: Sequence[Bench]) -> blocks.Table | None:
  """Methods by benchmark, over those budgets that were asked for; None for one."""
  if len(found) < 2:
    return None
  lines: dict[tuple, dict[int, tables.Entry]] = {}
  for index, bench in enumerate(found):
    for entry in bench.entries:
      key = (tables.ROLES.index(entry.role), entry.rows[0]['budget'] or 0.0, entry.name,
             entry.trained)
      lines.setdefault(key, {})[index] = entry
  return blocks.Table(
      ('method', 'budget', *[(b.metric, 'partial' if b.partial else '') for b in found],
       'of full, mean', 'retention, mean'),
      [_overview_line(found, key, lines[key]) for key in sorted(lines)],
      note='Means are over the benchmarks of this table, and left out where one of them '
      'has no number. Budgets are those asked for: visual tokens, mean over layers.')


def _overview_line(found: Sequence[Bench], key: tuple, line: Mapping[int, tables.Entry]
                   ) -> blocks.Line:
  _, budget, name, _ = key
  some = next(iter(line.values()))
  values = [(b.show(line[i].accuracy), b.interval(*line[i].ci95)) if i in line else '–'
            for i, b in enumerate(found)]

  def average(field: str, show: Callable[[float], str]) -> str:
    numbers = [getattr(line[i], field) if i in line else None for i in range(len(found))]
    return '–' if None in numbers else show(sum(numbers) / len(numbers))
  return blocks.Line(((name, tag(some)), f'{budget:g}' if budget else 'all', *values,
                      average('ratio', tables.percent),
                      average('retention', lambda x: f'{x:.3f}')), some.role)
