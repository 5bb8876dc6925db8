"""report.html and report.md of a sweep.

The HTML is one file that needs nothing else; the Markdown has its figures in a
folder beside it.  Both are made of the same blocks (sweep_page.py).
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_compress import atomic
from vlm_compress.config import check
from vlm_compress.data.errors import DataError
from vlm_compress.eval import blocks, example_log, html_parts, markdown_parts, sweep_page
from vlm_compress.eval.answer_log import read_rows
from vlm_compress.eval.result_schema import ROW, SCHEMA, check_fields
from vlm_compress.eval.sweep_tables import benches

FOLDER = 'report_figures'


def write_report(sweep_dir: str | os.PathLike[str], *, allow_partial: bool = False
                 ) -> dict[str, pathlib.Path]:
  """Writes a sweep's report.html, report.md and the latter's figures.

  Args:
    sweep_dir: with rows.json and runs/, as result_schema.py has them.
    allow_partial: accept tables without their floors, marked as partial.

  Returns:
    {'html', 'md'}: paths.

  Raises:
    ConfigError: there is no rows.json of this version or no row in it, or floors are
      missing; nothing is written then.
    DataError: a file of a run is missing or damaged; names it.
  """
  home = pathlib.Path(sweep_dir)
  content = _content(home / 'rows.json')
  rows = [{**row, 'placement': placement(home, row)} for row in content['rows']]
  found = benches(rows, allow_partial)  # refuses before anything is read or drawn
  details: dict[str, sweep_page.Details] = {}
  for bench in found:
    cells = [row['cell'] for entry in bench.entries for row in entry.rows]
    examples = {cell: example_log.read(home / 'runs' / cell) for cell in cells}
    wanted = {key for some in examples.values() for key in some}
    for row in rows:
      if row['cell'] in examples:
        answers = _answers(home, row, bool(wanted))
        row.update(_kept(row, answers))
        details[row['cell']] = sweep_page.Details(examples[row['cell']], {
            key: answers[key] for key in wanted if key in answers})
  parts = sweep_page.page(benches(rows, allow_partial), content, details)
  paths = {'html': home / 'report.html', 'md': home / 'report.md'}
  _write_figures(home / FOLDER, parts)
  atomic.write_text(paths['md'], markdown_parts.document(sweep_page.TITLE, parts, FOLDER))
  atomic.write_text(paths['html'], html_parts.document(
      sweep_page.TITLE, html_parts.write(parts), wide=True))
  return paths


def _content(path: pathlib.Path) -> dict[str, Any]:
  """What rows.json holds."""
  check(path.is_file(), f'{path} is missing: {path.parent} is no directory of '
        'vlm-compress sweep, or that has not got to its end')
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise DataError(f'{path} is no JSON ({error}); run the sweep again, it keeps what is '
                    'finished') from error
  check_fields(content, ('schema', 'rows', 'failed', 'partial', 'times_failed'), str(path))
  check(content['schema'] == SCHEMA, f'{path} has schema {content["schema"]}, not {SCHEMA}; '
        'run the sweep again')
  check(bool(content['rows']), f'{path} has no row: no run of the sweep could be scored')
  for row in content['rows']:
    check_fields(row, ROW, f'{path}: {row.get("cell", "a row")}')
  return content


def placement(home: pathlib.Path, row: Mapping[str, Any]) -> tuple[int, ...]:
  """Layers behind which a run cuts tokens; () is in front of all, or nowhere."""
  path = home / 'runs' / row['cell'] / 'config.json'
  try:
    atp = json.loads(path.read_text(encoding='utf-8'))['model']['atp']
  except (OSError, ValueError, KeyError) as error:
    raise DataError(f'{path} is missing or damaged ({error}); delete the directory and '
                    'run the sweep again') from error
  places = tuple(atp['prune_after']) if atp else ()
  return () if places == (0,) else places


def _answers(home: pathlib.Path, row: Mapping[str, Any], shown: bool
             ) -> dict[str, dict[str, Any]]:
  """A run's answers, {} where the report needs none of them."""
  if not shown and not _is_adaptive(row):
    return {}
  path = home / 'runs' / row['cell'] / 'answers.jsonl'
  if not path.is_file():
    raise DataError(f'{path} is missing; delete the directory and run the sweep again')
  return read_rows(path)


def _is_adaptive(row: Mapping[str, Any]) -> bool:
  """Whether questions keep different numbers of tokens."""
  return any(row.get('kept_std_per_layer') or ())


def _kept(row: Mapping[str, Any], answers: Mapping[str, Mapping[str, Any]]
          ) -> dict[str, Any]:
  """`kept_counts` and `module_labels`, see tables.py; of questions with a picture."""
  if not _is_adaptive(row) or not row['placement']:
    return {}
  counts = [one['kept'] for one in answers.values()
            if 'kept' in one and sum(one['visual_tokens']) > 0]
  return {'kept_counts': counts,
          'module_labels': sweep_page.place_names(row['placement'])} if counts else {}


def _write_figures(folder: pathlib.Path, parts: Sequence[Any]) -> None:
  """Files of all figures; those of an earlier report go."""
  folder.mkdir(exist_ok=True)
  names = set()
  for one in _figures(parts):
    name = f'{one.name}.{blocks.ending(one.data)}'
    names.add(name)
    with atomic.replace(folder / name) as temporary:
      temporary.write_bytes(one.data)
  for path in folder.iterdir():
    if path.name not in names and path.suffix in ('.png', '.jpeg'):
      path.unlink()


def _figures(parts: Sequence[Any]) -> list[Any]:
  """All pictures among blocks, however deep."""
  found = []
  for part in parts:
    if isinstance(part, blocks.Section):
      found += _figures(part.blocks)
    elif isinstance(part, blocks.Example):
      found += part.strips
    elif isinstance(part, blocks.Figure):
      found.append(part)
  return found
