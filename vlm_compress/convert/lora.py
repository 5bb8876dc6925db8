"""LoRA adapters folded into the kernels that they adapt.

W + alpha / rank A B is a kernel like any other: formats that know no adapters
can hold it, and it costs nothing to run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from vlm_compress.config import LlavaConfig

_A, _B = 'lora_a', 'lora_b'


def is_lora(path: str) -> bool:
  """Whether a parameter belongs to an adapter."""
  return path.endswith((f'/{_A}', f'/{_B}'))


def adapter_of(path: str, paths: Container[str]) -> tuple[str, str] | None:
  """Of a model's paths those of the A and B that adapt a kernel, or None."""
  stem, _, name = path.rpartition('/')
  adapted = name == 'kernel' and f'{stem}/{_A}' in paths
  return (f'{stem}/{_A}', f'{stem}/{_B}') if adapted else None


def folded(kernel: Any, a: Any, b: Any, scale: float) -> Any:
  """W + scale A B, computed in float32.

  Args:
    kernel: float[..., in, out], of one layer or stacked.
    a: float[..., in, R]; b: float[..., R, out].
    scale: LoraConfig.scale.

  Returns:
    The kernel's kind of array and dtype; in bfloat16 it is rounded to that.
  """
  wide = lambda x: x.astype(np.float32)
  with jax.default_matmul_precision('float32'):
    return (wide(kernel) + (scale * wide(a)) @ wide(b)).astype(kernel.dtype)


def merge(params: dict[str, Any], config: LlavaConfig
          ) -> tuple[dict[str, Any], LlavaConfig]:
  """The same model without adapters.

  Args:
    params: parameter tree, of numpy or device arrays.
    config: of the model.

  Returns:
    Parameters and config.lora=None; both as given where there are no adapters.
    All other parameters are those given, uncopied.
  """
  if config.lora is None:
    return params, config
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  out = {}
  for path, value in flat.items():
    pair = adapter_of(path, flat)
    if pair is not None:
      value = folded(value, flat[pair[0]], flat[pair[1]], config.lora.scale)
    if not is_lora(path):
      out[path] = value
  return (flax.traverse_util.unflatten_dict(out, sep='/'),
          dataclasses.replace(config, lora=None))
