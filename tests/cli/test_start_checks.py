"""What a stage finds before it compiles: a full disk, other start weights, too
many pictures in a row."""

from __future__ import annotations

import collections
import dataclasses
import shutil

import pytest

pytest.importorskip('PIL', reason='needs the extra [demo]')

import llava_rows  # noqa: E402
from test_prepared_data import stage_of  # noqa: E402

from vlm_compress.cli import stage as stage_lib  # noqa: E402
from vlm_compress.cli import start_weights, workspace  # noqa: E402
from vlm_compress.config import ConfigError  # noqa: E402
from vlm_compress.convert.files import WEIGHTS  # noqa: E402
from vlm_compress.data import tokenizer as tokenizer_lib  # noqa: E402
from vlm_compress.data.llava_json import LlavaJson  # noqa: E402
from vlm_compress.data.prepare import Preparation, prepare  # noqa: E402
from vlm_compress.data.prepared import PreparedSource  # noqa: E402


@pytest.fixture(scope='module', name='root')
def fixture_root(tmp_path_factory):
  root = tmp_path_factory.mktemp('checks')
  source = llava_rows.write(root)
  prepare(Preparation(source, root / 'images', root / 'data', shard_mb=0.015))
  tokenizer_lib.word_level(llava_rows.WORDS).save(root / 'tokenizer.json')
  return root


def run(stage, root, workdir, said=None):
  said = [] if said is None else said
  stage = dataclasses.replace(stage, recipe=dataclasses.replace(
      stage.recipe, batch_size=8))
  split = workspace.open_split(stage.data, stage.data.train_split, root,
                               said.append, stage_lib.vision_of(stage))
  return stage_lib.run_stage(stage, workdir, split, message=said.append,
                             tensorboard=False)


@pytest.fixture(name='never')
def fixture_never(monkeypatch):
  """Nothing may be compiled, and no row measured."""
  def reached(*args, **kwargs):
    raise AssertionError('too late')
  monkeypatch.setattr(stage_lib, 'fit', reached)
  monkeypatch.setattr(stage_lib, 'row_lengths', reached)


def test_a_full_disk_is_found_before_anything_is_compiled(root, tmp_path,
                                                          monkeypatch, never):
  usage = collections.namedtuple('Usage', 'total used free')(10 ** 9, 10 ** 9, 1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  stage = stage_of(root, rows={'bucket_lengths': (60, 120)})
  with pytest.raises(ConfigError, match='1 kB free, but .* 3 checkpoint.s. of'):
    run(stage, root, tmp_path / 'run')


def test_start_weights_are_read_once_and_others_refused(root, tmp_path, monkeypatch):
  """Also in a workdir in which nothing has been trained yet."""
  class Begun(Exception):
    pass

  def fit(*args, **kwargs):
    raise Begun
  monkeypatch.setattr(stage_lib, 'fit', fit)
  monkeypatch.setattr(start_weights, '_SETTLED_SECONDS', -1.0)
  reads, real = [], start_weights.sha256
  monkeypatch.setattr(start_weights, 'sha256', lambda path: (
      reads.append(path), real(path))[1])
  weights = tmp_path / 'start' / WEIGHTS
  weights.parent.mkdir()
  weights.write_bytes(b'some weights')
  stage = dataclasses.replace(stage_of(root), init_from=str(weights.parent))
  work = tmp_path / 'run'
  for _ in range(2):
    with pytest.raises(Begun):
      run(stage, root, work)
  assert reads == [weights]
  weights.write_bytes(b'SOME weights')
  with pytest.raises(Begun):  # nothing is trained: the workdir is claimed again
    run(stage, root, work)
  assert len(reads) == 2
  (work / 'checkpoints' / '2').mkdir(parents=True)
  weights.write_bytes(b'same weights')
  with pytest.raises(ConfigError, match='init_from: sha256:'):
    run(stage, root, work)
  weights.write_bytes(b'SOME weights')
  with pytest.raises(Begun):
    run(stage, root, work)


@pytest.mark.parametrize('buckets', [(), (60, 120)])
def test_too_many_pictures_are_found_at_the_start(root, tmp_path, never, buckets):
  rows = {'length': 150, 'bucket_lengths': buckets, 'max_images': 1}
  with pytest.raises(ConfigError, match='has 2 pictures, .*rows.max_images=1; raise'):
    run(stage_of(root, rows=rows), root, tmp_path / 'run')


@pytest.mark.parametrize('most, words', [(1, 'at least 2 pictures'), (2, '')])
def test_older_data_tell_only_that_there_are_several(root, tmp_path, monkeypatch,
                                                     never, most, words):
  monkeypatch.setattr(PreparedSource, 'most_pictures', lambda self: (2, False))
  said, stage = [], stage_of(root, rows={'length': 150, 'max_images': most})
  with pytest.raises(ConfigError if words else AssertionError,
                     match=words or 'too late'):
    run(stage, root, tmp_path / 'run', said)
  assert any('rows.max_images=2 is drawn' in line for line in said) != bool(words)


def test_a_file_in_llava_format_says_so_too(root):
  source = LlavaJson(root / 'rows.json', root / 'images')
  with pytest.raises(ConfigError, match='rows.json.* has 2 pictures'):
    stage_lib._check_pictures(source, 1, print)
  stage_lib._check_pictures(source, 2, print)
