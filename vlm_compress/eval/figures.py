"""Drawings on matplotlib figures and axes that the caller makes.

No import of matplotlib here: everything is a method of the Figure or Axes that
is handed in, so the report and the notebooks share these drawings, and neither
pyplot nor its global state is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_compress.eval import tables

METHOD_COLOURS = ('#1f5fa8', '#c4511d', '#2c8560', '#7a4aa0', '#997300',
                  '#b03060', '#1797a6', '#7a5a3a', '#d0709e', '#5c6b12')
GREY, INK, FAINT = '#8a8f98', '#1d2129', '#d9dce1'
FLOOR_MARKERS = {'random': 'x', 'uniform grid': 's', 'average pooling': 'D',
                 'average pooling + linear': 'P'}
MAX_BINS = 40
LEGEND_ROW = 0.17  # inches
LEGEND_CHARACTERS = 160  # in a line of a report's figure


def style_axes(ax: Any, xlabel: str = '', ylabel: str = '') -> None:
  """Two spines, faint horizontal lines, small dark labels."""
  for side in ('top', 'right'):
    ax.spines[side].set_visible(False)
  for side in ('left', 'bottom'):
    ax.spines[side].set_color(GREY)
  ax.tick_params(colors=INK, labelsize=8, length=3)
  ax.grid(axis='y', color=FAINT, linewidth=0.6)
  ax.set_axisbelow(True)
  ax.set_xlabel(xlabel, color=INK, fontsize=9)
  ax.set_ylabel(ylabel, color=INK, fontsize=9)


def method_colours(parts: Sequence[tables.Section]) -> dict[str, str]:
  """A colour for every method that is no floor, bound or reference."""
  names = []
  for part in parts:
    names += [e.name for e in part.of_role('method') if e.name not in names]
  return {name: METHOD_COLOURS[i % len(METHOD_COLOURS)]
          for i, name in enumerate(names)}


# ----------------------------------------------------- accuracy and tokens


def draw_accuracy(figure: Any, parts: Sequence[tables.Section], *,
                  ylabel: str = 'accuracy, %', most: float = 100.0) -> None:
  """Accuracy against layer-average tokens, with floors and references.

  Args:
    figure: Figure.
    parts: of a table.
    ylabel: what accuracy is called.
    most: its value at a share of 1.
  """
  ax = figure.subplots()
  series: dict[Any, list[tuple[tables.Entry, float]]] = {}
  for part in parts:
    shown = [entry for entry in part.entries if entry.role != 'reference']
    step = min(0.05, 0.3 / max(len(shown), 1))
    for index, entry in enumerate(shown):
      # Markers of one budget are set apart a little (at most 0.15 octaves
      # either way), or they would hide each other.
      shift = 2 ** (step * (index - (len(shown) - 1) / 2))
      series.setdefault(series_of(entry), []).append(
          (entry, entry.average_tokens * shift))
  draw_all_series(ax, series, method_colours(parts), most)
  style_axes(ax, 'visual tokens, mean over decoder layers (log scale)', ylabel)
  references = [e for part in parts for e in part.of_role('reference')]
  full = [e for e in references if tables.is_full(e)]
  _token_axis(ax, [entry.average_tokens for part in parts
                   for entry in part.entries
                   if entry.role != 'reference' or tables.is_full(entry)])
  for entry in full:
    ax.plot(entry.average_tokens, most * entry.accuracy, marker='*',
            markersize=11, color=INK, zorder=5)
  _draw_references(ax, references, most)
  legend_below(figure, ax)


def legend_below(figure: Any, ax: Any) -> None:
  """The legend of an axes below the figure, if it has any."""
  handles, names = ax.get_legend_handles_labels()
  if handles:
    columns = min(4, max(1, int(LEGEND_CHARACTERS / (8 + max(map(len, names))))))
    # The axes keep their height.
    rows = -(-len(names) // columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * max(0, rows - 4))
    figure.legend(handles, names, loc='outside lower center', frameon=False,
                  fontsize=8, labelcolor=INK, ncols=columns)


def series_of(entry: tables.Entry) -> tuple[str, bool, str]:
  """Lines with the same are joined in a figure."""
  return entry.name, entry.trained, entry.role


def draw_all_series(ax: Any, series: Mapping[Any, Sequence[tuple[tables.Entry, float]]],
                    colours: Mapping[str, str], most: float) -> None:
  """Lines with intervals, floors below methods.

  Args:
    ax: Axes.
    series: series_of -> (entry, x).
    colours: of methods, by their name.
    most: value at a share of 1.
  """
  for key in sorted(series, key=lambda key: tables.ROLES.index(key[2])):
    _draw_series(ax, key, sorted(series[key], key=lambda pair: pair[1]),
                 colours.get(key[0], GREY), most)


def _draw_series(ax: Any, key: tuple[str, bool, str],
                 pairs: Sequence[tuple[tables.Entry, float]],
                 colour: str, most: float) -> None:
  name, trained, role = key
  entries, x = zip(*pairs)
  y = most * np.array([entry.accuracy for entry in entries])
  ci = most * np.array([entry.ci95 for entry in entries]).T
  main = role == 'method'
  marker = ('o' if main else 'v' if role == 'bound' else '^' if role == 'reference' else
            FLOOR_MARKERS.get(entries[0].method, '.'))
  filled = {} if trained or marker == 'x' else {'markerfacecolor': 'white'}
  ax.errorbar(
      x, y, yerr=np.maximum([y - ci[0], ci[1] - y], 0),
      label=name if trained or role == 'bound' else (
          f'{name} (training-free)'),
      color=INK if role == 'bound' else colour, marker=marker,
      markersize=7 if main else 5, linewidth=1.8 if main else 0.9,
      linestyle='-' if main else ':', elinewidth=1.2 if main else 0.8,
      capsize=2.5, zorder=4 if main else 3, **filled)


def _draw_references(ax: Any, entries: Sequence[tables.Entry], most: float) -> None:
  """Horizontal lines; their names stand right of the axes, kept apart, those of equal
  values together.
  """
  lines = sorted(entries, key=lambda entry: entry.accuracy)
  for entry in lines:
    full = tables.is_full(entry)
    ax.axhline(most * entry.accuracy, color=INK if full else GREY,
               linewidth=1.2 if full else 0.9, linestyle='--', zorder=2)
  ax.margins(y=0.06)
  ax.autoscale_view()
  low, high = ax.get_ylim()
  ax.set_ylim(max(low, -0.02 * most), min(high, 1.02 * most))
  gap = 0.052 * (ax.get_ylim()[1] - ax.get_ylim()[0])
  labels: dict[str, list[tables.Entry]] = {}
  for entry in reversed(lines):
    labels.setdefault(tables.percent(entry.accuracy) if most == 100 else
                      f'{most * entry.accuracy:.1f}', []).append(entry)
  top = ax.get_ylim()[1] + gap / 2
  for value, some in labels.items():
    height = gap * len(some)
    top = min(top, most * some[0].accuracy + height / 2)
    names = '\n'.join(entry.name for entry in some)
    ax.annotate(f'{names}  {value}', (1.01, top), xycoords=('axes fraction', 'data'),
                fontsize=8, color=INK, va='top', annotation_clip=False)
    top -= height


def _token_axis(ax: Any, tokens: Sequence[float]) -> None:
  """A logarithmic axis with the powers of two within the values."""
  tokens = [value for value in tokens if value > 0] or [1.0]
  ax.set_xscale('log', base=2)
  low, high = np.log2(min(tokens)) - 0.5, np.log2(max(tokens)) + 0.5
  ticks = 2.0 ** np.arange(np.ceil(low), np.floor(high) + 1)
  ax.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
  ax.set_xticks([], minor=True)
  ax.set_xlim(2.0 ** low, 2.0 ** high)


# ------------------------------------------------------------- kept tokens


def draw_kept_per_layer(ax: Any, lines: Mapping[str, tuple[Any, Any]],
                        xlabel: str = 'decoder layer') -> None:
  """Visual tokens that enter each layer, with the spread between instances.

  Args:
    ax: Axes.
    lines: label -> (mean float[M], std float[M]).
    xlabel: of the layer axis.
  """
  for index, (label, (mean, std)) in enumerate(lines.items()):
    mean, std = np.asarray(mean, float), np.asarray(std, float)
    # Layer l is the interval from l - 1/2 to l + 1/2.
    edges = np.arange(len(mean) + 1) + 0.5
    colour = METHOD_COLOURS[index % len(METHOD_COLOURS)]
    ax.stairs(mean + std, edges, baseline=np.maximum(mean - std, 0), fill=True,
              color=colour, alpha=0.18, linewidth=0)
    ax.stairs(mean, edges, baseline=None, color=colour, linewidth=1.8,
              label=label)
  ax.set_ylim(bottom=0)
  num_layers = max(len(mean) for mean, _ in lines.values())
  step = -(-num_layers // 16)
  ax.set_xticks(range(1, num_layers + 1, step))
  style_axes(ax, xlabel, 'visual tokens entering the layer')
  ax.legend(frameon=False, fontsize=8, labelcolor=INK)


def draw_kept_counts(ax: Any, counts: Any, labels: Sequence[str], *,
                     colour: str = METHOD_COLOURS[0]) -> None:
  """How many instances keep how many tokens: one mirrored histogram a module.

  Integer counts are drawn as they are (in at most MAX_BINS bins): a smoothed
  violin would invent counts and fail where all instances agree.

  Args:
    ax: Axes.
    counts: int[I, M], tokens that each of I instances keeps after each module.
    labels: M names.
    colour: of the histograms; medians are drawn in ink.
  """
  counts = np.asarray(counts)
  span = int(counts.max()) - int(counts.min()) + 1
  width = -(-span // MAX_BINS)
  edges = np.arange(counts.min(), counts.max() + width + 1, width) - 0.5
  for module in range(counts.shape[1]):
    share, _ = np.histogram(counts[:, module], edges)
    share = 0.84 * share / share.max()
    used = share > 0
    ax.barh(edges[:-1][used] + width / 2, share[used],
            left=module - share[used] / 2, height=width, color=colour,
            alpha=0.55, linewidth=0)
    median = np.median(counts[:, module])
    ax.plot([module - 0.42, module + 0.42], [median] * 2, color=INK,
            linewidth=1.2)
    ax.annotate(f'{median:g}', (module + 0.43, median), fontsize=7.5,
                color=INK, va='center')
  ax.set_xticks(range(counts.shape[1]), labels)
  ax.set_xlim(-0.6, counts.shape[1] - 0.3)
  ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
  style_axes(ax, '', 'tokens kept per instance')


# --------------------------------------------------------------- keep maps


def draw_keep_map(ax: Any, image: Any, keep_map: Any | None,
                  title: str = '') -> None:
  """The picture with the cells of dropped tokens faded out.

  Args:
    ax: Axes.
    image: uint8 or float[height, width, 3 or 4].
    keep_map: 0/1 [g, g] of the visual tokens' grid, or None for the picture
      alone.
    title: above the picture.
  """
  extent = (0.0, 1.0, 1.0, 0.0)
  ax.imshow(image, extent=extent, interpolation='antialiased')
  if keep_map is not None:
    keep = np.asarray(keep_map, bool)
    veil = np.ones((*keep.shape, 4))
    veil[..., :3] = 0.93, 0.94, 0.95
    veil[..., 3] = np.where(keep, 0.0, 0.86)
    ax.imshow(veil, extent=extent, interpolation='nearest')
    _outline(ax, keep)
  ax.set_xlim(0, 1)
  ax.set_ylim(1, 0)
  ax.set_xticks([])
  ax.set_yticks([])
  ax.set_aspect('equal')
  for spine in ax.spines.values():
    spine.set_color(GREY)
    spine.set_linewidth(0.6)
  ax.set_title(title, fontsize=8, color=INK, pad=4)


def _outline(ax: Any, keep: np.ndarray) -> None:
  """Lines between kept and dropped cells (a blank cell hides its veil)."""
  rows, cols = keep.shape
  padded = np.pad(keep, 1)
  x, y = [], []
  for r, c in zip(*np.nonzero(padded[:, 1:] != padded[:, :-1])):
    if 1 <= r <= rows:
      x += [c / cols, c / cols, np.nan]
      y += [(r - 1) / rows, r / rows, np.nan]
  for r, c in zip(*np.nonzero(padded[1:] != padded[:-1])):
    if 1 <= c <= cols:
      x += [(c - 1) / cols, c / cols, np.nan]
      y += [r / rows, r / rows, np.nan]
  ax.plot(x, y, color=METHOD_COLOURS[0], linewidth=0.9,
          solid_capstyle='butt')


def draw_keep_maps(axes: Sequence[Any], image: Any, keep_maps: Sequence[Any],
                   labels: Sequence[str],
                   thresholds: Sequence[Sequence[float]] | None = None) -> None:
  """The picture, then its keep map after each module, left to right.

  Args:
    axes: 1 + number of modules of them.
    image: uint8 or float[height, width, 3 or 4].
    keep_maps: 0/1 [module][g][g].
    labels: a name for each module.
    thresholds: [module][2] (theta_r, theta_s), or None.
  """
  draw_keep_map(axes[0], image, None, 'input')
  for module, keep_map in enumerate(keep_maps):
    keep = np.asarray(keep_map, bool)
    title = f'{labels[module]}\n{keep.sum()} of {keep.size} kept'
    if thresholds is not None:
      theta_r, theta_s = thresholds[module]
      title += f'\nθr {theta_r:.2f}   θs {theta_s:.2f}'
    draw_keep_map(axes[module + 1], image, keep, title)
