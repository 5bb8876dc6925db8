"""Parameter names of public checkpoints, and ours: the conversion on one page.

A rule is (their name, our path, how the array moves).  `*` is the number of a
layer: they have one array per layer, we have one for all, with the layer as
leading axis.  A part of a model (decoder, head, vision tower, projector) has
the same names behind the prefix in every layout; the layouts differ in the
prefixes, and a part is recognised by any of its names.

  layout                    decoder                tower
  Hugging Face LLaVA        language_model.model.  vision_tower.[vision_model.]
  the same, as in memory    model.language_model.  model.vision_tower.[...]
  original LLaVA, VoCo      model.                 model.vision_tower.vision_tower.
  parts of one's own        [model.]               [vision_model.]
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

import numpy as np

from vlm_compress.config import ConfigError

Rule = tuple[str, str, str]

# How an array of theirs becomes one of ours, and back.
TO_OURS = {
    'same': lambda w: w,
    'transpose': lambda w: np.swapaxes(w, 0, 1),  # out, in -> in, out
    'patches': lambda w: np.transpose(w, (2, 3, 1, 0)),  # D 3 y x -> y x 3 D
}
TO_THEIRS = {
    'same': lambda w: w,
    'transpose': lambda w: np.swapaxes(w, 0, 1),
    'patches': lambda w: np.transpose(w, (3, 2, 0, 1)),
}


def _dense(theirs: str, ours: str, bias: bool) -> list[Rule]:
  rules = [(f'{theirs}.weight', f'{ours}/kernel', 'transpose')]
  return rules + [(f'{theirs}.bias', f'{ours}/bias', 'same')] * bias


def _layer_norm(theirs: str, ours: str) -> list[Rule]:
  return [(f'{theirs}.{name}', f'{ours}/{name}', 'same')
          for name in ('weight', 'bias')]


def decoder_rules(attention_bias: bool) -> list[Rule]:
  """LLaMA; Qwen2 with biases on q, k and v."""
  rules = [('embed_tokens.weight', 'embed_tokens/embedding', 'same'),
           ('norm.weight', 'norm/weight', 'same')]
  for name in ('input_layernorm', 'post_attention_layernorm'):
    rules += [(f'layers.*.{name}.weight', f'layers/{name}/weight', 'same')]
  for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj'):
    rules += _dense(f'layers.*.self_attn.{name}', f'layers/self_attn/{name}',
                    attention_bias and name != 'o_proj')
  for name in ('gate_proj', 'up_proj', 'down_proj'):
    rules += _dense(f'layers.*.mlp.{name}', f'layers/mlp/{name}', False)
  return rules


def head_rules() -> list[Rule]:
  """The output matrix, where it is not the embedding again."""
  return [('weight', 'lm_head/kernel', 'transpose')]


def tower_rules() -> list[Rule]:
  """CLIP's vision transformer; their spelling of pre_layrnorm."""
  rules = [('embeddings.class_embedding', 'embeddings/class_embedding', 'same'),
           ('embeddings.patch_embedding.weight',
            'embeddings/patch_embedding/kernel', 'patches'),
           ('embeddings.position_embedding.weight',
            'embeddings/position_embedding/embedding', 'same')]
  rules += _layer_norm('pre_layrnorm', 'pre_layrnorm')
  for name in ('layer_norm1', 'layer_norm2'):
    rules += _layer_norm(f'encoder.layers.*.{name}', f'layers/{name}')
  for name in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
    rules += _dense(f'encoder.layers.*.self_attn.{name}',
                    f'layers/self_attn/{name}', True)
  for name in ('fc1', 'fc2'):
    rules += _dense(f'encoder.layers.*.mlp.{name}', f'layers/mlp/{name}', True)
  return rules


def projector_rules(original: bool = False) -> list[Rule]:
  """LLaVA-1.5's MLP; the original code numbers the layers 0 and 2."""
  names = ('0', '2') if original else ('linear_1', 'linear_2')
  return [rule for theirs, ours in zip(names, ('linear_1', 'linear_2'))
          for rule in _dense(theirs, ours, True)]


