"""Pieces of a report in Markdown; figures are files beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vlm_compress.eval import blocks

_MARKS = {'method': '**', 'floor': '*', 'bound': '*', 'heading': '**'}


def document(title: str, parts: Sequence[Any], folder: str) -> str:
  """The text; figures are in `folder`, relative to it."""
  return f'# {text(title)}\n\n{write(parts, folder)}\n'


def text(value: Any) -> str:
  """One line of Markdown text that keeps its characters."""
  return re.sub(r'([\\|*_`<>\[\]])', r'\\\1', ' '.join(str(value).split()))


def rows(columns: Sequence[str], lines: Iterable[Sequence[str]],
         left: int) -> list[str]:
  """Lines of a table; cells are Markdown, the first `left` columns are text."""
  rule = [':--' if i < left else '--:' for i in range(len(columns))]
  return [f'| {" | ".join(line)} |' for line in (columns, rule, *lines)]


def picture(block: blocks.Figure | blocks.Strip, alt: str, folder: str) -> str:
  """A picture's file."""
  return f'![{text(alt)}]({folder}/{block.name}.{blocks.ending(block.data)})'


def table(block: blocks.Table) -> str:
  """A table; methods are bold, floors and bounds slanted."""
  lines = []
  for line in block.lines:
    cells, mark = [_cell(cell) for cell in line.cells], _MARKS.get(line.role, '')
    cells += [''] * (len(block.columns) - len(cells))
    lines.append([f'{mark}{cells[0]}{mark}', *cells[1:]])
  out = '\n'.join(rows([_cell(name) for name in block.columns], lines, block.left))
  return out + (f'\n\n{text(block.note)}' if block.note else '')


def _cell(cell: blocks.Cell) -> str:
  return text(cell if isinstance(cell, str) else ' '.join(part for part in cell if part))


def example(block: blocks.Example, folder: str) -> str:
  """A question, its pictures below each other, and a table of answers."""
  strips = '\n\n'.join(
      (f'{text(strip.title)}:\n\n' if strip.title else '') + picture(
          strip, f'Picture and keep maps of {strip.title}' if strip.title else 'Picture',
          folder) for strip in block.strips)
  mark = {True: '✓', False: '✗', None: ''}
  replies = '\n'.join(rows(
      ('method', '', 'answer', ''), [
          (text(r.name), mark[r.right], text(r.text), text(r.about))
          for r in block.replies], left=4))
  return (f'#### {text(block.question)}\n\nAnswer: {text(block.answer)}\n\n{strips}\n\n'
          f'{replies}')


def _alert(block: blocks.Alert) -> str:
  items = '\n'.join(f'- {text(item)}' for item in block.items)
  return f'**{text(block.title.upper())}** {text(block.text)}\n\n{items}'


_WRITERS: dict[type, Callable[[Any, str], str]] = {
    blocks.Table: lambda b, _: table(b),
    blocks.Figure: lambda b, folder: (
        f'{picture(b, b.alt or b.caption, folder)}\n\n{text(b.caption)}'),
    blocks.Example: example,
    blocks.Note: lambda b, _: text(b.text),
    blocks.Bullets: lambda b, _: '\n'.join(f'- {text(item)}' for item in b.items),
    blocks.Alert: lambda b, _: _alert(b),
    blocks.Pairs: lambda b, _: '\n'.join(
        f'- `{key}`: {text(value)}' for key, value in blocks.flat(b.values)),
    blocks.Section: lambda b, folder: (
        f'{"#" * b.level} {text(b.heading)}\n\n{write(b.blocks, folder)}'),
}


def write(parts: Sequence[Any], folder: str) -> str:
  """Blocks as Markdown."""
  return '\n\n'.join(_WRITERS[type(part)](part, folder) for part in parts)
