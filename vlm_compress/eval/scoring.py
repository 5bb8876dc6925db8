"""Exact match, intervals, retention and the question-only floor.

Every number of a report passes through this file, so that all methods are
scored by the same rules.  Questions about one image are not independent: the
intervals resample images, not questions.  Pure functions of sequences and
arrays; nothing here knows a model.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

NUM_RESAMPLES = 2000
TAIL = 0.025  # Of each side of a 95 % interval.
# Smallest upper - lower gap that a retention may be divided by when no
# interval of the gap is given: two points of accuracy.
MIN_GAP = 0.02
# Resample weights held in memory at once (float64 values).
_CHUNK_VALUES = 4_000_000


def normalise(text: str) -> str:
  """Strips the text and makes every run of whitespace one space.

  Case and punctuation count: the answers of our data sets are lower case.
  """
  return ' '.join(text.split())


def exact_match(predictions: Sequence[str],
                answers: Sequence[str]) -> np.ndarray:
  """Which predictions equal their answer after `normalise`.

  Returns:
    bool[Q].
  """
  _check_aligned(predictions=predictions, answers=answers)
  return np.array([normalise(p) == normalise(a)
                   for p, a in zip(predictions, answers)], dtype=bool)


def word_accuracy(prediction: str, answer: str) -> float:
  """Share of the answer's words that stand at their place, 0..1."""
  words, wanted = normalise(prediction).split(), normalise(answer).split()
  return sum(a == b for a, b in zip(words, wanted)) / max(len(wanted), 1)


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean over questions with its 95 % interval.

  Attributes:
    mean: over questions; accuracies lie in 0..1, differences in -1..1.
    ci95: (low, high).
    n: questions.
    num_images: clusters that the interval resampled.
  """
  mean: float
  ci95: tuple[float, float]
  n: int
  num_images: int


def bootstrap_means(values: np.ndarray, image_ids: Sequence[Hashable], *,
                    seed: int = 0,
                    num_resamples: int = NUM_RESAMPLES) -> np.ndarray:
  """Means of resampled test sets; images are drawn, with their questions.

  All columns see the same draws, so that a statistic of several methods
  (difference, ratio, retention) can be formed draw by draw.  The draws depend
  on the seed and the set of images, not on the order of the questions.

  Args:
    values: float[Q] or float[Q, X], a score per question (and method).
    image_ids: the image of each question, Q of them.
    seed: of the draws.
    num_resamples: R.

  Returns:
    float[R] or float[R, X], means over the questions of each draw.
  """
  values = np.asarray(values, np.float64)
  _check_aligned(values=values, image_ids=image_ids)
  columns = values if values.ndim == 2 else values[:, None]
  totals = bootstrap_totals(
      np.hstack([columns, np.ones((len(columns), 1))]), image_ids, seed=seed,
      num_resamples=num_resamples)
  means = totals[:, :-1] / totals[:, -1:]
  return means if values.ndim == 2 else means[:, 0]


def bootstrap_totals(values: np.ndarray, image_ids: Sequence[Hashable], *,
                     seed: int = 0, num_resamples: int = NUM_RESAMPLES
                     ) -> np.ndarray:
  """Sums of resampled test sets, for any number that is made of sums.

  Args:
    values: float[Q, X], what is summed.
    image_ids, seed, num_resamples: as for `bootstrap_means`, whose draws these
      are.

  Returns:
    float[R, X].
  """
  order = {key: i for i, key in enumerate(sorted(set(image_ids), key=repr))}
  cluster = np.array([order[key] for key in image_ids])
  num_images = len(order)
  sums = np.stack([np.bincount(cluster, column, num_images)
                   for column in np.asarray(values, np.float64).T], 1)
  rng = np.random.default_rng(seed)
  shares = np.full(num_images, 1.0 / num_images)
  chunk = max(1, _CHUNK_VALUES // num_images)
  totals = []
  for start in range(0, num_resamples, chunk):
    size = min(chunk, num_resamples - start)
    totals.append(rng.multinomial(num_images, shares, size) @ sums)
  return np.concatenate(totals)


def mean_with_interval(values: np.ndarray, image_ids: Sequence[Hashable], *,
                       value_range: tuple[float, float] = (0.0, 1.0),
                       seed: int = 0,
                       num_resamples: int = NUM_RESAMPLES) -> Interval:
  """Mean with its 95 % percentile bootstrap interval, clustered by image.

  Where all questions score the same the bootstrap has zero width and would
  claim certainty.  Then the exact binomial bound takes its place: with I
  images and not one exception, the share of images with an exception is below
  1 - 0.025 ** (1 / I).  One image alone says nothing about others: the
  interval is that bound, or the whole range if its questions differ.

  Args:
    values: float[Q], a score per question.
    image_ids: the image of each question.
    value_range: lowest and highest possible score of a question.
    seed: of the resampling.
    num_resamples: draws.
  """
  values = np.asarray(values, np.float64)
  _check_aligned(values=values, image_ids=image_ids)
  low, high = value_range
  num_images = len(set(image_ids))
  mean = float(values.mean())
  if np.ptp(values) == 0.0:
    ci = no_exception(mean, num_images, value_range)
  elif num_images == 1:
    ci = (low, high)
  else:
    means = bootstrap_means(values, image_ids, seed=seed,
                            num_resamples=num_resamples)
    ci = np.quantile(means, (TAIL, 1.0 - TAIL))
  return Interval(mean, (float(ci[0]), float(ci[1])), len(values), num_images)


def no_exception(mean: float, num_images: int, value_range: tuple[float, float]
                 ) -> tuple[float, float]:
  """The interval where no image differs; see `mean_with_interval`."""
  share, (low, high) = 1.0 - TAIL ** (1.0 / num_images), value_range
  return mean - share * (mean - low), mean + share * (high - mean)


def score(predictions: Sequence[str], answers: Sequence[str],
          kinds: Sequence[str], image_ids: Sequence[Hashable], *,
          headline_kinds: Sequence[str] | None = None,
          seed: int = 0) -> dict[str, Any]:
  """The accuracy part of a result row.

  Args:
    predictions, answers, kinds, image_ids: one entry per question.
    headline_kinds: kinds whose questions make `accuracy`; None takes all.
    seed: of the bootstrap.

  Returns:
    {'accuracy', 'ci95': [low, high], 'n', 'by_kind': {kind: the same three}};
    by_kind holds every kind, headline or not, in sorted order.

  Raises:
    ValueError: sequences of unequal length, or a headline kind without any
      question.
  """
  _check_aligned(predictions=predictions, answers=answers, kinds=kinds,
                 image_ids=image_ids)
  correct = exact_match(predictions, answers)
  present = sorted(set(kinds))
  headline = present if headline_kinds is None else list(headline_kinds)
  missing = [kind for kind in headline if kind not in present]
  if missing:
    raise ValueError(f'headline kinds {missing} have no question; the test '
                     f'set has the kinds {present}')

  def part(chosen: set[str]) -> dict[str, Any]:
    rows = [i for i, kind in enumerate(kinds) if kind in chosen]
    result = mean_with_interval(correct[rows], [image_ids[i] for i in rows],
                                seed=seed)
    return {'accuracy': result.mean, 'ci95': list(result.ci95), 'n': result.n}

  return {**part(set(headline)),
          'by_kind': {kind: part({kind}) for kind in present}}


def paired_difference(a: np.ndarray, b: np.ndarray,
                      image_ids: Sequence[Hashable], *, seed: int = 0,
                      num_resamples: int = NUM_RESAMPLES) -> Interval:
  """mean(a) - mean(b) of two methods on the same questions.

  Images are resampled with the answers of both methods, so the difficulty
  that the methods share cancels: the interval is tighter than two intervals
  laid side by side.

  Args:
    a, b: bool[Q] or float[Q] in 0..1, the methods' scores of each question.
    image_ids: the image of each question.
    seed: of the resampling.
    num_resamples: draws.
  """
  _check_aligned(a=a, b=b, image_ids=image_ids)
  difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
  return mean_with_interval(difference, image_ids, value_range=(-1.0, 1.0),
                            seed=seed, num_resamples=num_resamples)


def retention(x: float, lower: float, upper: float, *,
              gap_ci95: Sequence[float] | None = None) -> float | None:
  """VoCo-LLaMA's retention (x - LB) / (UB - LB).

  Undefined, hence None, where the gap UB - LB lies within noise: the quotient
  would be noise as well.  Pass the interval of `paired_difference(UB, LB)` as
  gap_ci95: the gap counts when the whole interval is above zero.  Without it
  the gap must exceed MIN_GAP.  Values below 0 (worse than the lower bound)
  and above 1 are results and are returned as they are.

  Args:
    x, lower, upper: accuracies in 0..1 on the same questions.
    gap_ci95: (low, high) of upper - lower.
  """
  gap = upper - lower
  certain = gap > MIN_GAP if gap_ci95 is None else gap > 0 and gap_ci95[0] > 0
  return float((x - lower) / gap) if certain else None


def ratio_to_full(x: float, full: float) -> float | None:
  """ATP-LLaVA's plain ratio x / full; None when full is 0."""
  return float(x / full) if full > 0 else None


