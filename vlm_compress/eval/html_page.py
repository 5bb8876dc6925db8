"""The report as one HTML page that needs nothing else.

Made of the pieces of html_parts.py, with a table that draws intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_compress.eval import blocks, figures, floors, html_parts, tables
from vlm_compress.eval import page as page_lib


def render(page: page_lib.Page) -> str:
  """The HTML page."""
  body = [html_parts.alert(blocks.Alert(
      'Partial table.', 'It must not be read as a comparison:',
      [f'{line}.' for line in page.missing]))] if page.missing else []
  body += [html_parts.bullets(floors.findings(page.parts)),
           html_parts.figure(page.accuracy_url, 'Accuracy against visual tokens. Bars '
                             'are 95 % intervals; markers of one budget are set apart '
                             'a little. Hollow markers: training-free.'),
           html_parts.section('Methods beside their floors', _main_table(page.parts) +
                              html_parts.note(page_lib.HOW_TO_READ)),
           html_parts.section('By kind of question', _kind_table(page.parts))]
  if page.kept_url:
    body.append(html_parts.section(
        'Tokens kept', html_parts.figure(page.kept_url, page_lib.KEPT_CAPTION) +
        (html_parts.table(page_lib.kept_table(page)) if page.kept_percentiles else '')))
  if page.examples:
    body.append(html_parts.section('Pictures, questions, answers', html_parts.write(
        page.examples) + html_parts.note(page_lib.credit(page.attribution))))
  if page.stages:
    body.append(html_parts.section('Wall-clock', _stages(page.stages)))
  for heading, values in (('Configuration', page.config),
                          ('Versions', page.versions)):
    if values:
      body.append(html_parts.section(heading, html_parts.pairs(values)))
  return html_parts.document(page_lib.TITLE, '\n'.join(body))


def _main_table(parts: Sequence[tables.Section]) -> str:
  columns = ('tokens in', 'tokens avg', 'prefill', 'KV cache', 'accuracy')
  low = min(entry.ci95[0] for part in parts for entry in part.entries)
  low = min(int(10 * low) / 10, 0.9)
  scale = f'{100 * low:.0f} % <span>100 %</span>'
  head = ('<tr><th class=t>method</th>'
          + ''.join(f'<th>{name}</th>' for name in columns) +
          f'<th class="scale">{scale}</th><th class=t>95 % interval</th>'
          '<th>of full</th><th>retention</th><th>n</th></tr>')
  colours, full = figures.method_colours(parts), tables.full_tokens(parts)
  body = ''
  for part in parts:
    body += (f'<tbody><tr class="budget"><th class=t colspan="11">'
             f'{html_parts.text(tables.title(part, full))}</th></tr>')
    for entry in part.entries:
      cells = [html_parts.text(cell) for cell in tables.cells(entry)]
      colour = colours.get(entry.method, figures.GREY if entry.role == 'floor'
                           else figures.INK)
      tag = ' <small>floor</small>' if entry.role == 'floor' else ''
      if not entry.trained and entry.role in ('floor', 'method'):
        tag += ' <small>training-free</small>'
      seeds = f' × {cells[11]} seeds' if len(entry.rows) > 1 else ''
      body += (f'<tr class="{entry.role}"><td class=t><i style="background:'
               f'{colour}"></i>{cells[0]}{tag}</td>'
               + ''.join(f'<td>{cell}</td>' for cell in cells[2:7]) +
               f'<td>{_whisker(entry, low, colour)}</td>'
               f'<td class=t>{cells[7]}</td><td>{cells[8]}</td>'
               f'<td>{cells[9]}</td><td>{cells[10]}{seeds}</td></tr>')
    body += '</tbody>'
  return f'<table class="main"><thead>{head}</thead>{body}</table>'


def _whisker(entry: tables.Entry, low: float, colour: str) -> str:
  """Accuracy and interval as a dot on a line from `low` to 1."""
  def x(share):
    return 3 + 94 * (min(max(share, low), 1.0) - low) / (1 - low)
  a, b, c = (x(v) for v in (entry.ci95[0], entry.accuracy, entry.ci95[1]))
  radius = 3.4 if entry.role == 'method' else 2.4
  return ('<svg viewBox="0 0 100 12" width="100" height="12" aria-hidden="true">'
          '<line x1="3" y1="6" x2="97" y2="6" stroke="#d9dce1"/>'
          f'<line x1="{a:.1f}" y1="6" x2="{c:.1f}" y2="6" stroke="{colour}" '
          f'stroke-width="2"/><circle cx="{b:.1f}" cy="6" r="{radius}" '
          f'fill="{colour}"/></svg>')


def _kind_table(parts: Sequence[tables.Section]) -> str:
  columns, rows = page_lib.kind_cells(parts)
  split = lambda cell: cell.partition(' ')[::2]
  return html_parts.table(blocks.Table(
      [columns[0], *[tuple(name.split(' ', 1)) for name in columns[1:]]],
      [blocks.Line((row[0], *map(split, row[1:])), entry.role) for entry, row in zip(
          (entry for part in parts for entry in part.entries), rows)],
      note='Accuracy in per cent with its 95 % interval; after the name, layer-average '
      'tokens.'))


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
  longest = max(max(s['seconds'] for s in stages), 1e-9)
  total = sum(s['seconds'] for s in stages)
  rows = ''
  for stage in stages:
    width = 240 * stage['seconds'] / longest
    rows += (f'<tr><td class=t>{html_parts.text(stage["name"])}</td>'
             f'<td>{page_lib.duration(stage["seconds"])}</td>'
             f'<td>{html_parts.text(page_lib.steps(stage))}</td><td class=t><span '
             f'class="bar" style="width:{width:.0f}px"></span></td></tr>')
  return ('<table class="narrow"><thead><tr><th class=t>stage</th><th>time</th>'
          '<th>steps</th><th></th></tr></thead><tbody>' + rows + '</tbody>'
          f'<tfoot><tr><td class=t>total</td><td>{page_lib.duration(total)}</td>'
          '<td></td><td></td></tr></tfoot></table>')
