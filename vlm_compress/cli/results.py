"""Result rows: every method beside its floors, on the same questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_compress.cli.workspace import Message
from vlm_compress.compress.baselines.budget import pooling_count
from vlm_compress.config import AtpConfig, LlavaConfig, check
from vlm_compress.data.examples import Example
from vlm_compress.data.tokenizer import Tokenizer
from vlm_compress.eval import scoring
from vlm_compress.eval.evaluator import Answers, Method, Question, answer, cost


@dataclasses.dataclass
class Bench:
  """Questions and references that all rows share.

  Attributes:
    examples, features: of the test split.
    questions: what is asked.
    headline: kinds that make the accuracy.
    tokenizer, template: as in training.
    message: called with a line per method.
    answers: by row key, kept for the report's examples.
    rows: result rows so far.
  """
  examples: Sequence[Example]
  features: Any
  questions: Sequence[Question]
  headline: tuple[str, ...]
  tokenizer: Tokenizer
  template: str
  message: Message
  answers: dict[str, Answers] = dataclasses.field(default_factory=dict)
  rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  def run(self, method: Method, *, budget: float | None = None,
          key: str | None = None) -> dict[str, Any]:
    """Asks a method everything and appends its row.

    Args:
      method: what to run.
      budget: visual tokens that text can read, for VoCo; None takes what
        entered the layers.
      key: name under which the answers are kept; the method's name.
    """
    answers = answer(method, self.examples, self.features, self.questions,
                     self.tokenizer, template=self.template)
    self.answers[key or method.name] = answers
    average = float(answers.entering.mean()) if budget is None else budget
    row = {
        'method': method.name, 'trained': method.trained,
        'input_visual_tokens': (method.num_voco_tokens
                                if method.mask == 'voco'
                                else int(round(answers.entering[:, 0].mean()))),
        'layer_average_tokens': average, 'ratio_to_full': None,
        'retention': None, 'seed': method.seed, **cost(method, answers),
        **self._scores(answers.texts)}
    right = self.correct(key or method.name)
    row['correct'] = ''.join('01'[int(r)] for r in right)
    if method.mask != 'voco':  # VoCo prunes nothing; text reads C tokens
      row['kept_per_layer'] = answers.entering.mean(0).tolist()
      row['kept_std_per_layer'] = answers.entering.std(0).tolist()
    if answers.module_keep.shape[1]:
      row['kept_counts'] = answers.module_keep.sum(-1).tolist()
      kinds = np.asarray([q.turn.kind for q in self.questions])
      for kind in sorted(set(kinds)):
        row['by_kind'][kind]['layer_average_tokens'] = float(
            answers.entering[kinds == kind].mean())
    return self._append(row)

  def question_only(self, train: Sequence[Example], seed: int
                    ) -> dict[str, Any]:
    """The floor that never sees a picture."""
    turns = [t for example in train for t in example.turns]
    floor = scoring.fit_question_only(
        [t.question for t in turns], [t.answer for t in turns],
        [t.kind for t in turns])
    asked = [q.turn for q in self.questions]
    texts = scoring.predict_question_only(
        floor, [t.question for t in asked], [t.kind for t in asked])
    return self._append({
        'method': 'question only', 'trained': True, 'input_visual_tokens': 0,
        'layer_average_tokens': 0.0, 'prefill_flops': 0.0, 'kv_bytes': 0.0,
        'ratio_to_full': None, 'retention': None, 'seed': seed,
        **self._scores(texts)})

  def correct(self, key: str) -> np.ndarray:
    """bool[Q], which of the headline questions a method got right."""
    right = scoring.exact_match(self.answers[key].texts,
                                [q.turn.answer for q in self.questions])
    asked = [q.turn.kind in self.headline for q in self.questions]
    return np.asarray(right)[np.asarray(asked)]

  def images(self) -> list[int]:
    """Example number of every headline question."""
    return [q.example for q in self.questions if q.turn.kind in self.headline]

  def _scores(self, texts: list[str]) -> dict[str, Any]:
    turns = [q.turn for q in self.questions]
    images = [q.example for q in self.questions]
    out = scoring.score(texts, [t.answer for t in turns],
                        [t.kind for t in turns], images,
                        headline_kinds=self.headline)
    # Held-out pairs apart: the same questions, scored as kinds of their own.
    kinds = [f'{t.kind} (held-out)' if t.heldout else f'{t.kind} (seen)'
             for t in turns]
    split = scoring.score(texts, [t.answer for t in turns], kinds, images)
    out['by_kind'].update({k: v for k, v in split['by_kind'].items()
                           if k.endswith('(held-out)')})
    captions = [i for i, t in enumerate(turns) if t.kind == 'caption']
    if captions:
      cells = np.asarray([scoring.word_accuracy(texts[i], turns[i].answer)
                          for i in captions])
      mean = scoring.mean_with_interval(cells, [images[i] for i in captions])
      out['by_kind']['caption, per cell'] = {
          'accuracy': mean.mean, 'ci95': list(mean.ci95), 'n': mean.n}
    return out

  def compare(self, row: dict[str, Any], key: str,
              floors: dict[str, str]) -> None:
    """Adds paired differences to floors, {name in the report: key}."""
    row['differences'] = {}
    for name, floor in floors.items():
      gap = scoring.paired_difference(self.correct(key), self.correct(floor),
                                      self.images())
      row['differences'][name] = {'mean': gap.mean, 'ci95': list(gap.ci95)}

  def _append(self, row: dict[str, Any]) -> dict[str, Any]:
    self.rows.append(row)
    self.message(f'{row["method"]}: {100 * row["accuracy"]:.1f} % at '
                 f'{row["layer_average_tokens"]:.1f} tokens')
    return row


def difference(row: dict[str, Any], other: dict[str, Any],
               images: Sequence[int]) -> dict[str, Any]:
  """Paired difference in accuracy of two rows with `correct`.

  Args:
    row, other: result rows on the same questions.
    images: example of each question that counts for accuracy.

  Returns:
    'mean' and 'ci95', in shares.
  """
  right = [np.asarray(list(r['correct'])) == '1' for r in (row, other)]
  gap = scoring.paired_difference(*right, images)
  return {'mean': gap.mean, 'ci95': list(gap.ci95)}


def relate(rows: Sequence[dict[str, Any]], full: dict[str, Any],
           bounds: dict[float, tuple[float, float, Any]]) -> None:
  """Fills in ratio to full, and retention where bounds exist.

  Args:
    rows: result rows, changed in place.
    full: row of the uncompressed model.
    bounds: budget -> (LB, UB, 95 % interval of UB - LB), for VoCo rows and
      the floors at their budgets.
  """
  for row in rows:
    row['ratio_to_full'] = scoring.ratio_to_full(row['accuracy'],
                                                 full['accuracy'])
    if row['layer_average_tokens'] in bounds:
      lower, upper, gap = bounds[row['layer_average_tokens']]
      row['retention'] = scoring.retention(row['accuracy'], lower, upper,
                                           gap_ci95=gap)


def voco_rows(bench: Bench, base: LlavaConfig, base_params: Any,
              trained: LlavaConfig, params: Any, num_voco: int, seed: int
              ) -> dict[float, tuple[float, float, Any]]:
  """VoCo at C tokens, its bounds and the floors at C tokens.

  The upper bound is the model before compression was trained, with the VoCo
  tokens in the sequence and the causal mask; the lower bound the same under
  the VoCo mask (VoCo-LLaMA, section 4.1).

  Returns:
    The bounds, for `relate`.
  """
  budget = float(num_voco)
  check(base.voco is not None, 'the reference has no VoCo token: its bounds '
        'need the model that VoCo was trained from')
  plain = dataclasses.replace(base, voco=dataclasses.replace(
      trained.voco, num_voco_tokens=num_voco))
  have = (base.voco.distinct_rows, base.voco.num_voco_tokens)
  check(have[0] == trained.voco.distinct_rows and
        (not have[0] or have[1] >= num_voco), 'the reference has other VoCo '
        f'rows (distinct_rows={have[0]}, {have[1]} tokens) than the model; '
        'bounds need the same')
  upper = bench.run(Method(f'upper bound (UB), C={num_voco}', plain,
                           base_params, 'causal', num_voco, seed=seed))
  lower = bench.run(Method('lower bound (LB)', plain,
                           base_params, 'voco', num_voco, trained=False,
                           seed=seed), budget=budget, key=f'LB@{num_voco}')
  row = bench.run(Method('VoCo', trained, params, 'voco', num_voco,
                         seed=seed), budget=budget, key=f'VoCo@{num_voco}')
  floors = input_floors(bench, base, base_params, num_voco, seed)
  bench.compare(row, f'VoCo@{num_voco}', floors)
  gap = scoring.paired_difference(
      bench.correct(upper['method']), bench.correct(f'LB@{num_voco}'),
      bench.images())
  return {budget: (lower['accuracy'], upper['accuracy'], gap.ci95)}


def input_floors(bench: Bench, base: LlavaConfig, params: Any, count: int,
                 seed: int) -> dict[str, str]:
  """Random, uniform and pooled tokens in front of all layers, untrained.

  Returns:
    Names in the report -> keys of the answers, for Bench.compare.
  """
  for name in ('random', 'uniform'):
    atp = AtpConfig(selector=name, prune_after=(0,), fixed_counts=(count,),
                    target_tokens=count)
    label = 'uniform grid' if name == 'uniform' else name
    bench.run(Method(label, dataclasses.replace(base, voco=None, atp=atp),
                     params, trained=False, seed=seed), budget=float(count),
              key=f'{label}@{count}')
  pooled = dataclasses.replace(base, voco=None, resampler='avg_pool',
                               num_query_tokens=count)
  bench.run(Method('average pooling', pooled, params, trained=False,
                   seed=seed), budget=float(count),
            key=f'average pooling@{count}')
  return {f'{name} (training-free)': f'{name}@{count}'
          for name in ('random', 'uniform grid', 'average pooling')}


def atp_rows(bench: Bench, base: LlavaConfig, base_params: Any,
             trained: LlavaConfig, params: Any, seed: int) -> dict[str, Any]:
  """ATP, and the floors that keep as many tokens in every layer, untrained."""
  row = bench.run(Method('ATP', trained, params, seed=seed))
  counts = module_counts(bench.answers['ATP'])
  atp = dataclasses.replace(trained.atp, selector='fixed', fixed_counts=counts)
  bench.run(Method('ATP scores, fixed count',
                   dataclasses.replace(trained, atp=atp), params, seed=seed))
  floors = pruned_floors(bench, base, base_params, trained, counts,
                         row['layer_average_tokens'], seed)
  bench.compare(row, 'ATP', floors)
  return row


def pruned_floors(bench: Bench, base: LlavaConfig, params: Any,
                  trained: LlavaConfig, counts: tuple[int, ...],
                  average: float, seed: int) -> dict[str, str]:
  """Random and uniform at an ATP run's counts, and pooling at its average.

  Returns:
    Names in the report -> keys of the answers, for Bench.compare.
  """
  for name in ('random', 'uniform'):
    atp = dataclasses.replace(trained.atp, selector=name, fixed_counts=counts)
    label = 'uniform grid' if name == 'uniform' else name
    bench.run(Method(label, dataclasses.replace(base, voco=None, atp=atp),
                     params, trained=False, seed=seed), key=f'{label}@pruned')
  pooled = dataclasses.replace(base, voco=None, resampler='avg_pool',
                               num_query_tokens=pooling_count(average))
  bench.run(Method('average pooling', pooled, params, trained=False,
                   seed=seed), key='average pooling@pruned')
  return {f'{name} (training-free)': f'{name}@pruned'
          for name in ('random', 'uniform grid', 'average pooling')}


def module_counts(answers: Answers) -> tuple[int, ...]:
  """Mean tokens kept by each module, as whole numbers that do not increase."""
  counts = np.maximum(1, np.rint(answers.module_keep.sum(-1).mean(0)))
  return tuple(int(c) for c in np.minimum.accumulate(counts))
