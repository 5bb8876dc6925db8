"""Keep maps of a run's examples are what the run kept."""

from __future__ import annotations

import base64
import io

import core_helpers as helpers
import numpy as np
import pytest
import small_benchmark
from PIL import Image

from vlm_compress.analysis import example_maps
from vlm_compress.asking import Checkpoint, Settings, ask_shard
from vlm_compress.eval import example_log, runs
from vlm_compress.eval.answer_log import ShardLog
from vlm_compress.eval.methods import method_config

SEED = 3


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = small_benchmark.write_gqa(tmp_path_factory.mktemp('examples'))
  small_benchmark.write_model(path / 'atp', helpers.atp_config(
      prune_after=(1, 3), sap_lambda=16.0))
  return path


def recorded(folder, run, name, budget=None):
  """Rows of answers and of examples, and the model that gave both."""
  checkpoint = Checkpoint(folder / 'atp')
  # One question about each of two pictures: a program or two per shape is enough.
  questions = runs.read_questions('gqa', folder).take(['00', '30'])
  method = method_config(name, checkpoint.config, budget)
  run.mkdir()
  log = ShardLog(run, 0, 1, questions.questions)
  ask_shard(checkpoint, method, questions, log, Settings(1, 2, SEED))
  replica = checkpoint.replicas[0]
  with replica.here():
    vlm = replica.running(method.config)
    example_maps.record(run, vlm, method, questions, seed=SEED, number=4)
  return log.rows, example_log.read(run), questions, vlm


@pytest.mark.parametrize('name, budget, places', [
    pytest.param('atp', None, [1, 3], marks=pytest.mark.slow), ('random', 5.0, [0])])
def test_masks_have_the_counts_of_the_answers(folder, tmp_path, name, budget, places):
  answers, examples, questions, vlm = recorded(folder, tmp_path / 'run', name, budget)
  assert list(examples) == ['00', '30']
  kept = set()
  for key, example in examples.items():
    masks = example_log.masks(example)
    assert masks.shape == (len(places), 4, 4) and example['prune_after'] == places
    assert masks.sum((1, 2)).tolist() == answers[key]['kept']
    assert all((masks[1:] <= masks[:-1]).ravel())
    kept.add(masks.tobytes())
  assert len(kept) > 1
  if name == 'random':  # the seed is that of the run
    question = next(q for q in questions.questions if q.id == '00')
    again, other = (example_maps.module_keep(
        vlm, question, [questions.image_path(question)], seed) for seed in (SEED, SEED + 1))
    assert (again.reshape(-1, 4, 4) == example_log.masks(examples['00'])).all()
    assert (other != again).any()


def test_pictures_are_what_the_tower_saw(folder, tmp_path):
  _, examples, questions, vlm = recorded(folder, tmp_path / 'run', 'full')
  for key, example in examples.items():
    question = next(q for q in questions.questions if q.id == key)
    assert example['text'] == question.text and example['keep'] == []
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(example['picture']))))
    # In grey: of noise, JPEG keeps the brightness best.
    away = {q.image: np.abs(shown.mean(-1) - vlm.pixels(questions.image_path(q)).mean(-1))
            .mean() for q in questions.questions}
    nearest = min(away, key=away.get)
    assert nearest == question.image and away[nearest] < 25 < sorted(away.values())[1]
