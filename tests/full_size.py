"""Time and memory of scoring every benchmark at its full size, with random answers.

  python tests/full_size.py
  python tests/full_size.py --only gqa,pope

Each run writes the official files of a benchmark with invented content, draws an answer
to every question, scores them with `vlm-compress score` (or has it write the file for the
evaluation server) in a process of its own, and measures that process from its start to
its end, imports and output included.  Then it looks whether the numbers are over as many
questions as the release has, and what chance gives.  What `evaluate` does when the last
question is answered (full_size_end.py) is measured in the same way.

The table is printed, and all of it is written to results/full_size.json; with --only, to
--out alone.  It takes five to ten minutes and a gigabyte of disk in TMPDIR.  Questions are
invented, so nothing here says how good a model is.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import full_size_files as files
from full_size_end import write_shards
from full_size_words import Chance, write_answers

from vlm_compress import atomic
from vlm_compress.cli.benchmark import cpu_name
from vlm_compress.eval import markdown_parts
from vlm_compress.eval.benchmarks import catalogue, mme, sheets
from vlm_compress.eval.benchmarks.question import Question

ROOT = pathlib.Path(__file__).parents[1]
OUT = ROOT / 'results/full_size.json'
SEED = 20
MOST_ERRORS = 5.0  # standard errors that a number may lie off; chance: 1 in 2 million
GIB = 2 ** 30
END = pathlib.Path(__file__).with_name('full_size_end.py')
COLUMNS = ('benchmark', 'rows', 'random answers', 'expected', 'score: s', 'CPU s', 'GiB',
           'evaluate: s', 'CPU s', 'GiB')
PROBE = '''
import sys, time
from vlm_compress import resident
from vlm_compress.cli import __main__ as cli
code = cli.main(sys.argv[1:])
print(resident.peak(), time.process_time(), file=sys.stderr)
sys.exit(code)
'''


@dataclasses.dataclass(frozen=True)
class Expected:
  """What a number of the table must be.

  Attributes:
    row: (group, name) of the line; column: of the number.
    n: what it is over.
    value, error: mean and standard error of random answers.
  """
  row: tuple[str, str]
  column: str
  n: int
  value: float
  error: float


Asked = Sequence[tuple[Question, Chance]]
Expect = Callable[[Asked], list[Expected]]


@dataclasses.dataclass(frozen=True)
class Run:
  """One line of the table.

  Attributes:
    name: as --only and the table have it.
    benchmark: its key.
    rows: questions of the release that are scored or uploaded.
    write: files of the benchmark below a directory; gives the chances of the questions,
      in the order of the files.
    expect: the numbers; the first is the headline.  None writes the server's file.
    split: of the files.
    upload: name of the server's file.
    keep: which questions have an answer.
    asked: `evaluate` asks it, and its end is measured.
  """
  name: str
  benchmark: str
  rows: int
  write: Callable[[pathlib.Path, random.Random], list[Chance]]
  expect: Expect | None
  split: str | None = None
  upload: str = ''
  keep: Callable[[Question], bool] | None = None
  asked: bool = True


def mean(column: str, group: str = '', name: str = 'all') -> Expect:
  """A mean of points in percent, over all questions or those of a group."""
  def expect(asked: Asked) -> list[Expected]:
    mine = [c for q, c in asked if not group or q.groups.get(group) == name]
    return [Expected((group, name), column, len(mine),
                     100 * sum(c.mean for c in mine) / len(mine),
                     100 * math.sqrt(sum(c.variance for c in mine)) / len(mine))]
  return expect


def both(*parts: Expect) -> Expect:
  """Several of them."""
  return lambda asked: [number for part in parts for number in part(asked)]


def f1(asked: Asked) -> list[Expected]:
  """POPE.  Half of n labels are yes, and half of n answers: precision, recall and F1 are
  1/2.  F1 = 2 TP / (TP + FP + n / 2), whose slopes are 3 / 2n in TP and -1 / 2n in FP,
  each a binomial of n / 2 draws with variance n / 8: 5 / 16n.
  """
  n = len(asked) / 3
  return [Expected(('', 'mean'), 'F1', len(asked), 50.0, 100 * math.sqrt(5 / 16 / n / 3)),
          Expected(('', 'mean'), 'accuracy', len(asked), 50.0, 50 / math.sqrt(len(asked)))]


def perception(asked: Asked) -> list[Expected]:
  """MME.  An image gives each task 100 (share right + both right), in the mean 75; its
  values 0, 50 (twice as often) and 200 have the variance 5625.
  """
  images = [count / 2 for count in mme.PERCEPTION.values()]
  return [Expected(('', 'perception'), 'score', sum(mme.PERCEPTION.values()),
                   75.0 * len(images), math.sqrt(sum(5625 / n for n in images))),
          *(Expected(('task', task), 'accuracy', n, 50.0, 50 / math.sqrt(n))
            for task, n in (mme.PERCEPTION | mme.COGNITION).items())]


def circular(asked: Asked) -> list[Expected]:
  """MMBench.  Of k passes with k options all are right by k ** -k, the first by 1 / k."""
  sizes = [len(q.options) for q, _ in asked if int(q.id) < 1_000_000]
  out = []
  for column, shares in (('circular', [k ** -k for k in sizes]),
                         ('vanilla', [1 / k for k in sizes])):
    error = math.sqrt(sum(p * (1 - p) for p in shares)) / len(sizes)
    out.append(Expected(('', 'all'), column, len(sizes),
                        100 * sum(shares) / len(sizes), 100 * error))
  return [*out, *mean('vanilla', '', 'all rows')(asked)]


def _runs() -> dict[str, Run]:
  """All of them by name."""
  sized = lambda write, *sizes: lambda root, rng: write(root, rng, *sizes)
  seed = sized(files.seed, {'image': 14_233, 'video': 5_009})
  kind = lambda name: lambda q: q.groups['data'] == name
  soft, match = mean('accuracy'), mean('normalised')
  runs = [
      Run('gqa', 'gqa', 12_578, sized(files.gqa, 12_578), soft),
      Run('vqav2', 'vqav2', 214_354, sized(files.vqav2, 214_354), soft),
      Run('vqav2 test', 'vqav2', 447_793, sized(files.vqav2_test, 447_793), None, 'test',
          'upload.json'),
      Run('textvqa', 'textvqa', 5_000, sized(files.textvqa, 5_000), soft),
      Run('textvqa OCR', 'textvqa', 5_000, sized(files.textvqa_ocr, 5_000), soft),
      Run('vizwiz', 'vizwiz', 4_319, sized(files.vizwiz, 4_319), soft),
      Run('vizwiz test', 'vizwiz', 8_000, sized(files.vizwiz_test, 8_000), None, 'test',
          'upload.json'),
      Run('pope', 'pope', 9_000, sized(files.pope, 9_000), f1),
      Run('scienceqa', 'scienceqa', 4_241, sized(files.scienceqa, 4_241, 2_017),
          both(mean('accuracy', 'picture', 'image'), soft)),
      Run('mme', 'mme', 2_374, sized(files.mme, mme.PERCEPTION | mme.COGNITION), perception),
      Run('mmbench', 'mmbench', 4_377, sized(files.mmbench, 4_377, 1_176), circular),
      Run('mmbench upload', 'mmbench', 4_377, sized(files.mmbench, 4_377, 1_176), None, None,
          'upload.xlsx', asked=False),
      Run('seed', 'seed', 19_242, seed, both(soft, mean('accuracy', 'data', 'image'),
                                             mean('accuracy', 'data', 'video'))),
      Run('seed image', 'seed', 14_233, seed, soft, keep=kind('image'), asked=False),
      Run('seed video', 'seed', 5_009, seed, soft, keep=kind('video'), asked=False),
      Run('msvd_qa', 'msvd_qa', 13_157, sized(files.video_qa, 13_157, False), match),
      Run('msrvtt_qa', 'msrvtt_qa', 72_821, sized(files.video_qa, 72_821, True), match),
      Run('activitynet_qa', 'activitynet_qa', 8_000, sized(files.activitynet_qa, 8_000),
          both(mean('exact'), match)),
  ]
  return {run.name: run for run in runs}


RUNS = _runs()


def prepare(run: Run, root: pathlib.Path) -> tuple[Asked, list[str]]:
  """Writes files and answers below `root`.

  Returns:
    The questions that are answered, each with its chance, and the answers.
  """
  rng = random.Random(f'{SEED} {run.benchmark}')
  chances = run.write(root, rng)
  questions = catalogue.read(run.benchmark, root, run.split)
  odd = [str(part) for part in questions.parts if not part.complete]
  if odd or len(chances) != len(questions.questions):
    raise AssertionError(f'{run.name}: the invented files have {len(chances):,} chances and '
                         f'{len(questions.questions):,} questions; {", ".join(odd)}')
  asked = [(q, c) for q, c in zip(questions.questions, chances)
           if run.keep is None or run.keep(q)]
  texts = [rng.choice(chance.texts) for _, chance in asked]
  write_answers(root / 'answers.jsonl', [(q.id, q.prompt) for q, _ in asked], texts)
  return asked, texts


def command(run: Run, root: pathlib.Path) -> list[str]:
  """What Python runs: vlm-compress score."""
  words = ['-c', PROBE, 'score', '--benchmark', run.benchmark, '--data', str(root), '--predictions',
           str(root / 'answers.jsonl')]
  words += ['--split', run.split] if run.split else []
  words += ['--allow-partial'] if run.keep else []
  return words + (['--submission', str(root / run.upload)] if run.upload else
                  ['--out', str(root / 'scores.json')])


def measure(words: Sequence[str]) -> dict[str, Any]:
  """Seconds, those of CPUs and peak resident bytes of `python WORDS`, a process of its own,
  and how loaded the machine was: where others work, wall time says little.

  The process reads its own peak: what the system says of a child begins at the peak of
  the process that started it (vlm_compress/resident.py).
  """
  before, start = os.getloadavg(), time.perf_counter()
  done = subprocess.run([sys.executable, *words], cwd=ROOT, check=False,
                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  seconds = time.perf_counter() - start
  if done.returncode:
    raise AssertionError(f'{" ".join(words[2:])} failed: {done.stderr.strip()}')
  peak, cpu = done.stderr.splitlines()[-1].split()
  return {'seconds': round(seconds, 2), 'cpu_seconds': round(float(cpu), 2),
          'peak_bytes': int(peak), 'load_before': before, 'load_after': os.getloadavg()}


def differences(found: Mapping[str, Any], rows: int, expected: Sequence[Expected]
                ) -> list[str]:
  """What is wrong with the numbers that were written; [] if nothing is."""
  out = []
  counted = found['sums']['']['all']['n']
  if counted != rows or len(found['per_question']) != rows:
    out.append(f'{counted:,} questions were scored, not {rows:,}')
  lines = {(row['group'], row['name']): row for row in found['rows']}
  for one in expected:
    line = lines[one.row]
    value, n = line[one.column], line['n_of'].get(one.column, line['n'])
    label = f'{" ".join(one.row).strip()}: {one.column}'
    if n != one.n:
      out.append(f'{label} is over {n:,}, not {one.n:,}')
    if not abs(value - one.value) <= MOST_ERRORS * one.error:
      out.append(f'{label} is {value:.3f}; chance is {one.value:.3f}, give or take '
                 f'{one.error:.3f}')
  head, first = found['headline'], expected[0]
  if (head['value'], head['n']) != (lines[first.row][first.column], first.n):
    out.append(f'the headline is {head}, not {first.column} of {first.row}')
  return out


def upload_differences(path: pathlib.Path, ids: Sequence[str], texts: Sequence[str]
                       ) -> list[str]:
  """What is wrong with a file for a server; [] if every answer is in it, in order."""
  if path.suffix == '.xlsx':
    found = [(row['index'], row['prediction']) for _, row in sheets.read_xlsx(path)]
  else:
    found = [(str(row.get('question_id', row.get('image'))), row['answer'])
             for row in json.loads(path.read_text(encoding='utf-8'))]
  wanted = list(zip(ids, texts, strict=True))
  if len(found) != len(wanted):
    return [f'{path.name} has {len(found):,} answers, not {len(wanted):,}']
  wrong = [(a, b) for a, b in zip(found, wanted) if a != b]
  return [f'{path.name}: {len(wrong):,} answers differ; {wrong[0][0]} is not '
          f'{wrong[0][1]}'] if wrong else []


def carry_out(run: Run) -> dict[str, Any]:
  """Runs one of RUNS.

  Returns:
    Its row of the JSON file.

  Raises:
    AssertionError: a number is not what it must be, or the command failed.
  """
  with tempfile.TemporaryDirectory() as name:
    root = pathlib.Path(name)
    asked, texts = prepare(run, root)
    size = sum(path.stat().st_size for path in root.rglob('*') if path.is_file())
    row = {'name': run.name, 'benchmark': run.benchmark, 'split': run.split,
           'rows': len(asked), 'input_bytes': size, **measure(command(run, root))}
    if run.expect is None:
      wrong = upload_differences(root / run.upload, [q.id for q, _ in asked], texts)
      head = {'upload': run.upload}
    else:
      found = json.loads((root / 'scores.json').read_text(encoding='utf-8'))
      expected = run.expect(asked)
      wrong = differences(found, run.rows, expected)
      head = {'metric': found['headline']['metric'], 'value': found['headline']['value'],
              'expected': expected[0].value, 'standard_error': expected[0].error}
    if wrong or len(asked) != run.rows:
      raise AssertionError(f'{run.name}, {len(asked):,} rows: {"; ".join(wrong)}')
    return row | head | (finish(run, root, asked, texts, head) if run.asked else {})


def finish(run: Run, root: pathlib.Path, asked: Asked, texts: Sequence[str],
           head: Mapping[str, Any]) -> dict[str, Any]:
  """Measures the end of `evaluate`, which must have the number of `score`, or raises."""
  write_shards(root / 'run', [q for q, _ in asked], texts)
  words = [run.benchmark, str(root), str(root / 'run'), *([run.split] if run.split else [])]
  measured = measure([str(END), *words])
  found = json.loads((root / 'run/result.json').read_text(encoding='utf-8'))
  low, high = found['value_ci95'] or (-math.inf, math.inf)
  with open(root / 'run/answers.jsonl', encoding='utf-8') as stream:
    lines = sum(1 for _ in stream)
  if (lines, found['value']) != (run.rows, head.get('value')) or (
      head.get('value') is not None and not low < found['value'] < high):
    raise AssertionError(f'{run.name}: result.json has {found["value"]} [{low}, {high}], '
                         f'answers.jsonl {lines:,} lines; not {head} of {run.rows:,}')
  return {'evaluate': {**measured, 'value_ci95': found['value_ci95']}}


def _cost(row: Mapping[str, Any]) -> tuple[str, ...]:
  return (f'{row["seconds"]:.1f}', f'{row["cpu_seconds"]:.1f}',
          f'{row["peak_bytes"] / GIB:.2f}')


def table(found: Mapping[str, Any]) -> str:
  """README's table of the JSON file."""
  lines = []
  for row in found['runs']:
    upload = 'upload' in row
    lines.append((
        row['name'], f'{row["rows"]:,}',
        f'`{row["upload"]}`' if upload else f'{row["value"]:.2f}',
        '' if upload else f'{row["expected"]:.2f} ± {row["standard_error"]:.2f}',
        *_cost(row), *(_cost(row['evaluate']) if 'evaluate' in row else [''] * 3)))
  return '\n'.join(markdown_parts.rows(COLUMNS, lines, 1))


