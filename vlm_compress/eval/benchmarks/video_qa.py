"""MSVD-QA, MSRVTT-QA and ActivityNet-QA without a judge.

Official for ActivityNet-QA: equality of strings ('exact' here), which is its
headline (activitynet_qa.py); for the other two that is the common reading of
their papers.  'normalised' is ours: m4c's form on both sides.  Papers on video
chat models quote GPT-judged numbers, which are far higher for sentence answers:
never put these beside those.

The prompt is the question with LLaVA's short-answer line (ours; there is no
LLaVA-1.5 prompt for videos).
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_compress.data.errors import DataError
from vlm_compress.data.records import read_json
from vlm_compress.eval.benchmarks import scores, vqa_text
from vlm_compress.eval.benchmarks.question import (
  SHORT_ANSWER,
  Part,
  Question,
  QuestionSet,
  field,
  first_file,
  home,
  is_whole,
)

RULES = ('match',)
HEADLINE = scores.Headline('exact match after normalisation (no GPT judge)', 'normalised')
POLICY = scores.WRONG
COUNTS = {'msvd_qa': 13_157, 'msrvtt_qa': 72_821, 'activitynet_qa': 8_000}
TYPES = ('motion', 'spatial relation', 'temporal relation', 'yes/no', 'color', 'object',
         'location', 'number', 'other')
FREE = TYPES[3:]
VIDEOS = 'videos'
# Of the releases; of several files of a name the first of these is taken.
EXTENSIONS = ('.mp4', '.avi', '.mkv', '.webm', '.mov', '.flv', '.m4v', '.wmv', '.mpg')
_MAPPING = 'youtube_mapping.txt'  # of MSVD: `clip vid17`
NAMES = {'msvd_qa': 'MSVD-QA', 'msrvtt_qa': 'MSRVTT-QA'}
REMARK = 'exact match, not comparable with numbers that GPT has judged'


def read(root: pathlib.Path, key: str) -> QuestionSet:
  """The test questions: test_qa.json, or test_q.json and test_a.json.

  Videos are videos/<name> with one of EXTENSIONS: v_<video_name> for
  ActivityNet, video<id> for MSRVTT, and for MSVD the clip that
  youtube_mapping.txt gives, or vid<id> without that file.

  Args:
    root: directory of the files.
    key: msvd_qa, msrvtt_qa or activitynet_qa.

  Raises:
    DataError: a row lacks a field, or a question has no answer.
    FileNotFoundError: a file is not there, or is another of the three sets'.
  """
  root = home(root, key)
  path = first_file(root, 'test_qa.json', 'test_q.json')
  paired = path.name == 'test_q.json'
  answers = _answers(first_file(root, 'test_a.json')) if paired else {}
  names, clips = _video_names(root), _clips(root) if key == 'msvd_qa' else {}
  questions = []
  for i, row in enumerate(_list(path)):
    where = f'{path}: question {i}'
    number = field(row, 'question_id' if paired else 'id', (str, int), where)
    if paired and number not in answers:
      raise DataError(f'{where}: id {number!r} has no answer in test_a.json')
    label = answers[number] if paired else row
    if (other := _set_of(row, label)) != key:
      raise FileNotFoundError(f'{path} holds questions of {other} (see question {i}); the '
                              f'files of {key} are not there')
    text = field(row, 'question', str, where)
    stem = _stem(row, key, clips, where)
    questions.append(Question(
        str(number), text, f'{text}\n{SHORT_ANSWER}',
        f'{VIDEOS}/{names.get(stem, stem + (".avi" if key == "msvd_qa" else ".mp4"))}',
        answers=(field(label, 'answer', str, where),),
        groups=_groups(row, label, key, where)))
  return QuestionSet(key, root, path, tuple(questions),
                     (Part('questions', len(questions), (COUNTS[key],)),), videos=True)


def _list(path: pathlib.Path) -> list[Any]:
  rows = read_json(path)
  if not isinstance(rows, list):
    raise DataError(f'{path} must be a list')
  return rows


def _answers(path: pathlib.Path) -> dict[str | int, Mapping[str, Any]]:
  found: dict[str | int, Mapping[str, Any]] = {}
  for i, row in enumerate(_list(path)):
    number = field(row, 'question_id', (str, int), f'{path}: answer {i}')
    if number in found:
      raise DataError(f'{path}: answer {i}: the id {number!r} occurs twice')
    found[number] = row
  return found


def _set_of(row: Mapping[str, Any], label: Mapping[str, Any]) -> str:
  """Which set a question is from: the files have the same names, and often ids."""
  if 'type' in label:
    return 'activitynet_qa'
  video = re.fullmatch('video[0-9]+', str(row.get('video_name')))
  return 'msrvtt_qa' if 'category_id' in row or video else 'msvd_qa'


def _groups(row: Mapping[str, Any], label: Mapping[str, Any], key: str,
            where: str) -> dict[str, str]:
  if key == 'activitynet_qa':
    number = str(field(label, 'type', (int, str), where))
    if not is_whole(number) or int(number) >= len(TYPES):
      raise DataError(f'{where}: type {number} is unknown')
    return {'type': TYPES[int(number)]}
  if 'category_id' not in row:
    return {}
  return {'category': str(field(row, 'category_id', (int, str), where))}


def _stem(row: Mapping[str, Any], key: str, clips: Mapping[str, str], where: str) -> str:
  """The video's file name without its extension."""
  if 'video_name' in row:
    name = field(row, 'video_name', str, where)
    return f'v_{name}' if key == 'activitynet_qa' else name
  number = field(row, 'video_id', int, where)
  return clips.get(f'vid{number}', f'vid{number}') if key == 'msvd_qa' else f'video{number}'


