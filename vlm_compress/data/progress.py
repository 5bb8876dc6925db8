"""A progress bar over examples with the time that is left, quiet where nobody
looks.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
  """Gives a function that advances a bar; there is no bar outside a terminal.

  Args:
    what: stands in front of the bar.
    total: examples in all.
  """
  if not sys.stderr.isatty():
    yield lambda count: None
    return
  import rich.console
  import rich.progress
  with rich.progress.Progress(
      *rich.progress.Progress.get_default_columns(),
      rich.progress.MofNCompleteColumn(),
      console=rich.console.Console(stderr=True), transient=True) as bar:
    task = bar.add_task(what, total=total)
    yield lambda count: bar.advance(task, count)
