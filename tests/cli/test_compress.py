"""vlm-compress compress, and generate --vision-cache on what it leaves."""

from __future__ import annotations

import io
import shutil

import core_helpers as helpers
import numpy as np
import pytest
from api_helpers import make
from PIL import Image

from vlm_compress import api, caching
from vlm_compress.cli import __main__ as cli
from vlm_compress.decode.segmented import SegmentedModel

QUESTION, OTHER = 'what is this on the left side', 'is the dog red'
_LOADED: dict = {}


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """Directories of a VoCo, an ATP and a plain model."""
  found = {}
  one_module = helpers.atp_config(sap_lambda=16.0, prune_after=(2,),
                                  target_tokens=10.0, capacities=(10,))
  for name, config in (('voco', helpers.voco_config()), ('full', helpers.tiny()),
                       ('atp', one_module)):
    found[name] = tmp_path_factory.mktemp('models') / name
    api.save(make(config, seed=7), found[name])
  return found


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Two pictures, one of them twice, and a text."""
  rng, path = np.random.default_rng(1), tmp_path_factory.mktemp('pictures')
  for name in 'ab':
    Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(
        path / f'{name}.png')
  shutil.copy(path / 'b.png', path / 'c.png')
  (path / 'notes.txt').write_text('no picture')
  return path


@pytest.fixture(autouse=True)
def load_once(models, monkeypatch):
  """Commands share models in memory: their programs take long to compile."""
  load = api.load

  def shared(directory, template=None):
    if directory not in models.values() or template is not None:
      return load(directory, template=template)
    if directory not in _LOADED:
      _LOADED[directory] = load(directory)
    return _LOADED[directory]
  monkeypatch.setattr(api, 'load', shared)


@pytest.fixture
def run(models, capsys):
  """Runs a command with a model; gives exit code, stdout, stderr."""
  def run(command, model, *argv):
    code = cli.main([command, f'--checkpoint={models[model]}', *map(str, argv)])
    return code, *capsys.readouterr()
  return run


@pytest.fixture
def ask(run, folder, monkeypatch):
  """Asks about pictures; gives the answers and the lines on stderr."""
  def ask(model, *argv, questions=(QUESTION,), images=('a.png',)):
    monkeypatch.setattr('sys.stdin', io.StringIO('\n'.join([*questions, ''])))
    code, out, err = run('generate', model, '--interactive', '--max-new-tokens=5',
                         *[f'--image={folder / name}' for name in images], *argv)
    assert code == 0, err
    return out, err.splitlines()
  return ask


def no_compressing(monkeypatch):
  """What would be computed anew for a picture fails from now on."""
  def fails(*_):
    raise AssertionError('computed anew')
  monkeypatch.setattr(SegmentedModel, 'compress', fails)
  monkeypatch.setattr(SegmentedModel, 'keep', fails)
  monkeypatch.setattr(api.Vlm, '_encode', fails)


def test_voco_from_pictures_to_answers(run, ask, folder, tmp_path, monkeypatch):
  plain = {images: ask('voco', questions=(QUESTION, OTHER), images=images)[0]
           for images in (('a.png',), ('a.png', 'c.png'))}
  assert len(set(plain.values())) == 2
  out, file = tmp_path / 'cache', tmp_path / 'new' / 'cache.safetensors'
  # 2 VoCo tokens of 16 visual ones: 4 layers, keys and values, 2 heads of 8
  for where in (out, file):
    assert run('compress', 'voco', '--images', folder, '--out', where) == (
        0, f'{where}: 2 entries written, 1 already there\n1.03 kB per picture, '
        "12.6 % of the full model's 8.19 kB of visual keys and values\n", '')
  assert len([*out.iterdir()]) == 2
  no_compressing(monkeypatch)
  for where in (out, file):
    code, text, _ = run('compress', 'voco', '--images', folder / 'a.png',
                        folder / 'c.png', '--out', where)
    assert code == 0 and '0 entries written, 2 already there' in text
    for images, want in plain.items():
      got, err = ask('voco', f'--vision-cache={where}', questions=(QUESTION, OTHER),
                     images=images)
      assert got == want
      assert len(err) == len(images)  # once, whatever is asked
      assert all(line.startswith(f'vision cache: hit: {where}') for line in err)


def test_voco_misses(run, ask, folder, tmp_path, monkeypatch):
  want = ask('voco', '--num-voco-tokens=1')[0]
  argv = (f'--vision-cache={tmp_path}', '--num-voco-tokens=1')
  got, err = ask('voco', *argv)
  assert got == want and len([*tmp_path.iterdir()]) == 1
  assert len(err) == 1 and err[0].startswith('vision cache: miss: ')
  no_compressing(monkeypatch)
  got, err = ask('voco', *argv)
  assert got == want and err[0].startswith('vision cache: hit: ')
  file = tmp_path / 'cache.safetensors'
  code, out, err = run('generate', 'voco', f'--image={folder / "a.png"}',
                       f'--prompt={QUESTION}', f'--vision-cache={file}')
  assert (code, out) == (2, '') and not file.exists()
  assert err == (f'error: {file} does not exist; add it: vlm-compress compress '
                 f'--out {file}\n')


def test_atp_keeps_for_a_question(run, ask, folder, tmp_path, monkeypatch):
  both = {'questions': (QUESTION, OTHER)}
  plain, counts = ask('atp', **both)
  code, out, err = run('compress', 'atp', '--images', folder / 'a.png', '--out',
                       tmp_path, f'--prompt={QUESTION}')
  assert (code, err) == (0, '') and '1 entry written, 0 already there' in out
  # each question reads what was kept for it
  got, err = ask('atp', f'--vision-cache={tmp_path}', **both)
  assert got == plain and len([*tmp_path.iterdir()]) == 2
  assert [line.split()[2] for line in err[::2]] == ['hit:', 'miss:']
  assert err[1::2] == counts and counts[0] != counts[1]
  no_compressing(monkeypatch)
  got, err = ask('atp', f'--vision-cache={tmp_path}', **both)
  assert got == plain and [line.split()[2] for line in err[::2]] == ['hit:'] * 2
  # both read what was kept for the first
  _, err = ask('atp', f'--vision-cache={tmp_path}', f'--kept-for={QUESTION}', **both)
  assert 'hit: ' in err[0] and err[1:] == [counts[0]] * 2
  code, out, err = run('generate', 'atp', f'--image={folder / "b.png"}',
                       f'--prompt={QUESTION}', '--vision-cache=none.safetensors')
  assert (code, out) == (2, '') and '--prompt TEXT' in err


def test_a_question_that_the_file_has_not_does_not_end_the_session(
    run, folder, tmp_path, monkeypatch):
  file = tmp_path / 'cache.safetensors'
  run('compress', 'atp', '--images', folder / 'a.png', '--out', file,
      f'--prompt={QUESTION}')
  monkeypatch.setattr('sys.stdin', io.StringIO(f'{OTHER}\n{QUESTION}\n'))
  code, out, err = run('generate', 'atp', '--interactive',
                       f'--image={folder / "a.png"}', f'--vision-cache={file}')
  first, *rest = err.splitlines()
  assert code == 2 and out.count('\n') == 1
  assert first.startswith('error: ') and f'only for [\'{QUESTION}\']' in first
  assert [line.partition(': ')[0] for line in rest] == [
      'vision cache', 'visual tokens per layer']


@pytest.mark.parametrize('name', ['cache', 'cache.safetensors'])
def test_a_broken_picture(run, models, folder, tmp_path, name):
  pictures, where = tmp_path / 'pictures', tmp_path / name
  shutil.copytree(folder, pictures)
  raw = (pictures / 'a.png').read_bytes()
  (pictures / 'aa.png').write_bytes(raw[:len(raw) // 2])
  argv = ('compress', 'voco', '--images', pictures, '--out', where)
  code, out, err = run(*argv)
  assert (code, out) == (2, '') and err.count('\n') == 1
  assert err.startswith('error: ') and str(pictures / 'aa.png') in err
  vlm, said = api.load(models['voco']), []
  caching.cached_image(vlm, pictures / 'a.png', where, say=said.append)
  assert said[0].startswith('hit')  # what was written before is there
  code, out, err = run(*argv, '--skip-broken')
  assert code == 0 and '1 entry written, 2 already there, 1 pictures skipped' in out
  assert err.startswith('skipped: ') and str(pictures / 'aa.png') in err
  assert err.count('\n') == 1
  code, out, err = run('compress', 'voco', '--images', pictures / 'aa.png', '--out',
                       where, '--skip-broken')
  assert (code, out) == (2, '') and 'none of the 1 pictures can be read' in err


def test_a_damaged_entry_is_replaced(run, ask, folder, tmp_path):
  argv = ('compress', 'voco', '--images', folder / 'a.png', '--out', tmp_path)
  run(*argv)
  path, = tmp_path.iterdir()
  good = path.read_bytes()
  path.write_bytes(good[:-8])
  code, out, err = run('generate', 'voco', f'--image={folder / "a.png"}',
                       f'--prompt={QUESTION}', f'--vision-cache={tmp_path}')
  assert (code, out) == (2, '') and err.count('\n') == 1
  assert str(path) in err and 'delete the file' in err
  code, out, err = run(*argv)
  assert code == 0 and '1 entry written' in out and path.read_bytes() == good
  assert err.startswith(f'replaced: {path}: file: truncated')


@pytest.mark.parametrize('model, argv, words', [
    ('voco', ['--prompt=a cat'], ['prompt', 'VoCo']),
    ('voco', ['--num-voco-tokens=3'], ['1 to 2']),
    ('atp', [], ['depends on the question']),
    ('atp', ['--prompt=an elephant', '--skip-broken'], ["'an'", 'vocabulary']),
    ('atp', ['--prompt=a cat', '--num-voco-tokens=1'], ['ATP']),
    ('atp', ['--prompt=a cat', '--template=nice'], ['nice', 'vicuna_v1']),
    ('full', [], ['neither VoCo', 'full']),
    ('voco', ['--images', 'none.png'], ['none.png', 'no such file']),
    ('voco', ['--images', '{models}'], ['no picture in it']),
    ('voco', ['--out', '{a}'], ['a.png', 'file where a directory']),
    ('voco', ['--out', '{a}/b.safetensors'], ['a.png'])])
def test_mistakes_of_compress_are_one_line(run, models, folder, tmp_path, model,
                                           argv, words):
  argv = [word.format(models=models[model], a=folder / 'a.png') for word in argv]
  given = ['--images', folder / 'a.png', '--out', tmp_path / 'new', *argv]
  code, out, err = run('compress', model, *given)
  assert code == 2 and out == '' and not [*tmp_path.iterdir()]
  assert err.count('\n') == 1 and all(word in err for word in words), err


@pytest.mark.parametrize('model, argv, words', [
    ('voco', ['--kept-for=a cat', '--vision-cache={new}'], ['--kept-for']),
    ('atp', ['--kept-for=a cat'], ['--kept-for', '--vision-cache']),
    ('full', ['--vision-cache={new}'], ['--vision-cache', 'full']),
    ('voco', ['--method=full', '--vision-cache={new}'], ['method full']),
    ('atp', ['--image={b}', '--vision-cache={new}'], ['one picture', 'not 2']),
    ('atp', ['--num-voco-tokens=1', '--vision-cache={new}'], ['ATP']),
    ('atp', ['--kept-for=an elephant', '--vision-cache={new}'], ["'an'"]),
    ('voco', ['--vision-cache={a}'], ['a.png'])])
def test_mistakes_of_generate_are_one_line(run, folder, tmp_path, model, argv, words):
  names = {'new': tmp_path / 'new', 'a': folder / 'a.png', 'b': folder / 'b.png'}
  code, out, err = run('generate', model, f'--image={folder / "a.png"}',
                       '--prompt=what is this', *[a.format(**names) for a in argv])
  assert (code, out) == (2, '') and not [*tmp_path.iterdir()]
  assert err.count('\n') == 1 and all(word in err for word in words), err


def test_a_cache_without_a_picture_is_a_mistake(run, tmp_path):
  code, out, err = run('generate', 'voco', '--prompt=what is this',
                       f'--vision-cache={tmp_path}')
  assert (code, out) == (2, '') and '--image' in err and err.count('\n') == 1
