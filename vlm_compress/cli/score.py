"""vlm-compress score: any model's answer file on a benchmark.

  vlm-compress score --benchmark gqa --predictions answers.jsonl --data eval/gqa
  vlm-compress score --benchmark vqav2 --split test --predictions answers.jsonl \
    --data eval/vqav2 --submission upload.json
  vlm-compress score --check-data eval

The file may be ours, LLaVA's, lmms-eval's samples or VLMEvalKit's table.  What
happens to questions without an answer is the benchmark's own rule (an error,
or wrong); --allow-partial scores what is there, and n says how much that is.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_compress.atomic import write_text
from vlm_compress.cli.arguments import Parser
from vlm_compress.config import check
from vlm_compress.eval.benchmarks import answers, catalogue, joining, mmbench, sheets, textvqa
from vlm_compress.eval.benchmarks.check import check as check_files
from vlm_compress.eval.benchmarks.scores import Row, Scores

WIDE = 100  # columns that a table may take


def parser() -> argparse.ArgumentParser:
  """The command line."""
  p = Parser(prog='vlm-compress score', description=__doc__.splitlines()[0])
  p.add_argument('--benchmark', choices=sorted(catalogue.BENCHMARKS),
                 help='what was asked')
  p.add_argument('--predictions', nargs='+', type=pathlib.Path, metavar='FILE',
                 help=f'answer files: {", ".join(answers.SUFFIXES)}')
  p.add_argument('--data', type=pathlib.Path, metavar='DIR',
                 help="the benchmark's official files, or a directory with a "
                 'directory of that name')
  p.add_argument('--split', help="if not the one that has public answers")
  p.add_argument('--rule', help="another way to score, to compare with other tools' "
                 'numbers')
  p.add_argument('--allow-partial', action='store_true',
                 help='leave out questions without an answer')
  p.add_argument('--out', type=pathlib.Path, metavar='FILE.json',
                 help='write all numbers here, per question too')
  p.add_argument('--submission', type=pathlib.Path, metavar='FILE',
                 help='write the file for the evaluation server instead of scoring')
  p.add_argument('--check-data', type=pathlib.Path, metavar='DIR',
                 help='say which benchmarks are complete there, and stop')
  return p


def main(argv: list[str]) -> int:
  """Scores; returns the exit code."""
  args = parser().parse_args(argv)
  if args.check_data is not None:
    show_files(args.check_data)
    return 0
  check_arguments(args)
  module = catalogue.BENCHMARKS[args.benchmark]
  split = args.split
  if args.submission is not None and hasattr(module, 'UPLOADS'):
    split = module.UPLOADS[split]  # the server may want more than is asked
  questions = catalogue.read(args.benchmark, args.data, split)
  check_apart(args, questions.source)
  rows = [row for path in args.predictions for row in answers.read(path)]
  predictions = joining.join(rows, questions)
  if args.submission is not None:
    print(module.write_submission(args.submission, questions, predictions))
    return 0
  scores = module.score(questions, predictions, allow_partial=args.allow_partial,
                        rule=args.rule or module.RULES[0])
  if module is textvqa:
    scores = textvqa.with_prompts(scores, [row.question for row in rows])
  show(scores)
  if args.out is not None:
    write_text(args.out, json.dumps(scores.as_json(), indent=1) + '\n')
  return 0


def check_arguments(args: argparse.Namespace) -> None:
  """Raises ConfigError for arguments that are missing or do not go together."""
  for name in ('benchmark', 'predictions', 'data'):
    check(getattr(args, name) is not None, f'--{name} is needed; see vlm-compress '
          'score --help')
  module = catalogue.BENCHMARKS[args.benchmark]
  splits = getattr(module, 'SPLITS', ())
  check(args.split is None or args.split in splits,
        f'--split={args.split}: {args.benchmark} has ' +
        (f'{", ".join(splits)}' if splits else 'no splits to choose from'))
  check(args.rule is None or args.rule in module.RULES, f'--rule={args.rule}: '
        f'{args.benchmark} has {", ".join(module.RULES)}')
  if args.submission is not None:
    check(hasattr(module, 'write_submission'), f'--submission: {args.benchmark} has '
          'no evaluation server; leave it out')
    check(args.out is None and args.rule is None and not args.allow_partial,
          '--submission writes a file instead of scoring; leave out --out, --rule '
          'and --allow-partial')
    uploads = getattr(module, 'UPLOADS', None)
    check(uploads is None or args.split in uploads, '--submission: the server of '
          f'{args.benchmark} takes {" and ".join(uploads or ())}, not '
          f'{args.split or (splits or ("",))[0]}; say so with --split')
    check(module is not mmbench or args.submission.suffix in sheets.SUFFIXES,
          f'--submission: {args.submission} must end in {" or ".join(sheets.SUFFIXES)}')
  for name in ('out', 'submission'):
    if getattr(args, name) is not None:
      check_target(name, getattr(args, name))
  check_apart(args)


def check_target(name: str, path: pathlib.Path) -> None:
  """Raises ConfigError if no file can be written there."""
  check(not path.is_dir(), f'--{name}: {path} is a directory; name a file in it')
  above = next(p for p in path.absolute().parents if p.exists())
  check(above.is_dir() and os.access(above, os.W_OK | os.X_OK),
        f'--{name}: {path} cannot be written: {above} is ' +
        ('not yours to write in' if above.is_dir() else 'no directory') +
        '; name another place')


def check_apart(args: argparse.Namespace, source: pathlib.Path | None = None) -> None:
  """Raises ConfigError if what is written would replace what is read.

  Args:
    args: of the command.
    source: the benchmark's file, where it is known already.
  """
  for name in ('out', 'submission'):
    path = getattr(args, name)
    for other in (*args.predictions, args.data, source):
      check(path is None or other is None or not _same(path, other),
            f'--{name}: {path} is a file that is read ({other}); name another one')


def _same(a: pathlib.Path, b: pathlib.Path) -> bool:
  return a.resolve() == b.resolve() or a.exists() and b.exists() and a.samefile(b)


def show(scores: Scores) -> None:
  """Prints headline, table and notes; every number has its n beside it."""
  head = scores.headline
  several = len(catalogue.BENCHMARKS[scores.benchmark].RULES) > 1
  rule = f', rule {scores.rule}' if several else ''
  value = f'{scores.value:.2f}' if scores.n else '–'  # a number of nothing is none
  lines = [f'{head.metric}: {value} ({head.scale}{rule}, n = {scores.n:,}'
           f'{", partial" if scores.partial else ""})']
  columns = list(dict.fromkeys(name for row in scores.rows for name in row.numbers))
  table = Table(box=box.SIMPLE_HEAD, show_edge=False, collapse_padding=True)
  for name in ('by', '', 'n', *columns):
    table.add_column(name, justify='left' if name in ('by', '') else 'right',
                     no_wrap=True)
  last = None
  for row in scores.rows:
    if last is not None and row.group != last:
      table.add_section()
    # Names come from files and may look like rich's own marks.
    table.add_row(row.group if row.group != last else '', Text(row.name), f'{row.n:,}',
                  *(_number(row, column) for column in columns))
    last = row.group
  _print(lines, table, [f'note: {note}' for note in scores.notes])


def _number(row: Row, column: str) -> str:
  """A number of the table, with its own n where that is not the line's."""
  if column not in row.numbers:
    return ''
  n = f' (n = {row.n_of[column]:,})' if column in row.n_of else ''
  return (f'{row.numbers[column]:.2f}' if row.n else '–') + n


