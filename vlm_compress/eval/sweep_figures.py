"""Drawings of a sweep on matplotlib figures that the caller makes; see figures.py."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_compress.eval import figures, tables
from vlm_compress.eval.sweep_tables import Bench, mean

_WORSE, _EVEN, _BETTER = np.array([[0.85, 0.42, 0.36], [1, 1, 1], [0.36, 0.58, 0.82]])
_SPAN = 0.25  # a difference to the full model that has the full colour, as a share
_WIDTH = 12  # letters of a column's name in a line


def has_latency(bench: Bench) -> bool:
  """Whether a time was measured for two lines or more."""
  return sum(mean(e, 'first_token_seconds') is not None for e in bench.entries) > 1


def draw_latency(figure: Any, bench: Bench) -> None:
  """Value against the time to the first token, which starts at 0."""
  ax = figure.subplots()
  series: dict[Any, list[tuple[tables.Entry, float]]] = {}
  longest = 0.0
  for entry in bench.entries:
    seconds = mean(entry, 'first_token_seconds')
    if seconds is None:
      continue
    longest = max(longest, seconds)
    if tables.is_full(entry):
      _draw_full(ax, bench, entry, seconds)
    else:
      series.setdefault(figures.series_of(entry), []).append((entry, seconds))
  figures.draw_all_series(ax, series, figures.method_colours(bench.parts), bench.most)
  ax.set_xlim(0, 1.08 * longest)
  figures.style_axes(ax, 'seconds of a question to the first token', bench.metric)
  figures.legend_below(figure, ax)


def _draw_full(ax: Any, bench: Bench, entry: tables.Entry, seconds: float) -> None:
  low, high = entry.ci95
  ax.errorbar([seconds], [bench.most * entry.accuracy],
              yerr=[[bench.most * max(entry.accuracy - low, 0)],
                    [bench.most * max(high - entry.accuracy, 0)]],
              color=figures.INK, marker='*', markersize=11, linestyle='none',
              elinewidth=1.2, capsize=2.5, label=entry.name, zorder=5)


def kind_columns(bench: Bench) -> list[tables.Entry]:
  """The full model and the methods: what the heat map shows."""
  return [e for e in bench.entries if e.by_kind and (
      tables.is_full(e) or e.role == 'method')]


def draw_kinds(ax: Any, columns: Sequence[tables.Entry], kinds: Sequence[str]) -> None:
  """Accuracy of each kind of question, coloured by the difference to full.

  Args:
    ax: Axes.
    columns: entries; the full model is one of them, or nothing is coloured.
    kinds: lines, from top to bottom.
  """
  full = next((e.by_kind for e in columns if tables.is_full(e)), None)
  shares = np.array([[_share(e.by_kind, kind) for e in columns] for kind in kinds])
  picture = np.ones((*shares.shape, 3))
  for row, kind in enumerate(kinds):
    for col, share in enumerate(shares[row]):
      if full is not None and not np.isnan(share - _share(full, kind)):
        picture[row, col] = _colour(share - _share(full, kind))
      ax.text(col, row, '–' if np.isnan(share) else f'{100 * share:.1f}', ha='center',
              va='center', fontsize=8, color=figures.INK)
  ax.imshow(picture, aspect='auto', interpolation='nearest')
  ax.set_xticks(range(len(columns)), [
      e.name if tables.is_full(e) else
      f'{textwrap.fill(e.name, _WIDTH)}\n{e.average_tokens:.3g} tokens'
      for e in columns], fontsize=8, color=figures.INK)
  ax.set_yticks(range(len(kinds)), kinds, fontsize=8, color=figures.INK)
  ax.xaxis.tick_top()
  ax.tick_params(length=0)
  for spine in ax.spines.values():
    spine.set_visible(False)
  for edge in range(1, len(kinds)):
    ax.axhline(edge - 0.5, color='white', linewidth=1.5)
  for edge in range(1, len(columns)):
    ax.axvline(edge - 0.5, color='white', linewidth=1.5)


def _share(by_kind: Mapping[str, Any], kind: str) -> float:
  return by_kind[kind]['accuracy'] if kind in by_kind else np.nan


def _colour(difference: float) -> np.ndarray:
  """White at 0; red is worse, blue better than the full model."""
  end = _BETTER if difference > 0 else _WORSE
  return _EVEN + min(abs(difference) / _SPAN, 1.0) * (end - _EVEN)
