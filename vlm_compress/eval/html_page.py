"""The report as one HTML page that needs nothing else.

Strings only; figures come as data URLs.  Whatever was not written here (names,
questions, answers, configuration) is escaped, and the page forbids the browser
to load or run anything.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_compress.eval import figures, scoring, tables
from vlm_compress.eval import page as page_lib


def render(page: page_lib.Page) -> str:
  """The HTML page."""
  blocks = [_partial(page.missing), _findings(page.parts),
            _figure(page.accuracy_url, 'Accuracy against visual tokens. Bars '
                    'are 95 % intervals; markers of one budget are set apart '
                    'a little. Hollow markers: training-free.'),
            _section('Methods beside their floors', _main_table(page.parts) +
                     f'<p class="note">{_text(page_lib.HOW_TO_READ)}</p>'),
            _section('By kind of question', _kind_table(page.parts))]
  if page.kept_url:
    blocks.append(_section(
        'Tokens kept', _figure(page.kept_url, page_lib.KEPT_CAPTION) +
        (_table(page_lib.KEPT_COLUMNS, page.kept_percentiles, left=2)
         if page.kept_percentiles else '')))
  if page.examples:
    blocks.append(_section('Pictures, questions, answers', ''.join(
        map(_example, page.examples)) + _attribution(page.attribution)))
  if page.stages:
    blocks.append(_section('Wall-clock', _stages(page.stages)))
  for heading, values in (('Configuration', page.config),
                          ('Versions', page.versions)):
    if values:
      blocks.append(_section(heading, _key_values(values)))
  return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
          '<meta http-equiv="Content-Security-Policy" content="default-src '
          '\'none\'; img-src data:; style-src \'unsafe-inline\'">\n'
          '<meta name="viewport" content="width=device-width, '
          f'initial-scale=1">\n<title>{page_lib.TITLE}</title>\n<style>{STYLE}</style>\n'
          f'</head>\n<body>\n<h1>{page_lib.TITLE}</h1>\n' + '\n'.join(blocks) +
          '\n</body>\n</html>\n')


# ------------------------------------------------------------------- HTML


def _text(value: Any) -> str:
  return html.escape(str(value), quote=True)


def _section(heading: str, body: str) -> str:
  return f'<section>\n<h2>{_text(heading)}</h2>\n{body}\n</section>'


def _figure(url: str, caption: str) -> str:
  return (f'<figure><img src="{url}" alt="{_text(caption)}">'
          f'<figcaption>{_text(caption)}</figcaption></figure>')


def _partial(missing: Sequence[str]) -> str:
  if not missing:
    return ''
  items = ''.join(f'<li>{_text(line)}.</li>' for line in missing)
  return (f'<div class="partial"><strong>Partial table.</strong> It must not be '
          f'read as a comparison:<ul>{items}</ul></div>')


def _findings(parts: Sequence[tables.Section]) -> str:
  items = ''.join(f'<li>{_text(line)}</li>' for line in tables.findings(parts))
  return f'<ul class="findings">{items}</ul>' if items else ''


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]],
           left: int) -> str:
  """Cells are escaped; the first `left` columns are text."""
  def line(cells, tag):
    return '<tr>' + ''.join(
        f'<{tag}{" class=t" if i < left else ""}>{_text(cell)}</{tag}>'
        for i, cell in enumerate(cells)) + '</tr>'
  return (f'<table><thead>{line(columns, "th")}</thead><tbody>' +
          ''.join(line(row, 'td') for row in rows) + '</tbody></table>')


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
             f'{_text(tables.title(part, full))}</th></tr>')
    for entry in part.entries:
      cells = [_text(cell) for cell in tables.cells(entry)]
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
  roles = [entry.role for part in parts for entry in part.entries]
  head = '<th class=t>method</th>' + ''.join(
      f'<th>{_text(name).replace(" (", "<br><small>(")}</small></th>'
      for name in columns[1:])
  body = ''
  for role, row in zip(roles, rows):
    body += f'<tr class="{role}"><td class=t>{_text(row[0])}</td>'
    for cell in row[1:]:
      value, _, interval = cell.partition(' ')
      body += f'<td>{_text(value)} <small>{_text(interval)}</small></td>'
    body += '</tr>'
  return (f'<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
          '<p class="note">Accuracy in per cent with its 95 % interval; after '
          'the name, layer-average tokens.</p>')


def _example(example: Mapping[str, Any]) -> str:
  answer = example['answer']
  strips = ''
  for method, (url, pictures) in example['figures'].items():
    name = f'<div class="name">{_text(method)}</div>' if method else ''
    strips += (f'<div class="strip">{name}<img src="{url}" style="width:'
               f'{150 * pictures}px" alt="Picture and keep maps'
               f'{" of " + _text(method) if method else ""}"></div>')
  replies = ''
  for method, text in example['predictions'].items():
    right = scoring.normalise(text) == scoring.normalise(answer)
    replies += (f'<tr><td class=t>{_text(method)}</td><td class="t '
                f'{"right" if right else "wrong"}">{"✓" if right else "✗"} '
                f'{_text(text)}</td></tr>')
  return (f'<article><h3>{_text(example["question"])}</h3>'
          f'<p class="answer">Answer: {_text(answer)}</p><div class="cols">'
          f'<div>{strips}</div><table class="replies">{replies}</table></div>'
          '</article>')


def _attribution(text: str) -> str:
  linked = re.sub(r'https?://[^\s<>()]*[^\s<>().,;]',
                  lambda m: f'<a href="{m.group(0)}">{m.group(0)}</a>',
                  _text(text))
  return (f'<p class="note">{linked} Shown here with dropped cells faded out; '
          'these figures are under the same licence.</p>')


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
  longest = max(max(s['seconds'] for s in stages), 1e-9)
  total = sum(s['seconds'] for s in stages)
  rows = ''
  for stage in stages:
    width = 240 * stage['seconds'] / longest
    rows += (f'<tr><td class=t>{_text(stage["name"])}</td>'
             f'<td>{page_lib.duration(stage["seconds"])}</td>'
             f'<td>{_text(page_lib.steps(stage))}</td><td class=t><span '
             f'class="bar" style="width:{width:.0f}px"></span></td></tr>')
  return ('<table class="narrow"><thead><tr><th class=t>stage</th><th>time</th>'
          '<th>steps</th><th></th></tr></thead><tbody>' + rows + '</tbody>'
          f'<tfoot><tr><td class=t>total</td><td>{page_lib.duration(total)}</td>'
          '<td></td><td></td></tr></tfoot></table>')


def _key_values(values: Mapping[str, Any]) -> str:
  items = ''.join(f'<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>'
                  for key, value in page_lib.flat(values))
  return f'<dl>{items}</dl>'


STYLE = '''
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue",
  "DejaVu Sans", sans-serif; color: #1d2129; background: #fff;
  max-width: 68rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 1.2rem; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .7rem; padding-bottom: .25rem;
  border-bottom: 1px solid #d9dce1; }
h3 { font-size: 1rem; margin: 0; }
a { color: #1f5fa8; }
figure { margin: 1rem 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption, .note { font-size: .82rem; color: #59606b; margin: .5rem 0 0; }
.findings { padding-left: 1.1rem; }
.findings li { margin: .25rem 0; }
.partial { border-left: 4px solid #b3261e; background: #fdf0ef;
  padding: .6rem 1rem; margin: 1rem 0; }
.partial ul { margin: .3rem 0 0; padding-left: 1.1rem; }
table { border-collapse: collapse; width: 100%; font-size: .82rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .28rem .45rem; vertical-align: middle;
  white-space: nowrap; }
.t { text-align: left; }
thead th { font-weight: 600; color: #59606b; border-bottom: 1px solid #8a8f98;
  vertical-align: bottom; white-space: normal; }
tbody tr { border-bottom: 1px solid #eceef1; }
tr.budget th { padding-top: .9rem; font-weight: 600; color: #59606b;
  white-space: normal; }
tr.method td { font-weight: 600; background: #f3f7fc; }
tr.floor td, tr.bound td { color: #59606b; }
tr.floor td:first-child, tr.bound td:first-child { padding-left: 1.3rem; }
td i { display: inline-block; width: .6em; height: .6em; border-radius: 50%;
  margin-right: .5em; }
small { font-weight: 400; color: #59606b; font-size: .9em; }
.main td small { border: 1px solid #d9dce1; border-radius: 3px;
  padding: 0 .3em; margin-left: .3em; }
svg { display: block; }
th.scale { font-weight: 400; text-align: left; white-space: nowrap;
  min-width: 100px; font-size: .72rem; }
th.scale span { float: right; }
.narrow { width: auto; }
tfoot td { border-top: 1px solid #8a8f98; font-weight: 600; }
.bar { display: inline-block; height: .6em; background: #9fb9d6; }
article { margin: 1.3rem 0 1.8rem; break-inside: avoid; }
.answer { margin: .1rem 0 .5rem; color: #59606b; }
.cols { display: flex; gap: 1.5rem; flex-wrap: wrap; align-items: flex-start; }
.strip { margin-bottom: .4rem; }
.strip img { display: block; height: auto; max-width: 100%; }
.strip .name { font-size: .82rem; font-weight: 600; }
.replies { width: auto; flex: 1 1 14rem; }
.replies td { white-space: normal; }
.right { color: #1e6b45; }
.wrong { color: #b3261e; }
dl { columns: 3 15rem; column-gap: 2rem; font-size: .76rem; margin: 0; }
dl div { break-inside: avoid; display: flex; gap: .6em;
  justify-content: space-between; border-bottom: 1px dotted #d9dce1; }
dt { color: #59606b; overflow-wrap: anywhere; }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
section { overflow-x: auto; }
@page { size: A4; margin: 14mm 12mm; }
@media print {
  body { font-size: 9.5pt; max-width: none; margin: 0; padding: 0;
    print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  section { overflow: visible; }
  h2, h3 { break-after: avoid; }
  figure, tr, .partial, .main tbody { break-inside: avoid; }
  thead { display: table-header-group; }
  table { font-size: 7.6pt; }
  th, td { padding: .2rem .3rem; }
  .strip img { max-width: 11.5cm; }
  svg { width: 80px; height: 10px; }
  th.scale { min-width: 80px; }
}
'''
