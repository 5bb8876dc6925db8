"""Published figures of chips, written down a second time."""

from __future__ import annotations

import pytest

from vlm_compress.eval.hardware import CHIPS, chip_of

# name: TFLOP/s, GiB, GB/s of memory, GB/s of links, names that jax gives it.
PUBLISHED = {
    'v4': (275, 32, 1228, 300, ['TPU v4']),
    'v5e': (197, 16, 819, 200, ['TPU v5 lite', 'TPU v5e']),
    'v5p': (459, 95, 2765, 600, ['TPU v5', 'TPU v5p']),
    'v6e': (918, 32, 1640, 448, ['TPU v6 lite', 'TPU v6e']),
    'a100': (312, 80, 2039, 300, ['NVIDIA A100-SXM4-80GB']),
    'h100': (989, 80, 3350, 450, ['NVIDIA H100 80GB HBM3'])}


@pytest.mark.parametrize('name', PUBLISHED)
def test_figures_of_a_chip(name):
  flops, memory, bandwidth, links, kinds = PUBLISHED[name]
  for kind in kinds:
    chip = chip_of(kind)
    assert chip is not None and chip.name == name
    assert (chip.flops, chip.hbm_bytes) == (flops * 1e12, memory * 2**30)
    assert (chip.hbm_bandwidth, chip.link_bandwidth) == (bandwidth * 1e9, links * 1e9)


def test_all_chips_are_in_the_table():
  assert {chip.name for chip in CHIPS} == set(PUBLISHED)
  assert chip_of('cpu') is None and chip_of('TPU v9') is None
