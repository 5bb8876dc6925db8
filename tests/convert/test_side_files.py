"""What a conversion takes along beside the weights, and VoCo's row.

How text and pictures are prepared, which tokens end an answer; and directories
that are damaged or are not what a command expects.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import safetensors.numpy
import tokenizers
from test_conversion import (  # noqa: F401  (fixtures)
    CONFIG,
    DECODER,
    fixture_exported,
    fixture_ours,
    fixture_source,
    random_params,
    reconfigure,
    refused,
    rewrite,
    run,
    weights,
)

from vlm_compress.convert import files, preprocessor
from vlm_compress.data.tokenizer import word_level


def processor(directory):
  return json.loads((directory / 'processor.json').read_text())


def test_how_text_and_pictures_are_prepared(source, tmp_path, capsys):
  argv = ('convert', '--from', source, '--to')
  assert run(*argv, tmp_path / 'a') == 0
  assert processor(tmp_path / 'a') == {
      'template': 'vicuna_v1', 'image_aspect_ratio': 'pad'}
  size = files.load_config(tmp_path / 'a').vision.image_size
  values = {'do_center_crop': True, 'size': {'shortest_edge': size},
            'crop_size': {'height': size, 'width': size}}
  (source / 'processor_config.json').unlink()
  path = source / 'preprocessor_config.json'
  path.write_text(json.dumps(values))
  assert run(*argv, tmp_path / 'b') == 0
  assert '--image-aspect-ratio=pad' in capsys.readouterr().out
  assert processor(tmp_path / 'b')['image_aspect_ratio'] == 'crop'
  assert run(*argv, tmp_path / 'c', '--image-aspect-ratio', 'pad',
             '--template', 'llava_v1') == 0
  assert processor(tmp_path / 'c') == {
      'template': 'llava_v1', 'image_aspect_ratio': 'pad'}
  # the export says the same in its own words, and is understood
  for name, mode in (('b', 'crop'), ('c', 'pad')):
    assert run('export', '--from', tmp_path / name, '--to',
               tmp_path / f'{name}-hf') == 0
    assert preprocessor.aspect_mode(tmp_path / f'{name}-hf', size) == mode
    assert json.loads((tmp_path / f'{name}-hf/processor_config.json').read_text())[
        'image_processor']['do_pad'] == (mode == 'pad')
  path.write_text(json.dumps({**values, 'resample': 0}))
  assert 'resample=0' in refused(capsys, *argv, tmp_path / 'd')


def test_tokens_that_end_an_answer_come_along(source, tmp_path):
  (source / 'generation_config.json').unlink()
  reconfigure(source, lambda v: v.update(bos_token_id=7, eos_token_id=9))
  assert run('convert', '--from', source, '--to', tmp_path / 'a') == 0
  assert files.generation_ends(tmp_path / 'a') == [9]
  said = {'eos_token_id': [9, 11], 'temperature': 0.6}
  (source / 'generation_config.json').write_text(json.dumps(said))
  (source / 'chat_template.jinja').write_text('{{ x }}')
  assert run('convert', '--from', source, '--to', tmp_path / 'b') == 0
  assert files.generation_ends(tmp_path / 'b') == [9, 11]
  assert run('export', '--from', tmp_path / 'b', '--to', tmp_path / 'c') == 0
  assert json.loads((tmp_path / 'c/generation_config.json').read_text()) == said
  assert (tmp_path / 'c/chat_template.jinja').read_text() == '{{ x }}'


def test_voco_rows(source, tmp_path, capsys):
  argv = ('convert', '--from', source, '--to')
  line = refused(capsys, *argv, tmp_path / 'a', '--num-voco-tokens', 4)
  assert '<voco>' in line and 'added_tokens.json' in line
  # two rows of padding behind it
  (source / 'added_tokens.json').write_text('{"<voco>": 93}')
  assert run(*argv, tmp_path / 'b', '--num-voco-tokens', 4) == 0
  assert 'the 2 rows behind it' in capsys.readouterr().out
  config = files.load_config(tmp_path / 'b')
  assert (config.text.vocab_size, config.voco_token_index) == (93, 93)
  assert processor(tmp_path / 'b')['template'] == 'voco_v1'
  table = weights(source)[f'{DECODER}embed_tokens.weight']
  ours = weights(tmp_path / 'b')
  np.testing.assert_array_equal(ours['voco_embedding'], table[93:94])
  np.testing.assert_array_equal(
      ours['language_model/embed_tokens/embedding'], table[:93])
  (source / 'added_tokens.json').write_text('{"<voco>": 96}')
  assert 'id 96' in refused(capsys, *argv, tmp_path / 'to-c')
  # words behind it are no padding
  (source / 'added_tokens.json').write_text('{"<voco>": 93, "[PAD]": 94}')
  assert "['[PAD]'] stand behind" in refused(capsys, *argv, tmp_path / 'to-d')
  (source / 'added_tokens.json').write_text('{"<voco>": 91}')
  assert '93 tokens' in refused(capsys, *argv, tmp_path / 'to-e')


def test_how_many_voco_tokens_if_nothing_says_it(source, tmp_path, capsys):
  (source / 'added_tokens.json').write_text('{"<voco>": 95}')
  line = refused(capsys, 'convert', '--from', source, '--to', tmp_path / 'a')
  assert 'id 95, and so have images' in line and str(source) in line
  reconfigure(source, lambda v: v.update(image_token_index=94))
  assert run('convert', '--from', source, '--to', tmp_path / 'a') == 0
  assert files.load_config(tmp_path / 'a').voco.num_voco_tokens == 2
  said = capsys.readouterr().out
  assert '2 tokens per image' in said and 'padding' not in said


def parts(source, tmp_path):
  """Directories of a language model, its tower and its projector."""
  values = json.loads((source / 'config.json').read_text())
  for name, start, new, config in (
      ('lm', 'language_model.', '', values['text_config']),
      ('clip', 'vision_tower.', '', values['vision_config']),
      ('stage', 'multi_modal_projector.linear_', 'mm_projector.', {
          **values['text_config'], 'model_type': 'llava',
          'mm_projector_type': 'mlp2x_gelu', 'mm_vision_tower': 'here'})):
    (tmp_path / name).mkdir()
    tensors = {k.replace(start, new): v for k, v in weights(source).items()
               if k.startswith(start)}
    if name == 'stage':
      tensors = {k.replace('r.1.', 'r.0.'): v for k, v in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / name / (
        'mm_projector.safetensors' if name == 'stage' else files.WEIGHTS))
    (tmp_path / name / 'config.json').write_text(json.dumps(config))
  (tmp_path / 'lm/tokenizer.json').write_text((source / 'tokenizer.json').read_text())
  return ('convert', '--llm', tmp_path / 'lm', '--vision', tmp_path / 'clip')


def test_a_projector_belongs_to_its_language_model(source, ours, tmp_path, capsys):
  argv = (*parts(source, tmp_path), '--projector', tmp_path / 'stage', '--to')
  assert run(*argv, tmp_path / 'a') == 0
  for key, value in weights(tmp_path / 'a').items():
    if 'post_layernorm' not in key:
      np.testing.assert_array_equal(value, weights(ours)[key], err_msg=key)
  for name in ('hidden_size', 'num_hidden_layers', 'vocab_size'):
    said = {'value': 0}
    def change(v, name=name, said=said):
      said['value'] = v[name] = 2 * v[name]
    path = tmp_path / 'stage/config.json'
    before = path.read_text()
    reconfigure(tmp_path / 'stage', change)
    line = refused(capsys, *argv, tmp_path / 'to')
    assert f'{name}={said["value"]}' in line and 'trained for another' in line
    path.write_text(before)


def test_pictures_of_a_tower_of_its_own_are_checked(source, tmp_path, capsys):
  argv = (*parts(source, tmp_path), '--to')
  path = tmp_path / 'clip/preprocessor_config.json'
  path.write_text(json.dumps({'image_mean': [0.5, 0.5, 0.5]}))
  line = refused(capsys, *argv, tmp_path / 'to')
  assert str(path) in line and 'image_mean' in line
  path.write_text('{}')
  assert run(*argv, tmp_path / 'a') == 0
  assert processor(tmp_path / 'a')['image_aspect_ratio'] == 'pad'  # LLaVA's own


def test_each_others_directories_are_known(ours, exported, tmp_path, capsys):
  assert 'is a model directory already' in refused(
      capsys, 'convert', '--from', ours, '--to', tmp_path / 'to')
  assert run('generate', '--checkpoint', exported, '--prompt', 'x') == 2
  assert 'vlm-compress convert' in capsys.readouterr().err


def test_damaged_model_directories(ours, tmp_path, capsys):
  tower = 'vision_tower/layers/mlp/fc1/kernel'
  changes = [
      (lambda t: {k: v for k, v in t.items() if k != tower}, ['no parameter']),
      (lambda t: t.update({tower: t[tower][:, :3]}), ['has shape']),
      (lambda t: t.update({tower: t[tower].astype(np.int32)}), ['int32'])]
  for index, (change, words) in enumerate(changes):
    copy = tmp_path / str(index)
    shutil.copytree(ours, copy)
    rewrite(copy, change)
    for command in (('generate', '--checkpoint', copy, '--prompt', 'x'),
                    ('export', '--from', copy, '--to', tmp_path / 'to')):
      assert run(*command) == 2
      lines = capsys.readouterr().err.splitlines()
      assert len(lines) == 1 and tower in lines[0], lines
    assert all(word in lines[0] for word in words) or index == 0


def test_the_exported_tokenizer_knows_the_placeholder(tmp_path):
  tokenizer = word_level('what is this a cat dog red blue'.split())
  config = dataclasses.replace(CONFIG, image_token_index=-200,
                               text=dataclasses.replace(
                                   CONFIG.text, vocab_size=tokenizer.vocab_size))
  files.save_model(tmp_path / 'a', random_params(config), config, tokenizer)
  assert run('export', '--from', tmp_path / 'a', '--to', tmp_path / 'hf') == 0
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'hf/tokenizer.json'))
  index = json.loads((tmp_path / 'hf/config.json').read_text())[
      'image_token_index']
  assert theirs.token_to_id('<image>') == index == tokenizer.vocab_size
  assert theirs.encode('what <image> is').ids.count(index) == 1
