"""The report as Markdown: the numbers of the HTML page without pictures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vlm_compress.eval import blocks, floors, tables
from vlm_compress.eval import page as page_lib
from vlm_compress.eval.markdown_parts import rows as _md_table
from vlm_compress.eval.markdown_parts import text as _md


def render(page: page_lib.Page) -> str:
  """The Markdown text."""
  lines = [f'# {page_lib.TITLE}', '']
  lines += [f'**PARTIAL TABLE:** {_md(line)}.\n' for line in page.missing]
  lines += [f'- {_md(line)}' for line in floors.findings(page.parts)]
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
        [(_md(e.question), _md(e.answer), '; '.join(
            f'{_md(reply.name)}: {_md(reply.text)}' for reply in e.replies))
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
                for key, value in blocks.flat(values)]
  return '\n'.join(lines) + '\n'


def _escaped(cells: Iterable[Any]) -> list[str]:
  return [_md(cell) for cell in cells]
