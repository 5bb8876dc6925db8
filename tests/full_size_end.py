"""The end of `vlm-compress evaluate --benchmark` without its model: all questions have been
answered, and the shards become answers.jsonl, and result.json with its intervals.

  python tests/full_size_end.py BENCHMARK DATA RUN [SPLIT]

RUN holds the shards of `write_shards`.  The last line of stderr is the peak of resident
memory in bytes, and seconds of CPUs.  full_size.py measures it.
"""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Sequence

from full_size_words import write_answers

from vlm_compress import resident
from vlm_compress.cli.benchmark_run import NUM_SHARDS
from vlm_compress.data.video import NUM_FRAMES
from vlm_compress.eval import methods, runs
from vlm_compress.eval.answer_log import ShardLog, in_shards, shard_path
from vlm_compress.eval.benchmarks import catalogue
from vlm_compress.eval.benchmarks.question import Question
from vlm_compress.presets import preset


def write_shards(run: pathlib.Path, questions: Sequence[Question], texts: Sequence[str]) -> None:
  """Writes the shards of a run of which every question is answered."""
  run.mkdir()
  said = {q.id: text for q, text in zip(questions, texts, strict=True)}
  shards = in_shards(questions, NUM_SHARDS)
  for i, shard in enumerate(shards):
    write_answers(shard_path(run, i, len(shards)), [(q.id, q.prompt) for q in shard],
                  [said[q.id] for q in shard])


def main(argv: Sequence[str]) -> int:
  """Puts a run together as LLaVA-1.5-7B's; returns the exit code."""
  key, data, run, *split = argv
  run, split = pathlib.Path(run), split[0] if split else None
  questions = catalogue.read(key, pathlib.Path(data), split)
  shards, rows = in_shards(questions.questions, NUM_SHARDS), {}
  for i, shard in enumerate(shards):
    rows.update(ShardLog(run, i, len(shards), shard).rows)
  about = {'split': split, 'rule': runs.BENCHMARKS[key].RULES[0], 'method_key': 'full',
           'seed': 0, **({'frames': NUM_FRAMES} if questions.videos else {})}
  runs.finish(run, questions, rows, methods.method_config('full', preset('llava_1_5_7b')),
              about, len(questions.questions))
  return 0


if __name__ == '__main__':
  code = main(sys.argv[1:])
  print(resident.peak(), time.process_time(), file=sys.stderr)
  sys.exit(code)
