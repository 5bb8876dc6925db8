"""Checkpoints that are damaged: what is missing is named, nothing is left.

Also where a command is stopped while it writes.
"""

from __future__ import annotations

import errno
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from test_conversion import (  # noqa: F401  (fixtures)
    CONFIG,
    DECODER,
    TOWER,
    fixture_exported,
    fixture_ours,
    fixture_source,
    reconfigure,
    refused,
    rewrite,
    run,
    weights,
)

from vlm_compress.convert import files
from vlm_compress.convert.tensors import INDEX, TensorWriter

PROJECTOR = 'multi_modal_projector.'


def without(*keys):
  return lambda t: {k: v for k, v in t.items() if k not in keys}


@pytest.mark.parametrize('key', [
    f'{DECODER}embed_tokens.weight', f'{DECODER}norm.weight',
    f'{TOWER}embeddings.class_embedding', f'{TOWER}pre_layrnorm.bias',
    f'{TOWER}post_layernorm.weight', f'{TOWER}post_layernorm.bias',
    f'{PROJECTOR}linear_1.weight', f'{PROJECTOR}linear_1.bias',
    f'{PROJECTOR}linear_2.weight'])
def test_a_missing_key_is_named(key, source, tmp_path, capsys):
  rewrite(source, without(key))
  line = refused(capsys, 'convert', '--from', source, '--to', tmp_path / 'to')
  assert f"1 tensor(s) missing, the first is ['{key}']" in line
  assert str(source) in line


@pytest.mark.parametrize('start,words', [
    (DECODER, ['projector alone', '--projector']),
    (TOWER, ['no vision tower', '--vision']),
    (PROJECTOR, ['without vision tower and projector', '--vision'])])
def test_a_missing_part_is_named(start, words, source, tmp_path, capsys):
  rewrite(source, lambda t: {k: v for k, v in t.items() if not k.startswith(start)})
  if start == PROJECTOR:  # then a language model alone
    reconfigure(source, lambda v: (lambda text: (v.clear(), v.update(text)))(
        v['text_config']))
  line = refused(capsys, 'convert', '--from', source, '--to', tmp_path / 'to')
  assert all(word in line for word in words), line


def test_the_inner_model_of_a_language_model(ours, source, tmp_path, capsys):
  """As transformers' LlamaModel saves itself: no prefix, no head."""
  lm, clip = tmp_path / 'lm', tmp_path / 'clip'
  for name, start, field in ((lm, DECODER, 'text_config'),
                             (clip, TOWER, 'vision_config')):
    name.mkdir()
    safetensors.numpy.save_file(
        {k.removeprefix(start): v for k, v in weights(source).items()
         if k.startswith(start)}, name / files.WEIGHTS)
    values = json.loads((source / files.CONFIG).read_text())[field]
    (name / files.CONFIG).write_text(json.dumps(values))
  argv = ('convert', '--llm', lm, '--vision', clip, '--to', tmp_path / 'to')
  line = refused(capsys, *argv)
  assert f'{lm} has no lm_head.weight' in line and 'tie_word_embeddings' in line
  reconfigure(lm, lambda v: v.update(tie_word_embeddings=True))
  assert run(*argv) == 0
  got, want = weights(tmp_path / 'to'), weights(ours)
  for key in got:
    if key.startswith(('language_model', 'vision_tower')):
      np.testing.assert_array_equal(got[key], want.get(
          key, weights(source).get(f'{TOWER}{key.partition("/")[2]}'.replace('/', '.'))))


def test_two_of_a_part_are_named(source, tmp_path, capsys):
  rewrite(source, lambda t: t.update({'model.norm.weight': t[f'{DECODER}norm.weight']}))
  line = refused(capsys, 'convert', '--from', source, '--to', tmp_path / 'to')
  assert 'two of decoder' in line and "'model.norm.weight'" in line
  assert str(source) in line


@pytest.mark.parametrize('key,words', [
    ('language_model/norm/weight', ['write the model directory again']),
    ('vision_tower/pre_layrnorm/bias', ['write the model directory again'])])
