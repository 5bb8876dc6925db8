"""The report as Markdown: the numbers of the HTML page without pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from vlm_compress.eval import page as page_lib
from vlm_compress.eval import tables


def render(page: page_lib.Page) -> str:
  """The Markdown text."""
  lines = [f'# {page_lib.TITLE}', '']
  lines += [f'**PARTIAL TABLE:** {_md(line)}.\n' for line in page.missing]
  lines += [f'- {_md(line)}' for line in tables.findings(page.parts)]
  rows = []
  full = tables.full_tokens(page.parts)
  for part in page.parts:
    rows.append([f'**{tables.title(part, full)}**'] +
                [''] * (len(tables.COLUMNS) - 1))
    for entry in part.entries:
      cells = [_md(cell) for cell in tables.cells(entry)]
      mark = {'method': '**', 'floor': '*', 'bound': '*'}.get(entry.role, '')
      rows.append([f'{mark}{cells[0]}{mark}'] + cells[1:])
  lines += ['', *_md_table(tables.COLUMNS, rows, left=2), '',
            page_lib.HOW_TO_READ, '', '## By kind of question', '']
  columns, rows = page_lib.kind_cells(page.parts)
  lines += _md_table(_escaped(columns), map(_escaped, rows), left=1)
  if page.kept_percentiles:
    lines += ['', '## Tokens kept', '',
              *_md_table(page_lib.KEPT_COLUMNS,
                         map(_escaped, page.kept_percentiles), left=2)]
  if page.examples:
    lines += ['', '## Questions and answers', '',
              'Pictures with keep maps: `report.html`.', '']
    lines += _md_table(
        ('question', 'answer', 'predictions'),
        [(_md(e['question']), _md(e['answer']), '; '.join(
            f'{_md(m)}: {_md(p)}' for m, p in e['predictions'].items()))
         for e in page.examples], left=3)
    lines += ['', _md(page.attribution)]
  if page.stages:
    lines += ['', '## Wall-clock', '', *_md_table(
        ('stage', 'time', 'steps'),
        [(_md(s['name']), page_lib.duration(s['seconds']),
          _md(page_lib.steps(s))) for s in page.stages], left=1)]
  for heading, values in (('Configuration', page.config),
                          ('Versions', page.versions)):
    if values:
      lines += ['', f'## {heading}', '']
      lines += [f'- `{key}`: {_md(value)}'
                for key, value in page_lib.flat(values)]
  return '\n'.join(lines) + '\n'


def _md(value: Any) -> str:
  """One line of Markdown text that keeps its characters."""
  return re.sub(r'([\\|*_`<>\[\]])', r'\\\1', ' '.join(str(value).split()))


def _escaped(cells: Iterable[Any]) -> list[str]:
  return [_md(cell) for cell in cells]


def _md_table(columns: Sequence[str], rows: Iterable[Sequence[str]],
              left: int) -> list[str]:
  rule = [':--' if i < left else '--:' for i in range(len(columns))]
  return [f'| {" | ".join(line)} |' for line in (columns, rule, *rows)]
