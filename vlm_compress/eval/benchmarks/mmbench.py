"""MMBench dev (arXiv 2307.06281): multiple choice in several passes.

Official: VLMEvalKit's rules without its judge (a model that answers with a
letter needs none).  The file holds every question once per pass, options
shifted and the letter moved along, so each row is asked and parsed on its own.
Circular: a question is right if all its rows are; that is what tables quote.
Vanilla: the first pass only.  Releases differ: the file's name is part of the
score.

Rules:
  vlmevalkit: letter, phrase or option text, see `infer`.
  strict: the text is the letter.
  2023: the matcher of the first release, before it asks GPT.
"""

from __future__ import annotations

import collections
import pathlib
import re
from collections.abc import Mapping, Sequence

from vlm_compress.data.errors import DataError
from vlm_compress.data.records import read_table
from vlm_compress.eval.benchmarks import scores, sheets
from vlm_compress.eval.benchmarks.question import (
  LETTER,
  LETTERS,
  Part,
  Question,
  QuestionSet,
  home,
  is_whole,
  with_options,
)

KEY = 'mmbench'
RULES = ('vlmevalkit', 'strict', '2023')
HEADLINE = scores.Headline('MMBench, circular', 'circular')
POLICY = scores.WRONG
LETTER_CN = '请直接回答选项字母。'
_PASS = 1_000_000  # index = pass * _PASS + question
_REFERENCE = 64  # characters; a shorter `image` is the index of another row
_NEEDED = ('index', 'question', 'A', 'B', 'image')
_REFUSALS = ("Sorry, I can't help with images of people yet.",
             "I can't process this file.",
             "I'm sorry, but without the image provided",
             'Cannot determine the answer')
_FAILED = 'Failed to obtain answer via API'
_BLANKS = str.maketrans(dict.fromkeys('.()[],:;!*#{}', ' '))
_PHRASE = re.compile(r'(?:correct\s+)?answer\s+is\s+\**([ABCD])\**', re.IGNORECASE)
_TAIL = 5  # the letter must be nearer to the end than so many words
# What may stand around a letter in the matcher of 2023, in its order.
_AROUND = (('', '.'), ('', ','), ('', ':'), ('', ')'), ('', ').'), ('(', ')'),
           ('(', ').'), (':', ''), (':', ','), (':', '.'), (':', ')'), (':', ').'))


def read(root: pathlib.Path) -> QuestionSet:
  """The rows of a TSV: `root` may be the file, or a directory with one *.tsv.

  A Chinese file (_cn in its name) is asked in Chinese.

  Raises:
    DataError: a row is malformed, or several files could be meant.
    FileNotFoundError: there is no file.
  """
  found = files(root)
  if len(found) > 1:
    raise DataError(f'{found[0].parent} has several .tsv files '
                    f'({", ".join(p.name for p in found)}); name one with --data')
  path = found[0]
  suffix = LETTER_CN if '_cn' in path.name.lower() else LETTER
  questions, pictures, kept = [], {}, {}
  for line, row in read_table(path, '\t'):
    where = f'{path}: line {line}'
    lacking = [name for name in _NEEDED if name not in row]
    if lacking:
      raise DataError(f'{path}: line 1: no column {", ".join(lacking)}; is it '
                      "MMBench's file?")
    index = row['index']
    if not is_whole(index):
      raise DataError(f'{where}: index {index!r} is no whole number')
    picture = row['image']
    if 0 < len(picture) <= _REFERENCE:
      if picture not in pictures:
        raise DataError(f'{where}: its image is that of row {picture!r}, which '
                        'does not stand above it')
      picture = pictures[picture]
    # Passes repeat the picture; it is kept once.
    row['image'] = pictures[index] = kept.setdefault(picture, picture)
    questions.append(_question(row, suffix, where))
  base = len({q.unit for q in questions})
  return QuestionSet(KEY, path.parent, path, tuple(questions), (
      Part('rows', len(questions), (4_377, 4_329)), Part('questions', base, (1_176, 1_164))),
      notes=(f'file: {path.name}',))


def files(root: pathlib.Path) -> list[pathlib.Path]:
  """The TSVs that could be meant: `root` itself, or those in it.

  Raises:
    FileNotFoundError: there is none.
  """
  if root.is_file():
    return [root]
  root = home(root, KEY)
  found = sorted(root.glob('*.tsv'))
  if not found:
    raise FileNotFoundError(f'{root} has no .tsv file; see "Benchmarks" in the '
                            'README')
  return found


def _question(row: Mapping[str, str], suffix: str, where: str) -> Question:
  options = []
  for letter in 'ABCD':  # up to the first empty one, as LLaVA does
    if not row.get(letter):
      break
    options.append(row[letter])
  answer = row.get('answer', '')
  if len(options) < 2 or answer and answer not in LETTERS[:len(options)]:
    raise DataError(f'{where}: {len(options)} options and the answer {answer!r}')
  if not row['image']:
    raise DataError(f'{where}: has no picture')
  hint = row.get('hint', '')
  text = f'{hint}\n{row["question"]}' if hint else row['question']
  base = str(int(row['index']) % _PASS)
  groups = {name: row[name] for name in ('l2-category', 'category', 'split')
            if row.get(name)}
  return Question(row['index'], row['question'],
                  f'{with_options(text, options)}\n{suffix}', None, tuple(options),
                  (answer,) if answer else (), groups, picture=row['image'], unit=base)


