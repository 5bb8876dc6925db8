"""What a conversion takes along beside the weights, and VoCo's row.

How text and pictures are prepared, which tokens end an answer; and directories
that are damaged or are not what a command expects.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
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
  path.write_text(json.dumps({**values, 'resample': 0}))
  assert 'resample=0' in refused(capsys, *argv, tmp_path / 'd')


def test_tokens_that_end_an_answer_come_along(source, tmp_path):
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
  assert '2 rows of padding' in capsys.readouterr().out
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
