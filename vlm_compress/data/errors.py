"""The error of everything that reads data.

Apart from the readers, so that a caller can catch it without importing them.
"""

from __future__ import annotations


class DataError(ValueError):
  """Data that cannot be used; the message names file and remedy."""
