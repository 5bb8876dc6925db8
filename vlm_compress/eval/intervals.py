"""95 % intervals of benchmarks' numbers, differences and agreement of two runs.

Questions about one picture, and rows that are scored together, are not
independent: units (answer_log.unit_of) are resampled whole.  Every number here
is made of sums over questions or units (score and count; for F1 the four cells
of the confusion matrix; for MME what is right and what is twice right per
task), so a resampled test set costs one product of matrices, and all numbers of
a benchmark, and two runs of it, see the same draws.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vlm_compress.config import check
from vlm_compress.eval import scoring
from vlm_compress.eval.answer_log import unit_of
from vlm_compress.eval.benchmarks import mmbench, mme, openmoji_grid, pope
from vlm_compress.eval.benchmarks.scores import Result, Row, Scores

TAILS = (scoring.TAIL, 1.0 - scoring.TAIL)


@dataclasses.dataclass(frozen=True)
class Sums:
  """What a number is made of.

  Attributes:
    units: unit of each row.
    columns: float[Q, X], summed over any selection of units.
    value: float[..., X] sums -> float[...] shares, 0..1; nan of nothing.
  """
  units: list[str]
  columns: np.ndarray
  value: Callable[[np.ndarray], np.ndarray]


def full_score(scores: Scores) -> float:
  """What the headline of a perfect run on these questions is."""
  if scores.benchmark == mme.KEY:
    return 200.0 * len({r.question.groups['task'] for r in headline_results(scores)})
  return 100.0


def sums_of(benchmark: str, results: Sequence[Result]) -> Sums:
  """The sums of a benchmark's headline over these results, as a share."""
  units = [unit_of(r.question) for r in results]
  if benchmark == mme.KEY:
    return _mme(results, units)
  if benchmark == pope.KEY:
    return _f1(results, units)
  if benchmark == mmbench.KEY:
    whole = mmbench.circular(results)
    columns = np.asarray([[score, 1.0] for score in whole.values()], np.float64)
    return Sums(list(whole), columns, _mean)
  columns = np.asarray([[float(r.score), 1.0] for r in results])
  return Sums(units, columns, _mean)


def _mean(sums: np.ndarray) -> np.ndarray:
  with np.errstate(invalid='ignore'):
    return sums[..., 0] / sums[..., 1]


def _f1(results: Sequence[Result], units: list[str]) -> Sums:
  """Mean over categories of F1: true positives, and answers yes, and labels yes."""
  names = sorted({r.question.groups['category'] for r in results})
  columns = np.zeros((len(results), 3 * len(names)))
  for row, r in zip(columns, results):
    said, label = r.parsed == 'yes', r.question.answers[0] == 'yes'
    at = 3 * names.index(r.question.groups['category'])
    row[at:at + 3] = said and label, said, label

  def value(sums):
    sums = sums.reshape(*sums.shape[:-1], len(names), 3)
    return np.mean(2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1), -1)
  return Sums(units, columns, value)


def _mme(results: Sequence[Result], units: list[str]) -> Sums:
  """Mean over tasks of (accuracy + accuracy+) / 2."""
  names = sorted({r.question.groups['task'] for r in results})
  pairs = collections.defaultdict(list)
  for index, r in enumerate(results):
    pairs[r.question.unit].append(index)
  columns = np.zeros((len(results), 4 * len(names)))
  for indices in pairs.values():
    for number, index in enumerate(indices):
      at = 4 * names.index(results[index].question.groups['task'])
      whole = number == 1  # counted once, with the second question
      both = whole and all(results[i].score for i in indices)
      columns[index, at:at + 4] = results[index].score, 1, both, whole

  def value(sums):
    right, n, both, whole = np.moveaxis(
        sums.reshape(*sums.shape[:-1], len(names), 4), -1, 0)
    with np.errstate(invalid='ignore'):
      return np.mean((right / n + both / np.maximum(whole, 1)) / 2, -1)
  return Sums(units, columns, value)


def headline_results(scores: Scores) -> list[Result]:
  """The results that the headline is over."""
  return _members(scores, scores.row(scores.headline.group, scores.headline.name),
                  _grouped(scores))


def _grouped(scores: Scores) -> dict[tuple[str, str], list[Result]]:
  """(group, name) -> its results, of one pass: VQAv2 has 68 groups."""
  found = collections.defaultdict(list)
  for result in scores.results:
    for part in result.question.groups.items():
      found[part].append(result)
  return found


def _members(scores: Scores, row: Row,
             grouped: Mapping[tuple[str, str], list[Result]]) -> list[Result]:
  if scores.benchmark == mme.KEY and not row.group:
    tasks = {'perception': mme.PERCEPTION, 'cognition': mme.COGNITION,
             'total': mme.PERCEPTION | mme.COGNITION}[row.name]
    return [r for r in scores.results if r.question.groups['task'] in tasks]
  if not row.group:
    return list(scores.results)
  return grouped.get((row.group, row.name), [])


