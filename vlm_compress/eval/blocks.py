"""What pages are made of, whatever they are written in.

A page is a list of these; html_parts.py and markdown_parts.py write each of
them, so the HTML and the Markdown of a report hold the same tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

# A cell is a text, or a text and a smaller one beside it, such as an interval.
Cell = str | tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of a table.

  Attributes:
    cells: one a column; of a heading only the first.
    role: one of tables.ROLES, 'heading' of the lines below it, or ''.
    colour: of the dot in front, '' for none.
  """
  cells: tuple[Cell, ...]
  role: str = ''
  colour: str = ''


@dataclasses.dataclass(frozen=True)
class Table:
  """Columns and lines.

  Attributes:
    columns: their names.
    lines: see Line.
    left: columns of text, in front of those of numbers.
    note: below it.
  """
  columns: Sequence[Cell]
  lines: Sequence[Line]
  left: int = 1
  note: str = ''


@dataclasses.dataclass(frozen=True)
class Figure:
  """A picture with its caption.

  Attributes:
    name: of its file, without ending.
    data: of a PNG or JPEG.
    caption: below it.
    alt: what it shows, in words; '' is the caption.
  """
  name: str
  data: bytes
  caption: str
  alt: str = ''


@dataclasses.dataclass(frozen=True)
class Strip:
  """Pictures side by side.

  Attributes:
    name: of the file, without ending; title: above.
    data: of a PNG or JPEG.
    pictures: how many there are.
  """
  name: str
  title: str
  data: bytes
  pictures: int


@dataclasses.dataclass(frozen=True)
class Reply:
  """An answer: whose, its text, whether it is right (None: nobody says), and
  what else there is to say.
  """
  name: str
  text: str
  right: bool | None
  about: str = ''


@dataclasses.dataclass(frozen=True)
class Example:
  """A question with pictures and what was answered."""
  question: str
  answer: str
  strips: Sequence[Strip]
  replies: Sequence[Reply]


@dataclasses.dataclass(frozen=True)
class Note:
  """A paragraph in small type."""
  text: str


@dataclasses.dataclass(frozen=True)
class Bullets:
  """Sentences."""
  items: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Alert:
  """What must not be overlooked: `title` in bold, a sentence, and items."""
  title: str
  text: str
  items: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Names and values, nested ones as dotted names."""
  values: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading and what is below it; `level` 2 or 3."""
  heading: str
  blocks: Sequence[Any]
  level: int = 2


def ending(data: bytes) -> str:
  """Of a picture's file: 'png' or 'jpeg'."""
  return 'jpeg' if data.startswith(b'\xff\xd8') else 'png'


def flat(values: Mapping[str, Any], prefix: str = '') -> list[tuple[str, Any]]:
  """Nested mappings as dotted names."""
  found = []
  for key, value in values.items():
    if isinstance(value, Mapping) and value:
      found += flat(value, f'{prefix}{key}.')
    else:
      found.append((f'{prefix}{key}', value))
  return found