def parser() -> argparse.ArgumentParser:
  """The command line."""
  p = argparse.ArgumentParser(description=__doc__, prog='python tests/full_size.py',
                              formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--only', metavar='NAMES', help='some of: ' + ', '.join(RUNS))
  p.add_argument('--out', type=pathlib.Path, metavar='FILE.json',
                 help=f'instead of {OUT.relative_to(ROOT)}')
  return p


def main(argv: Sequence[str] | None = None) -> int:
  """Measures; returns the exit code."""
  args = parser().parse_args(argv)
  names = args.only.split(',') if args.only else list(RUNS)
  unknown = [name for name in names if name not in RUNS]
  if unknown:
    print(f'error: no run is called {", ".join(unknown)}; there are {", ".join(RUNS)}',
          file=sys.stderr)
    return 2
  out = args.out or (None if args.only else OUT)
  found = {'setting': {'python': platform.python_version(), 'cpu': cpu_name(),
                       'cores': os.cpu_count(), 'seed': SEED,
                       'date': datetime.date.today().isoformat()}, 'runs': []}
  for name in names:
    if sys.stderr.isatty():
      print(f'{name} ...', file=sys.stderr)
    found['runs'].append(carry_out(RUNS[name]))
  if out is not None:
    atomic.write_text(out, json.dumps(found, indent=1) + '\n')
  print(table(found))
  return 0


if __name__ == '__main__':
  sys.exit(main())
