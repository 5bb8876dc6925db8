"""Scores against values worked out by hand."""

import numpy as np
import pytest

from vlm_compress.eval import scoring


def test_exact_match_normalises_whitespace_only():
  got = scoring.exact_match([' red  car\n', 'Red car', 'red car.', ''],
                            ['red car', 'red car', 'red car', 'x'])
  np.testing.assert_array_equal(got, [True, False, False, False])


def test_exact_match_refuses_unequal_and_empty():
  with pytest.raises(ValueError, match="'predictions': 1, 'answers': 2"):
    scoring.exact_match(['a'], ['a', 'b'])
  with pytest.raises(ValueError, match='no question'):
    scoring.exact_match([], [])


def test_bootstrap_draws_whole_images():
  # Two images: one all right with three questions, one all wrong with one.
  # A draw holds 2x the first, one of each, or 2x the second.
  means = scoring.bootstrap_means(np.array([1, 1, 1, 0]), 'aaab', seed=0)
  assert set(np.round(means, 6)) == {0.0, 0.75, 1.0}
  shares = [np.mean(np.isclose(means, m)) for m in (0.0, 0.75, 1.0)]
  np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.04)


def test_bootstrap_is_seeded_and_blind_to_order():
  rng = np.random.default_rng(1)
  values, images = rng.random(60), rng.integers(0, 20, 60)
  first = scoring.bootstrap_means(values, images.tolist(), seed=3)
  order = rng.permutation(60)
  again = scoring.bootstrap_means(values[order], images[order].tolist(), seed=3)
  np.testing.assert_allclose(first, again, rtol=1e-12)
  other = scoring.bootstrap_means(values, images.tolist(), seed=4)
  assert not np.allclose(first, other)


def test_bootstrap_columns_and_chunks_share_draws(monkeypatch):
  rng = np.random.default_rng(2)
  values = rng.random((40, 2))
  images = list(range(40))
  both = scoring.bootstrap_means(values, images, seed=5)
  np.testing.assert_allclose(
      both[:, 1], scoring.bootstrap_means(values[:, 1], images, seed=5))
  monkeypatch.setattr(scoring, '_CHUNK_VALUES', 40 * 7)
  np.testing.assert_allclose(
      both, scoring.bootstrap_means(values, images, seed=5))


def test_interval_agrees_with_the_normal_approximation():
  # 400 single-question images, 300 right: 0.75 +- 1.96 sqrt(.75 .25 / 400).
  values = np.array([1] * 300 + [0] * 100)
  got = scoring.mean_with_interval(values, range(400))
  assert got.mean == 0.75 and got.n == 400 and got.num_images == 400
  np.testing.assert_allclose(got.ci95, (0.75 - 0.0424, 0.75 + 0.0424),
                             atol=0.006)


