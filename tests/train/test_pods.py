"""Meshes over the hosts and slices of a TPU pod, and the rows that hosts read."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from vlm_compress.config import ConfigError
from vlm_compress.sharding import device_grid
from vlm_compress.train.loop import share_of


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a mesh is made from; compares by value, as devices do by identity."""
  id: int
  slice_index: int
  process_index: int
  coords: tuple[int, int, int]
  core_on_chip: int = 0
  device_kind: str = 'TPU v5 lite'
  platform: str = 'tpu'


def chips(num_slices, side=4):
  """Slices of side x side chips; a host has a square of 2 x 2."""
  hosts = side // 2
  return [Chip(s * side**2 + y * side + x, s,
               s * hosts**2 + (y // 2) * hosts + x // 2, (x, y, 0))
          for s in range(num_slices) for y in range(side) for x in range(side)]


@pytest.mark.parametrize('shape', [(32, 1, 1), (2, 16, 1), (4, 4, 2), (2, 4, 4)])
def test_only_data_reaches_from_slice_to_slice(shape):
  grid = device_grid(shape, chips(2))
  assert grid.shape == shape
  assert sorted(chip.id for chip in grid.flat) == list(range(32))
  slices = [{chip.slice_index for chip in row.flat} for row in grid]
  assert slices == [{0}] * (shape[0] // 2) + [{1}] * (shape[0] // 2)


def test_a_model_over_several_slices_is_refused():
  with pytest.raises(ConfigError, match='mesh.data=1 is no multiple of the 2 slices'):
    device_grid((1, 32, 1), chips(2))


def held(grid):
  """The piece of a batch, spread over data and fsdp, of every process."""
  out = {}
  for place, row in enumerate(grid.reshape(-1, grid.shape[2])):
    for chip in row:
      out.setdefault(chip.process_index, set()).add((place, place + 1, 1))
  return out


@pytest.mark.parametrize('shape, parts', [
    ((16, 1, 1), 4), ((1, 16, 1), 4), ((1, 4, 4), 2), ((2, 4, 2), 4)])
def test_hosts_read_all_parts_of_a_batch(shape, parts):
  """A host's rows are no neighbours where the mesh winds through its square."""
  found = held(device_grid(shape, chips(1)))
  shares = {process: share_of(found, process) for process in found}
  assert {count for _, count in shares.values()} == {parts}
  for process, (index, _) in shares.items():
    for other, (other_index, _) in shares.items():
      assert (index == other_index) == (found[process] == found[other])
  assert {index for index, _ in shares.values()} == set(range(parts))


def test_rows_that_are_partly_anothers_are_refused():
  with pytest.raises(ConfigError, match='process 1 shares some rows'):
    share_of({0: {(0, 1, 1), (1, 2, 1)}, 1: {(1, 2, 1), (2, 3, 1)}}, 1)
  with pytest.raises(ConfigError, match='multiple of the number'):
    share_of({0: {(0, 1, 1), (1, 2, 1)}, 1: {(2, 3, 1)}}, 0)


FOR_PODS = """
from jax.experimental import topologies
from vlm_compress import sharding
from vlm_compress.train.loop import share_of

for name, num_slices, hosts in (('v5e:16x16', 1, 64), ('v5p:4x4x4', 1, 16),
                                ('v6e:4x8', 1, 8), ('v5e:4x4', 2, 8)):
  devices = list(topologies.get_topology_desc(
      platform='tpu', topology_name=name, num_slices=num_slices).devices)
  for fsdp, tensor in ((1, 1), (8, 1), (16, 1), (4, 4)):
    mesh = sharding.make_mesh(-1, fsdp, tensor, devices=devices)
    held = {}
    for device, index in sharding.batch_sharding(mesh).devices_indices_map(
        (512,)).items():
      held.setdefault(device.process_index, set()).add(index[0].indices(512))
    shares = {share_of(held, process) for process in held}
    (count,) = {count for _, count in shares}
    assert len(held) == hosts and len(shares) == count, (name, fsdp, tensor)
    assert tensor > 1 or count == hosts
print('spread')
"""


@pytest.mark.tpu
def test_real_topologies():
  done = subprocess.run(
      [sys.executable, '-c', FOR_PODS], text=True, capture_output=True, check=False,
      env=os.environ | dict(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1',
                            TPU_WORKER_HOSTNAMES='localhost'))
  assert done.returncode == 0 and 'spread' in done.stdout, done.stderr[-3000:]
