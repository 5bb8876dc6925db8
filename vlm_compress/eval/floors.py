"""What a method stands beside: its floors, and how it compares with the best of them.

A table without them is refused, because a score at a budget says nothing before it
is known what needs no method to get there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vlm_compress.config import ConfigError
from vlm_compress.eval.tables import (
  FLOORS,
  Entry,
  Row,
  Section,
  is_full,
  percent,
  quantity,
  same_budget,
  sections,
)

# Those that every budget needs -> names of methods that count as them.  Pages of
# trained runs have no smaller pictures, because they read features of whole ones from
# a file, and may have pooling trained; sweeps have all of them, training-free.
NEEDED = {name: FLOORS[name] for name in ('random', 'uniform grid', 'average pooling')}
NEEDED_OF_SWEEPS = {name: (name,) for name in FLOORS}
FLOPS_TOLERANCE = 1.02  # how much more a floor of “about” as many FLOPs may need


def floors_for(parts: Sequence[Section], part: Section, entry: Entry) -> list[Entry]:
  """The floors of a section that a method is measured against.

  Those of its own checkpoint, or if that has none anywhere, of the others; cut in
  front of all layers or where the method cuts; and of as many tokens (same_budget)
  or more.
  """
  return [floor for floor in _comparable(parts, part, entry)
          if floor.placement in ((), entry.placement)]


def _comparable(parts: Sequence[Section], part: Section, entry: Entry) -> list[Entry]:
  """`floors_for`, wherever they cut."""
  own = any(floor.checkpoint == entry.checkpoint for some in parts
            for floor in some.of_role('floor'))
  return [floor for floor in part.of_role('floor')
          if (not own or floor.checkpoint == entry.checkpoint) and
          (same_budget(floor.average_tokens, entry.average_tokens) or
           floor.average_tokens > entry.average_tokens)]


def problems(parts: Sequence[Section], needed: Mapping[str, Sequence[str]] = NEEDED
             ) -> list[str]:
  """What keeps the table from being a fair comparison; empty when nothing.

  Args:
    parts: of the table.
    needed: NEEDED or NEEDED_OF_SWEEPS.
  """
  found = []
  counts = {row['n'] for part in parts for entry in part.entries for row in entry.rows}
  if len(counts) > 1:
    found.append('the rows were scored on different numbers of questions '
                 f'{sorted(counts)}')
  for part in parts:
    lacking: dict[tuple[str, ...], list[str]] = {}
    for entry in part.of_role('method'):
      missing = _missing(floors_for(parts, part, entry), entry, needed)
      if missing:
        lacking.setdefault(missing, []).append(entry.name)
    found += [f'{", ".join(names)} at {part.budget:.3g} layer-average tokens lacks '
              f'the floor rows {", ".join(missing)} at that budget'
              for missing, names in lacking.items()]
  return found


def _missing(floors: Sequence[Entry], entry: Entry,
             needed: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
  """Floors that a method lacks, those where it cuts among them."""
  out = []
  for floor, names in needed.items():
    places = {one.placement for one in floors if one.method in names}
    if not places:
      out.append(floor)
    elif floor in ('random', 'uniform grid'):  # those that can be cut anywhere
      if () not in places:
        out.append(f'{floor} in front of all layers')
      if entry.placement not in places:
        out.append(f'{floor} cut where it cuts')
  return tuple(out)


def checked_sections(rows: Sequence[Row], allow_partial: bool
                     ) -> tuple[list[Section], list[str]]:
  """Sections and their problems; any problem is an error unless allowed.

  Raises:
    ConfigError: floors are missing, or rows are not comparable.
  """
  parts = sections(rows)
  found = problems(parts)
  if found and not allow_partial:
    raise ConfigError(
        f'report: {"; ".join(found)}. Evaluate what is missing, or allow a '
        'partial table, which is then marked as such')
  return parts, found


def findings(parts: Sequence[Section], metric: str = 'accuracy', most: float = 100.0,
             show: Callable[[float], str] | None = None) -> list[str]:
  """One plain sentence for each compressed method, with its best floor.

  Args:
    parts: of the table.
    metric: what accuracy is called.
    most: its value at a share of 1; differences are given in these points.
    show: a share as text; None is per cent.
  """
  show = show or percent
  full = next((entry for part in parts for entry in part.entries
               if is_full(entry)), None)
  lines = []
  for part in parts:
    for entry in part.of_role('method'):
      floors = floors_for(parts, part, entry)
      line = f'{entry.name}: {entry.average_tokens:.3g}'
      if full is not None:
        line += f' of {full.average_tokens:.3g}'
      line += f' visual tokens on average, {metric} {show(entry.accuracy)}'
      if entry.ratio is not None:
        line += f', {percent(entry.ratio)} of full'
      if entry.retention is not None:
        line += f', retention {entry.retention:.3f}'
      if floors:
        best = max(floors, key=lambda floor: floor.accuracy)
        line += f'; best floor: {best.name} {show(best.accuracy)}'
        line += _verdict(entry, best, most)
        others = [(', though cut elsewhere', _comparable(parts, part, entry)),
                  (f' at about {quantity(entry.flops, "FLOP")} or less', [
                      one for some in parts if some is not part for one in some.entries
                      if (one.role == 'floor' and one.trained <= entry.trained or
                          is_full(one)) and
                      one.flops <= FLOPS_TOLERANCE * entry.flops])]
        for how, some in others:
          other = max(some, key=lambda one: one.accuracy, default=best)
          if other.accuracy > best.accuracy and other not in floors:
            line += f'; a better floor{how}: {other.name} {show(other.accuracy)}'
      lines.append(f'{line}.')
  return lines


def floor_name(floor: str, placement: tuple[int, ...], trained: bool) -> str:
  """What `differences` calls a floor: one that cuts behind a layer is compared only
  with methods that cut there, too.
  """
  return floor + (', at its cuts' if placement else '') + (
      '' if trained else ' (training-free)')


def paired(entry: Entry, name: str) -> tuple[float, float, float] | None:
  """Difference to a floor in shares, (mean, low, high), over all seeds.

  The interval reaches from the seeds' lowest end to their highest; None where
  a seed was not compared.
  """
  found = [(row.get('differences') or {}).get(name) for row in entry.rows]
  if None in found:
    return None
  return (sum(one['mean'] for one in found) / len(found), min(one['ci95'][0] for one in found),
          max(one['ci95'][1] for one in found))


def _verdict(entry: Entry, best: Entry, most: float) -> str:
  """How a method stands to its best floor: paired if the rows say so."""
  found = paired(entry, floor_name(best.method, best.placement, best.trained))
  if found is not None:
    mean, low, high = (most * share for share in found)
    text = f', difference {mean:+.1f} points [{low:+.1f}, {high:+.1f}]'
    sure = low > 0
  else:
    text, sure = '', entry.ci95[0] > best.ci95[1]
  if entry.accuracy <= best.accuracy:
    return f'{text}, the floor is not beaten'
  if not sure:
    return f'{text}, within noise' if text else ' (the intervals overlap)'
  if entry.trained and not best.trained:
    return f'{text} (an untrained floor)'
  return text
