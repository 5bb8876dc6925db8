"""Small invented files in the official formats of the benchmarks, with answers
and what the official scorers give for them.
"""

from __future__ import annotations

import json
import pathlib
import shutil

from vlm_compress.eval.benchmarks import answers, catalogue, joining
from vlm_compress.eval.benchmarks.question import QuestionSet

DATA = pathlib.Path(__file__).parent / 'eval/benchmarks/data'
ANSWERS = {key: DATA / key / ('pred.jsonl' if key.endswith('_qa') else 'answers.jsonl')
           for key in catalogue.BENCHMARKS}


def expected(key: str) -> dict:
  """What the official scorer gives."""
  return json.loads((DATA / 'expected' / f'{key}.json').read_text(encoding='utf-8'))


def cases(name: str) -> list[dict]:
  """Texts and what the official parser makes of them."""
  return json.loads((DATA / 'cases' / f'{name}.json').read_text(encoding='utf-8'))


def json_lines(path: pathlib.Path) -> list[dict]:
  """The rows of a file of JSON lines."""
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def write_lines(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
  """Writes JSON lines; returns the path."""
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  return path


def predictions(key: str, questions: QuestionSet) -> dict[str, str]:
  """The answers that come with the files."""
  return joining.join(answers.read(ANSWERS[key]), questions)


def scored(key: str, **options):
  """Questions, predictions and scores of a benchmark's own answers."""
  questions = catalogue.read(key, DATA)
  given = predictions(key, questions)
  return questions, given, catalogue.BENCHMARKS[key].score(questions, given, **options)


def copied(key: str, tmp_path: pathlib.Path) -> pathlib.Path:
  """A copy of a benchmark's files, to damage."""
  return pathlib.Path(shutil.copytree(DATA / key, tmp_path / key))
