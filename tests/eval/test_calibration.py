"""Calibrating: the search by hand, the numbers by hand, and a real model."""

from __future__ import annotations

import dataclasses
import types

import core_helpers as helpers
import numpy as np
import pytest
from core_helpers import BOS, IMAGE, Sample

from vlm_compress.config import ConfigError
from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.eval.calibration import Prompts, calibrate, counter
from vlm_compress.models.llava import PruneOptions

# P = 16, four layers, modules behind the first three: the floor is (16 + 3) / 4.
CONFIG = helpers.atp_config(capacities=(6,))  # few programs to compile
PICTURES = (2, 0, 1, 4, 3, 2)
TEXTS = ((6, 7, 8, 9), (6, 10), (7,), (9, 8, 30, 31, 32), (40, 41, 42), (50, 6))


def same(average, num_prompts=2):
  """A count whose prompts and layers all have the same average."""
  return lambda shift: np.full((num_prompts, 4), float(average(shift)))


def sigmoid_count(shift):
  """50 prompts, smooth in the shift; later modules keep less."""
  offsets = np.linspace(-1, 1, 50)[:, None] + np.array([0.0, 0.5, 1.5])
  kept = 1 + 15 / (1 + np.exp(shift + offsets))
  return np.concatenate([np.full((50, 1), 16.0), kept], axis=1)


@pytest.mark.parametrize('target', [4.8, 6.0, 10.0, 15.9])
@pytest.mark.parametrize('start', [0.0, -7.3, 20.0])
def test_a_smooth_dial_is_found_from_anywhere(target, start):
  got = calibrate(sigmoid_count, target, CONFIG, start=start)
  assert got.reached and abs(got.achieved - target) <= 0.002 * target
  assert got.tolerance == 0.002 * target
  assert got.achieved == sigmoid_count(got.shift).mean()
  assert 2 <= got.evaluations <= 20 and min(got.tried)[0] <= got.shift
  assert dict(got.tried)[got.shift] == got.achieved
  np.testing.assert_allclose(got.layer_averages,
                             sigmoid_count(got.shift).mean(0))


def test_the_points_that_are_looked_at():
  # 9 tokens at 2.5: 2 and 4 surround it, then the middle, and again
  got = calibrate(same(lambda s: 14 - 2 * s), 9.0, CONFIG, tolerance=0.0)
  assert got.tried == ((0.0, 14.0), (1.0, 12.0), (2.0, 10.0), (2.5, 9.0),
                       (3.0, 8.0), (4.0, 6.0))
  assert (got.shift, got.achieved, got.reached) == (2.5, 9.0, True)
  down = calibrate(same(lambda s: 5.0 - s), 9.1, CONFIG, tolerance=0.5,
                   start=0.25)
  assert [s for s, _ in down.tried] == [-3.75, -1.75, -0.75, 0.25]
  assert (down.shift, down.achieved) == (-3.75, 8.75)
  once = calibrate(same(lambda s: 14 - 2 * s), 9.0, CONFIG, tolerance=5.0)
  assert once.evaluations == 1 and once.shift == 0.0 and once.reached


def test_a_jump_gives_the_nearest_side_and_says_so():
  jump = same(lambda s: 10.0 if s < 0.3 else 6.0)
  for target, achieved in ((9.0, 10.0), (7.0, 6.0), (8.0, 6.0)):  # 8: fewer
    got = calibrate(jump, target, CONFIG)
    assert (got.achieved, got.reached) == (achieved, False)
    assert (got.shift < 0.3) == (achieved == 10.0)
    ends = [max(s for s, v in got.tried if v == 10.0),
            min(s for s, v in got.tried if v == 6.0)]
    assert 0 < ends[1] - ends[0] <= 1e-4 and got.evaluations < 20
  coarse = calibrate(jump, 9.0, CONFIG, resolution=0.1)
  assert coarse.evaluations < got.evaluations


def test_the_best_seen_counts_where_more_shift_keeps_more():
  # bisection for 9 passes 0.75 (9.2), is sent on by a bump, and ends at a jump
  values = {0.0: 12.0, 1.0: 5.0, 0.5: 9.9, 0.75: 9.2, 0.875: 11.0}
  got = calibrate(same(lambda s: values.get(s, 5.5)), 9.0, CONFIG)
  assert (got.shift, got.achieved, got.reached) == (0.75, 9.2, False)
  assert len({s for s, _ in got.tried if s > 0.875}) > 5


