"""A finished run: its answers with their scores, and the numbers made of them.

answers.jsonl holds all that scoring read, so runs are compared and summed up
without the benchmark's files.  result_schema.py has the fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_compress import atomic
from vlm_compress.config import check
from vlm_compress.data.errors import DataError
from vlm_compress.eval import efficiency, intervals
from vlm_compress.eval.answer_log import read_rows, unit_of, write_rows
from vlm_compress.eval.benchmarks import catalogue, openmoji_grid
from vlm_compress.eval.benchmarks.question import Question, QuestionSet
from vlm_compress.eval.benchmarks.scores import Result, Scores
from vlm_compress.eval.evaluator import Answers, Method, cost
from vlm_compress.eval.methods import MethodConfig
from vlm_compress.eval.result_schema import RESULT, check_fields

ANSWERS, CONFIG, RESULTS = 'answers.jsonl', 'config.json', 'result.json'
BENCHMARKS = {**catalogue.BENCHMARKS, openmoji_grid.KEY: openmoji_grid}


def read_questions(key: str, root: pathlib.Path, split: str | None = None) -> QuestionSet:
  """The questions of one of BENCHMARKS; see catalogue.read."""
  if key == openmoji_grid.KEY:
    return openmoji_grid.read(root, *(() if split is None else (split,)))
  return catalogue.read(key, root, split)


def fingerprint(questions: QuestionSet) -> str:
  """SHA-256 of what is asked and what counts as right, 16 digits."""
  digest = hashlib.sha256()
  for q in questions.questions:
    picture = hashlib.sha256(q.picture.encode()).hexdigest() if q.picture else q.image
    digest.update(json.dumps([q.id, q.prompt, picture, q.options, q.answers]).encode())
  return digest.hexdigest()[:16]


def picture_sizes(questions: QuestionSet) -> str:
  """SHA-256 of the names and sizes of the pictures' files, 16 digits.

  A picture that is replaced by another is noticed by its size, without reading all of
  them; '' stands for one that is not there.
  """
  digest = hashlib.sha256()
  for name, q in {q.image: q for q in questions.questions if q.image}.items():
    path = questions.image_path(q)
    digest.update(json.dumps([name, path.stat().st_size if path.is_file() else '']).encode())
  return digest.hexdigest()[:16]


def first_units(questions: QuestionSet, limit: int) -> QuestionSet:
  """The first `limit` questions, and others that are scored with them."""
  units = {unit_of(q) for q in questions.questions[:limit]}
  return questions.take(q.id for i, q in enumerate(questions.questions)
                        if i < limit or q.unit and unit_of(q) in units)


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run.

  Attributes:
    directory: where it is.
    config, result: of its files.
    scores: of its answers; None where answers are not public.
  """
  directory: pathlib.Path
  config: Mapping[str, Any]
  result: Mapping[str, Any]
  scores: Scores | None


def finish(run: pathlib.Path, questions: QuestionSet, rows: Mapping[str, dict],
           method: MethodConfig, about: Mapping[str, Any], total: int) -> dict[str, Any]:
  """Scores a run's answers and writes answers.jsonl and result.json.

  Args:
    run: its directory.
    questions: what was asked.
    rows: answers by question id.
    method: that answered.
    about: fields of the result that the run knows: method_key, seed, rule,
      versions, frames (of videos), ...
    total: questions there are in the benchmark.

  Returns:
    What result.json holds.
  """
  module, partial = BENCHMARKS[questions.benchmark], len(questions.questions) < total
  public = all(q.answers for q in questions.questions)
  scores = module.score(questions, {key: row['prediction'] for key, row in rows.items()},
                        rule=about['rule']) if public else None
  write_rows(run / ANSWERS, _with_scores(questions, rows, scores))
  notes = list(scores.notes if scores else questions.notes)
  if partial:
    notes.append(f'partial: {len(questions.questions):,} of {total:,} questions')
  if questions.videos:
    notes.append(f'{about["frames"]} frames of every video, from the middles of equal spans '
                 'of its time; tokens and costs are of all of them')
  if not public:
    notes.append('answers of this split are not public: upload the file of '
                 'vlm-compress score --submission')
  result = {**about, 'benchmark': questions.benchmark, 'method': method.label,
            'trained': method.trained, 'budget': method.budget, 'partial': partial,
            'n_asked': len(questions.questions), 'n_benchmark': total,
            **numbers(scores, len(questions.questions)),
            **costs(method, [rows[q.id] for q in questions.questions],
                    about.get('frames', 1)), 'notes': notes}
  check_fields(result, RESULT, 'result')
  atomic.write_text(run / RESULTS, json.dumps(result, indent=1) + '\n')
  return result


def _with_scores(questions: QuestionSet, rows: Mapping[str, dict], scores: Scores | None
                 ) -> Iterator[dict[str, Any]]:
  """The lines of answers.jsonl."""
  results = {r.question.id: r for r in scores.results} if scores else {}
  for q in questions.questions:
    row = {**rows[q.id], 'unit': unit_of(q), 'image': q.image, 'groups': dict(q.groups),
           'answers': list(q.answers)}
    if scores:
      row |= {'parsed': results[q.id].parsed, 'score': float(results[q.id].score)}
    yield row


