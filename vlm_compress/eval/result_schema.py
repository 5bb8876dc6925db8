"""What an evaluation writes: the files of a run, of a sweep, and their fields.

Shares are 0..1, never per cent; intervals are [low, high], 95 %, bootstrapped
over pictures or over the questions that are scored together.

A run directory (`vlm-compress evaluate --benchmark ... --out RUN`) belongs to
one configuration:

  config.json   what was asked of what: `benchmark`, `split`, `rule`, `questions`
                (`fingerprint`, `pictures`: hash of their sizes, `number` asked, `of` how
                many), `checkpoint` (hash of the weights), `tokenizer` (hash of its file
                and the processor's), `template`, `method_key`, `model` (the config that ran),
                `runs_as`, `seed`, `num_shards`, `max_new_tokens`; of videos `frames`
  answers-00003-of-00016.jsonl            a finished shard
  answers-00003-of-00016.partial.jsonl    an unfinished one, in order of answering
  answers.jsonl all shards in the benchmark's order, written at the end
  result.json   the numbers, written at the end

answers.jsonl, one object per question (ANSWER; `vlm-compress score` reads it):

  question_id    str, of the benchmark
  prediction     str, what the model said
  answer_tokens  int, tokens of the prediction; ended: 'eos', 'max_new_tokens'
                 or 'context'
  visual_tokens  float[M], visual tokens that entered each decoder layer, of all
                 frames of a video together; VoCo's text reads C tokens of each
                 picture in all layers
  kept           int[L], tokens left after each module, of all frames; only where
                 there are modules
  text_tokens    int, of the prompt with BOS; prompt_tokens: those behind the (first)
                 image
  latency_seconds   wall clock of its batches, with pictures not seen before and with
                 decoding videos, divided by
                 their questions, which are `latency_rows`; `compiled`: a
                 program was compiled meanwhile, so it says little
  shard          int
  parsed, score  what the scorer read (null: nothing), and its points 0..1; in
                 answers.jsonl, not in the shards
  unit           what was resampled: picture, or questions scored together; image:
                 its file, null where there is none or it has no name
  groups         {'structural': 'verify', ...}, the benchmark's types; answers: list
                 of str, the right ones; these, `unit` and `image` are in
                 answers.jsonl and not in the shards

result.json (RESULT) and a sweep's row (ROW) share these fields:

  benchmark, split, rule
  metric, value, value_ci95, scale   the headline as tables quote it ('GQA
                 accuracy', 61.9, [..], '0-100'); scale_max: 100 or MME's 2000
  accuracy, ci95 value and interval as shares of scale_max
  n, n_asked, n_benchmark   questions the value is over, questions asked, questions
                 there are; partial: some left out
  by_kind        {'structural: verify': {'accuracy', 'ci95', 'n'}}
  method         as eval/tables.py names it: 'full', 'VoCo', 'ATP', 'random',
                 'uniform grid', 'average pooling', 'lower bound (LB)', ...
  method_key     as methods.py and sweeps name it: 'full', 'voco', 'random', ...
  trained        the decoder was trained under this selection of tokens
  budget         visual tokens that were asked for, of each picture or frame; null
                 for the full model
  seed           of random selection; a checkpoint's own seed is its business
  frames         of every video; only in result.json, only of videos.  Numbers of
                 tokens, FLOPs and bytes are per question, over all its frames
  input_visual_tokens    that enter the first layer (VoCo: C, that text reads)
  layer_average_tokens   mean over layers, then over questions
  kept_per_layer, kept_std_per_layer   float[M]; not for VoCo, which prunes nothing
  prefill_flops, prefill_flops_dense, vision_flops, projector_flops,
  selector_flops, kv_bytes             means over questions
  latency_seconds, latency_n           median over questions that compiled nothing
                 (null if all did), and how many those are
  generated_tokens                     mean per question

result.json has besides: `sums` {group: {name: {'sum', 'n'}}} of the scores,
`module_counts` (mean tokens kept by each module, whole numbers, where it
prunes), `notes`, `versions`, `scores` (the scorer's table).

A sweep directory (`vlm-compress sweep --out SWEEP`):

  runs/<cell>/   run directories; cell = checkpoint/method/budget/benchmark/seed,
                 joined by '--'; error.txt has the traceback of one that crashed
  rows.json      {'schema', 'rows': [ROW], 'failed': [{'cell', 'error'}],
                 'partial': bool, 'times_failed': why there are no times, or null}
  times.json     {'key', 'lines': {line: {'seconds', 'ratio', 'rounds', 'questions'}}}:
                 seconds of a question to its first token, measured in turn, and the
                 ratio to the full model; see cli/sweep_times.py
  table.csv, table.parquet   ROW's flat fields (TABLE), a line per row

ROW adds:

  cell           name of the run's directory below runs/; checkpoint: its name
  ratio_to_full  value / full's value (ATP-LLaVA); null without a full row
  retention      (x - LB) / (UB - LB) (VoCo-LLaMA); null where there are no
                 bounds or their gap lies within noise
  agreement, agreement_ci95   share of questions answered as the full model did
  differences    {'random (training-free)': {'mean', 'ci95'}}: paired, in shares,
                 to the floors of the same budget and benchmark: those in front of all
                 layers, and 'random, at its cuts (training-free)'
  line           the same in cells that differ in the seed only
  first_token_seconds, first_token_ratio   of times.json, null if not measured
  correct        '0110...', in the order of answers.jsonl; only where all scores
                 are 0 or 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_compress.config import check

SCHEMA = 2

ANSWER = ('question_id', 'prediction', 'answer_tokens', 'ended', 'visual_tokens',
          'text_tokens', 'prompt_tokens', 'latency_seconds', 'latency_rows',
          'compiled', 'shard')
RESULT = ('benchmark', 'split', 'rule', 'metric', 'value', 'value_ci95', 'scale',
          'scale_max', 'accuracy', 'ci95', 'n', 'n_asked', 'n_benchmark', 'partial', 'by_kind',
          'method', 'method_key', 'trained', 'budget', 'seed', 'input_visual_tokens',
          'layer_average_tokens', 'prefill_flops', 'prefill_flops_dense',
          'vision_flops', 'projector_flops', 'selector_flops', 'kv_bytes',
          'latency_seconds', 'latency_n', 'generated_tokens')
ROW = ('cell', 'checkpoint', *RESULT, 'ratio_to_full', 'retention', 'agreement',
       'agreement_ci95', 'differences', 'line', 'first_token_seconds', 'first_token_ratio')
# Of ROW, what table.csv and table.parquet have as columns.
TABLE = ('cell', 'benchmark', 'split', 'checkpoint', 'method', 'method_key', 'trained',
         'budget', 'seed', 'metric', 'value', 'value_low', 'value_high', 'accuracy', 'n',
         'n_asked', 'n_benchmark', 'partial', 'ratio_to_full', 'retention', 'agreement',
         'input_visual_tokens', 'layer_average_tokens', 'prefill_flops', 'kv_bytes',
         'first_token_seconds', 'first_token_ratio')


def check_fields(values: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
  """Raises ConfigError for an object that lacks a field of the schema."""
  lacking = [name for name in fields if name not in values]
  check(not lacking, f'{where}: field(s) {", ".join(lacking)} are missing; it was '
        'written by another version: delete it and run again')
