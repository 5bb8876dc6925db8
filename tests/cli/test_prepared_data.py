"""Prepared data in a training stage: pixels or features, buckets, mistakes."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

pytest.importorskip('PIL', reason='needs the extra [demo]')

import llava_rows  # noqa: E402

from vlm_compress.cli import stage as stage_lib  # noqa: E402
from vlm_compress.cli import workspace  # noqa: E402
from vlm_compress.cli.claims import claim  # noqa: E402
from vlm_compress.cli.quickstart_config import get_config  # noqa: E402
from vlm_compress.config import ConfigError  # noqa: E402
from vlm_compress.data import lengths  # noqa: E402
from vlm_compress.data import tokenizer as tokenizer_lib  # noqa: E402
from vlm_compress.data.errors import DataError  # noqa: E402
from vlm_compress.data.prepare import Preparation, prepare  # noqa: E402
from vlm_compress.models.sequence import VISUAL  # noqa: E402

TOWER = {'model_type': 'clip_vision_model', 'image_size': 24, 'patch_size': 6,
         'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 3,
         'num_attention_heads': 4}
BUCKETS = (60, 80, 120)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A data set of 46 rows with 0, 1 and 2 pictures, and its tokenizer."""
  root = tmp_path_factory.mktemp('prepared')
  source = llava_rows.write(root, 46)
  prepare(Preparation(source, root / 'images', root / 'data', shard_mb=0.05))
  tokenizer_lib.word_level(llava_rows.WORDS).save(root / 'tokenizer.json')
  return root


def stage_of(root, name='instruct', rows=(), directory='data', tower=TOWER):
  config = get_config(name)
  config.data.update(name='prepared', train_split='train',
                     tokenizer=str(root / 'tokenizer.json'))
  config.data.options = {'directory': str(root / directory)}
  if tower is not None:
    config.data.image_size = tower['image_size']
    config.model.vision = tower
  config.rows.kinds = {}
  config.rows.update({'template': 'vicuna_v1', 'independent_turns': False,
                      'num_voco_tokens': (0,), 'max_images': 2, **dict(rows)})
  config.train.batch_size = 4
  return stage_lib.bridge(config)


def batches_of(stage, root, said=None, share=(0, 1)):
  said = [] if said is None else said
  split = workspace.open_split(
      stage.data, stage.data.train_split, root, said.append,
      stage_lib.vision_of(stage))
  tokenizer = workspace.tokenizer_for(stage.data, split.examples)
  config = workspace.model_config(stage.model, tokenizer)
  return stage_lib.stage_batches(stage, config, split, tokenizer, said.append,
                                 share)


def test_batches_in_buckets(root, tmp_path):
  said = []
  batches = batches_of(stage_of(root, rows={'bucket_lengths': BUCKETS}),
                       tmp_path, said)
  lengths = set()
  for _ in range(20):
    batch = next(batches)
    assert batch.features.shape == (4, 2, 24, 24, 3)
    assert batch.features.dtype == np.uint8
    assert batch.input_ids.shape[1] in BUCKETS
    lengths.add(batch.input_ids.shape[1])
    images = batch.image_valid.sum(1)
    assert (images > 0).all() or not images.any()
    np.testing.assert_array_equal(
        (batch.token_types == VISUAL).sum(1), 16 * images)
    assert batch.loss_mask.any(1).all()
  assert len(lengths) > 1
  assert any('46 rows' in line and 'padding' in line for line in said), said
  assert len(list((tmp_path / 'lengths').iterdir())) == 1


def test_batches_of_one_length(root, tmp_path):
  batch = next(batches_of(stage_of(root, rows={'length': 150}), tmp_path))
  assert batch.input_ids.shape == (4, 150)
  assert batch.features.shape == (4, 2, 24, 24, 3)
  assert not (tmp_path / 'lengths').exists()


@pytest.mark.parametrize('buckets', [(), BUCKETS])
def test_processes_share_the_batches(root, tmp_path, buckets):
  stage = stage_of(root, rows={'bucket_lengths': buckets, 'length': 150})
  whole = batches_of(stage, tmp_path)
  parts = []
  for p in range(2):
    parts.append(batches_of(stage, tmp_path, share=(p, 2)))
  rows = lambda batch: [ids.tolist() for ids in batch.input_ids]
  for _ in range(3):
    one, two = (next(part) for part in parts)
    assert one.input_ids.shape[0] == 2
    assert sorted(rows(one) + rows(two)) == sorted(rows(next(whole)))


def test_one_process_measures_for_all(root, tmp_path, monkeypatch):
  """Another one meets the first, which has measured by then, and reads."""
  stage = stage_of(root, rows={'bucket_lengths': BUCKETS})
  measured, real = [], lengths._measure
  monkeypatch.setattr(lengths, '_measure', lambda job: (
      measured.append(jax.process_index()), real(job))[1])
  monkeypatch.setattr(jax, 'process_index', lambda: 1)

  def meet(name):
    with monkeypatch.context() as first:
      first.setattr(jax, 'process_index', lambda: 0)
      first.setattr(multihost_utils, 'sync_global_devices', lambda name: None)
      batches_of(stage, tmp_path)
  monkeypatch.setattr(multihost_utils, 'sync_global_devices', meet)
  assert next(batches_of(stage, tmp_path)).input_ids.shape[1] in BUCKETS
  assert measured == [0]


