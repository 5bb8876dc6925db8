"""Figures of what compression keeps and where attention goes.

Pure functions: arrays in, a matplotlib Figure out, drawn without pyplot on the
Agg canvas.  Show one in a notebook by leaving it as the last value of a cell
under `%matplotlib inline`, save it with `figure.savefig`.  The drawings
themselves are those of the report (eval/figures.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_compress.eval import figures

DPI = 150


def keep_map_figure(image: np.ndarray, keep_maps: np.ndarray,
                    labels: Sequence[str], *,
                    thresholds: np.ndarray | None = None,
                    title: str = '') -> Any:
  """One picture, and what is kept of it after each module.

  Args:
    image: uint8 or float[height, width, 3 or 4].
    keep_maps: 0/1 [M, g, g], the grid of visual tokens after each module.
    labels: M names, such as 'after layer 4'.
    thresholds: float[M, 2], theta_r and theta_s, or None.
    title: above all, such as the question.

  Returns:
    A Figure.
  """
  keep_maps = _array('keep_maps', keep_maps, 3)
  _named('labels', labels, len(keep_maps))
  columns = 1 + len(keep_maps)
  figure = _figure(1.9 * columns, 2.6 + 0.3 * bool(title))
  axes = figure.subplots(1, columns, squeeze=False)[0]
  figures.draw_keep_maps(axes, image, keep_maps, labels, thresholds)
  if title:
    figure.suptitle(title, fontsize=10, color=figures.INK)
  return figure


def keep_map_grid_figure(images: Sequence[np.ndarray],
                         keep_maps: Sequence[np.ndarray],
                         labels: Sequence[str], *,
                         titles: Sequence[str] = ()) -> Any:
  """Several pictures below each other, a column for each module.

  Args:
    images: I pictures, uint8 or float[height, width, 3 or 4].
    keep_maps: I arrays 0/1 [M, g, g].
    labels: M names.
    titles: I texts left of the pictures, such as the questions, or ().

  Returns:
    A Figure.
  """
  rows, columns = len(images), 1 + len(labels)
  _named('keep_maps', keep_maps, rows)
  figure = _figure(1.9 * columns, 2.2 * rows)
  axes = figure.subplots(rows, columns, squeeze=False)
  for row, (image, maps) in enumerate(zip(images, keep_maps)):
    maps = _array('keep_maps', maps, 3)
    _named('labels', labels, len(maps))
    figures.draw_keep_maps(axes[row], image, maps, labels)
    if titles:
      axes[row, 0].set_ylabel(titles[row], fontsize=8, color=figures.INK)
  return figure


def kept_counts_figure(counts: np.ndarray, labels: Sequence[str]) -> Any:
  """How the kept counts spread over instances, and over modules of each.

  Left: a histogram of the instances' counts for each module.  Right: each
  instance as a line through its modules, so that one sees whether those that
  keep much early keep much late.

  Args:
    counts: int[I, M], tokens kept by each instance after each module.
    labels: M names.

  Returns:
    A Figure.
  """
  counts = _array('counts', counts, 2)
  _named('labels', labels, counts.shape[1])
  figure = _figure(9.0, 3.2)
  left, right = figure.subplots(1, 2, sharey=True)
  figures.draw_kept_counts(left, counts, labels)
  x = np.arange(counts.shape[1])
  right.plot(x, counts.T, color=figures.METHOD_COLOURS[0], linewidth=0.7,
             alpha=max(0.08, min(0.8, 8 / len(counts))))
  right.plot(x, counts.mean(0), color=figures.INK, linewidth=1.8, marker='o',
             markersize=4, label='mean')
  right.set_xticks(x, labels)
  figures.style_axes(right)
  right.legend(frameon=False, fontsize=8, labelcolor=figures.INK)
  left.set_title('distribution (line: median)', fontsize=9, color=figures.INK)
  right.set_title('each instance', fontsize=9, color=figures.INK)
  return figure


def kept_per_layer_figure(lines: Mapping[str, tuple[np.ndarray, np.ndarray]]
                          ) -> Any:
  """Visual tokens that enter each layer, mean and spread between instances.

  Args:
    lines: label -> (mean float[M], std float[M]).

  Returns:
    A Figure.
  """
  figure = _figure(7.0, 3.0)
  figures.draw_kept_per_layer(figure.subplots(), lines)
  return figure


def threshold_figure(thresholds: np.ndarray, labels: Sequence[str], *,
                     groups: Sequence[str] | None = None) -> Any:
  """theta_r against theta_s of every instance, a panel for each module.

  Low theta_r keeps more by redundancy score; low theta_s keeps more by the
  spatial grid.

  Args:
    thresholds: float[I, M, 2], theta_r and theta_s.
    labels: M names.
    groups: I names to colour by, such as kinds of question, or None.

  Returns:
    A Figure.
  """
  thresholds = _array('thresholds', thresholds, 3)
  _named('labels', labels, thresholds.shape[1])
  groups = [''] * len(thresholds) if groups is None else list(groups)
  _named('groups', groups, len(thresholds))
  figure = _figure(2.9 * thresholds.shape[1] + 0.4, 3.1)
  axes = figure.subplots(1, thresholds.shape[1], squeeze=False, sharex=True,
                         sharey=True)[0]
  for module, (ax, label) in enumerate(zip(axes, labels)):
    for index, group in enumerate(sorted(set(groups))):
      chosen = [i for i, name in enumerate(groups) if name == group]
      ax.plot(thresholds[chosen, module, 0], thresholds[chosen, module, 1],
              linestyle='', marker='o', markersize=3.5, alpha=0.6,
              markeredgewidth=0, color=_colour(index), label=group)
    figures.style_axes(ax, 'θr (redundancy)', '' if module else 'θs (spatial)')
    ax.set_title(label, fontsize=9, color=figures.INK)
  if any(groups):
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc='outside lower center', frameon=False,
                  fontsize=8, labelcolor=figures.INK, ncols=4)
  return figure


def attention_figure(shares: Mapping[str, np.ndarray], *,
                     stds: Mapping[str, np.ndarray] | None = None,
                     ylabel: str = 'share of the text tokens’ attention'
                     ) -> Any:
  """Attention of text tokens per layer, one line for each kind of key.

  Args:
    shares: label -> float[M] in 0..1, such as 'visual tokens', 'VoCo tokens',
      'text tokens'.
    stds: label -> float[M], spread between instances, for any of the labels.
    ylabel: what the shares are shares of.

  Returns:
    A Figure.
  """
  figure = _figure(7.0, 3.0)
  ax = figure.subplots()
  for index, (label, values) in enumerate(shares.items()):
    values = _array(label, values, 1)
    layers = np.arange(1, len(values) + 1)
    ax.plot(layers, values, color=_colour(index), linewidth=1.8, marker='o',
            markersize=4, label=label)
    if stds and label in stds:
      std = _array(label, stds[label], 1)
      ax.fill_between(layers, np.maximum(values - std, 0), values + std,
                      color=_colour(index), alpha=0.18, linewidth=0)
  _layer_axis(ax, max(map(len, shares.values())))
  ax.set_ylim(bottom=0)
  figures.style_axes(ax, 'decoder layer', ylabel)
  ax.legend(frameon=False, fontsize=8, labelcolor=figures.INK)
  return figure


def attention_shares_figure(shares: Mapping[str, np.ndarray]) -> Any:
  """The same as stacked bars: where a layer's attention goes in total.

  Args:
    shares: label -> float[M]; of each layer they sum to at most 1.

  Returns:
    A Figure.

  Raises:
    ValueError: shares of a layer sum to more than 1.
  """
  total = np.sum([_array(label, v, 1) for label, v in shares.items()], 0)
  if total.max() > 1 + 1e-3:
    raise ValueError(f'shares of layer {total.argmax() + 1} sum to '
                     f'{total.max():.3f}; at most 1')
  figure = _figure(7.0, 3.0)
  ax = figure.subplots()
  bottom = np.zeros(len(total))
  for index, (label, values) in enumerate(shares.items()):
    ax.bar(np.arange(1, len(total) + 1), values, 0.8, bottom=bottom,
           color=_colour(index), label=label)
    bottom = bottom + np.asarray(values)
  _layer_axis(ax, len(total))
  ax.set_ylim(0, 1)
  figures.style_axes(ax, 'decoder layer', 'share of attention')
  figure.legend(loc='outside right upper', frameon=False, fontsize=8,
                labelcolor=figures.INK)
  return figure


def _colour(index: int) -> str:
  return figures.METHOD_COLOURS[index % len(figures.METHOD_COLOURS)]


def _layer_axis(ax: Any, num_layers: int) -> None:
  ax.set_xticks(range(1, num_layers + 1, -(-num_layers // 16)))


def _figure(width: float, height: float) -> Any:
  # Imported here, so that the package imports without the extra that has it.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  figure = Figure(figsize=(width, height), dpi=DPI, layout='constrained')
  FigureCanvasAgg(figure)
  return figure


def _array(name: str, values: Any, ndim: int) -> np.ndarray:
  values = np.asarray(values)
  if values.ndim != ndim or values.size == 0:
    raise ValueError(f'{name} has shape {values.shape}; {ndim} axes, none '
                     'empty, are needed')
  return values


def _named(name: str, values: Sequence[Any], count: int) -> None:
  if len(values) != count:
    raise ValueError(f'{name} has {len(values)} entries; {count} are needed')