def infer(text: str, options: Sequence[str]) -> str | None:
  """The letter in a model's text, Z for a refusal, or None [VLMEvalKit].

  In turn: a known refusal; the only letter of this row among the words, near
  the end; 'answer is **X**'; the only option whose text occurs, if the text is
  not much longer than the options.
  """
  letters = LETTERS[:len(options)]
  if _FAILED not in text:
    if any(refusal in text for refusal in _REFUSALS):
      return 'Z'
    said = text.translate(_BLANKS).split()
    found = [letter for letter in letters if letter in said]
    if len(found) == 1 and said.index(found[0]) > len(said) - _TAIL:
      return found[0]
    if not found and 'Z' in said:
      return 'Z'
    phrase = _PHRASE.search(text)
    if phrase and phrase.group(1).upper() in letters:
      return phrase.group(1).upper()
  if len(text) > 2 * sum(map(len, options)):
    return None
  return _by_text(text, options)


def infer_2023(text: str, options: Sequence[str]) -> str | None:
  """The letter that the first release finds without GPT, or None."""
  said, letters = text.split(), LETTERS[:len(options)]
  for before, after in (('', ''), *_AROUND):
    found = [letter for letter in letters if before + letter + after in said]
    if len(found) == 1:
      if not before + after and 'A' in said and len(said) > 3:
        break  # it takes the A for an article
      return found[0]
  return _by_text(text, options)


def _by_text(text: str, options: Sequence[str]) -> str | None:
  found = [letter for letter, option in zip(LETTERS, options)
           if option.lower() in text.lower()]
  return found[0] if len(found) == 1 else None


def score(questions: QuestionSet, predictions: Mapping[str, str], *,
          allow_partial: bool = False, rule: str = RULES[0]) -> scores.Scores:
  """Circular and vanilla accuracy in percent, by category."""
  def judge(text: str, question: Question) -> tuple[str | None, int]:
    letter = {'vlmevalkit': infer, '2023': infer_2023,
              'strict': lambda text, options: text}[rule](text, question.options)
    return letter, int(letter == question.answers[0])
  return scores.score(questions, predictions, judge=judge, summarise=summarise,
                      headline=HEADLINE, policy=POLICY, rule=rule,
                      allow_partial=allow_partial,
                      remark='circular is over the rows that have answers'
                      if allow_partial else '')


def summarise(results: Sequence[scores.Result]) -> tuple[scores.Row, ...]:
  """The table.  n counts questions; the row 'all rows' counts rows."""
  rows = [_row('', 'all', results)]
  rows.append(scores.Row('', 'all rows', len(results), {
      'vanilla': 100 * sum(r.score for r in results) / len(results)}, 'rows'))
  for group in ('l2-category', 'category'):
    members = collections.defaultdict(list)
    for result in results:
      if group in result.question.groups:
        members[result.question.groups[group]].append(result)
    rows += [_row(group, name, mine) for name, mine in sorted(members.items())]
  return tuple(rows)


def circular(results: Sequence[scores.Result]) -> dict[str, int]:
  """Question -> 1 if every row of it is right."""
  right: dict[str, int] = {}
  for result in results:
    unit = result.question.unit
    right[unit] = min(right.get(unit, 1), result.score)
  return right


def _row(group: str, name: str, results: Sequence[scores.Result]) -> scores.Row:
  whole = circular(results)
  first = [r.score for r in results if int(r.question.id) < _PASS]
  numbers = {'circular': 100 * sum(whole.values()) / len(whole)}
  n_of = {}
  if first:
    numbers['vanilla'] = 100 * sum(first) / len(first)
    # Where answers are missing, a question may lack its first pass, or have no other.
    n_of = {'vanilla': len(first)} if len(first) != len(whole) else {}
  return scores.Row(group, name, len(whole), numbers, n_of=n_of)


def write_submission(path: pathlib.Path, questions: QuestionSet,
                     predictions: Mapping[str, str]) -> str:
  """Writes what the server takes: the rows with a column `prediction`, as
  .xlsx (which it wants) or .tsv.

  Returns:
    A line that says what was written.
  """
  header = ['index', 'question', 'A', 'B', 'C', 'D', 'prediction', 'answer', 'split']
  rows = []
  for q in questions.questions:
    options = [*q.options, '', ''][:4]
    rows.append([int(q.id), q.text, *options, predictions.get(q.id, ''),
                 ''.join(q.answers), q.groups.get('split', '')])
  sheets.write(path, [header, *rows])
  given = sum(q.id in predictions for q in questions.questions)
  return f'{path}: {len(rows)} rows, {len(rows) - given} of them without a prediction'
