"""Questions about videos: the answers that the frames as pictures give, in any batch; what
they cost; and what has no room.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import zlib

import core_helpers as helpers
import jax
import numpy as np
import pytest

pytest.importorskip('av', reason='needs the extra [video]')

import small_benchmark  # noqa: E402
import video_files  # noqa: E402

from vlm_compress import api, asking, batches  # noqa: E402
from vlm_compress.analysis import example_maps  # noqa: E402
from vlm_compress.asking import Checkpoint, Settings, ask_shard, check_frames  # noqa: E402
from vlm_compress.config import ConfigError  # noqa: E402
from vlm_compress.data import video  # noqa: E402
from vlm_compress.data.errors import DataError  # noqa: E402
from vlm_compress.eval import efficiency, example_log, runs  # noqa: E402
from vlm_compress.eval.answer_log import ShardLog  # noqa: E402
from vlm_compress.eval.methods import method_config  # noqa: E402

FRAMES, P, M = 3, 16, 4
TIMES = ('latency_seconds', 'latency_rows', 'compiled')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = video_files.write_questions(tmp_path_factory.mktemp('videos'), 'msvd_qa')
  small_benchmark.write_model(path / 'atp', helpers.atp_config(sap_lambda=16.0))
  small_benchmark.write_model(path / 'voco', helpers.voco_config())
  return path


@functools.cache
def opened(path):
  """A checkpoint, whose programs all tests share."""
  return Checkpoint(path, devices=jax.devices()[:1])


def answered(folder, out, model, batch_size, name, budget=None):
  """Rows of all questions, the method, and the model that ran."""
  checkpoint = opened(folder / model)
  questions = runs.read_questions('msvd_qa', folder)
  method = method_config(name, checkpoint.config, budget)
  out.mkdir()
  log = ShardLog(out, 0, 1, questions.questions)
  ask_shard(checkpoint, method, questions, log, Settings(batch_size, 3, 7, FRAMES))
  replica = checkpoint.replicas[0]
  return log.rows, method, questions, replica.running(method.config)


def plain(rows):
  return {key: {k: v for k, v in row.items() if k not in TIMES} for key, row in rows.items()}


@pytest.mark.parametrize('model, name, budget', [
    ('voco', 'full', None), ('voco', 'voco', None), ('voco', 'random', 4.0),
    pytest.param('atp', 'atp', None, marks=pytest.mark.slow)])
def test_frames_are_pictures_of_a_question(folder, tmp_path, model, name, budget):
  one, method, questions, vlm = answered(folder, tmp_path / 'one', model, 1, name, budget)
  many, *_ = answered(folder, tmp_path / 'many', model, 4, name, budget)
  assert plain(many) == plain(one) and len(one) == 6
  assert len({row['prediction'] for row in one.values()}) > 2
  for q in questions.questions[::2]:
    frames = list(video.read_frames(questions.image_path(q), FRAMES))
    if name == 'random':  # whose choice has the question's name
      row_id = zlib.crc32(q.id.encode()) & 0x7fffffff
      _, (alone,) = next(batches.answer_batches(
          vlm, [batches.Request(q.prompt, frames, row_id)], method='atp', max_new_tokens=3,
          seed=7))
    else:
      loaded = api.load(folder / model)
      alone = api.generate(loaded, q.prompt, frames, method=method.runs_as, max_new_tokens=3)
    row = one[q.id]
    assert (row['prediction'], row['answer_tokens']) == (alone.text, len(alone.token_ids))
    wanted = {'full': [FRAMES * P] * M, 'voco': [FRAMES * 2] * M, 'random': [FRAMES * 4] * M
              }.get(name) or alone.visual_tokens.tolist()
    assert row['visual_tokens'] == wanted
    # BOS, a newline behind each frame (and behind its VoCo tokens), the prompt's words.
    lines = FRAMES * (2 if name == 'voco' else 1)
    words = len(vlm.tokenizer.encode(q.prompt))
    assert row['text_tokens'] == 1 + lines + words + 1


def test_frames_are_in_the_order_of_time(folder):
  vlm = api.load(folder / 'voco')
  questions = runs.read_questions('msvd_qa', folder)
  q = questions.questions[0]
  frames = list(video.read_frames(questions.image_path(q), FRAMES))
  seen = asking._opened(vlm, questions, q, Settings(frames=FRAMES), {})
  for pixels, frame in zip(seen, frames, strict=True):
    np.testing.assert_array_equal(pixels, vlm.pixels(frame))
  logits = [api.logits(vlm, q.prompt, some, method='full').logits[-1] for some in (
      seen, frames, frames[::-1])]
  np.testing.assert_array_equal(logits[0], logits[1])
  assert np.abs(logits[0] - logits[2]).max() > 1e-3


def test_a_video_is_decoded_once_for_a_window(folder, tmp_path, monkeypatch):
  decoded = []
  read = video.read_frames
  monkeypatch.setattr(video, 'read_frames', lambda path, count: decoded.append(
      path.name) or read(path, count))
  answered(folder, tmp_path / 'run', 'voco', 4, 'voco')  # four questions, then two
  assert decoded == ['clip_a_1_9.avi', 'clip_b_0_5.avi', 'clip_b_0_5.avi']


def test_upper_bound_has_running_positions(folder):
  vlm = api.load(folder / 'voco')
  picture = np.zeros((8, 8, 3), np.uint8)
  row = batches.prepare(vlm, 'what is this', [picture] * 2, 'upper_bound', None)
  np.testing.assert_array_equal(row.batch.positions[0, :row.size], np.arange(row.size))
  assert row.positions == row.size
  method = method_config('upper_bound', vlm.config)
  questions = runs.read_questions('msvd_qa', folder)
  laid = asking._laid_out(vlm, method, questions.questions[0], 2)
  np.testing.assert_array_equal(laid['positions'], np.arange(len(laid['positions'])))


def with_room(folder, positions):
  vlm = api.load(folder / 'voco')
  return dataclasses.replace(vlm, config=dataclasses.replace(
      vlm.config, text=dataclasses.replace(vlm.config.text, max_position_embeddings=positions)))


def test_frames_without_room_are_refused_in_front(folder):
  questions = runs.read_questions('msvd_qa', folder)
  longest = max(questions.questions, key=lambda q: len(q.prompt))
  vlm = with_room(folder, 72)
  size = lambda name, budget, frames: len(asking._laid_out(
      vlm, method_config(name, vlm.config, budget), longest, frames)['positions'])
  assert size('full', None, 2) < 72
  check = lambda name, budget, frames, vlm=vlm: check_frames(
      vlm, method_config(name, vlm.config, budget), questions, Settings(frames=frames))
  check('full', None, 2)
  for name, budget, tokens in (('full', None, 16), ('random', 4.0, 16),
                               ('upper_bound', None, 16), ('avg_pool', 8.0, 8)):
    with pytest.raises(ConfigError, match=f'question .*: 9 frames of {tokens} visual tokens are '
                       'too many.*max_position_embeddings=72.*fewer --frames, or with a method'):
      check(name, budget, 9)
  check('voco', None, 9)  # each frame at positions of its own
  check('avg_pool', 1.0, 9)
  full = size('full', None, 2)  # not even one position for the answer
  with pytest.raises(ConfigError, match=f'needs {full} positions, which leaves none'):
    check('full', None, 2, with_room(folder, full))
  check('full', None, 2, with_room(folder, full + 1))


def test_a_video_that_is_none_names_its_question(folder, tmp_path):
  bad = video_files.write_questions(tmp_path, 'msrvtt_qa', per_video=1)
  (bad / 'msrvtt_qa/videos/video7011.mp4').write_bytes(b'no video')
  questions = runs.read_questions('msrvtt_qa', bad)
  checkpoint = opened(folder / 'voco')
  log = ShardLog(tmp_path, 0, 1, questions.questions)
  with pytest.raises(DataError, match=r"question '1': .*video7011\.mp4: not a video"):
    ask_shard(checkpoint, method_config('voco', checkpoint.config), questions, log,
              Settings(1, 3, frames=FRAMES))
  (bad / 'msrvtt_qa/videos/video7011.mp4').unlink()
  gone = asking.check_pictures(questions)
  assert [q.id for q in gone] == ['1']
  assert 'ask about 1 video(s) that are not there' in asking.missing_message(questions, gone)


def test_without_the_package_nothing_is_begun(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, 'av', None)
  with pytest.raises(ConfigError, match=r"msvd_qa: .*pip install 'vlm_compress\[video\]'"):
    asking.check_pictures(runs.read_questions('msvd_qa', folder))


def test_costs_are_of_all_frames(folder, tmp_path):
  """By the formulas of a single image, put together by hand."""
  rows, method, _, vlm = answered(folder, tmp_path / 'full', 'voco', 4, 'full')
  rows, config, text = list(rows.values()), method.config, vlm.config.text
  some = [{**rows[0]}]
  found = runs.costs(method, some, FRAMES)
  n = FRAMES * P + some[0]['text_tokens']
  pairs = n * (n + 1) / 2
  assert found['vision_flops'] == FRAMES * efficiency.vision_flops(config)
  assert found['projector_flops'] == FRAMES * efficiency.projector_flops(config)
  assert found['prefill_flops'] == M * efficiency.layer_flops(
      text, n, pairs) + efficiency.lm_head_flops(text)
  assert found['input_visual_tokens'] == found['layer_average_tokens'] == FRAMES * P
  each = 2 * text.num_key_value_heads * text.size_per_head * efficiency.BYTES_PER_VALUE[
      config.dtype]
  assert found['kv_bytes'] == M * n * each

  made = opened(folder / 'voco').config
  method = method_config('voco', made)
  some = [{**rows[0], 'visual_tokens': [FRAMES * 2] * M, 'text_tokens': 20}]
  found = runs.costs(method, some, FRAMES)
  read, one = 20 - 1 - FRAMES, 2 + P + 2
  compress = FRAMES * efficiency.layer_flops(text, one, one * (one + 1) / 2)
  after = efficiency.layer_flops(text, read, read * (read + 1) / 2 + read * 2 * FRAMES)
  assert found['prefill_flops'] == M * (compress + after) + efficiency.lm_head_flops(text)
  assert found['kv_bytes'] == M * (read + 2 * FRAMES) * each
  assert found['vision_flops'] == FRAMES * efficiency.vision_flops(config)

  method = method_config('upper_bound', made)
  some = [{**rows[0], 'text_tokens': 20}]
  assert runs.costs(method, some, FRAMES)['kv_bytes'] == M * each * (
      20 + FRAMES * (P + 2))


def test_costs_of_selectors():
  config = helpers.atp_config(prune_after=(1, 2))
  visual = np.asarray([[48.0, 24, 12, 12]])
  one, three = (efficiency.selector_flops(config, visual, np.asarray([5.0]), n) for n in (1, 3))
  thresholds = 2 * config.atp.threshold_hidden_size * (2 * P + 2)
  assert (three - one).tolist() == [2 * 2 * thresholds]  # two modules, two images more
  # SparseVLM clusters each image alone: three times what one costs, but for attention.
  plain = dataclasses.replace(config, atp=None)
  sparse = method_config('sparsevlm', plain, 10.0).config
  counts = [P, *np.repeat(sparse.atp.fixed_counts, np.diff([*sparse.atp.prune_after, M]))]
  counts = np.asarray([[P] * (sparse.atp.prune_after[0] - 1) + counts], np.float64)
  assert counts.shape == (1, M)
  flops = lambda images: efficiency.selector_flops(
      sparse, images * counts, np.asarray([5.0]), images)[0]
  assert flops(3) == 3 * flops(1) > 0


@pytest.mark.parametrize('name, budget', [('random', 4.0), ('full', None)])
def test_examples_show_the_first_frame(folder, tmp_path, name, budget):
  rows, method, questions, vlm = answered(folder, tmp_path / 'run', 'voco', 4, name, budget)
  example_maps.record(tmp_path / 'run', vlm, method, questions, seed=7, frames=FRAMES)
  examples = example_log.read(tmp_path / 'run')
  assert list(examples) == ['0', '3']  # one question about each video
  for key, example in examples.items():
    q = next(q for q in questions.questions if q.id == key)
    first = next(video.read_frames(questions.image_path(q), FRAMES))
    assert example['picture'] == example_maps.base64.b64encode(
        example_maps._jpeg(vlm.pixels(first))).decode()
    if name == 'random':
      assert example_log.masks(example).shape == (1, 4, 4)
      assert example_log.masks(example).sum() == 4 and rows[key]['kept'] == [FRAMES * 4]


def test_names_of_videos(tmp_path):
  root = video_files.write_questions(tmp_path, 'msvd_qa')
  videos = root / 'msvd_qa/videos'
  names = lambda: [q.image for q in runs.read_questions('msvd_qa', root).questions[::3]]
  assert names() == ['videos/clip_a_1_9.avi', 'videos/clip_b_0_5.avi']
  (videos / 'clip_a_1_9.txt').touch()  # no video, whatever its name
  assert names()[0] == 'videos/clip_a_1_9.avi'
  (videos / 'clip_a_1_9.MP4').touch()
  assert names()[0] == 'videos/clip_a_1_9.MP4'
  (root / 'msvd_qa/youtube_mapping.txt').unlink()  # videos by their numbers
  assert names() == ['videos/vid1300.avi', 'videos/vid1301.avi']
  (videos / 'vid1300.mkv').touch()
  assert names() == ['videos/vid1300.mkv', 'videos/vid1301.avi']
