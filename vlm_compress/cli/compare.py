"""vlm-compress compare: two runs of one benchmark, question by question.

  vlm-compress compare runs/atp runs/full

The difference is paired: both runs are resampled together, so what is hard for
both cancels.  Agreement is the share of questions to which both gave the same
answer, right or wrong.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from vlm_compress.atomic import write_text
from vlm_compress.cli.arguments import Parser
from vlm_compress.config import check
from vlm_compress.eval import intervals, runs


def parser() -> argparse.ArgumentParser:
  """The command line."""
  p = Parser(prog='vlm-compress compare', description=__doc__.splitlines()[0])
  p.add_argument('runs', nargs=2, type=pathlib.Path, metavar='RUN',
                 help='directories that evaluate --benchmark has finished')
  p.add_argument('--out', type=pathlib.Path, metavar='FILE.json',
                 help='write the numbers here')
  return p


def main(argv: list[str]) -> int:
  """Compares; returns the exit code."""
  args = parser().parse_args(argv)
  check(args.out is None or not args.out.is_dir(),
        f'--out: {args.out} is a directory; name a file in it')
  a, b = (runs.load(path) for path in args.runs)
  for run in (a, b):
    check(run.scores is not None, f'{run.directory}: the answers of this split are not '
          'public, so nothing was scored')
  asked = [run.config['questions']['fingerprint'] for run in (a, b)]
  intervals.check_same_questions(a.scores, b.scores)
  check(asked[0] == asked[1], f'{a.directory} and {b.directory} were asked other questions '
        'or prompts under the same ids; evaluate both on the same files')
  gap = intervals.difference(a.scores, b.scores)
  same = intervals.agreement(a.scores, b.scores)
  head, most = a.scores.headline, intervals.full_score(a.scores)
  print(f'{head.metric} ({head.scale}, n = {gap.n:,} in {gap.num_images:,} units)')
  for run in (a, b):
    print(f'  {run.directory} ({run.result["method"]}): {run.scores.value:.2f}')
  print(f'difference: {most * gap.mean:+.2f} [{most * gap.ci95[0]:+.2f}, '
        f'{most * gap.ci95[1]:+.2f}] (95 %, paired, units resampled; n = {gap.n:,})')
  print(f'agreement: {100 * same.mean:.2f} % [{100 * same.ci95[0]:.2f}, '
        f'{100 * same.ci95[1]:.2f}] (n = {same.n:,})')
  if args.out is not None:
    write_text(args.out, json.dumps({
        'runs': [str(run.directory) for run in (a, b)], 'metric': head.metric,
        'values': [run.scores.value for run in (a, b)], 'n': gap.n,
        'units': gap.num_images, 'partial': a.scores.partial or b.scores.partial,
        'difference': {'mean': gap.mean, 'ci95': list(gap.ci95), 'scale_max': most},
        'agreement': {'mean': same.mean, 'ci95': list(same.ci95)}}, indent=1) + '\n')
  return 0
