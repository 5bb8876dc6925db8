"""vlm-compress calibrate: pictures, data of a config page, and mistakes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import core_helpers as helpers
import numpy as np
import pytest

pytest.importorskip('PIL', reason='needs the extra [demo]')

from api_helpers import TOKENIZER, make
from PIL import Image

from vlm_compress import api
from vlm_compress.cli import __main__ as cli
from vlm_compress.cli import calibrate, workspace
from vlm_compress.cli.stage import bridge
from vlm_compress.cli.train import load_page
from vlm_compress.config import VisionConfig
from vlm_compress.convert.files import load_config, load_params, save_model
from vlm_compress.convert.processor import Processor
from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Example, Turn
from vlm_compress.decode.identity import fingerprint
from vlm_compress.eval.evaluator import Method, answer
from vlm_compress.models.inputs import PruneOptions
from vlm_compress.vlm import prepare

QUESTIONS = ['what is this', 'is the dog red']
PAGE = '''
from vlm_compress.cli.quickstart_config import get_config as base


def get_config():
  config = base('atp')
  config.data.update(name='llava_json', train_split='{root}/train.json',
                     test_split='{root}/test.json', tokenizer='t.json')
  config.data.options = {{'image_folder': '{root}/pictures'}}
  config.rows.kinds = {{}}
  config.eval.update(headline=('',), num_test=3)
  config.eval.per_kind = {{'': {per_picture}}}
  return config
'''


def masked(vlm, pictures, shift):
  """float[Q, M] that enter each layer, by Llava's masked prefill."""
  rows = []
  for picture in pictures:
    for question in QUESTIONS:
      batch = prepare(vlm, question, [picture], 'atp', None).batch
      _, _, out = helpers.apply(vlm.model, vlm.on_device, batch, method='prefill',
                                prune=PruneOptions(threshold_shift=shift))
      rows.append(np.asarray(out.entering).sum((1, 2, 3)))
  return np.stack(rows)


def in_folder(folder):
  return [folder / name for name in ('a.JPG', 'b.webp', 'c.png', 'd.bmp')]


