"""A model with LoRA adapters in Hugging Face's format: merged, and said."""

from __future__ import annotations

import dataclasses

import core_helpers as helpers
import numpy as np
import pytest
from test_conversion import TOKENIZER, random_params, refused, rewrite, run, weights

from vlm_compress.config import LoraConfig
from vlm_compress.convert import files, lora
from vlm_compress.convert.tensors import ADAPTERS

LORA = LoraConfig(rank=2, alpha=1.0, targets=('q_proj', 'down_proj'))


@pytest.mark.parametrize('method', ['plain', 'atp'])
def test_export_merges_and_convert_gives_the_merged_model(method, tmp_path,
                                                          capsys):
  config = helpers.atp_config() if method == 'atp' else helpers.tiny()
  config = dataclasses.replace(config, lora=LORA, image_token_index=95)
  params = random_params(config)
  files.save_model(tmp_path / 'ours', params, config, TOKENIZER)
  assert files.load_config(tmp_path / 'ours') == config
  assert run('export', '--from', tmp_path / 'ours', '--to', tmp_path / 'hf') == 0
  said = capsys.readouterr()
  assert 'LoRA adapters (rank 2, q_proj, down_proj) were merged' in said.err
  assert said.err.count('\n') == 1 and 'LoRA' not in said.out
  assert (tmp_path / 'hf' / ADAPTERS).exists() == (method == 'atp')
  assert not [key for key in weights(tmp_path / 'hf') if 'lora' in key]
  assert run('convert', '--from', tmp_path / 'hf', '--to', tmp_path / 'back') == 0
  back = files.load_config(tmp_path / 'back')
  assert back.lora is None and back.atp == config.atp
  got = weights(tmp_path / 'back')
  want = helpers.flat(lora.merge(params, config)[0])
  assert {k for k in got if 'post_layernorm' not in k} == set(want)
  for path, x in want.items():
    helpers.close(got[path], x, 1e-6)
  path = 'language_model/layers/self_attn/q_proj/kernel'
  assert np.abs(got[path] - helpers.flat(params)[path]).max() > 0.1


def test_adapters_that_the_config_does_not_know_are_refused(tmp_path, capsys):
  config = helpers.tiny(image_token_index=95)
  files.save_model(tmp_path / 'ours', random_params(config), config, TOKENIZER)
  path = 'language_model/layers/mlp/up_proj/lora_a'
  rewrite(tmp_path / 'ours', lambda t: t.update(
      {path: np.ones((4, 32, 2), np.float32)}))
  line = refused(capsys, 'export', '--from', tmp_path / 'ours', '--to',
                 tmp_path / 'to')
  assert path in line