def numbers(scores: Scores | None, asked: int) -> dict[str, Any]:
  """The part of a result that scoring gives; nulls where nothing can be scored."""
  if scores is None:
    return {'metric': None, 'value': None, 'value_ci95': None, 'scale': None,
            'scale_max': None, 'accuracy': None, 'ci95': None, 'n': asked,
            'by_kind': {}, 'sums': {}, 'scores': None}
  found, most = intervals.intervals(scores), intervals.full_score(scores)
  table = scores.as_json()
  del table['per_question']
  return {'metric': scores.headline.metric, 'value': scores.value,
          'value_ci95': [most * x for x in found['ci95']],
          'scale': scores.headline.scale, 'scale_max': most, **found,
          'sums': table.pop('sums'), 'scores': table}


def costs(method: MethodConfig, rows: Sequence[Mapping[str, Any]], num_images: int = 1
          ) -> dict[str, Any]:
  """The part of a result that says what the answers cost.

  Visual tokens are averaged over the questions with a picture, everything else
  over all.  Both are of all pictures of a question.

  Args:
    method: that answered.
    rows: of answers.jsonl.
    num_images: pictures of a question that has any: frames of a video, or 1.
  """
  config = method.config
  entering = np.asarray([row['visual_tokens'] for row in rows], np.float64)
  pictured = entering.sum(1) > 0
  seen = entering[pictured] if pictured.any() else entering
  voco = method.runs_as == 'voco'
  fair = [row['latency_seconds'] for row in rows if not row['compiled']]
  out = {'input_visual_tokens': float(seen[:, 0].mean()),
         'layer_average_tokens': float(seen.mean()), **_flops(
             method, rows, entering, num_images),
         'latency_seconds': float(np.median(fair)) if fair else None,
         'latency_n': len(fair),
         'generated_tokens': float(np.mean([row['answer_tokens'] for row in rows]))}
  if not voco:
    out |= {'kept_per_layer': seen.mean(0).tolist(),
            'kept_std_per_layer': seen.std(0).tolist()}
  if method.runs_as == 'atp':
    kept = seen[:, list(config.atp.prune_after)].mean(0)
    counts = np.minimum.accumulate(np.maximum(1, np.rint(kept)))
    out['module_counts'] = [int(c) for c in counts]
  return out


def _flops(method: MethodConfig, rows: Sequence[Mapping[str, Any]],
           entering: np.ndarray, num_images: int) -> dict[str, float]:
  """Means over rows; those without a picture pay for none."""
  config, pictured = method.config, entering.sum(1) > 0
  text, prompt = np.asarray([[row['text_tokens'], row['prompt_tokens']] for row in rows],
                            np.float64).T
  count = config.voco.num_voco_tokens if method.runs_as in ('voco', 'upper_bound') else 0
  nothing = np.zeros((0,))
  total: dict[str, float] = {}

  def add(values: Mapping[str, float], share: float) -> None:
    for name, value in values.items():
      total[name] = total.get(name, 0.0) + share * value
  if pictured.any():
    as_method = Method('', config, None, 'voco' if method.runs_as == 'voco' else 'causal',
                       count)
    add(cost(as_method, Answers([], entering[pictured], nothing, nothing, text[pictured],
                                prompt[pictured]), num_images), pictured.mean())
  if not pictured.all():
    alone = text[~pictured]
    parts = efficiency.prefill_cost(
        dataclasses.replace(config, atp=None), np.zeros((len(alone), entering.shape[1])),
        alone, num_images=0)
    tokens = np.repeat(alone[:, None], entering.shape[1], axis=1)
    add({'prefill_flops': float(np.mean(parts.prefill)), 'prefill_flops_dense': float(
        np.mean(parts.prefill - parts.decoder + parts.decoder_dense)), 'vision_flops': 0.0,
         'projector_flops': 0.0, 'selector_flops': 0.0, 'kv_bytes': float(np.mean(
             efficiency.kv_bytes(config.text, tokens, config.dtype)))}, (~pictured).mean())
  return total


def load(directory: pathlib.Path) -> Run:
  """A finished run.

  Raises:
    ConfigError: there is none, or it was written by another version.
    DataError: answers.jsonl is damaged; names the line.
  """
  for name in (CONFIG, RESULTS, ANSWERS):
    check((directory / name).is_file(), f'{directory} has no {name}: it is no finished '
          'run of vlm-compress evaluate --benchmark; run that again, it goes on')
  config, result = (_object(directory / name) for name in (CONFIG, RESULTS))
  check_fields(config, ('questions', 'model', 'checkpoint'), str(directory / CONFIG))
  check_fields(result, RESULT, str(directory / RESULTS))
  rows = read_rows(directory / ANSWERS)
  scores = None
  if result['metric'] is not None:
    for row in rows.values():
      check_fields(row, ('image', 'answers', 'groups', 'unit', 'parsed', 'score'),
                   str(directory / ANSWERS))
    scores = _scores(result, [_result(row) for row in rows.values()])
  return Run(directory, config, result, scores)


def _object(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise DataError(f'{path} is no JSON ({error}); delete the directory, and run '
                    'evaluate again') from error
  check(isinstance(found, dict), f'{path} holds no object; delete the directory')
  return found


def _result(row: Mapping[str, Any]) -> Result:
  question = Question(row['question_id'], '', '', row['image'], answers=tuple(row['answers']),
                      groups=row['groups'], unit=row['unit'])
  score = row['score']
  return Result(question, row['prediction'], row['parsed'],
                int(score) if score in (0, 1) else score)


def _scores(result: Mapping[str, Any], results: Sequence[Result]) -> Scores:
  module = BENCHMARKS[result['benchmark']]
  return Scores(result['benchmark'], result['rule'], module.HEADLINE,
                module.summarise(results), tuple(results), len(results), 0,
                bool(result['partial']), tuple(result['notes']))
