"""ActivityNet-QA (arXiv 1906.02467) by its official metric: equality of strings.

Read like the other two sets of video questions, see video_qa.py.  The match
after normalisation stands beside the official number, which also counts a
capital letter or a full stop as wrong.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from vlm_compress.eval.benchmarks import scores, video_qa, vqa_text
from vlm_compress.eval.benchmarks.question import Question, QuestionSet

KEY = 'activitynet_qa'
RULES = ('match',)
HEADLINE = scores.Headline('ActivityNet-QA exact match, official (no GPT judge)', 'exact')
POLICY = scores.WRONG


def read(root: pathlib.Path) -> QuestionSet:
  """The test questions; see video_qa.read."""
  return video_qa.read(root, KEY)


def score(questions: QuestionSet, predictions: Mapping[str, str], *,
          allow_partial: bool = False, rule: str = RULES[0]) -> scores.Scores:
  """Exact and normalised match in percent, by type."""
  def judge(text: str, question: Question) -> tuple[str, int]:
    return vqa_text.m4c(text), int(text == question.answers[0])
  return scores.score(questions, predictions, judge=judge, summarise=summarise,
                      headline=HEADLINE, policy=POLICY, rule=rule,
                      allow_partial=allow_partial, remark=video_qa.REMARK)


def summarise(results: Sequence[scores.Result]) -> tuple[scores.Row, ...]:
  """The table, with the free questions as a total of their own."""
  return video_qa.rows(results, ('exact', 'normalised'))
