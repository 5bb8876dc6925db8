"""A GGUF language model as if it were one of Hugging Face's.

llama.cpp's files hold weights, sizes and vocabulary together.  Weights are
dequantised one at a time, under Hugging Face's names.  For the architecture
`llama` the file has the rows of q and k in another order, because llama.cpp
rotates neighbours where Hugging Face rotates halves; they are put back.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_compress.config import ConfigError, check
from vlm_compress.convert import rules

ARCHITECTURES = ('llama', 'qwen2')
# GGUF's names of dtypes that need no dequantisation.
_PLAIN = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
_INSTALL = "pip install -e '.[convert]'"
# Keys behind '<architecture>.' and the field of config.json that they are.
_FIELDS = {
    'embedding_length': 'hidden_size', 'feed_forward_length':
    'intermediate_size', 'block_count': 'num_hidden_layers',
    'attention.head_count': 'num_attention_heads', 'attention.head_count_kv':
    'num_key_value_heads', 'attention.key_length': 'head_dim',
    'attention.layer_norm_rms_epsilon': 'rms_norm_eps', 'rope.freq_base':
    'rope_theta', 'context_length': 'max_position_embeddings'}
_OPTIONAL = {'attention.head_count_kv', 'attention.key_length',
             'rope.freq_base'}
# Roles of tokens, and the field that has the id.
_ROLES = {'bos': 'bos_token_id', 'eos': 'eos_token_id',
          'padding': 'pad_token_id'}
# Keys with the values that this code implements; other keys are refused.
_FIXED: dict[str, tuple[Any, ...]] = {
    'rope.scaling.type': ('none',), 'attention.causal': (True,),
    'attention.sliding_window': (0,), 'expert_count': (0,),
    'expert_used_count': (0,)}


def find(source: pathlib.Path) -> pathlib.Path | None:
  """The GGUF file that a checkpoint is, or None if it is of another format.

  Args:
    source: a .gguf file, or a directory that has one and no safetensors.

  Raises:
    ConfigError: several in the directory.
  """
  if source.suffix == '.gguf' and not source.is_dir():
    return source
  if not source.is_dir() or any(source.glob('*.safetensors')):
    return None
  found = sorted(source.glob('*.gguf'))
  check(len(found) < 2, f'{source} has {len(found)} .gguf files; name one of '
        f'them, such as {found[:1]}')
  return found[0] if found else None


class GgufFile:
  """The tensors of one GGUF file, by Hugging Face's keys.

  The methods are those of tensors.TensorFiles.

  Attributes:
    where: the file, for messages.
    keys: of all tensors, sorted.
    metadata: what the file says about itself.
    architecture: one of ARCHITECTURES.
  """

  def __init__(self, where: str | os.PathLike[str]):
    """Maps the file; no tensor is read.

    Raises:
      ConfigError: truncated or no GGUF, another architecture, or a tensor
        that has no place in a LLaMA.
    """
    self.where = pathlib.Path(where)
    reader = _open(self.where)
    self.metadata = {key: field.contents()
                     for key, field in reader.fields.items()}
    self.architecture = self.metadata.get('general.architecture')
    check(self.architecture in ARCHITECTURES, f'{self.where}: general.'
          f'architecture={self.architecture!r} is not supported; only '
          f'{" and ".join(ARCHITECTURES)}')
    kind = self.metadata.get('general.type', 'model')
    check(kind == 'model', f'{self.where}: general.type={kind!r}; only whole '
          'models can be converted')
    parts = self.metadata.get('split.count', 1)
    check(parts <= 1, f'{self.where} is one of {parts} parts (split.count); '
          'merge them with llama-gguf-split --merge')
    self._tensors = {_their_key(self.where, t.name): t for t in reader.tensors}
    self.keys = sorted(self._tensors)

  def shape(self, key: str) -> tuple[int, ...]:
    """The shape of a tensor; nothing is read."""
    return tuple(int(n) for n in reversed(self._tensors[key].shape))

  def dtype(self, key: str) -> str:
    """Its dtype, as numpy spells it; float32 for quantised ones.

    Raises:
      ConfigError: a kind of quantisation that the gguf package cannot undo.
    """
    kind = self._tensors[key].tensor_type
    if kind.name in _PLAIN:
      return _PLAIN[kind.name]
    check(_can_dequantise(kind), f'{self.where}: {key} is stored as '
          f'{kind.name}, which cannot be dequantised; quantise the model to '
          'Q8_0 or convert the original weights')
    return 'float32'

  def read(self, key: str) -> np.ndarray:
    """The tensor."""
    return self.part(key, slice(None))

  def part(self, key: str, index: slice) -> np.ndarray:
    """Rows of the tensor; the rest is not dequantised, but for q and k."""
    heads = self._rotated_heads(key)
    if heads:
      return _halves(self._values(key, slice(None)), heads)[index]
    return self._values(key, index)

  def _values(self, key: str, index: slice) -> np.ndarray:
    import gguf
    tensor = self._tensors[key]
    data = np.asarray(tensor.data[index])
    if tensor.tensor_type.name == 'BF16':  # the package gives bytes
      return data.view(jnp.bfloat16)
    if tensor.tensor_type.name in _PLAIN:
      return data
    return gguf.dequantize(data, tensor.tensor_type)

  def _rotated_heads(self, key: str) -> int:
    """Heads of a tensor whose rows are in llama.cpp's order; 0 for others."""
    name = {'q_proj': 'attention.head_count',
            'k_proj': 'attention.head_count_kv'}.get(key.split('.')[-2])
    if self.architecture != 'llama' or name is None:
      return 0
    values = text_values(self)
    return values['num_attention_heads' if 'kv' not in name
                  else 'num_key_value_heads']


