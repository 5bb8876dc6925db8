"""TextVQA val, v0.5.1 (arXiv 1904.08920): text in pictures, soft accuracy.

Official: m4c's evaluator, both sides normalised.  LLaVA's figure is with OCR
tokens in the prompt (Rosetta's, which come in a file of their own); without
them it is about twelve points lower, so the scores say which it is.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from fractions import Fraction

from vlm_compress.data.errors import DataError
from vlm_compress.data.records import read_json, read_json_lines
from vlm_compress.eval.benchmarks import scores, vqa_text
from vlm_compress.eval.benchmarks.question import (
  SHORT_ANSWER,
  Part,
  Question,
  QuestionSet,
  field,
  first_file,
  home,
)

KEY = 'textvqa'
FILE = 'TextVQA_0.5.1_val.json'
OCR_FILE = 'TextVQA_Rosetta_OCR_v0.2_val.json'
LLAVA_FILE = 'llava_textvqa_val_v051_ocr.jsonl'  # has the tokens in its prompts
RULES = ('official',)
HEADLINE = scores.Headline('TextVQA accuracy', 'accuracy')
POLICY = scores.WRONG
_OCR = 'Reference OCR token: '
_ASKED = 'questions are'  # how the note on our own prompts begins


def read(root: pathlib.Path, ocr: bool | None = None) -> QuestionSet:
  """The questions of val; images are train_images/<image_id>.jpg.

  Args:
    root: directory of the files.
    ocr: OCR tokens in the prompt; None puts them there if their file exists.
      They do not matter for scoring.

  Raises:
    DataError: a row lacks a field or has other than ten answers, or an image has
      no tokens, or several.
    FileNotFoundError: a file is not there.
  """
  root = home(root, KEY)
  path = first_file(root, FILE)
  if ocr is None:
    ocr = any((root / name).is_file() for name in (OCR_FILE, LLAVA_FILE))
  lines = _ocr_lines(root) if ocr else {}
  questions = []
  for i, row in enumerate(field(read_json(path), 'data', list, str(path))):
    where = f'{path}: question {i}'
    text, image = field(row, 'question', str, where), field(row, 'image_id', str, where)
    answers = tuple(field(row, 'answers', list, where))
    if not answers or not all(isinstance(a, str) for a in answers):
      raise DataError(f"{where}: field 'answers' must hold texts; is it the "
                      'test file?')
    if len(answers) != vqa_text.NUM_HUMANS:
      raise DataError(f'{where}: {len(answers)} answers; TextVQA has '
                      f'{vqa_text.NUM_HUMANS} a question: copy the file again')
    questions.append(Question(
        str(field(row, 'question_id', int, where)), text,
        '\n'.join([text.capitalize(), *_lines_of(lines, image, text, where, ocr),
                   SHORT_ANSWER]),
        f'train_images/{image}.jpg', answers=answers, aliases=(image,)))
  return QuestionSet(KEY, root, path, tuple(questions),
                     (Part('questions', len(questions), (5_000,)),), notes=(
                         f'{_ASKED} {"" if ocr else "not "}asked with OCR tokens here; '
                         'an answer file may come from other prompts',))


def _ocr_lines(root: pathlib.Path) -> dict[tuple[str, str], tuple[str, ...]]:
  """(image, question in lower case or '' for all) -> lines of the prompt."""
  path = first_file(root, OCR_FILE, LLAVA_FILE)
  found: dict[tuple[str, str], tuple[str, ...]] = {}

  def add(key: tuple[str, str], lines: tuple[str, ...], where: str) -> None:
    # LLaVA's file repeats a question that was asked twice, with the same tokens.
    if found.setdefault(key, lines) != lines:
      raise DataError(f'{where}: the image {key[0]} has other OCR tokens above; copy '
                      'the file again')
  if path.name == LLAVA_FILE:
    for number, row in read_json_lines(path):
      where = f'{path}: line {number}'
      first, *rest = field(row, 'text', str, where).split('\n')
      image = str(field(row, 'question_id', (str, int), where))
      add((image, first.lower()), tuple(x for x in rest if x.startswith(_OCR)), where)
    return found
  for i, row in enumerate(field(read_json(path), 'data', list, str(path))):
    where = f'{path}: row {i}'
    tokens = field(row, 'ocr_tokens', list, where)
    if not all(isinstance(token, str) for token in tokens):
      raise DataError(f"{where}: field 'ocr_tokens' must hold texts")
    add((field(row, 'image_id', str, where), ''), (_OCR + ', '.join(tokens),), where)
  return found


def _lines_of(lines: Mapping[tuple[str, str], tuple[str, ...]], image: str,
              text: str, where: str, ocr: bool) -> tuple[str, ...]:
  for key in ((image, ''), (image, text.lower())):
    if key in lines:
      return lines[key]
  if ocr:
    raise DataError(f'{where}: image {image} has no OCR tokens; the file of '
                    'tokens belongs to another version')
  return ()


def score(questions: QuestionSet, predictions: Mapping[str, str], *,
          allow_partial: bool = False, rule: str = RULES[0]) -> scores.Scores:
  """Soft accuracy in percent."""
  def judge(text: str, question: Question) -> tuple[str, Fraction]:
    answer = vqa_text.m4c(text)
    return answer, vqa_text.soft_accuracy(
        answer, [vqa_text.m4c(human) for human in question.answers])
  return scores.score(questions, predictions, judge=judge, summarise=summarise,
                      headline=HEADLINE, policy=POLICY, rule=rule,
                      allow_partial=allow_partial)


def with_prompts(found: scores.Scores, prompts: Sequence[str | None]) -> scores.Scores:
  """The same scores, named after what the model was asked.

  Args:
    found: from `score`.
    prompts: of the answer file's rows, as far as they say it.
  """
  kinds = {_kind(prompt) for prompt in prompts}
  kind = kinds.pop() if len(kinds) == 1 else (
      'unknown whether with OCR tokens' if None in kinds else 'with and without OCR tokens')
  kind = kind or 'unknown whether with OCR tokens'
  metric = f'{found.headline.metric}, {kind}'
  notes = [note for note in found.notes if not note.startswith(_ASKED)]
  return dataclasses.replace(
      found, headline=dataclasses.replace(found.headline, metric=metric),
      notes=(f'prompts of the answer file: {kind}', *notes))


def _kind(prompt: str | None) -> str | None:
  """What a prompt has; a bare question, as VLMEvalKit's tables have, says nothing."""
  if prompt is not None and _OCR.strip() in prompt:
    return 'with OCR tokens'
  return 'without OCR tokens' if prompt is not None and SHORT_ANSWER in prompt else None


def summarise(results: Sequence[scores.Result]) -> tuple[scores.Row, ...]:
  """The table: one number."""
  return scores.mean_rows(results, 'accuracy')
