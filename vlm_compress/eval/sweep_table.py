"""A sweep's table as table.csv and table.parquet."""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_compress import atomic
from vlm_compress.eval.result_schema import TABLE
from vlm_compress.eval.sweep_rows import flat

# Columns that are no float64.
_TEXTS = ('cell', 'benchmark', 'split', 'checkpoint', 'method', 'method_key', 'metric')
_WHOLE, _FLAGS = ('seed', 'n', 'n_asked', 'n_benchmark'), ('trained', 'partial')


def write(directory: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> list[pathlib.Path]:
  """Writes both files, each whole or not at all.

  Args:
    directory: of the sweep.
    rows: of result_schema.py; null is an empty cell.

  Returns:
    Their paths.
  """
  lines = [flat(row, TABLE) for row in rows]
  text = io.StringIO()
  writer = csv.DictWriter(text, TABLE, lineterminator='\n')
  writer.writeheader()
  writer.writerows(lines)
  paths = [directory / 'table.csv', directory / 'table.parquet']
  atomic.write_text(paths[0], text.getvalue())
  with atomic.replace(paths[1]) as temporary:
    _write_parquet(temporary, lines)
  return paths


def _write_parquet(path: pathlib.Path, lines: Sequence[Mapping[str, Any]]) -> None:
  import pyarrow
  import pyarrow.parquet
  kind = lambda name: (
      pyarrow.string() if name in _TEXTS else pyarrow.int64() if name in _WHOLE else
      pyarrow.bool_() if name in _FLAGS else pyarrow.float64())
  schema = pyarrow.schema([(name, kind(name)) for name in TABLE])
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(lines), schema), path)