def test_a_parameter_that_an_export_misses(key, words, ours, tmp_path, capsys):
  shutil.copytree(ours, tmp_path / 'ours')
  rewrite(tmp_path / 'ours', without(key))
  argv = ('export', '--from', tmp_path / 'ours', '--to', tmp_path / 'to')
  line = refused(capsys, *argv)
  assert f'has no {key}' in line and 'frozen' not in line
  assert all(word in line for word in words)
  rewrite(tmp_path / 'ours', lambda t: {
      k: v for k, v in t.items() if not k.startswith('vision_tower/')})
  if key.startswith('vision_tower/'):
    assert 'trained on frozen features' in refused(capsys, *argv)


@pytest.mark.parametrize('text', [
    '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["b"]}}',
    '{"weight_map": 3}', '{"weight_map": {"a": null}}', '{', '[]'])
def test_an_index_that_is_none(text, source, tmp_path, capsys):
  (source / INDEX).write_text(text)
  line = refused(capsys, 'convert', '--from', source, '--to', tmp_path / 'to')
  assert f'{source / INDEX} is no index' in line and 'download it again' in line


def test_a_key_in_two_files(source, tmp_path, capsys):
  key = f'{DECODER}norm.weight'
  safetensors.numpy.save_file({key: weights(source)[key]},
                              source / 'other.safetensors')
  line = refused(capsys, 'convert', '--from', source, '--to', tmp_path / 'to')
  assert f"['{key}'] is in another file" in line and 'other.safetensors' in line


class Stop(Exception):
  """A bug of ours."""


@pytest.mark.parametrize('command', ['convert', 'export'])
@pytest.mark.parametrize('error,code', [
    (OSError(errno.ENOSPC, 'No space left on device'), 2),
    (KeyboardInterrupt(), 130), (Stop(), None)])
def test_what_stops_halfway_leaves_nothing(command, error, code, ours, exported,
                                           tmp_path, monkeypatch, capsys):
  real, left = TensorWriter._write, [5]

  def write(self, *args):
    real(self, *args)
    left[0] -= 1
    if not left[0]:
      written = [p for p in tmp_path.rglob('*') if p.is_file()]
      assert [p.name for p in written] and all('.tmp/' in str(p) for p in written)
      raise error
  monkeypatch.setattr(TensorWriter, '_write', write)
  source = exported if command == 'convert' else ours
  argv = (command, '--from', source, '--to', tmp_path / 'to')
  if code is None:
    with pytest.raises(Stop):
      run(*argv)
  else:
    assert run(*argv) == code
    assert capsys.readouterr().err.count('\n') == 1
  assert left == [0] and not list(tmp_path.iterdir())


@pytest.mark.parametrize('name,text,words', [
    ('tokenizer.json', '{}', ['is no tokenizer.json', 'download it again']),
    ('tokenizer.json', '{"model": {"vocab": {"a": 0}}}', ['is no tokenizer.json']),
    ('tokenizer_config.json', '{"eos_token": "<|nope|>"}', ['<|nope|>']),
    ('tokenizer_config.json', '{"eos_token": null}', ['eos_token is null']),
    ('tokenizer_config.json', '{"bos_token": 5}', ['no readable']),
    ('generation_config.json', '{', ['eos_token_id', 'remove the file']),
    ('generation_config.json', '[]', ['eos_token_id']),
    ('generation_config.json', '{"eos_token_id": "x"}', ['eos_token_id']),
    ('generation_config.json', '{"eos_token_id": [2, 93]}', ['93', 'correct']),
    ('added_tokens.json', '{"<voco>": "x"}', ["'x'", 'download it again']),
    ('added_tokens.json', '{"<voco>": -3}', ['-3']),
    ('added_tokens.json', '{"<voco>": null}', ['no readable'])])
def test_files_that_generate_would_refuse(name, text, words, source, tmp_path,
                                          capsys):
  (source / name).write_text(text)
  line = refused(capsys, 'convert', '--from', source, '--to', tmp_path / 'to')
  # the file that is named is one that the user has
  assert str(source / name) in line or 'tokenizer.json' in line
  assert '.tmp' not in line and all(word in line for word in words), line


def test_ids_of_the_config_are_named_there(source, tmp_path, capsys):
  (source / 'generation_config.json').unlink()
  for value, words in (('x', "eos_token_id='x'"), (94, 'eos_token_id=[94]')):
    reconfigure(source, lambda v, value=value: v.update(eos_token_id=value))
    line = refused(capsys, 'convert', '--from', source, '--to', tmp_path / 'to')
    assert words in line and str(source) in line
    assert 'generation_config' not in line