def _video_names(root: pathlib.Path) -> dict[str, str]:
  """File names of videos by stem."""
  folder = root / VIDEOS
  found = sorted(folder.iterdir()) if folder.is_dir() else []
  return {path.stem: path.name for extension in reversed(EXTENSIONS) for path in found
          if path.suffix.lower() == extension}


def _clips(root: pathlib.Path) -> dict[str, str]:
  """vid<id> -> name of the clip, of MSVD; {} without the file that says it."""
  path = root / _MAPPING
  if not path.is_file():
    return {}
  try:
    lines = path.read_text(encoding='utf-8-sig').splitlines()
  except UnicodeDecodeError as e:
    raise DataError(f'{path}: byte {e.start} is not UTF-8; save the file as UTF-8') from e
  clips: dict[str, str] = {}
  for number, line in enumerate(lines, 1):
    parts = line.split()
    if len(parts) not in (0, 2):
      raise DataError(f'{path}: line {number}: must be a clip and vid<id>')
    if parts and clips.setdefault(parts[1], parts[0]) != parts[0]:
      raise DataError(f'{path}: line {number}: {parts[1]} was another clip above')
  return clips


def score(questions: QuestionSet, predictions: Mapping[str, str], *,
          allow_partial: bool = False, rule: str = RULES[0]) -> scores.Scores:
  """Exact and normalised match in percent, by type."""
  def judge(text: str, question: Question) -> tuple[str, int]:
    said = vqa_text.m4c(text)
    return said, int(said == vqa_text.m4c(question.answers[0]))
  headline = dataclasses.replace(
      HEADLINE, metric=f'{NAMES[questions.benchmark]} {HEADLINE.metric}')
  return scores.score(questions, predictions, judge=judge, summarise=summarise,
                      headline=headline, policy=POLICY, rule=rule,
                      allow_partial=allow_partial, remark=REMARK)


def summarise(results: Sequence[scores.Result]) -> tuple[scores.Row, ...]:
  """The table."""
  return rows(results, ('normalised', 'exact'))


def rows(results: Sequence[scores.Result], columns: Sequence[str]
         ) -> tuple[scores.Row, ...]:
  """Shares of 'exact' and 'normalised' matches in percent, in that order of columns:
  all, free (where questions have types), and groups.
  """
  right = {'exact': lambda r: r.text == r.question.answers[0],
           'normalised': lambda r: r.parsed == vqa_text.m4c(r.question.answers[0])}
  groups = [('', 'all', list(results))]
  free = [r for r in results if r.question.groups.get('type') in FREE]
  groups += [('', 'free', free)] if free else []
  for group in ('type', 'category'):
    values = sorted({r.question.groups[group] for r in results if group in r.question.groups})
    groups += [(group, value, [r for r in results if r.question.groups.get(group) == value])
               for value in values]
  return tuple(scores.Row(group, name, len(mine), {
      column: 100 * sum(map(right[column], mine)) / len(mine) for column in columns})
               for group, name, mine in groups)
