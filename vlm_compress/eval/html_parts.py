"""Pieces of an HTML page that needs nothing else.

Strings only; figures come inside.  Whatever was not written here (names,
questions, answers, configuration) is escaped, and the page forbids the browser
to load or run anything.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_compress.eval import blocks

STRIP_WIDTH = 150  # CSS pixels of each picture of a strip


def document(title: str, body: str, wide: bool = False) -> str:
  """The page; `body` is HTML, a `wide` page has wide tables."""
  return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
          '<meta http-equiv="Content-Security-Policy" content="default-src '
          '\'none\'; img-src data:; style-src \'unsafe-inline\'">\n'
          '<meta name="viewport" content="width=device-width, '
          f'initial-scale=1">\n<title>{text(title)}</title>\n<style>{STYLE}</style>\n'
          f'</head>\n<body{" class=wide" if wide else ""}>\n<h1>{text(title)}</h1>\n'
          f'{body}\n</body>\n</html>\n')


def text(value: Any) -> str:
  """Escaped."""
  return html.escape(str(value), quote=True)


def data_url(data: bytes) -> str:
  """A PNG or JPEG as an address that needs no file."""
  return (f'data:image/{blocks.ending(data)};base64,'
          f'{base64.b64encode(data).decode("ascii")}')


def section(heading: str, body: str, level: int = 2) -> str:
  """A heading and HTML below it."""
  if level > 2:
    return f'<h{level}>{text(heading)}</h{level}>\n{body}'
  return f'<section>\n<h2>{text(heading)}</h2>\n{body}\n</section>'


def figure(url: str, caption: str, alt: str = '') -> str:
  """A picture with its caption."""
  return (f'<figure><img src="{url}" alt="{text(alt or caption)}">'
          f'<figcaption>{text(caption)}</figcaption></figure>')


def alert(block: blocks.Alert) -> str:
  """A box in red."""
  items = ''.join(f'<li>{text(line)}</li>' for line in block.items)
  return (f'<div class="partial"><strong>{text(block.title)}</strong> '
          f'{text(block.text)}<ul>{items}</ul></div>')


def bullets(items: Sequence[str]) -> str:
  """A list, '' without items."""
  lines = ''.join(f'<li>{text(line)}</li>' for line in items)
  return f'<ul class="findings">{lines}</ul>' if lines else ''


def note(words: str) -> str:
  """A paragraph in small type; addresses become links."""
  linked = re.sub(r'https?://[^\s<>()]*[^\s<>().,;]',
                  lambda m: f'<a href="{m.group(0)}">{m.group(0)}</a>', text(words))
  return f'<p class="note">{linked}</p>'


def table(block: blocks.Table) -> str:
  """A table that scrolls where it is too wide."""
  head = ''.join(f'<th{_side(i, block)}>{_cell(name)}</th>'
                 for i, name in enumerate(block.columns))
  parts, rows = [], ''
  for line in block.lines:
    if line.role == 'heading':
      parts.append(rows)
      rows = (f'<tr class="budget"><th class=t colspan="{len(block.columns)}">'
              f'{_cell(line.cells[0])}</th></tr>')
      continue
    dot = f'<i style="background:{line.colour}"></i>' if line.colour else ''
    cells = ''.join(f'<td{_side(i, block)}>{dot if i == 0 else ""}{_cell(cell)}</td>'
                    for i, cell in enumerate(line.cells))
    rows += f'<tr{f" class={chr(34)}{line.role}{chr(34)}" if line.role else ""}>{cells}</tr>'
  body = ''.join(f'<tbody>{part}</tbody>' for part in (*parts, rows) if part)
  return (f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{body}</table></div>'
          + (note(block.note) if block.note else ''))


def _side(index: int, block: blocks.Table) -> str:
  return ' class=t' if index < block.left else ''


def _cell(cell: blocks.Cell) -> str:
  main, minor = (cell, '') if isinstance(cell, str) else cell
  return text(main) + (f' <small>{text(minor)}</small>' if minor else '')


def example(block: blocks.Example) -> str:
  """A question, pictures on the left, answers on the right."""
  strips = ''
  for strip in block.strips:
    name = f'<div class="name">{text(strip.title)}</div>' if strip.title else ''
    strips += (f'<div class="strip">{name}<img src="{data_url(strip.data)}" '
               f'style="width:{STRIP_WIDTH * strip.pictures}px" alt="Picture'
               f'{" and keep maps" if strip.pictures > 1 else ""}'
               f'{" of " + text(strip.title) if strip.title else ""}"></div>')
  replies = ''
  for reply in block.replies:
    kind, mark = {True: (' right', '✓ '), False: (' wrong', '✗ '), None: ('', '')}[
        reply.right]
    about = f' <small>{text(reply.about)}</small>' if reply.about else ''
    replies += (f'<tr><td class=t>{text(reply.name)}</td><td class="t{kind}">{mark}'
                f'{text(reply.text)}{about}</td></tr>')
  return (f'<article><h3>{text(block.question)}</h3>'
          f'<p class="answer">Answer: {text(block.answer)}</p><div class="cols">'
          f'<div>{strips}</div><table class="replies">{replies}</table></div>'
          '</article>')


def pairs(values: Mapping[str, Any]) -> str:
  """Names and values in columns."""
  items = ''.join(f'<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>'
                  for key, value in blocks.flat(values))
  return f'<dl>{items}</dl>'


_WRITERS: dict[type, Callable[[Any], str]] = {
    blocks.Table: table,
    blocks.Figure: lambda b: figure(data_url(b.data), b.caption, b.alt),
    blocks.Example: example,
    blocks.Note: lambda b: note(b.text),
    blocks.Bullets: lambda b: bullets(b.items),
    blocks.Alert: alert,
    blocks.Pairs: lambda b: pairs(b.values),
    blocks.Section: lambda b: section(b.heading, write(b.blocks), b.level),
}


def write(parts: Sequence[Any]) -> str:
  """Blocks as HTML."""
  return '\n'.join(_WRITERS[type(part)](part) for part in parts)


STYLE = '''
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue",
  "DejaVu Sans", sans-serif; color: #1d2129; background: #fff;
  max-width: 68rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 1.2rem; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .7rem; padding-bottom: .25rem;
  border-bottom: 1px solid #d9dce1; }
h3 { font-size: 1rem; margin: 1.8rem 0 .5rem; }
h4 { font-size: .86rem; margin: 1.1rem 0 .2rem; color: #59606b; }
article h3 { margin: 0; }
body.wide { max-width: 76rem; }
.scroll { overflow-x: auto; }
.scroll td small, .scroll th small { display: block; }
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
tr:not(.floor) + tr.floor td { border-top: 1px dashed #8a8f98; }
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
p.answer { margin: .1rem 0 .5rem; color: #59606b; }
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
  section, .scroll { overflow: visible; }
  a { color: inherit; }
  .wide table { font-size: 6.6pt; }
  .wide th, .wide td { padding: .15rem .22rem; white-space: normal; }
  .wide .scroll td:not(.t) { white-space: nowrap; }
  tbody:has(tr.budget) { break-inside: avoid; }
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
