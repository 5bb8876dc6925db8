"""Memory that this process has in RAM, as the kernel counts it."""

from __future__ import annotations

import re
import resource
import sys

_LINE = re.compile(r'^(VmHWM|VmRSS):\s+(\d+) kB', re.MULTILINE)


def now() -> int | None:
  """Bytes resident now; None where the system doesn't say (not Linux)."""
  return _read().get('VmRSS')


def peak() -> int:
  """Bytes resident at most so far.

  On Linux of this program alone: `getrusage` starts a program at the peak of
  the process that started it, however large that was.
  """
  found = _read().get('VmHWM')
  if found is not None:
    return found
  unit = 1 if sys.platform == 'darwin' else 1024
  return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def restart_peak() -> bool:
  """The peak counts from here on; False where that can't be had."""
  try:
    with open('/proc/self/clear_refs', 'w', encoding='ascii') as file:
      file.write('5')
  except OSError:
    return False
  return True


def _read() -> dict[str, int]:
  try:
    with open('/proc/self/status', encoding='ascii') as file:
      return {name: 1024 * int(kb) for name, kb in _LINE.findall(file.read())}
  except OSError:
    return {}
