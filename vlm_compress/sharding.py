"""Mesh, logical axis rules and the one way to constrain an activation.

Sharding is data: parameters and a few activations carry logical axis names,
RULES maps the names to mesh axes, and nothing else in the code knows about
devices.  `constrain` exists because a misspelt logical axis is otherwise
silently left unsharded.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm_compress.config import LlavaConfig, check

MESH_AXES = ('data', 'fsdp', 'tensor')

# logical axis -> mesh axis (or axes); None is replicated
RULES: dict[str, Any] = {
    'batch': ('data', 'fsdp'),
    'length': None,
    'embed': 'fsdp',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'mlp': 'tensor',
    'vocab': 'tensor',
    'layers': None,
    'modules': None,
    'act_embed': None,
}


@dataclasses.dataclass(frozen=True)
class MeshSpec:
  """Devices along each axis; see `make_mesh`.

  Attributes:
    data: copies of the model; -1 takes what is left.
    fsdp: parameters, optimiser and batch are split over these.
    tensor: heads and inner sizes are split over these.
  """
  data: int = -1
  fsdp: int = 1
  tensor: int = 1

  def __post_init__(self):
    check(self.data == -1 or self.data >= 1, f'mesh.data={self.data}: at least '
          '1, or -1 for what is left')
    for name in ('fsdp', 'tensor'):
      check(getattr(self, name) >= 1, f'mesh.{name}={getattr(self, name)}: at '
            'least 1')


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1,
              devices: list[jax.Device] | None = None) -> Mesh:
  """A (data, fsdp, tensor) mesh over all devices.

  Args:
    data, fsdp, tensor: devices along each axis; data=-1 takes what is left.
    devices: devices to use, all of them by default.

  Returns:
    A mesh with automatic axes.  Neighbours in it are neighbours on the chips'
    network; of several slices, only `data` reaches from one to the other.

  Raises:
    ConfigError: the product is not the number of devices, or data is no
      multiple of the number of slices.
  """
  devices = jax.devices() if devices is None else devices
  num_devices = len(devices)
  if data == -1:
    check(num_devices % (fsdp * tensor) == 0,
          f'mesh fsdp={fsdp} x tensor={tensor} does not divide '
          f'{num_devices} devices')
    data = num_devices // (fsdp * tensor)
  shape = (data, fsdp, tensor)
  check(math.prod(shape) == num_devices,
        f'mesh data={data} x fsdp={fsdp} x tensor={tensor} needs '
        f'{math.prod(shape)} devices, but there are {num_devices}; '
        'data=-1 takes all that are left')
  return Mesh(device_grid(shape, devices), MESH_AXES,
              axis_types=(AxisType.Auto,) * 3)


def device_grid(shape: tuple[int, int, int], devices: list[jax.Device]
                ) -> np.ndarray:
  """Devices as an array of the shape (data, fsdp, tensor).

  Raises:
    ConfigError: data is no multiple of the number of slices.
  """
  slices = len({getattr(device, 'slice_index', None) for device in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(
        shape, devices, allow_split_physical_axes=True)
  check(shape[0] % slices == 0, f'mesh.data={shape[0]} is no multiple of the '
        f'{slices} slices: between slices only copies of the model exchange '
        'gradients; lower mesh.fsdp or mesh.tensor')
  return mesh_utils.create_hybrid_device_mesh(
      (shape[0] // slices, *shape[1:]), (slices, 1, 1), devices,
      allow_split_physical_axes=True)


def partition_spec(logical_axes: tuple[str | None, ...]) -> PartitionSpec:
  """PartitionSpec of logical axis names; an unknown name raises."""
  for name in logical_axes:
    check(name is None or name in RULES,
          f'unknown logical axis {name!r}; known: {sorted(RULES)}')
  return PartitionSpec(*(RULES[n] if n is not None else None
                         for n in logical_axes))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
  """Constrains an activation's sharding under the mesh of `jax.set_mesh`.

  Without a mesh it only checks the names.  Axes that a dimension's size does
  not divide are left alone.
  """
  check(len(logical_axes) == x.ndim,
        f'{len(logical_axes)} logical axes {logical_axes} for an array of '
        f'shape {x.shape}')
  spec = partition_spec(logical_axes)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  fitting = [axes if _divides(size, axes, mesh) else None
             for size, axes in zip(x.shape, spec)]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting))


def check_sizes(config: LlavaConfig, mesh: Mesh, with_vision: bool) -> None:
  """Whether a mesh splits the kernels of a model; see `tree_shardings`.

  Args:
    config: of the model.
    mesh: devices.
    with_vision: the CLIP tower is among the parameters.

  Raises:
    ConfigError: fsdp or tensor does not divide what it should split.
  """
  text, vision = config.text, config.vision
  for axis, name, size in (
      ('tensor', 'text.num_attention_heads', text.num_attention_heads),
      ('tensor', 'text.intermediate_size', text.intermediate_size),
      ('fsdp', 'text.hidden_size', text.hidden_size),
      *[('fsdp', 'vision.hidden_size', vision.hidden_size)] * with_vision):
    check(size % mesh.shape[axis] == 0, f'mesh.{axis}={mesh.shape[axis]} does '
          f'not divide {name}={size}, so every device would hold kernels whole; '
          'use a divisor of it')


def tree_shardings(abstract_params: Any, mesh: Mesh) -> Any:
  """NamedShardings of a parameter tree with Linen's partitioning metadata.

  Axes that a dimension's size does not divide are replicated: see `check_sizes`
  for those that must not be.

  Args:
    abstract_params: tree of (boxed) arrays or ShapeDtypeStructs.
    mesh: the mesh.

  Returns:
    The same tree, unboxed, of NamedSharding.
  """
  def leaf(x):
    names = x.names if isinstance(x, nn.Partitioned) else ()
    value = x.value if isinstance(x, nn.Partitioned) else x
    spec = partition_spec(tuple(names))
    fitting = [axes if _divides(size, axes, mesh) else None
               for size, axes in zip(value.shape, spec)]
    return NamedSharding(mesh, PartitionSpec(*fitting))
  return jax.tree.map(leaf, abstract_params,
                      is_leaf=lambda x: isinstance(x, nn.Partitioned))


def unbox(tree: Any) -> Any:
  """A tree without Linen's partitioning metadata, whatever mesh is set."""
  is_box = lambda x: isinstance(x, nn.Partitioned)
  return jax.tree.map(lambda x: x.value if is_box(x) else x, tree,
                      is_leaf=is_box)


def _divides(size: int, axes: Any, mesh: Mesh) -> bool:
  if axes is None:
    return True
  axes = (axes,) if isinstance(axes, str) else axes
  return size % math.prod(mesh.shape[a] for a in axes) == 0


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of an array whose first axis is the batch."""
  return NamedSharding(mesh, partition_spec(('batch',)))


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())
