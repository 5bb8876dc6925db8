"""A progress bar over bytes, quiet where nobody looks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def byte_progress(what: str, total: int) -> Iterator[Callable[[int], Any]]:
  """Gives a function to call with the number of bytes just done."""
  console = Console(stderr=True)
  with Progress(TextColumn('{task.description}'), BarColumn(), DownloadColumn(),
                TimeRemainingColumn(), console=console, transient=True,
                disable=not console.is_terminal) as bar:
    task = bar.add_task(what, total=total)
    yield lambda count: bar.update(task, advance=count)