def test_what_no_shift_reaches_is_an_error_with_floor_and_ceiling():
  never = same(lambda s: pytest.fail('there is no need to count'))
  for target in (4.7, 0.5, 16.1, 600.0):
    with pytest.raises(ConfigError, match=rf'target of {target:g} tokens cannot '
                       r'.*\(1, 2, 3\) of 4 layers.* floor 4\.75 and 16$'):
      calibrate(never, target, CONFIG)
  # possible for the placement, but not on these prompts
  narrow = same(lambda s: np.clip(9.0 - s, 7.0, 12.0))
  for target in (6.5, 13.0):
    side = (0, 64) if target < 9 else (-64, 0)
    with pytest.raises(ConfigError) as caught:
      calibrate(narrow, target, CONFIG)
    ends = [narrow(float(s)).mean() for s in side]
    assert (f'shifts from {side[0]} to {side[1]} give averages from '
            f'{min(ends):g} to {max(ends):g}; ') in str(caught.value)
    assert 'floor 4.75 and 16' in str(caught.value)
  for target in (7.0, 12.0):  # the ends themselves, though never between two
    got = calibrate(narrow, target, CONFIG)
    assert got.reached and got.achieved == target


def test_mean_and_percentiles_by_hand():
  counts = np.array([[16, 10, 10, 2], [16, 4, 2, 1], [16, 3, 3, 1],
                     [16, 2, 2, 1], [16, 1, 1, 1]], np.float64)
  got = calibrate(lambda shift: counts, counts.mean(), CONFIG)
  np.testing.assert_allclose(got.mean, [4, 3.6, 1.2])
  np.testing.assert_allclose(got.p50, [3, 2, 1])
  np.testing.assert_allclose(got.p90, [4 + 0.6 * 6, 3 + 0.6 * 7, 1.6])
  np.testing.assert_allclose(got.p99, [4 + 0.96 * 6, 3 + 0.96 * 7, 1.96])
  np.testing.assert_allclose(got.std[0], np.sqrt((36 + 0 + 1 + 4 + 9) / 5))
  np.testing.assert_allclose(got.layer_averages, [16, 4, 3.6, 1.2])
  assert got.achieved == pytest.approx(24.8 / 4)
  assert (got.num_prompts, got.num_pictures) == (5, 5)
  # modules behind layers 1 and 3 only: other columns
  placed = helpers.atp_config(prune_after=(1, 3))
  got = calibrate(lambda shift: counts, counts.mean(), placed)
  np.testing.assert_allclose(got.mean, [4, 1.2])


def test_the_interval_resamples_pictures():
  rng = np.random.default_rng(0)
  values = rng.normal(10, 1, 400)
  count = lambda repeats: lambda shift: np.repeat(
      np.repeat(values, repeats)[:, None], 4, axis=1)
  find = lambda repeats, pictures: calibrate(
      count(repeats), values.mean(), CONFIG, pictures=pictures)
  one = find(1, None)
  error = values.std() / 20
  np.testing.assert_allclose(
      one.ci95, values.mean() + np.array([-1.96, 1.96]) * error, atol=0.01)
  ids = np.repeat(np.arange(400), 4).tolist()
  four = find(4, ids)  # nothing new is learned from asking four times
  np.testing.assert_allclose(np.ptp(four.ci95), np.ptp(one.ci95), rtol=0.05)
  assert np.ptp(find(4, None).ci95) < 0.6 * np.ptp(one.ci95)
  assert (four.num_prompts, four.num_pictures) == (1600, 400)
  alone = find(1, ['the same'] * 400)
  assert alone.ci95 == (4.75, 16.0)  # one picture says nothing about others


def test_everything_goes_to_json():
  got = calibrate(sigmoid_count, 8.0, CONFIG).to_dict()
  assert len(got['p99']) == 3 and len(got['layer_averages']) == 4
  assert all(isinstance(x, float) for x in got['mean'])
  assert got['evaluations'] == len(got['tried'])
  assert 'bootstrap' in got['interval'] and got['target'] == 8.0


# ------------------------------------------------------------ a real model


@pytest.fixture(scope='module')
def model():
  return SegmentedModel(CONFIG, helpers.build(CONFIG)[1])


@pytest.fixture(scope='module')
def prompts():
  """Six prompts about five pictures, in batches of four."""
  samples = [Sample((BOS, IMAGE, *text), seed=i)
             for i, text in zip(PICTURES, TEXTS)]
  rows = [helpers.row(s, CONFIG) for s in samples]
  features = np.concatenate([helpers.features(Sample((IMAGE,), seed=i), CONFIG)
                             for i in range(5)])
  return Prompts(rows, features, PICTURES, batch_size=4)