def show_files(root: pathlib.Path) -> None:
  """Prints what there is of every benchmark below a directory."""
  table = Table(box=box.SIMPLE_HEAD, show_edge=False, collapse_padding=True)
  for name in ('benchmark', 'split', 'state', 'questions', 'images', 'missing'):
    table.add_column(name, justify='right' if name in ('images', 'missing') else 'left',
                     no_wrap=name != 'questions')
  found, notes = check_files(root), []
  for one in found:
    there = not one.problem
    table.add_row(one.benchmark, Text(one.split), one.state,
                  ', '.join(str(part) for part in one.parts),
                  f'{one.images:,}' if there else '', f'{one.missing:,}' if there else '')
    name = ' '.join(word for word in (one.benchmark, one.split) if word)
    if one.problem:
      notes.append(f'{name}: {one.problem}')
    if one.missing:
      notes.append(f'{name}: {one.missing:,} image file(s) missing, the first is '
                   f'{one.example}')
    notes += [f'{name}: {note}' for note in one.notes]
  _print([f'benchmarks below {root}'], table, notes)


def _print(before: list[str], table: Table, after: list[str]) -> None:
  console = Console()
  console.width = max(console.width, WIDE)  # rather broken lines than lost digits
  for part in (*before, '', table, '', *after):
    console.print(part, **({'markup': False, 'highlight': False, 'soft_wrap': True}
                           if isinstance(part, str) else {}))
