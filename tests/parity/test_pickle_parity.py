"""PyTorch's own files: read as weights alone and only when asked.

What they give is compared with the same weights as safetensors.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

torch = pytest.importorskip(
    'torch', reason="parity needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip(
    'transformers',
    reason="parity needs transformers: pip install -e '.[parity]'")

import safetensors.torch  # noqa: E402
from test_convert_parity import (  # noqa: E402
    build,
    compare,
    convert,
    example,
    our_logits,
    same_weights,
    their_logits,
    write_original,
)

from vlm_compress.cli import __main__ as cli  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """An original LLaVA, and its CLIP directory."""
  root = tmp_path_factory.mktemp('made')
  model = build('llava 1.5')
  write_original(model, root / 'llava')
  model.config.vision_config.save_pretrained(root / 'clip')
  convert('--from', root / 'llava', '--vision', root / 'clip', '--to',
          root / 'want')
  return model, root


def pickled(root, to, shards=1):
  """The same weights as pytorch_model*.bin, with what lies beside them."""
  state = safetensors.torch.load_file(root / 'llava/model.safetensors')
  to.mkdir()
  (to / 'config.json').write_text((root / 'llava/config.json').read_text())
  names = [f'pytorch_model-{i}.bin' for i in range(shards)]
  if shards == 1:
    names = ['pytorch_model.bin']
  where = {key: names[i % shards] for i, key in enumerate(sorted(state))}
  for name in names:
    torch.save({k: state[k] for k in state if where[k] == name}, to / name)
  if shards > 1:
    (to / 'pytorch_model.bin.index.json').write_text(
        json.dumps({'weight_map': where}))
  torch.save({'lr': 1}, to / 'training_args.bin')
  return to


def command(root, source, to):
  return ['convert', '--from', str(source), '--vision', str(root / 'clip'),
          '--to', str(to)]


@pytest.mark.parametrize('shards', [1, 3])
def test_same_weights(shards, made, tmp_path, capsys):
  _, root = made
  source = pickled(root, tmp_path / 'source', shards)
  argv = command(root, source, tmp_path / 'got')
  assert cli.main(argv) == 2
  error = capsys.readouterr().err
  assert '--allow-pickle' in error and error.count('\n') == 1
  assert cli.main([*argv, '--allow-pickle']) == 0
  same_weights(tmp_path / 'got', root / 'want')


@pytest.mark.parametrize('shards', [1, 2])
def test_the_command_of_the_message_works(shards, made, tmp_path, capsys):
  _, root = made
  source = pickled(root, tmp_path / 'source', shards)
  argv = command(root, source, tmp_path / 'got')
  assert cli.main(argv) == 2
  remedy = capsys.readouterr().err.partition('python -c "')[2].rpartition('"')[0]
  subprocess.run([sys.executable, '-c', remedy], check=True, timeout=120)
  if shards == 2:  # one of them is not there yet
    last = source / 'pytorch_model-1.safetensors'
    last.rename(tmp_path / 'later')
    assert cli.main(argv) == 2
    assert '--allow-pickle' in capsys.readouterr().err
    (tmp_path / 'later').rename(last)
  assert cli.main(argv) == 0
  same_weights(tmp_path / 'got', root / 'want')


class Program:
  def __reduce__(self):
    return (print, ('ran',))


def test_programs_are_refused(made, tmp_path, capsys):
  _, root = made
  source = pickled(root, tmp_path / 'source')
  argv = [*command(root, source, tmp_path / 'got'), '--allow-pickle']
  torch.save({'x': Program()}, source / 'pytorch_model.bin')
  assert cli.main(argv) == 2
  said = capsys.readouterr()
  assert 'ran' not in said.out and 'weights alone' in said.err
  torch.save([torch.ones(2)], source / 'pytorch_model.bin')
  assert cli.main(argv) == 2
  assert 'dictionary of tensors' in capsys.readouterr().err
  (source / 'pytorch_model.bin').write_bytes(b'not at all')
  assert cli.main(argv) == 2
  assert 'download it again' in capsys.readouterr().err
  assert not (tmp_path / 'got').exists()


def test_a_projector_of_the_first_stage(made, tmp_path, capsys):
  model, root = made
  state = safetensors.torch.load_file(root / 'llava/model.safetensors')
  lm = tmp_path / 'lm'
  lm.mkdir()
  model.config.text_config.save_pretrained(lm)
  safetensors.torch.save_file(
      {k: v for k, v in state.items()
       if 'projector' not in k and 'vision_tower' not in k},
      lm / 'model.safetensors')
  clip = tmp_path / 'clip'
  clip.mkdir()
  model.config.vision_config.save_pretrained(clip)
  safetensors.torch.save_file(
      {k.partition('vision_tower.vision_tower.')[2]: v
       for k, v in state.items() if 'vision_tower' in k},
      clip / 'model.safetensors')
  stage = tmp_path / 'stage1'
  stage.mkdir()
  torch.save({k: v for k, v in state.items() if 'projector' in k},
             stage / 'mm_projector.bin')
  argv = ['convert', '--llm', str(lm), '--vision', str(clip), '--projector',
          str(stage), '--to', str(tmp_path / 'got')]
  assert cli.main(argv) == 2
  assert '--allow-pickle' in capsys.readouterr().err
  assert cli.main([*argv, '--allow-pickle']) == 0
  assert 'no config.json' in capsys.readouterr().out
  same_weights(tmp_path / 'got', root / 'want')
  ids, pixels = example(model)
  compare('first stage', our_logits(tmp_path / 'got', ids, pixels),
          their_logits(model, ids, pixels), 1e-4)
  # the config beside it says which features it was trained on
  values = json.loads((root / 'llava/config.json').read_text())
  (stage / 'config.json').write_text(json.dumps(
      {**values, 'mm_vision_select_layer': -1}))
  argv[-1] = str(tmp_path / 'other')
  assert cli.main([*argv, '--allow-pickle']) == 0
  config = json.loads((tmp_path / 'other/config.json').read_text())
  assert config['vision_feature_layer'] == -1
  (stage / 'config.json').write_text(json.dumps({**values, 'hidden_size': 64}))
  argv[-1] = str(tmp_path / 'never')
  assert cli.main([*argv, '--allow-pickle']) == 2
  assert 'hidden_size=64' in capsys.readouterr().err
  # alone it is no model
  assert cli.main(['convert', '--from', str(stage), '--allow-pickle', '--to',
                   str(tmp_path / 'never')]) == 2
  assert '--projector' in capsys.readouterr().err