def test_clustering_widens_the_interval():
  # The same 400 answers, but ten to an image that is all right or all wrong:
  # 40 independent things, so sqrt(10) times as wide.
  values = np.array([1] * 300 + [0] * 100)
  flat = scoring.mean_with_interval(values, range(400)).ci95
  clustered = scoring.mean_with_interval(values, np.arange(400) // 10).ci95
  ratio = (clustered[1] - clustered[0]) / (flat[1] - flat[0])
  assert ratio == pytest.approx(10 ** 0.5, rel=0.15)


def test_all_right_is_no_certainty():
  got = scoring.mean_with_interval(np.ones(50), range(50))
  assert got.mean == 1.0 and got.ci95[1] == 1.0
  assert got.ci95[0] == pytest.approx(0.025 ** (1 / 50))  # 0.929
  wrong = scoring.mean_with_interval(np.zeros(50), range(50))
  assert wrong.ci95 == (0.0, pytest.approx(1 - 0.025 ** (1 / 50)))


def test_one_image_says_nothing():
  got = scoring.mean_with_interval(np.array([1, 0]), ['a', 'a'])
  assert (got.mean, got.ci95) == (0.5, (0.0, 1.0))


def test_score_by_kind_and_headline():
  row = scoring.score(
      predictions=['cat', 'dog', '2', '3', 'yes'],
      answers=['cat', 'cat', '2', '3', 'no'],
      kinds=['what', 'what', 'count', 'count', 'is'],
      image_ids=[1, 2, 1, 2, 3], headline_kinds=['what', 'count'])
  assert row['accuracy'] == 0.75 and row['n'] == 4
  assert list(row['by_kind']) == ['count', 'is', 'what']
  assert [k['accuracy'] for k in row['by_kind'].values()] == [1.0, 0.0, 0.5]
  assert [k['n'] for k in row['by_kind'].values()] == [2, 1, 2]
  assert row['ci95'][0] == 0.5 and row['ci95'][1] == 1.0


def test_score_without_headline_takes_all():
  row = scoring.score(['a', 'b'], ['a', 'x'], ['k', 'l'], [1, 2])
  assert row['accuracy'] == 0.5 and row['n'] == 2


def test_score_refuses_a_headline_kind_without_questions():
  with pytest.raises(ValueError, match=r"\['where'\] have no question"):
    scoring.score(['a'], ['a'], ['what'], [1], headline_kinds=['where'])


def test_paired_difference_cancels_what_methods_share():
  # b is right exactly where a is, but for 10 of 200 images.
  rng = np.random.default_rng(0)
  a = rng.random(200) < 0.6
  b = a.copy()
  b[np.flatnonzero(a)[:10]] = False
  got = scoring.paired_difference(a, b, range(200))
  assert got.mean == pytest.approx(0.05)
  assert 0.0 < got.ci95[0] < 0.05 < got.ci95[1] < 0.1
  apart = scoring.mean_with_interval(a, range(200)).ci95
  assert got.ci95[1] - got.ci95[0] < apart[1] - apart[0]
  back = scoring.paired_difference(b, a, range(200))
  np.testing.assert_allclose(back.ci95, (-got.ci95[1], -got.ci95[0]))


def test_paired_difference_of_equal_methods_keeps_a_width():
  got = scoring.paired_difference(np.ones(99), np.ones(99), range(99))
  share = 1 - 0.025 ** (1 / 99)
  assert got.mean == 0.0
  np.testing.assert_allclose(got.ci95, (-share, share))


def test_retention_by_hand():
  # GQA column of VoCo-LLaMA: (57.0 - 37.7) / (61.1 - 37.7).
  assert scoring.retention(0.570, 0.377, 0.611) == pytest.approx(19.3 / 23.4)
  assert scoring.retention(0.3, 0.4, 0.6) == pytest.approx(-0.5)
  assert scoring.retention(0.7, 0.4, 0.6) == pytest.approx(1.5)


def test_retention_of_the_published_row():
  upper = [61.1, 77.7, 64.0, 1487.2, 85.0, 57.9, 66.5]
  voco = [57.0, 72.3, 58.8, 1323.3, 81.4, 53.7, 65.4]
  lower = [37.7, 41.2, 22.3, 617.3, 53.9, 36.9, 60.7]
  got = [scoring.retention(*row) for row in zip(voco, lower, upper)]
  assert 100 * np.mean(got) == pytest.approx(83.7, abs=0.05)


def test_retention_is_undefined_within_noise():
  assert scoring.retention(0.5, 0.50, 0.51) is None
  assert scoring.retention(0.5, 0.6, 0.4) is None
  assert scoring.retention(0.5, 0.5, 0.51, gap_ci95=(0.005, 0.015)) == 0.0
  assert scoring.retention(0.5, 0.4, 0.5, gap_ci95=(-0.01, 0.21)) is None


def test_ratio_to_full():
  assert scoring.ratio_to_full(0.49, 0.5) == pytest.approx(0.98)
  assert scoring.ratio_to_full(0.49, 0.0) is None


def test_question_only_floor():
  floor = scoring.fit_question_only(
      questions=['what is at A?', 'what is at A?', 'what  is at A?',
                 'what is at B?', 'is there a cat?', 'is there a cat?'],
      answers=['cat', 'dog', 'dog ', 'cat', 'yes', 'no'],
      kinds=['what', 'what', 'what', 'what', 'is', 'is'])
  assert floor.by_question['what is at A?'] == 'dog'
  assert floor.by_question['is there a cat?'] == 'no'  # Tie: alphabetical.
  assert scoring.predict_question_only(
      floor, [' what is at A?', 'what is at C?', 'is there a fox?', 'why?'],
      ['what', 'what', 'is', 'new']) == ['dog', 'cat', 'no', 'cat']


def test_word_accuracy_by_hand():
  assert scoring.word_accuracy('dog cat owl', 'dog bee owl') == 2 / 3
  assert scoring.word_accuracy('dog', 'dog bee') == 0.5
  assert scoring.word_accuracy('', 'dog') == 0.0
  assert scoring.word_accuracy('cat dog', 'dog cat') == 0.0
