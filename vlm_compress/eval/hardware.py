"""Published figures of accelerators, per chip: for utilisation and rooflines.

From the vendors' public specifications of Cloud TPU and of NVIDIA's SXM
modules; dense bfloat16, without sparsity.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip.

  Attributes:
    name: as people say it.
    flops: peak bfloat16 FLOP/s.
    hbm_bytes: memory.
    hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s to other chips, all links together, one direction.
    kinds: how jax names the device, in small letters.
  """
  name: str
  flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  kinds: tuple[str, ...]


CHIPS = (
    Chip('v4', 275e12, 32 * 2**30, 1228e9, 300e9, ('tpu v4',)),
    Chip('v5e', 197e12, 16 * 2**30, 819e9, 200e9, ('tpu v5 lite', 'tpu v5e')),
    Chip('v5p', 459e12, 95 * 2**30, 2765e9, 600e9, ('tpu v5', 'tpu v5p')),
    Chip('v6e', 918e12, 32 * 2**30, 1640e9, 448e9, ('tpu v6 lite', 'tpu v6e')),
    Chip('a100', 312e12, 80 * 2**30, 2039e9, 300e9, ('nvidia a100-sxm4-80gb',)),
    Chip('h100', 989e12, 80 * 2**30, 3350e9, 450e9, ('nvidia h100 80gb hbm3',)),
)


def chip_of(device_kind: str) -> Chip | None:
  """The chip of a jax device's `device_kind`, or None."""
  kind = device_kind.lower()
  return next((chip for chip in CHIPS if kind in chip.kinds), None)