def intervals(scores: Scores, *, seed: int = 0,
              num_resamples: int = scoring.NUM_RESAMPLES) -> dict:
  """The headline and the lines of the table, as shares with intervals.

  Args:
    scores: of a run.
    seed, num_resamples: of the bootstrap.

  Returns:
    {'accuracy', 'ci95', 'n', 'by_kind': {'structural: verify': the same three}};
    lines without the headline's number are left out; where names say enough
    (a single group, openmoji_grid) the group is not named.

  Raises:
    ConfigError: nothing that the headline is over has been answered.
  """
  head = scores.headline
  rows = [scores.row(head.group, head.name)]
  rows += [row for row in scores.rows if head.column in row.numbers and row.n and
           (row.group or scores.benchmark != mme.KEY and row.name in ('all', 'mean'))
           and row is not rows[0]]
  grouped = _grouped(scores)
  parts = [(row, sums_of(scores.benchmark, members)) for row in rows
           if (members := _members(scores, row, grouped))]
  check(bool(parts) and parts[0][0] is rows[0], f'{scores.benchmark}: no answer to any '
        f'question that {head.metric} is over')
  found = _bootstrap([sums for _, sums in parts], seed, num_resamples)
  out = [{'accuracy': mean, 'ci95': list(ci), 'n': row.n}
         for (row, _), (mean, ci) in zip(parts, found)]
  plain = scores.benchmark == openmoji_grid.KEY or len(
      {row.group for row, _ in parts[1:] if row.group}) < 2
  label = lambda row: row.name if plain or not row.group else f'{row.group}: {row.name}'
  kinds = {label(row): value for (row, _), value in zip(parts, out)
           if row.group or row is not rows[0]}
  return {**out[0], 'by_kind': kinds}


def _bootstrap(parts: Sequence[Sums], seed: int, num_resamples: int
               ) -> list[tuple[float, tuple[float, float]]]:
  """Value and interval of each, from one set of draws over all units.

  A number over few of the units is resampled with all of them: how many of its
  questions a draw has varies then, as it does in a new test set.
  """
  units = list(dict.fromkeys(unit for part in parts for unit in part.units))
  draws = _draws(parts, units, seed, num_resamples)
  out = []
  for part, values in zip(parts, draws):
    value = float(part.value(part.columns.sum(0)))
    num_units = len(set(part.units))
    if np.nanmax(values) - np.nanmin(values) < 1e-12 and _same_units(part):
      ci = scoring.no_exception(value, num_units, (0.0, 1.0))
    else:
      ci = ((0.0, 1.0) if num_units == 1 else tuple(np.nanquantile(values, TAILS)))
    out.append((value, (float(min(ci[0], value)), float(max(ci[1], value)))))
  return out


def _same_units(part: Sums) -> bool:
  """Whether every row has the same columns, so that nothing can vary."""
  return bool(np.ptp(part.columns, axis=0).max() == 0) or (
      float(part.value(part.columns.sum(0))) in (0.0, 1.0))


def _draws(parts: Sequence[Sums], units: Sequence[str], seed: int,
           num_resamples: int) -> list[np.ndarray]:
  """float[R] for each part."""
  place = {unit: i for i, unit in enumerate(units)}
  columns = []
  for part in parts:
    total = np.zeros((len(units), part.columns.shape[1]))
    np.add.at(total, [place[unit] for unit in part.units], part.columns)
    columns.append(total)
  totals = scoring.bootstrap_totals(np.hstack(columns), units, seed=seed,
                                    num_resamples=num_resamples)
  ends = np.cumsum([c.shape[1] for c in columns])[:-1]
  return [part.value(some) for part, some in zip(parts, np.split(totals, ends, 1))]


def difference(a: Scores, b: Scores, *, seed: int = 0,
               num_resamples: int = scoring.NUM_RESAMPLES) -> scoring.Interval:
  """a's headline minus b's, as shares, on the same questions, paired.

  Raises:
    ConfigError: the two runs scored other questions.
  """
  check_same_questions(a, b)
  parts = [sums_of(s.benchmark, headline_results(s)) for s in (a, b)]
  units = list(dict.fromkeys(parts[0].units))
  first, second = _draws(parts, units, seed, num_resamples)
  value = float(parts[0].value(parts[0].columns.sum(0)) -
                parts[1].value(parts[1].columns.sum(0)))
  if np.nanmax(np.abs(first - second - value)) < 1e-12:
    ci = scoring.no_exception(value, len(units), (-1.0, 1.0))
  else:
    ci = (-1.0, 1.0) if len(units) == 1 else np.nanquantile(first - second, TAILS)
  return scoring.Interval(value, (float(ci[0]), float(ci[1])),
                          len(parts[0].units), len(units))


def agreement(a: Scores, b: Scores, *, seed: int = 0) -> scoring.Interval:
  """Share of the headline's questions to which both runs gave the same answer.

  Answers are compared as the scorer reads them; where it read nothing in
  either, as texts, whatever their blanks and case.

  Raises:
    ConfigError: the two runs scored other questions.
  """
  check_same_questions(a, b)
  pairs = list(zip(headline_results(a), headline_results(b)))
  same = np.asarray([_said(x) == _said(y) for x, y in pairs], np.float64)
  return scoring.mean_with_interval(same, [unit_of(x.question) for x, _ in pairs],
                                    seed=seed)


def _said(result: Result) -> tuple[bool, str]:
  if result.parsed is not None:
    return True, scoring.normalise(result.parsed).lower()
  return False, scoring.normalise(result.text or '').lower()


def check_same_questions(a: Scores, b: Scores) -> None:
  """Raises ConfigError unless two runs scored the same questions, by one rule."""
  check((a.benchmark, a.rule) == (b.benchmark, b.rule), f'one run is of {a.benchmark} '
        f'(rule {a.rule}), the other of {b.benchmark} (rule {b.rule}); compare runs of '
        'one benchmark')
  ids = [[r.question.id for r in s.results] for s in (a, b)]
  if ids[0] != ids[1]:
    other = sorted(set(ids[0]) ^ set(ids[1]))
    check(False, f'the runs scored {len(ids[0])} and {len(ids[1])} questions, '
          f'{len(other)} of them not in both ({", ".join(other[:3])}); evaluate both '
          'on the same questions')
