"""The benchmark's tables and figures out of its JSON."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_compress.atomic import replace, write_text
from vlm_compress.config import VocoConfig
from vlm_compress.eval import efficiency, report
from vlm_compress.eval.benchmark import goals
from vlm_compress.eval.benchmark.subjects import SMALL
from vlm_compress.eval.figures import GREY, METHOD_COLOURS, style_axes
from vlm_compress.eval.tables import quantity
from vlm_compress.presets import preset

INFERENCE = ('method', 'visual tokens', 'vision ms', 'selector ms', 'prefill ms',
             'spread', 'decode ms/token', '10-token answer ms', 'prefill FLOP',
             'KV cache', 'peak memory', 'slot waste', 'time ratio',
             'FLOP ratio', 'time / FLOP')
SELECTOR = ('selector of', 'ms', 'of prefill time', 'of prefill FLOP')
TRAINING = ('step', 'ms', 'temporaries', 'peak memory', 'time ratio',
            'memory ratio')
ADAPTIVE = ('model', 'visual tokens', 'batches', 'slots / tokens, all layers',
            'rung / kept, behind each module', 'ms / prompt', 'programs')
MISSED = ' (target missed)'  # what no threshold shift gives within the tolerance
TEXT_LENGTHS = (16, 32, 48, 64, 128)


def write(found: Mapping[str, Any], directory: pathlib.Path
          ) -> list[pathlib.Path]:
  """Writes benchmark.md and the figures; returns their paths.

  Args:
    found: see cli/benchmark.py: 'inference', 'adaptive' and 'training' rows.
    directory: exists.
  """
  paths = [directory / 'benchmark.md']
  write_text(paths[0], markdown(found))
  if found['inference']:
    paths.append(_save(directory / 'benchmark.png',
                       ratio_figure(found['inference'])))
  if found['adaptive']:
    paths.append(_save(directory / 'benchmark_slots.png',
                       slot_figure(found['adaptive'])))
  return paths


def markdown(found: Mapping[str, Any]) -> str:
  """All tables."""
  out = []
  for key, rows in _groups(found['inference']).items():
    out += [f'**{title(*key)}**', '', *_table(INFERENCE, map(_inference, rows)), '']
  slices = {title(*key): rows for key, rows in _groups(found['inference']).items()
            if key[0] != SMALL}
  if slices:
    out += ['**What was hoped for (bold: reached)**', '',
            *_table((*goals.COLUMNS, *slices), goals.table(slices)), '']
  selectors = [row for row in found['inference'] if row['selector_ms'] > 0]
  if selectors:
    out += ['**Scores, thresholds and moving what is kept**', '',
            *_table(SELECTOR, map(_selector, selectors)), '']
  if found['inference']:
    out += ['**VoCo, cached: prefill FLOPs saved by the length of the '
            'prompt (whole 7B, counted)**', '',
            *_table(('text tokens', *map(str, TEXT_LENGTHS)), [
                ['saved', *(f'{100 * voco_savings(n):.1f} %'
                            for n in TEXT_LENGTHS)]]), '']
  if found['adaptive']:
    out += ['**Adaptive counts and static shapes**', '',
            *_table(ADAPTIVE, [line for row in found['adaptive']
                               for line in _adaptive(row)]), '']
  for row in found['training']:
    if row['method'] == found['training'][0]['method']:
      out += [f'**Training, {row["dtype"]}, batch {row["batch"]}**', '']
  if found['training']:
    out += [*_table(TRAINING, map(_training, found['training'])), '']
  return '\n'.join(out)


def voco_savings(num_text: int) -> float:
  """Part of the full model's prefill FLOPs that a picture cached as one VoCo
  token saves in LLaVA-1.5-7B, projector included: the formula alone.

  Args:
    num_text: text tokens of the prompt; BOS and newline are in VoCo's cache.
  """
  plain = preset('llava_1_5_7b')
  voco = dataclasses.replace(plain, voco=VocoConfig(1),
                             voco_token_index=plain.text.vocab_size)
  layers = np.full(plain.text.num_hidden_layers, float(plain.num_visual_tokens))
  full = efficiency.prefill_cost(plain, layers, float(num_text))
  read = efficiency.voco_cost(voco, float(num_text - 2), cached=True)
  return 1.0 - float((read.projector + read.prefill) /
                     (full.projector + full.prefill))


def title(subject: str, dtype: str, batch: int) -> str:
  """Names a table."""
  return f'{subject}, {dtype}, batch {batch}'


def _groups(rows: Iterable[Mapping[str, Any]]) -> dict[tuple, list]:
  groups: dict[tuple, list] = {}
  for row in rows:
    groups.setdefault((row['subject'], row['dtype'], row['batch']), []).append(row)
  return groups


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  return ['| ' + ' | '.join(columns) + ' |',
          '|' + '|'.join([' :-- '] + [' --: '] * (len(columns) - 1)) + '|',
          *('| ' + ' | '.join(row) + ' |' for row in rows)]


def _ms(value: float) -> str:
  return '–' if value == 0 else f'{value:.3g}' if value < 1000 else f'{value:.0f}'


def _bytes(value: float | None) -> str:
  return '–' if value is None else quantity(value, 'B')


def _inference(row: Mapping[str, Any]) -> list[str]:
  return [_method(row), f'{row["visual_tokens"]:.1f}', _ms(row['vision_ms']),
          _ms(row['selector_ms']), _ms(row['prefill_ms']),
          f'{100 * row["spread"]:.0f} %', _ms(row['decode_ms']),
          _ms(row['answer_ms']), quantity(row['prefill_flops'], 'FLOP'),
          _bytes(row['kv_bytes']), _bytes(row['peak_bytes']),
          f'{row["slot_waste"]:.2f}', f'{row["time_ratio"]:.3f}',
          f'{row["flop_ratio"]:.3f}', f'{row["time_over_flops"]:.2f}']


def _method(row: Mapping[str, Any]) -> str:
  return row['method'] + MISSED * (not row.get('reached', True))


def _selector(row: Mapping[str, Any]) -> list[str]:
  name = title(row['subject'], row['dtype'], row['batch'])
  return [f'{_method(row)}, {name}', _ms(row['selector_ms']),
          f'{100 * row["selector_ms"] / row["prefill_ms"]:.1f} %',
          f'{100 * row["selector_flops"] / row["prefill_flops"]:.2f} %']


def _adaptive(row: Mapping[str, Any]) -> list[list[str]]:
  missed = MISSED * (not row.get('reached', True))
  return [[f'{row["subject"]}, {row["dtype"]}', f'{row["achieved"]:.1f}{missed}',
           name if name == 'alone' else f'{name}, {row["batch"]}',
           f'{mode["waste"]:.3f}', ', '.join(
               f'{w:.2f}' for w in row['rung_waste']) if name == 'alone' else '–',
           _ms(mode['ms_per_prompt']),
           str(row['programs']) if name == 'alone' else '–']
          for name, mode in row['modes'].items()]


def _training(row: Mapping[str, Any]) -> list[str]:
  return [row['method'], _ms(row['step_ms']), _bytes(row['temp_bytes']),
          _bytes(row['peak_bytes']), f'{row["time_ratio"]:.2f}',
          f'{row["memory_ratio"]:.2f}']


def _save(path: pathlib.Path, figure: Any) -> pathlib.Path:
  with replace(path) as temporary:
    temporary.write_bytes(report.png(figure))
  return path


def ratio_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
  """Prefill time and FLOPs of every method, as parts of the full model's."""
  groups = _groups(rows)
  columns = min(len(groups), 3)
  lines = -(-len(groups) // columns)
  figure = report.new_figure(4.4 * columns, 3.0 * lines + 0.3)
  axes = list(figure.subplots(lines, columns, squeeze=False).flat)
  for ax in axes[len(groups):]:
    ax.axis('off')
  for ax, (key, group) in zip(axes, groups.items()):
    style_axes(ax, 'part of the full model')
    places = np.arange(len(group))
    for shift, column, colour, name in (
        (-0.2, 'flop_ratio', GREY, 'prefill FLOPs'),
        (0.2, 'time_ratio', METHOD_COLOURS[0], 'prefill time')):
      values = [row[column] for row in group]
      ax.barh(places + shift, values, 0.38, color=colour, label=name)
      for place, value in zip(places, values):
        ax.text(1.05 * value, place + shift, f'{value:.2f}', fontsize=5.5,
                va='center')
    ax.set_yticks(places, [row['method'] for row in group], fontsize=6)
    ax.axvline(1.0, color=GREY, linewidth=0.6)
    ax.set(xscale='log', xlim=(0.07, 6.0))
    ax.set_xticks([0.1, 0.25, 0.5, 1, 2, 4], ['.1', '.25', '.5', '1', '2', '4'])
    ax.minorticks_off()
    ax.invert_yaxis()
    ax.set_title(title(*key), fontsize=8)
  axes[0].legend(fontsize=6, frameon=False, loc='upper right')
  return figure


def slot_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
  """Tokens that prompts kept, and the rungs that they were rounded up to."""
  figure = report.new_figure(9.0, 3.2 * len(rows))
  axes = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(3, 1))
  for (left, right), row in zip(axes, rows):
    kept = np.asarray(row['kept'])
    style_axes(left, 'prompt, by what it keeps after the first module',
               'visual tokens')
    order = np.argsort(kept[:, 0], kind='stable')
    ladder = np.asarray(row['ladder'])
    for module, after in enumerate(row['prune_after']):
      colour = METHOD_COLOURS[module]
      values = kept[order, module]
      rungs = ladder[np.searchsorted(ladder, values)]
      left.step(np.arange(len(values)), rungs, where='mid', color=colour,
                linewidth=1.0, label=f'after layer {after} of {row["num_layers"]}')
      left.plot(np.arange(len(values)), values, '.', color=colour, markersize=4)
      left.fill_between(np.arange(len(values)), values, rungs, step='mid',
                        color=colour, alpha=0.15, linewidth=0)
    for rung in ladder[ladder <= 1.5 * kept.max()]:
      left.axhline(rung, color=GREY, linewidth=0.4, linestyle=':')
    left.set_ylim(0, 1.2 * ladder[np.searchsorted(ladder, kept.max())])
    left.set_title(f'{row["subject"]}: tokens kept (dots), slots of the rung '
                   '(lines), empty slots (shaded)', fontsize=8)
    left.legend(fontsize=7, frameon=False, loc='upper left', ncols=3)
    style_axes(right, '', 'slots / tokens')
    modes = row['modes']
    names = [name if name == 'alone' else f'{name} {row["batch"]}'
             for name in modes]
    right.bar(names, [mode['waste'] for mode in modes.values()],
              color=METHOD_COLOURS[:len(modes)], width=0.6)
    right.axhline(1.0, color=GREY, linewidth=0.8)
    right.set_ylim(0.9, None)
    right.set_title('all layers, text included', fontsize=8)
  return figure