@pytest.fixture(scope='module')
def vlm(tmp_path_factory):
  """An ATP model with its tower, in a directory; its own shift is not 0."""
  made = make(helpers.atp_config(score_norm='minmax', threshold_shift=0.125,
                                 capacities=(16,)), seed=2)
  path = tmp_path_factory.mktemp('model')
  api.save(made, path)
  return api.load(path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Four pictures among other things; `empty` has none."""
  root = tmp_path_factory.mktemp('files') / 'pictures'
  (root / 'deeper').mkdir(parents=True)
  (root.parent / 'empty').mkdir()
  rng = np.random.default_rng(1)
  for name in ('c.png', 'a.JPG', 'b.webp', 'd.bmp', 'deeper/e.png'):
    Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(root / name)
  for name in ('pictures/.hidden.png', 'pictures/notes.txt', 'empty/x.txt',
               'empty/.y.png', 'broken.png'):
    (root.parent / name).write_text('no picture')
  return root


@pytest.fixture
def run(vlm, capsys):
  """Runs the command; gives exit code, stdout, stderr."""
  def run(*argv, checkpoint=vlm.directory):
    code = cli.main(['calibrate', f'--checkpoint={checkpoint}', *map(str, argv)])
    return code, *capsys.readouterr()
  return run


def asked(folder):
  return ['--images', folder, *[f'--prompt={q}' for q in QUESTIONS]]


def test_pictures_of_a_folder(folder):
  names = lambda *paths: [p.name for p in calibrate.picture_paths(paths)]
  assert names(folder) == ['a.JPG', 'b.webp', 'c.png', 'd.bmp']
  loose = folder / 'notes.txt'  # a file that is named is taken at its word
  assert names(loose, folder)[:2] == ['notes.txt', 'a.JPG']
  with pytest.raises(DataError, match='empty has no picture in it'):
    names(folder, folder.parent / 'empty')


def test_two_budgets_on_pictures(run, vlm, folder, tmp_path):
  out = tmp_path / 'new' / 'numbers.json'
  code, text, err = run('--target-tokens', 7, 10, *asked(folder),
                        '--tolerance=0.4', f'--out={out}', '--batch-size=4')
  assert code == 0 and err == '8 prompt(s) about 4 picture(s)\n'
  values = json.loads(out.read_text())
  assert values['prompts'] == QUESTIONS and values['num_visual_tokens'] == 16
  assert values['fingerprint'] == fingerprint(vlm.params)
  few, many = values['calibrations']
  assert few['shift'] > many['shift'] and few['achieved'] < many['achieved']
  for found, target in ((few, 7), (many, 10)):
    want = masked(vlm, in_folder(folder), np.float32(found['shift']))
    assert found['target'] == target and found['reached']
    assert abs(found['achieved'] - target) <= 0.4
    assert found['achieved'] == pytest.approx(want.mean(), abs=1e-5)
    np.testing.assert_allclose(found['layer_averages'], want.mean(0), atol=1e-5)
    for name, q in (('p50', 50), ('p90', 90), ('p99', 99)):
      np.testing.assert_allclose(
          found[name], np.percentile(want[:, 1:], q, axis=0), atol=1e-5)
    low, high = found['ci95']
    assert low <= found['achieved'] <= high and found['num_pictures'] == 4
    assert found['tried'][0][0] <= 0.125 <= found['tried'][-1][0]
    # the same numbers stand in the table, a line per module
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines)
                 if line.split()[:2] == [str(target), f'{found["shift"]:+.4f}'])
    assert lines[first].split()[2] == f'{found["achieved"]:.2f}'
    for module in range(3):
      assert lines[first + module].split()[-5:] == [str(module + 1)] + [
          f'{found[x][module]:.1f}' for x in ('mean', 'p50', 'p90', 'p99')]
  assert 'bootstrap' in text and f'numbers: {out}' in text
  assert list(out.parent.iterdir()) == [out]


def test_a_saved_model_keeps_as_many_without_a_shift(run, vlm, folder, tmp_path):
  saved = tmp_path / 'saved'
  code, text, _ = run('--target-tokens=8', *asked(folder), '--tolerance=0.4',
                      '--batch-size=4', f'--out={tmp_path}/n.json', f'--save={saved}')
  assert code == 0 and f'model: {saved}, atp.threshold_shift=' in text
  found = json.loads((tmp_path / 'n.json').read_text())['calibrations'][0]
  before, after = (json.loads((pathlib.Path(d) / 'config.json').read_text())
                   for d in (vlm.directory, saved))
  assert after['atp'].pop('threshold_shift') == found['shift'] != 0.125
  assert before['atp'].pop('threshold_shift') == 0.125 and before == after
  files = lambda d: {p.name: p.read_bytes() for p in pathlib.Path(d).iterdir()
                     if p.name != 'config.json'}
  assert files(saved) == files(vlm.directory)
  loaded = api.load(saved)
  kept = [api.generate(loaded, q, [p], max_new_tokens=1).visual_tokens
          for p in in_folder(folder) for q in QUESTIONS]
  assert np.mean(kept) == pytest.approx(found['achieved'], abs=1e-5)
  as_it_was = masked(vlm, in_folder(folder), None).mean()
  assert abs(found['achieved'] - as_it_was) > 0.5
  code, out, err = run('--target-tokens=8', *asked(folder), f'--save={saved}')
  assert (code, out) == (2, '') and err == (
      f'error: {saved} exists and is not empty; name another directory or '
      'delete it\n')


@pytest.fixture
def step(monkeypatch):
  """Instead of the model: 10 tokens enter each layer below 0.7, then 6.

  Gives the list of shifts that were counted.
  """
  def counter(model, prompts, num_rows, advance):
    def count(shift):
      shifts.append(shift)
      return np.full((num_rows, 4), 10.0 if shift < 0.7 else 6.0)
    return count
  shifts = []
  monkeypatch.setattr(calibrate.calibration, 'counter', counter)
  return shifts


def test_an_average_that_moves_in_steps_is_said(run, folder, step):
  argv = ['--images', folder / 'a.JPG', '--prompt=a cat', '--target-tokens']
  code, text, err = run(*argv, 9.1, 10)
  assert code == 0 and len(step) == len(set(step)) > 10  # nothing twice
  assert err == ('1 prompt(s) about 1 picture(s)\nnote: 9.1 tokens were asked '
                 'for, 10 are the nearest: on 1 prompt(s) the average moves '
                 'in steps; more prompts make them smaller\n')
  assert text.count('10.00') == 2
  code, out, err = run(*argv, 12)
  assert (code, out) == (2, '') and err.splitlines()[1] == (
      'error: a target of 12 tokens is not reached: on these prompts shifts '
      f'from -63.875 to 0.125 give averages from 10 to 10; {LIMITS} between '
      'the floor 4.75 and 16')


TWO = ['--images', 'x.png', '--prompt=a']
LIMITS = 'with atp.prune_after=(1, 2, 3) of 4 layers the layer average lies'


@pytest.mark.parametrize('argv, line', [
    (['--target-tokens=3', *TWO], f'a target of 3 tokens cannot be reached: '
     f'{LIMITS} between the floor 4.75 and 16'),
    (['--target-tokens', 8, 17, *TWO], f'a target of 17 tokens cannot be '
     f'reached: {LIMITS} between the floor 4.75 and 16'),
    (['--target-tokens=0', *TWO], "argument --target-tokens: '0' is not a "
     'number > 0; see vlm-compress calibrate --help'),
    (['--target-tokens=8'], 'the prompts come from --config, or from --images '
     'and --prompt; name one of the two'),
    (['--target-tokens=8', '--config=a.py', *TWO], 'the prompts come from '
     '--config, or from --images and --prompt; name one of the two'),
    (['--target-tokens=8', '--images', 'x.png'],
     '--images needs --prompt, what is asked about them'),
    (['--target-tokens=8', '--config=a.py', '--prompt=a'], '--prompt belongs to '
     '--images; with --config questions are drawn from the data'),
    (['--target-tokens=8', *TWO, '--num-prompts=4'], '--num-prompts belongs to '
     '--config; of --images, every picture is asked everything'),
    (['--target-tokens=8', *TWO, '--config.a=1'], 'unrecognized arguments: '
     '--config.a=1; see vlm-compress calibrate --help'),
    (['--target-tokens', 8, 9, *TWO, '--save=d'], '--save writes a model for '
     'one budget, but --target-tokens names 2'),
    (['--target-tokens=8', *TWO, '--out=.'], '--out: . is a directory; name a '
     'file in it'),
    (['--target-tokens=8', '--config=no.py'], '--config: no.py does not exist'),
    (['--target-tokens=8', *TWO], 'x.png: no such file; check the data root or '
     'fetch the pictures again')])
def test_mistakes_are_one_line(run, argv, line, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code, out, err = run(*argv)
  assert (code, out) == (2, '')
  assert err == f'error: {line}\n' or err.endswith(f'/{line}\n'), err


def test_mistakes_in_models_and_pictures(run, vlm, folder, tmp_path):
  values = json.loads((pathlib.Path(vlm.directory) / 'config.json').read_text())
  checkpoint = tmp_path / 'other'
  checkpoint.mkdir()
  fixed = {**values['atp'], 'selector': 'uniform', 'fixed_counts': [9, 4, 2]}
  for atp, words in ((None, 'has no ATP modules, so there are no thresholds'),
                     (fixed, "has atp.selector='uniform': it keeps")):
    (checkpoint / 'config.json').write_text(json.dumps({**values, 'atp': atp}))
    code, out, err = run('--target-tokens=8', *asked(folder),
                         checkpoint=checkpoint)
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert err.startswith(f'error: {checkpoint} {words}'), err
  for path, words in (
      (folder.parent / 'broken.png', 'broken.png: not a picture in one of'),
      (folder.parent / 'empty', 'empty has no picture in it (.png .jpg'),
      (folder.parent / 'none', 'none: no such file')):
    code, out, err = run('--target-tokens=8', *asked(path))
    assert (code, out, err.count('\n')) == (2, '', 1) and words in err, err
  code, out, err = run('--target-tokens=8', '--images', folder,
                       '--prompt=what elephant')
  assert (code, out) == (2, '') and "'elephant'" in err
  shutil.rmtree(checkpoint)
  code, _, err = run('--target-tokens=8', *asked(folder), checkpoint=checkpoint)
  assert code == 2 and 'config.json does not exist' in err


# ----------------------------------------------------- data of a config page


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  """A model of frozen features, 64 visual tokens, in a directory."""
  tiny = helpers.tiny()
  config = dataclasses.replace(
      tiny, voco_token_index=TOKENIZER.vocab_size,
      vision=VisionConfig('efficientnet_lite0', 128, 16, 112),
      text=dataclasses.replace(tiny.text, vocab_size=TOKENIZER.vocab_size),
      atp=dataclasses.replace(helpers.atp_config().atp, target_tokens=25.0))
  path = tmp_path_factory.mktemp('small')
  save_model(path, helpers.build(config)[1], config, TOKENIZER,
             processor=Processor('short'))
  return path


@pytest.fixture
def page(tmp_path, monkeypatch):
  """(questions per picture) -> a page; five training pictures, no test split."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'pictures').mkdir()
  for i in range(5):
    Image.new('RGB', (20, 10), (50 * i, 0, 0)).save(
        tmp_path / 'pictures' / f'{i}.png')
  say = lambda who, text: {'from': who, 'value': text}
  questions = ['what is this', 'a cat', 'is the dog red']
  (tmp_path / 'train.json').write_text(json.dumps([
      {'id': str(i), 'image': f'{i}.png', 'conversations': [
          x for n, q in enumerate(questions) for x in (
              say('human', '<image>\n' * (n == 0) + q), say('gpt', 'red'))]}
      for i in range(5)]))
  TOKENIZER.save(tmp_path / 't.json')

  def encode(pixels):
    means = pixels.astype(np.float32).mean((1, 2, 3)).astype(int)
    return np.stack([np.random.default_rng(m).normal(size=(64, 112))
                     for m in means])
  monkeypatch.setattr(workspace, 'encoder', lambda: (encode, 'fake'))

  def write(per_picture):
    (tmp_path / 'page.py').write_text(PAGE.format(
        root=tmp_path, per_picture=per_picture))
    return 'page.py'
  return write


@pytest.mark.slow
def test_questions_of_the_training_split(run, small, page, tmp_path):
  argv = ['--target-tokens=25', '--tolerance=0.3', f'--data-root={tmp_path}',
          f'--out={tmp_path}/n.json', f'--config={page(2)}']
  code, text, err = run(*argv, checkpoint=small)
  assert code == 0, err
  lines = err.splitlines()  # the first says that pictures are encoded
  assert lines[1:] == [
      f'note: {tmp_path}/train.json has no more than 10 such questions',
      '10 prompt(s) about 5 picture(s)']
  assert '95 %' in text
  values = json.loads((tmp_path / 'n.json').read_text())
  assert (values['config'], values['split']) == ('page.py', 'train')
  (found,) = values['calibrations']
  assert found['reached'] and (found['num_prompts'], found['num_pictures']) == (10, 5)
  # what evaluate measures at this shift, asking the same
  stage = bridge(load_page('page.py'))
  split = workspace.open_split(stage.data, stage.data.train_split, tmp_path, print)
  order, questions = calibrate.draw(split, stage.per_kind, 10, seed=0)
  assert sorted(order) == list(range(5)) != order
  examples = [split.examples[i] for i in range(5)]
  answers = answer(
      Method('ATP', load_config(small), load_params(small),
             threshold_shift=found['shift']), examples, split.features,
      [dataclasses.replace(q, example=order[q.example]) for q in questions],
      TOKENIZER, batch_size=8, progress=False)
  assert answers.entering.mean() == pytest.approx(found['achieved'], abs=1e-4)
  np.testing.assert_allclose(
      found['p90'], np.percentile(answers.module_keep.sum(-1), 90, axis=0))


def test_settings_of_the_page_and_other_splits(run, small, page, tmp_path, step):
  argv = ['--target-tokens=20', '--tolerance=20', f'--data-root={tmp_path}',
          f'--config={page(2)}', '--num-prompts=3']
  code, _, err = run(*argv, '--config.eval.per_kind={"": 1}', checkpoint=small)
  assert code == 0 and err.splitlines()[1:] == ['3 prompt(s) about 3 picture(s)']
  code, _, err = run(*argv, checkpoint=small)
  assert code == 0 and err == '3 prompt(s) about 2 picture(s)\n'
  code, out, err = run(*argv, '--split=test', checkpoint=small)
  assert (code, out) == (2, '') and f'{tmp_path}/test.json' in err
  assert err.count('\n') == 1


def test_pages_that_do_not_fit(run, small, vlm, page, tmp_path):
  argv = ['--target-tokens=25', f'--data-root={tmp_path}', f'--config={page(1)}']
  code, out, err = run('--target-tokens=12', *argv[1:])  # another tower
  assert (code, out, err.count('\n')) == (2, '', 1)
  assert f'{vlm.directory}: vision.model_type=' in err
  code, _, err = run(*argv[:-1], f'--config={page(0)}', checkpoint=small)
  assert code == 2 and 'config.eval.headline' in err
  code, _, err = run(*argv, '--config.eval.per_knd=3', checkpoint=small)
  assert code == 2 and "unknown config field 'per_knd'" in err


def test_drawn_questions_are_mixed_and_the_same_again():
  turns = lambda i: tuple(Turn(f'{kind} {i} {n} ?', 'red', kind) for kind in 'ab'
                          for n in range(3))
  split = workspace.Split([Example(f'{i}', turns(i), (b'x',)) for i in range(40)],
                          None, '')
  order, questions = calibrate.draw(split, {'a': 2, 'b': 1}, 30, seed=0)
  assert len(questions) == 30 and order[:10] != list(range(10))
  assert [q.example for q in questions] == [i for i in range(10) for _ in 'aab']
  assert [q.turn.kind for q in questions] == ['a', 'a', 'b'] * 10
  # the question is about the picture that its example has
  assert all(q.turn.question.split()[1] == str(order[q.example])
             for q in questions)
  assert calibrate.draw(split, {'a': 2, 'b': 1}, 30, seed=0) == (order, questions)
  assert calibrate.draw(split, {'a': 2, 'b': 1}, 30, seed=1)[0] != order
  # kinds that few pictures have: the search goes on to the end
  assert calibrate.draw(split, {'c': 1, 'a': 1}, 60, seed=0)[1][-1].example == 39
  assert calibrate.draw(split, {'c': 1}, 5, seed=0)[1] == []
