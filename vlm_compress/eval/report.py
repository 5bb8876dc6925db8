"""report.json, report.md and report.html, and the table for the terminal.

The page is one self-contained file: styles inline, figures as PNG inside, no
script and no address that is loaded, so that it can be mailed, printed and
kept.  Figures are drawn on Figure objects, without pyplot and its global
state; matplotlib and rich are imported by the functions that need them.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from vlm_compress.atomic import replace, write_text
from vlm_compress.config import ConfigError, check
from vlm_compress.eval import (
  blocks,
  figures,
  floors,
  html_page,
  html_parts,
  markdown_page,
  scoring,
  tables,
)
from vlm_compress.eval import page as page_lib

DPI, PHOTO_DPI = 200, 130
FIGURE_WIDTH = 9.6  # Inches; the page scales it to its width.


# ------------------------------------------------------------------ files


def write_report(report: Mapping[str, Any], workdir: str | os.PathLike[str], *,
                 allow_partial: bool = False) -> dict[str, pathlib.Path]:
  """Writes report.json, report.md and report.html into workdir.

  Each file appears whole or not at all.  report.json comes first, so that the
  numbers are safe if a figure then fails.  Nothing is written when the table
  is refused.

  Args:
    report: {'rows': result rows (see tables.py), 'config', 'versions',
      'stages': [{'name', 'seconds', 'steps'}], 'attribution': str, 'examples':
      [{'image_png_base64', 'question', 'answer', 'predictions': {method:
      text}, 'keep_maps': {method: [module][g][g]}, 'thresholds': {method:
      [module][2]}}]}; all but rows may be left out.
    workdir: created if absent.
    allow_partial: accept a table without its floors, marked as partial.

  Returns:
    {'json', 'md', 'html'}: paths.

  Raises:
    ConfigError: a row that cannot be, missing floors, pictures without
      attribution, or a value that JSON cannot hold.
  """
  parts, missing = floors.checked_sections(report.get('rows') or (),
                                           allow_partial)
  check(not report.get('examples') or
        bool((report.get('attribution') or '').strip()),
        'report: attribution is empty, but examples show pictures; name their '
        'source and licence')
  folder = pathlib.Path(workdir)
  paths = {ext: folder / f'report.{ext}' for ext in ('json', 'md', 'html')}
  write_text(paths['json'], _json({**report, 'partial': missing}))
  page = _page(report, parts, missing)
  write_text(paths['md'], markdown_page.render(page))
  write_text(paths['html'], html_page.render(page))
  return paths


def write_figures(report: Mapping[str, Any],
                  workdir: str | os.PathLike[str]) -> list[pathlib.Path]:
  """accuracy.png and keep_maps.png: the figures of a README.

  Args:
    report: as write_report takes it.
    workdir: an existing directory.

  Returns:
    The files written; keep_maps.png only where an example has keep maps.
  """
  folder, written = pathlib.Path(workdir), []
  parts = tables.sections(report['rows'])
  figures_by_name = {'accuracy.png': accuracy_png(parts)}
  mapped = [e for e in report.get('examples') or () if e.get('keep_maps')]
  if mapped:
    figures_by_name['keep_maps.png'] = _keep_map_rows(
        mapped[:3], module_labels(report))
  for name, png in figures_by_name.items():
    with replace(folder / name) as temporary:
      temporary.write_bytes(png)
    written.append(folder / name)
  return written


def _keep_map_rows(examples: Sequence[Mapping[str, Any]],
                   labels: Sequence[str]) -> bytes:
  """Several examples below each other, the first method of each."""
  columns = 1 + max(len(next(iter(e['keep_maps'].values())))
                    for e in examples)
  figure = new_figure(1.8 * columns, 2.35 * len(examples))
  grid = figure.subplots(len(examples), columns, squeeze=False)
  for index, (axes, example) in enumerate(zip(grid, examples)):
    method, maps = next(iter(example['keep_maps'].items()))
    image = _decode_image(example['image_png_base64'], index)
    figures.draw_keep_maps(axes, image, maps, _named(labels, len(maps)),
                           (example.get('thresholds') or {}).get(method))
    axes[0].set_title(f'{example["question"]}\n'
                      f'{example["predictions"][method]}', fontsize=8)
  return png(figure)


def module_labels(report: Mapping[str, Any]) -> list[str]:
  """'after layer 4', ... from the first prune_after in the config, else []."""
  stack = [report.get('config') or {}]
  while stack:
    node = stack.pop(0)
    if node.get('prune_after'):
      return [f'after layer {layer}' for layer in node['prune_after']]
    stack += [value for value in node.values() if isinstance(value, Mapping)]
  return []


def kept_percentiles(parts: Sequence[tables.Section], labels: Sequence[str]
                     ) -> list[tuple[str, ...]]:
  """(method, module, mean, std, p50, p90, p99) of rows with kept_counts."""
  lines = []
  for label, (counts, names) in _kept_counts(parts, labels).items():
    for module, name in enumerate(names):
      kept = counts[:, module]
      p50, p90, p99 = np.percentile(kept, (50, 90, 99))
      lines.append((label, name, f'{kept.mean():.1f}', f'{kept.std():.1f}',
                    f'{p50:.0f}', f'{p90:.0f}', f'{p99:.0f}'))
  return lines


def _page(report: Mapping[str, Any], parts: Sequence[tables.Section],
          missing: Sequence[str]) -> page_lib.Page:
  labels = module_labels(report)
  kept = kept_png(parts, labels)
  return page_lib.Page(
      parts=parts, missing=missing,
      attribution=report.get('attribution') or '',
      accuracy_url=html_parts.data_url(accuracy_png(parts)),
      kept_url=kept and html_parts.data_url(kept),
      kept_percentiles=kept_percentiles(parts, labels),
      examples=[_page_example(example, labels, index)
                for index, example in enumerate(report.get('examples') or ())],
      stages=list(report.get('stages') or ()),
      config=dict(report.get('config') or {}),
      versions=dict(report.get('versions') or {}))


def _json(report: Mapping[str, Any]) -> str:
  def plain(value):
    if isinstance(value, (np.ndarray, np.generic)):
      return value.tolist()
    raise TypeError(f'{type(value).__name__} has no JSON form')
  try:
    return json.dumps(report, indent=1, default=plain, allow_nan=False) + '\n'
  except (TypeError, ValueError) as error:
    raise ConfigError(f'report.json: {error}; give plain finite values'
                      ) from error


# --------------------------------------------------------------- terminal


def print_table(rows: Sequence[tables.Row], *, allow_partial: bool = False,
                file: TextIO | None = None) -> None:
  """Prints the comparison: in colour on a terminal, else as aligned text."""
  print_sections(*floors.checked_sections(rows, allow_partial), file=file)


def print_sections(parts: Sequence[tables.Section], missing: Sequence[str], *,
                   file: TextIO | None = None) -> None:
  """`print_table` of sections that were checked."""
  file = sys.stdout if file is None else file
  show = _Printer(file)
  columns = list(range(len(tables.COLUMNS)))
  lines = _lines(parts, columns)
  for name in _DROP_ORDER:
    if max(len(text) for text, _ in lines) <= show.width:
      break
    columns.remove(tables.COLUMNS.index(name))
    lines = _lines(parts, columns)
  for text, style in lines:
    show(text, style)
  for line in missing:
    show(f'PARTIAL TABLE: {line}.', 'bold red')
  for line in floors.findings(parts):
    show(line, '')


# Columns that go, one by one, when a terminal is narrow; the files have all.
_DROP_ORDER = ('tokens in', 'KV cache', 'prefill', 'seeds', 'n', 'of full',
               'retention', 'training')
_STYLES = {'reference': 'bold', 'method': 'bold cyan', 'bound': 'dim',
           'floor': 'dim'}


def _lines(parts: Sequence[tables.Section], columns: Sequence[int]
           ) -> list[tuple[str, str]]:
  """(text, rich style) of each line, in aligned columns."""
  full = tables.full_tokens(parts)
  table: list[tuple[Sequence[str], str]] = [(tables.COLUMNS, 'underline')]
  for part in parts:
    table.append(((tables.title(part, full),), 'italic'))
    for entry in part.entries:
      cells = tables.cells(entry)
      table.append(((f'  {cells[0]}', *cells[1:]), _STYLES[entry.role]))
  widths = {i: max(len(cells[i]) for cells, _ in table if len(cells) > 1)
            for i in columns}

  def text(cells):
    if len(cells) == 1:
      return cells[0]
    return '  '.join(
        cells[i].ljust(widths[i]) if i < 2 else cells[i].rjust(widths[i])
        for i in columns).rstrip()

  return [(text(cells), style) for cells, style in table]


class _Printer:
  """Prints lines in colour on a terminal with rich, else as they are."""

  def __init__(self, file: TextIO):
    self.width, self._file, self._console = sys.maxsize, file, None
    if not file.isatty():
      return
    self.width = shutil.get_terminal_size().columns
    try:
      from rich import console
    except ModuleNotFoundError:
      return
    self._console = console.Console(file=file, width=self.width)

  def __call__(self, text: str, style: str) -> None:
    if self._console is None:
      self._file.write(f'{text}\n')
    else:
      self._console.print(text, style=style, markup=False, highlight=False)


# ---------------------------------------------------------------- figures


def accuracy_png(parts: Sequence[tables.Section], **options: Any) -> bytes:
  """Accuracy against layer-average tokens, as PNG; see figures.draw_accuracy."""
  figure = new_figure(FIGURE_WIDTH, 4.6)
  figures.draw_accuracy(figure, parts, **options)
  return png(figure)


def kept_png(parts: Sequence[tables.Section],
             labels: Sequence[str]) -> bytes | None:
  """Kept tokens per layer and their distributions, as PNG.

  None when no method keeps different numbers in different layers.
  """
  lines = {}
  for part in parts:
    for entry in part.of_role('method'):
      mean = _kept_rows(entry, 'kept_per_layer')
      if mean is not None and np.ptp(mean) > 0:
        std = _kept_rows(entry, 'kept_std_per_layer')
        lines[_label(entry)] = (mean, np.zeros_like(mean) if std is None
                                else std)
  if not lines:
    return None
  counts = _kept_counts(parts, labels)
  rows = -(-len(counts) // 2)
  figure = new_figure(FIGURE_WIDTH, 2.7 * (1 + rows))
  grid = figure.add_gridspec(1 + rows, 2)
  figures.draw_kept_per_layer(figure.add_subplot(grid[0, :]), lines)
  for index, (label, (kept, names)) in enumerate(counts.items()):
    place = grid[1 + index // 2, index % 2 if len(counts) > 1 else slice(None)]
    ax = figure.add_subplot(place)
    colour = list(lines).index(label) if label in lines else index
    figures.draw_kept_counts(
        ax, kept, names,
        colour=figures.METHOD_COLOURS[colour % len(figures.METHOD_COLOURS)])
    ax.set_title(label, fontsize=9, color=figures.INK)
  return png(figure)


def _page_example(example: Mapping[str, Any], labels: Sequence[str],
                  index: int) -> blocks.Example:
  """The example with one figure a method in place of picture and maps."""
  image = _decode_image(example['image_png_base64'], index)
  maps = example.get('keep_maps') or {'': []}
  strips = [blocks.Strip(
      f'example{index}-{method}', method,
      keep_map_strip(image, keep_maps, labels,
                     (example.get('thresholds') or {}).get(method)),
      1 + len(keep_maps)) for method, keep_maps in maps.items()]
  wanted = scoring.normalise(example['answer'])
  return blocks.Example(example['question'], example['answer'], strips, [
      blocks.Reply(method, text, scoring.normalise(text) == wanted)
      for method, text in example['predictions'].items()])


def keep_map_strip(image: np.ndarray, keep_maps: Sequence[Any], labels: Sequence[str],
                   thresholds: Sequence[Sequence[float]] | None = None,
                   photo: bool = False) -> bytes:
  """The picture, and beside it what is kept after each module, as PNG.

  Args:
    image, keep_maps, thresholds: see figures.draw_keep_maps.
    labels: of the modules; numbers where they do not fit.
    photo: as JPEG, a tenth of the size.
  """
  columns = 1 + len(keep_maps)
  figure = new_figure(1.8 * columns, 2.35)
  axes = figure.subplots(1, columns, squeeze=False)[0]
  figures.draw_keep_maps(axes, image, keep_maps,
                         _named(labels, len(keep_maps)), thresholds)
  return jpeg(figure) if photo else png(figure)


def _decode_image(text: str, index: int) -> np.ndarray:
  from matplotlib import image as matplotlib_image
  try:
    data = base64.b64decode(text, validate=True)
    return matplotlib_image.imread(io.BytesIO(data), format='png')
  except (binascii.Error, ValueError, OSError, SyntaxError) as error:
    raise ConfigError(f'report example {index}: image_png_base64 is no PNG '
                      f'({error}); encode the picture anew') from error


def _kept_rows(entry: tables.Entry, field: str) -> np.ndarray | None:
  """Mean over seeds of a per-layer list, or None."""
  values = [row.get(field) for row in entry.rows]
  missing = any(value is None or len(value) == 0 for value in values)
  return None if missing else np.mean(values, 0)


def _kept_counts(parts: Sequence[tables.Section], labels: Sequence[str]
                 ) -> dict[str, tuple[np.ndarray, list[str]]]:
  """Label -> int[instances of all seeds, modules] and the modules' names."""
  found = {}
  for part in parts:
    for entry in part.of_role('method'):
      counts = [row['kept_counts'] for row in entry.rows
                if row.get('kept_counts') is not None]
      if counts:
        both = np.concatenate([np.asarray(c) for c in counts])
        names = entry.rows[0].get('module_labels', labels)
        found[_label(entry)] = both, _named(names, both.shape[1])
  return found


def _label(entry: tables.Entry) -> str:
  return f'{entry.name}, {entry.average_tokens:.3g} tokens on average'


def _named(labels: Sequence[str], count: int) -> list[str]:
  """The labels if they fit, else 'module 1', ..."""
  return list(labels) if len(labels) == count else [
      f'module {i + 1}' for i in range(count)]


def new_figure(width: float, height: float) -> Any:
  """An empty Figure; sizes in inches."""
  import matplotlib.figure
  return matplotlib.figure.Figure(figsize=(width, height), dpi=DPI,
                                  layout='constrained')


def png(figure: Any) -> bytes:
  """The figure as PNG, without the stamp of the version that drew it."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', metadata={'Software': None})
  return buffer.getvalue()


def jpeg(figure: Any) -> bytes:
  """The figure as JPEG."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='jpeg', dpi=min(DPI, PHOTO_DPI),
                 pil_kwargs={'quality': 85})
  return buffer.getvalue()