def test_other_data_are_no_way_to_go_on(root, tmp_path):
  """Without buckets nothing else in a checkpoint tells them apart."""
  stage = stage_of(root, rows={'length': 150})
  stage = dataclasses.replace(stage, recipe=dataclasses.replace(
      stage.recipe, batch_size=8))
  split = workspace.open_split(stage.data, 'train', tmp_path, print,
                               stage_lib.vision_of(stage))
  work = tmp_path / 'run'
  claim(work, stage_lib.describe(stage), split.fingerprint)
  (work / 'checkpoints' / '2').mkdir(parents=True)
  other = dataclasses.replace(split, fingerprint='0123')
  with pytest.raises(ConfigError, match=f'{split.fingerprint} -> 0123.*pictures'):
    stage_lib.run_stage(stage, work, other, message=print, tensorboard=False)


@pytest.mark.parametrize('buckets', [(), BUCKETS])
def test_a_state_of_other_data_of_the_same_length_is_refused(root, tmp_path, buckets):
  """--allow-config-change lets a run begin on them; its checkpoint says no."""
  source = llava_rows.write(tmp_path, 46)
  llava_rows.picture(tmp_path / 'images/0.jpg', 999)
  prepare(Preparation(source, tmp_path / 'images', tmp_path / 'data', shard_mb=0.05))
  (tmp_path / 'tokenizer.json').write_bytes((root / 'tokenizer.json').read_bytes())
  one, same, other = (batches_of(stage_of(
      where, rows={'length': 150, 'bucket_lengths': buckets}), tmp_path)
                      for where in (root, root, tmp_path))
  same.set_state(one.get_state())
  with pytest.raises(DataError, match='--allow-config-change cannot allow'):
    other.set_state(one.get_state())


def test_voco_stage_leaves_text_out(root, tmp_path):
  said = []
  batches = batches_of(stage_of(root, 'voco8', {
      'template': 'voco', 'num_voco_tokens': (8,), 'text_length': 100,
      'bucket_lengths': (80, 160)}), tmp_path, said)
  for _ in range(15):
    split, teacher = next(batches)
    assert split.text.image_valid.any(1).all() and teacher is None
    assert split.text.input_ids.shape[1] in (80 - 24, 100)
  assert any('9 rows without a picture' in line for line in said), said


def test_frozen_features_need_one_picture_a_row(root, tmp_path, monkeypatch):
  monkeypatch.setattr(workspace, 'encoder', lambda: (
      lambda pixels: np.zeros((len(pixels), 64, 112)), 'fake'))
  with pytest.raises(DataError, match='9 rows are text only and 9 have'):
    batches_of(stage_of(root, tower=None), tmp_path)
  rows = [row for row in llava_rows.rows()
          if isinstance(row.get('image'), str)]
  source = tmp_path / 'one.json'
  source.write_text(json.dumps(rows))
  prepare(Preparation(source, root / 'images', tmp_path / 'one'))
  (tmp_path / 'tokenizer.json').write_bytes(
      (root / 'tokenizer.json').read_bytes())
  stage = stage_of(tmp_path, rows={'bucket_lengths': (120, 160),
                                   'max_images': 1}, directory='one', tower=None)
  batch = next(batches_of(stage, tmp_path))
  assert batch.features.shape == (4, 1, 64, 112)
  assert batch.features.dtype == np.float32 and batch.image_valid.all()


@pytest.mark.parametrize('options, words', [
    ({}, ['directory', 'missing', 'prepare-data']),
    ({'directory': 3}, ['directory', 'missing']),
    ({'directory': 'x', 'folder': 'y'}, ["['folder']", 'verify'])])
def test_options_are_checked(options, words):
  with pytest.raises(ConfigError) as caught:
    workspace.DataSpec(name='prepared', options=tuple(options.items()))
  assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize('changes, words', [
    ({'rows': {'image_aspect_ratio': 'crop'}, 'tower': None},
     ['image_aspect_ratio', 'padded']),
    ({'rows': {'image_aspect_ratio': 'wide'}}, ['image_aspect_ratio', 'crop']),
    ({'rows': {'bucket_lengths': (80, 60)}}, ['bucket_lengths', 'increasing']),
    ({'rows': {'max_images': 0}}, ['max_images']),
    ({'rows': {'kinds': {'what': 1}, 'bucket_lengths': (80,)}},
     ['bucket_lengths', 'kinds'])])
def test_rows_are_checked(root, changes, words):
  with pytest.raises(ConfigError) as caught:
    stage_of(root, **changes)
  assert all(word in str(caught.value) for word in words), caught.value