def _open(path: pathlib.Path) -> Any:
  """The gguf package's reader."""
  try:
    import gguf
  except ModuleNotFoundError as e:
    raise ConfigError(f'{path}: reading GGUF needs the package gguf; {_INSTALL}'
                      ) from e
  check(path.is_file(), f'{path} does not exist')
  with open(path, 'rb') as file:
    check(file.read(4) == b'GGUF', f'{path} is no GGUF file')
  try:
    return gguf.GGUFReader(path)
  except Exception as e:  # whatever numpy says about bytes that are not there
    raise ConfigError(f'{path} is truncated, or of a GGUF version or tensor '
                      f'type that the gguf package does not know ({e}); '
                      'download it again, or upgrade gguf') from e


def _their_key(where: pathlib.Path, name: str) -> str:
  """llama.cpp's name -> Hugging Face's.

  Raises:
    ConfigError: a name that no LLaMA has.
  """
  check(not name.startswith('rope_freqs'), f'{where} has the tensor {name}: '
        'scaled RoPE frequencies (Llama 3.1 and later) are not supported')
  stem, _, kind = name.rpartition('.')
  layer = re.fullmatch(r'blk\.(\d+)\.(.+)', stem)
  pattern = f'blk.*.{layer[2]}' if layer else stem
  check(pattern in rules.GGUF_NAMES and kind in ('weight', 'bias'),
        f'{where}: the tensor {name} is unknown and belongs to no LLaMA or '
        'Qwen2; another architecture, or a newer llama.cpp')
  theirs = rules.GGUF_NAMES[pattern].replace('*', layer[1] if layer else '')
  return f'{theirs}.{kind}'


def _can_dequantise(kind: Any) -> bool:
  """Whether the gguf package can; it says so only by trying."""
  import gguf
  if kind.name in ('F64', 'I8', 'I16', 'I32', 'I64'):
    return False
  try:
    gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
  except NotImplementedError:
    return False
  return True


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
  """Rows x0 y0 x1 y1 ... of every head -> x0 x1 ... y0 y1 ...

  Args:
    rows: [heads * H, ...].
    heads: their number.
  """
  pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def text_values(file: GgufFile) -> dict[str, Any]:
  """What a Hugging Face config.json of the language model would say.

  Args:
    file: the model.

  Returns:
    Fields for hf_config.text_config.

  Raises:
    ConfigError: a key of the architecture is missing, or would change the
      numbers in a way that is not implemented.
  """
  start, where = f'{file.architecture}.', file.where
  found = {key.removeprefix(start): value
           for key, value in file.metadata.items() if key.startswith(start)}
  out: dict[str, Any] = {'model_type': file.architecture}
  for key, field in _FIELDS.items():
    value = found.pop(key, None)
    check(value is not None or key in _OPTIONAL, f'{where}: {start}{key} is '
          'missing')
    if value is None:
      continue
    check(isinstance(value, (int, float)) and math.isfinite(value)
          and value > 0, f'{where}: {start}{key}={value!r} is not supported; '
          'one positive number')
    out[field] = value if isinstance(value, int) else float(
        str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06
  heads = out['num_attention_heads']
  out.setdefault('num_key_value_heads', heads)
  size = out.setdefault('head_dim', out['hidden_size'] // heads)
  check('model.embed_tokens.weight' in file.keys,
        f'{where} has no tensor token_embd.weight')
  out['vocab_size'] = file.shape('model.embed_tokens.weight')[0]
  out['tie_word_embeddings'] = 'lm_head.weight' not in file.keys
  for role, field in _ROLES.items():
    out[field] = file.metadata.get(f'tokenizer.ggml.{role}_token_id')
  allowed = {**_FIXED, 'attention.value_length': (size,),
             'rope.dimension_count': (size,), 'vocab_size': (out['vocab_size'],)}
  for key, value in sorted(found.items()):
    check(key in allowed, f'{where}: {start}{key}={value!r} is unknown and '
          'might change the numbers; this model cannot be converted')
    check(value in allowed[key], f'{where}: {start}{key}={value!r} is not '
          f'supported; only {" or ".join(map(repr, allowed[key]))}')
  return out