def masked_counts(shift, config=CONFIG):
  """float[Q, M] by Llava's masked prefill, all prompts in one batch."""
  batch = helpers.batch([Sample((BOS, IMAGE, *text), seed=i)
                         for i, text in zip(PICTURES, TEXTS)], config, length=24,
                        num_images=1)
  llava, params = helpers.build(config)
  _, _, out = helpers.apply(llava, params, batch, method='prefill',
                            prune=PruneOptions(threshold_shift=shift))
  return np.asarray(out.entering).sum((2, 3)).T


@pytest.mark.parametrize('shift', [0.0, 0.1, 60.0])
def test_counts_are_those_of_the_masked_prefill(model, prompts, shift):
  batches = list(prompts)
  assert [b.input_ids.shape[0] for b in batches] == [4, 4] and len(prompts) == 6
  done = []
  count = counter(model, prompts, len(prompts), done.append)
  np.testing.assert_array_equal(count(shift), masked_counts(shift))
  assert done == [4, 4]
  np.testing.assert_array_equal(  # without copies, and twice the same
      counter(model, [b for b in batches])(shift)[:6], count(shift))


def test_calibrated_is_what_the_masked_model_keeps(model, prompts):
  count = counter(model, prompts, len(prompts))
  for target in (6.0, 9.0, 12.5):
    got = calibrate(count, target, CONFIG, tolerance=0.3,
                    pictures=prompts.pictures)
    want = masked_counts(got.shift)
    assert got.reached and abs(want.mean() - target) <= 0.3
    assert got.achieved == pytest.approx(want.mean(), abs=1e-6)
    np.testing.assert_allclose(got.mean, want[:, 1:].mean(0), rtol=1e-6)
    np.testing.assert_allclose(got.p90, np.percentile(want[:, 1:], 90, axis=0))
    assert got.num_pictures == 5 and got.num_prompts == 6
  assert want.std() > 0  # prompts differ
  # the config's own shift is the same dial
  own = dataclasses.replace(CONFIG, atp=dataclasses.replace(
      CONFIG.atp, threshold_shift=got.shift))
  np.testing.assert_array_equal(masked_counts(None, own), want)


def test_more_shift_keeps_fewer_tokens(model, prompts):
  count = counter(model, prompts, len(prompts))
  counts = np.stack([count(s) for s in np.linspace(-0.5, 0.5, 13)])
  # at the first module without exception, for every prompt
  assert (np.diff(counts[:, :, 1], axis=0) <= 0).all()
  assert (np.diff(counts.mean((1, 2))) <= 0).all()
  assert counts[0].mean() - counts[-1].mean() > 5
  assert len(np.unique(counts.mean((1, 2)))) > 6


def test_several_images_of_a_row_are_averaged():
  """Of a model that keeps what is written here."""
  kept = np.array([[[8, 4], [5, 0]], [[6, 2], [5, 0]], [[1, 2], [3, 0]]])
  keep = np.arange(16) < kept[..., None]  # [L, B, I, P]
  batch = helpers.batch(
      [Sample((BOS, IMAGE, 7, IMAGE, 8, 9)), Sample((BOS, IMAGE, 6))],
      CONFIG, length=44, num_images=2)
  shifts = []

  def prefill(batch, options):
    shifts.append(options.threshold_shift)
    return types.SimpleNamespace(pruning=types.SimpleNamespace(
        inputs=batch, state=types.SimpleNamespace(module_keep=keep)))
  model = types.SimpleNamespace(config=CONFIG, prefill=prefill)
  np.testing.assert_array_equal(counter(model, [batch])(0.2), [
      [16, 6, 4, 1.5], [16, 5, 5, 3]])
  assert shifts == [0.2]


def test_models_without_thresholds_and_prompts_without_pictures(model):
  fixed = helpers.atp_config(selector='fixed', fixed_counts=(9, 4, 2))
  for config, words in ((helpers.tiny(), 'has no ATP modules'),
                        (fixed, r"'fixed'.*fixed_counts=\(9, 4, 2\)")):
    with pytest.raises(ConfigError, match=words):
      calibrate(sigmoid_count, 8.0, config)
    with pytest.raises(ConfigError, match=words):
      counter(types.SimpleNamespace(config=config), [])
  text = helpers.batch([Sample((BOS, 6, 7)), Sample((BOS, IMAGE, 6))], CONFIG,
                       length=24, num_images=1)
  with pytest.raises(ConfigError, match='a prompt has no picture'):
    counter(model, [text])(0.0)
  with pytest.raises(ConfigError, match='no prompts'):
    Prompts([], [], [], 4)
