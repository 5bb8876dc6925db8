"""Intervals, differences and agreement of benchmarks' numbers."""

from __future__ import annotations

import dataclasses

import benchmark_files
import numpy as np
import pytest

from vlm_compress.config import ConfigError
from vlm_compress.eval import intervals, scoring
from vlm_compress.eval.answer_log import unit_of
from vlm_compress.eval.benchmarks import catalogue, gqa, mmbench, mme, pope
from vlm_compress.eval.benchmarks.question import Question, QuestionSet
from vlm_compress.eval.benchmarks.scores import Scores

PUBLIC = sorted(catalogue.BENCHMARKS)


def made(module, questions, texts) -> Scores:
  """Scores of invented questions."""
  some = QuestionSet(module.KEY, benchmark_files.DATA, benchmark_files.DATA,
                     tuple(questions))
  return module.score(some, {q.id: t for q, t in zip(questions, texts)})


def gqa_scores(texts, pictures) -> Scores:
  return made(gqa, [Question(str(i), 'q', 'q', f'{p}.jpg', answers=('yes',),
                             groups={'structural': 'verify' if i % 2 else 'query'})
                    for i, p in enumerate(pictures)], texts)


@pytest.mark.parametrize('key', PUBLIC)
def test_values_are_the_scorers(key):
  """Of every benchmark, headline and lines of the table."""
  _, _, scores = benchmark_files.scored(key)
  found = intervals.intervals(scores, num_resamples=50)
  most = intervals.full_score(scores)
  assert most * found['accuracy'] == pytest.approx(scores.value)
  assert found['n'] == scores.n
  column = scores.headline.column
  for name, one in found['by_kind'].items():
    group, _, value = name.rpartition(': ')
    rows = [r for r in scores.rows if r.name == value and r.group and (
        not group or r.group == group)] or [r for r in scores.rows if r.name == name]
    scale = 200 if key == 'mme' else 100
    assert any(scale * one['accuracy'] == pytest.approx(r.numbers[column]) and
               r.n == one['n'] for r in rows), name
    assert 0 <= one['ci95'][0] <= one['accuracy'] <= one['ci95'][1] <= 1


def test_means_have_the_interval_of_scoring():
  rng = np.random.default_rng(0)
  pictures = rng.integers(0, 9, 40).tolist()
  texts = rng.choice(['yes', 'no'], 40).tolist()
  scores = gqa_scores(texts, pictures)
  want = scoring.mean_with_interval([t == 'yes' for t in texts],
                                    [f'{p}.jpg' for p in pictures])
  found = intervals.intervals(scores)
  assert found['accuracy'] == pytest.approx(want.mean)
  assert found['ci95'] == pytest.approx(want.ci95, abs=1e-12)
  all_right = intervals.intervals(gqa_scores(['yes'] * 40, pictures))
  assert all_right['ci95'] == pytest.approx([0.025 ** (1 / 9), 1.0])
  single = intervals.intervals(gqa_scores(['yes', 'no'], [1, 1]))
  assert single['ci95'] == [0.0, 1.0]


def test_circular_resamples_questions_and_not_rows():
  questions = [Question(str(i + 1_000_000 * k), 'q', 'q', None, options=('x', 'y'),
                        answers=('A',), picture='', unit=str(i))
               for i in range(6) for k in range(2)]
  texts = ['A', 'A'] * 3 + ['A', 'B'] * 3  # half are right both times
  found = intervals.intervals(made(mmbench, questions, texts))
  want = scoring.mean_with_interval([1, 1, 1, 0, 0, 0], list('012345'))
  assert found['accuracy'] == 0.5 and found['n'] == 6
  assert found['ci95'] == pytest.approx(want.ci95, abs=1e-12)