@dataclasses.dataclass(frozen=True)
class QuestionOnly:
  """The most frequent training answers: a floor that never sees a picture.

  Attributes:
    by_question: answer per question string (normalised).
    by_kind: answer per kind, for questions that training never asked.
    overall: answer for kinds that training never had.
  """
  by_question: Mapping[str, str]
  by_kind: Mapping[str, str]
  overall: str


def fit_question_only(questions: Sequence[str], answers: Sequence[str],
                      kinds: Sequence[str]) -> QuestionOnly:
  """Counts the training split; ties go to the alphabetically first answer."""
  _check_aligned(questions=questions, answers=answers, kinds=kinds)
  answers = [normalise(answer) for answer in answers]
  return QuestionOnly(
      by_question=_most_frequent(questions, answers, normalise),
      by_kind=_most_frequent(kinds, answers, str),
      overall=_most_frequent([''] * len(answers), answers, str)[''])


def predict_question_only(floor: QuestionOnly, questions: Sequence[str],
                          kinds: Sequence[str]) -> list[str]:
  """The floor's answer to each question."""
  _check_aligned(questions=questions, kinds=kinds)
  return [floor.by_question.get(normalise(question),
                                floor.by_kind.get(kind, floor.overall))
          for question, kind in zip(questions, kinds)]


def _most_frequent(keys: Sequence[str], answers: Sequence[str],
                   clean: Callable[[str], str]) -> dict[str, str]:
  counts = collections.defaultdict(collections.Counter)
  for key, answer in zip(keys, answers):
    counts[clean(key)][answer] += 1
  return {key: min(counter, key=lambda answer: (-counter[answer], answer))
          for key, counter in counts.items()}


def _check_aligned(**sequences: Sequence[Any]) -> None:
  lengths = {name: len(values) for name, values in sequences.items()}
  if len(set(lengths.values())) != 1:
    raise ValueError(f'one entry per question is needed, got {lengths}')
  if 0 in lengths.values():
    raise ValueError(f'no question to score: {", ".join(lengths)} are empty')