@dataclasses.dataclass(frozen=True)
class Part:
  """Where a part of a model is found.

  Attributes:
    root: first component of our paths.
    rules: all that it can have.
    prefixes: theirs; the first one is written by the export.
  """
  root: str
  rules: list[Rule]
  prefixes: tuple[str, ...]


PARTS = {
    'decoder': Part('language_model', decoder_rules(True),
                    ('language_model.model.', 'model.language_model.',
                     'model.', '')),
    'head': Part('language_model', head_rules(),
                 ('language_model.lm_head.', 'lm_head.')),
    'tower': Part('vision_tower', tower_rules(),
                  ('vision_tower.vision_model.', 'vision_tower.',
                   'model.vision_tower.vision_model.', 'model.vision_tower.',
                   'model.vision_tower.vision_tower.vision_model.',
                   'model.vision_tower.vision_tower.', 'vision_model.', '')),
    'projector': Part('multi_modal_projector', projector_rules(),
                      ('multi_modal_projector.',
                       'model.multi_modal_projector.')),
    'original projector': Part('multi_modal_projector', projector_rules(original=True),
                               ('model.mm_projector.', 'mm_projector.')),
}
# Buffers that the config determines.
LEFT_OUT = ('rotary_emb.inv_freq', 'embeddings.position_ids')
# The norm behind the tower's last layer, which LLaVA skips: kept with the
# weights so that an export gives it back.
CARRIED = _layer_norm('post_layernorm', 'post_layernorm')
# The other half of a whole CLIP model.
CLIP_TEXT = ('text_model.', 'text_projection.', 'visual_projection.',
             'logit_scale')


# Tensors of a GGUF file by llama.cpp's names, without .weight or .bias; they
# become the names of a language model of one's own.
GGUF_NAMES = {
    'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm',
    'output': 'lm_head', 'blk.*.attn_norm': 'model.layers.*.input_layernorm',
    'blk.*.ffn_norm': 'model.layers.*.post_attention_layernorm',
    'blk.*.attn_q': 'model.layers.*.self_attn.q_proj',
    'blk.*.attn_k': 'model.layers.*.self_attn.k_proj',
    'blk.*.attn_v': 'model.layers.*.self_attn.v_proj',
    'blk.*.attn_output': 'model.layers.*.self_attn.o_proj',
    'blk.*.ffn_gate': 'model.layers.*.mlp.gate_proj',
    'blk.*.ffn_up': 'model.layers.*.mlp.up_proj',
    'blk.*.ffn_down': 'model.layers.*.mlp.down_proj',
}


def find_prefix(part: str, keys: Iterable[str]) -> str | None:
  """The prefix of a part among the keys of a checkpoint, or None.

  Raises:
    ConfigError: the part is there twice.
  """
  keys = {re.sub(r'(?<![^.])layers\.\d+\.', 'layers.*.', key): key for key in keys}
  found = {prefix: keys[prefix + theirs] for prefix in PARTS[part].prefixes
           for theirs, _, _ in PARTS[part].rules if prefix + theirs in keys}
  if len(found) > 1:
    raise ConfigError(f'the checkpoint has two of {part}: '
                      f'{sorted(found.values())}; keep one')
  return next(iter(found), None)


def expand(rules: Iterable[Rule], prefix: str, root: str, num_layers: int
           ) -> dict[str, tuple[str, int | None, str]]:
  """Their keys -> (our path, layer or None, move), one entry per layer."""
  out = {}
  for theirs, ours, move in rules:
    if '*' not in theirs:
      out[prefix + theirs] = (f'{root}/{ours}', None, move)
      continue
    for layer in range(num_layers):
      out[prefix + theirs.replace('*', str(layer))] = (
          f'{root}/{ours}', layer, move)
  return out