def brute_force(scores: Scores, units: list[str], draws: int) -> np.ndarray:
  """The headline of resampled results, by the scorer itself; copies of a unit are
  units of their own.
  """
  order = sorted(set(units), key=repr)
  rng = np.random.default_rng(0)
  counts = rng.multinomial(len(order), np.full(len(order), 1 / len(order)), draws)
  values = []
  for draw in counts:
    results = [dataclasses.replace(r, question=dataclasses.replace(
        r.question, unit=f'{r.question.unit}/{copy}'))
               for unit, times in zip(order, draw) for copy in range(times)
               for r, u in zip(scores.results, units) if u == unit]
    try:
      rows = catalogue.BENCHMARKS[scores.benchmark].summarise(results)
    except (IndexError, ZeroDivisionError):
      values.append(np.nan)
      continue
    head = scores.headline
    values.append(next(r.numbers[head.column] for r in rows
                       if (r.group, r.name) == (head.group, head.name)))
  return np.asarray(values)


@pytest.mark.parametrize('module', [pope, mme])
def test_numbers_that_are_no_means_resample_like_the_scorer(module):
  rng = np.random.default_rng(1)
  if module is pope:
    questions = [Question(f'{c}/{i}', 'q', 'q', f'{i % 7}.jpg', groups={'category': c},
                          answers=(str(rng.choice(['yes', 'no'])),))
                 for c in pope.CATEGORIES for i in range(21)]
  else:
    questions = [Question(f'{i}#{k}', 'q', 'q', f'{i}.jpg', unit=str(i), answers=(a,),
                          groups={'task': 'count'})
                 for i in range(8) for k, a in ((1, 'yes'), (2, 'no'))]
  texts = [q.answers[0] if rng.random() < 0.7 else 'yes' for q in questions]
  scores = made(module, questions, texts)
  units = [unit_of(q) for q in questions]
  want = brute_force(scores, units, 40)
  part = intervals.sums_of(module.KEY, intervals.headline_results(scores))
  got, = intervals._draws([part], sorted(set(units)), 0, 40)
  np.testing.assert_allclose(intervals.full_score(scores) * got, want, rtol=1e-12)
  assert np.ptp(want) > 0


def test_difference_is_paired():
  pictures = [i // 2 for i in range(40)]
  rng = np.random.default_rng(2)
  a = rng.choice(['yes', 'no'], 40)
  b = np.where(rng.random(40) < 0.15, 'no', a)  # as a, a little worse
  first, second = gqa_scores(a.tolist(), pictures), gqa_scores(b.tolist(), pictures)
  gap = intervals.difference(first, second)
  want = scoring.paired_difference(a == 'yes', b == 'yes', [f'{p}.jpg' for p in pictures])
  assert gap.mean == pytest.approx(want.mean) and gap.mean > 0
  assert gap.ci95 == pytest.approx(want.ci95, abs=1e-12) and gap.n == 40
  assert gap.num_images == 20
  apart = intervals.intervals(first)['ci95']
  assert gap.ci95[1] - gap.ci95[0] < apart[1] - apart[0]


def test_agreement_is_about_what_was_read():
  a = gqa_scores(['Yes.', 'no', 'a cat', 'cat'], [0, 1, 2, 3])
  b = gqa_scores(['yes', 'no.', 'cat', 'dog'], [0, 1, 2, 3])
  same = intervals.agreement(a, b)
  assert same.mean == 0.5 and same.n == 4  # right or wrong does not matter
  # where nothing was read in either, the texts count
  options = dict(options=('red', 'blue'), answers=('A',), picture='')
  questions = [Question(str(i), 'q', 'q', None, unit=str(i), **options) for i in range(3)]
  x = made(mmbench, questions, ['A', 'hm', 'what ?'])
  y = made(mmbench, questions, ['A.', ' HM', 'B'])
  assert intervals.agreement(x, y).mean == pytest.approx(2 / 3)


def test_other_questions_are_refused():
  a = gqa_scores(['yes'] * 3, [0, 1, 2])
  with pytest.raises(ConfigError, match='3 and 2 questions, 1 of them'):
    intervals.difference(a, gqa_scores(['yes'] * 2, [0, 1]))
  other = dataclasses.replace(a, benchmark='pope')
  with pytest.raises(ConfigError, match='of gqa .*of pope'):
    intervals.agreement(a, other)
