"""Inference: every method on one subject, in turns.

Prefill starts from vision features and ends at the logits of the first new
token.  Rows that read a cached image start from its keys and values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_compress.config import AtpConfig
from vlm_compress.decode.prefilled import Prefilled, entering
from vlm_compress.decode.regroup import count_slots
from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.eval import efficiency
from vlm_compress.eval.benchmark import subjects
from vlm_compress.eval.benchmark.subjects import Subject
from vlm_compress.eval.benchmark.timing import alternate, median_ms, peak_rise, spread
from vlm_compress.eval.calibration import calibrate
from vlm_compress.models import segments as seg
from vlm_compress.models.inputs import Prefix, PruneOptions
from vlm_compress.models.llava import Llava

ANSWER = 10  # tokens of the answer whose time is reported
OUTSIDE_REST = 0.3  # seconds
TOLERANCE = 0.01  # of a layer average
NUM_PROMPT = float(subjects.NUM_TEXT - subjects.NUM_BEFORE)
FULL, FULL_CACHED = 'full', 'full, visual KV cached'


@dataclasses.dataclass
class Case:
  """A method on one batch.

  Attributes:
    method: its name.
    model: how it decodes.
    prefill: runs it; room for new tokens is the argument.
    flops: of its prefill, per row; dense_flops with attention as rectangles.
    entering: float[B, M], visual tokens that enter each layer.
    cached: float[B, M], tokens in each layer's cache after prefill.
    encodes: the picture is encoded (it is not in a cache).
    selector_flops: what choosing tokens adds, part of `flops`.
    reached: it keeps as many tokens as its name says, within TOLERANCE.
  """
  method: str
  model: SegmentedModel
  prefill: Callable[[int], Prefilled]
  flops: float
  dense_flops: float
  entering: np.ndarray
  cached: np.ndarray
  encodes: bool = True
  selector_flops: float = 0.0
  reached: bool = True


def cases(subject: Subject, num_rows: int, shares: tuple[float, ...],
          voco_tokens: tuple[int, ...]) -> list[Case]:
  """All methods on `num_rows` prompts.

  Args:
    subject: the model.
    num_rows: B.
    shares: layer averages of visual tokens for ATP, as parts of P.
    voco_tokens: C of each VoCo row; the first also without a cache.
  """
  P = subject.plain.num_visual_tokens
  M = subject.plain.text.num_hidden_layers
  all_tokens = np.full((num_rows, M), float(P))
  found = [_full(subject, num_rows, all_tokens),
           _full_cached(subject, num_rows, all_tokens)]
  for share in shares:
    pruned = _atp(subject, num_rows, share)
    found += [pruned, _random(subject, num_rows, share, pruned.entering)]
  for count in voco_tokens:
    rows = _voco(subject, num_rows, count)
    found += rows if count == voco_tokens[0] else rows[1:]
  return found


def _cost(config: Any, tokens: np.ndarray, text: float = subjects.NUM_TEXT
          ) -> tuple[float, float]:
  parts = efficiency.prefill_cost(config, tokens, text,
                                  prompt_tokens=NUM_PROMPT)
  return _both(parts)


def _both(parts: efficiency.PrefillCost) -> tuple[float, float]:
  """Mean FLOPs per row with the projector, needed and dense."""
  needed = parts.projector + parts.prefill
  return (float(np.mean(needed)),
          float(np.mean(needed - parts.decoder + parts.decoder_dense)))


def _full(subject: Subject, num_rows: int, tokens: np.ndarray) -> Case:
  batch = subjects.prompt_batch(subject, num_rows)
  return Case(FULL, subject.model, lambda room: subject.model.prefill(
      batch, None, room), *_cost(subject.plain, tokens), tokens,
              tokens + subjects.NUM_TEXT)


def _full_cached(subject: Subject, num_rows: int, tokens: np.ndarray) -> Case:
  """The image's keys and values are there; text is read behind them."""
  model, config = subject.model, subject.plain
  state = model.prefill(subjects.picture_batch(subject, num_rows), None, 0)
  cache, = state.caches
  prefix = Prefix(jnp.stack(cache.keys), jnp.stack(cache.values), cache.readable,
                  jnp.full(cache.readable.shape, -1))
  text = subjects.text_batch(subject, num_rows)
  length, seen = text.input_ids.shape[1], cache.readable.shape[1]
  layers = config.text.num_hidden_layers
  flops = [layers * float(efficiency.layer_flops(
      config.text, length, pairs(length, seen))) + efficiency.lm_head_flops(
          config.text) for pairs in (efficiency.causal_pairs,
                                     efficiency.dense_pairs)]
  return Case(FULL_CACHED, model, lambda room: model.read_behind(
      text, [prefix], room), *flops, tokens, tokens + subjects.NUM_TEXT,
              encodes=False)


def _atp(subject: Subject, num_rows: int, share: float) -> Case:
  """Thresholds moved until the average over rows and layers is the share."""
  batch, config = subjects.prompt_batch(subject, num_rows), subject.atp
  target = share * config.num_visual_tokens

  def count(shift: float) -> np.ndarray:
    state = subject.model.prefill(batch, PruneOptions(threshold_shift=shift))
    return entering(config, state.pruning).sum(2).T

  found = calibrate(count, target, config, tolerance=TOLERANCE * target)
  options = PruneOptions(threshold_shift=found.shift)
  tokens = count(found.shift)
  selector = np.mean(efficiency.selector_flops(config, tokens, NUM_PROMPT))
  return Case(f'ATP {100 * share:g} %', subject.model,
              lambda room: subject.model.prefill(batch, options, room),
              *_cost(config, tokens), tokens, tokens + subjects.NUM_TEXT,
              selector_flops=float(selector), reached=found.reached)


def _random(subject: Subject, num_rows: int, share: float, tokens: np.ndarray
            ) -> Case:
  """As many tokens as ATP keeps on average, by chance: no selector to pay,
  and a ladder with just these rungs.
  """
  placed = subject.atp.atp.prune_after
  counts = tuple(int(round(n)) for n in tokens.mean(0)[list(placed)])
  config = dataclasses.replace(subject.atp, atp=AtpConfig(
      prune_after=placed, selector='random', fixed_counts=counts,
      capacities=tuple(sorted(set(counts)))))
  model = subject.model.with_config(config)
  batch = subjects.prompt_batch(subject, num_rows)
  options = PruneOptions(row_ids=np.arange(num_rows, dtype=np.int32))
  cuts = [sum(c <= layer for c in placed) for layer in range(tokens.shape[1])]
  same = np.asarray([counts[n - 1] if n else config.num_visual_tokens
                     for n in cuts], np.float64)
  same = np.broadcast_to(same, tokens.shape)
  return Case(f'random {100 * share:g} %', model,
              lambda room: model.prefill(batch, options, room),
              *_cost(config, same), same, same + subjects.NUM_TEXT)


def _voco(subject: Subject, num_rows: int, count: int) -> list[Case]:
  config = subject.voco(count)
  model = subject.model.with_config(config)
  batch = subjects.voco_batch(subject, num_rows, count)
  compress = functools.partial(model.compress, batch.text.features,
                               batch.segment_ids, count)
  read = lambda images, room: model.read(batch.text, images,
                                         batch.voco_positions, room)
  cached = compress()
  length = subjects.NUM_TEXT - 2
  shape = (num_rows, config.text.num_hidden_layers)
  rows = []
  for name, run, is_cached in (
      (f'VoCo {count}', lambda room: read(compress(), room), False),
      (f'VoCo {count}, cached', lambda room: read(cached, room), True)):
    cost = efficiency.voco_cost(config, float(length), num_voco_tokens=count,
                                cached=is_cached, keys_only=True)
    rows.append(Case(name, model, run, *_both(cost),
                     np.full(shape, float(count)),
                     np.full(shape, float(length + count)), not is_cached))
  return rows


def vision_encoder(subject: Subject, num_rows: int,
                   encode: Callable[[int], Any] | None = None
                   ) -> Callable[[], Any]:
  """Encodes `num_rows` pictures; CLIP with the subject's weights, or `encode`."""
  if encode is not None:
    return lambda: encode(num_rows)
  size = subject.plain.vision.image_size
  pixels = jnp.zeros((num_rows, 1, size, size, 3), subject.plain.dtype)
  run = jax.jit(lambda params, x: Llava(subject.plain).apply(
      {'params': params}, x, method='vision_features'))
  return lambda: run(subject.model.rest, pixels)


def selector(subject: Subject, case: Case, num_rows: int) -> Callable[[], Any]:
  """What choosing costs: scores, thresholds, and moving kept tokens forward,
  behind each segment of an ATP case, at the slots that it has there.
  """
  config, model = subject.atp, subject.model
  state = case.prefill(0)
  batch = subjects.prompt_batch(subject, num_rows)
  tokens, pruning, _ = model.start(batch, PruneOptions(threshold_shift=0.0))
  text, size = config.text, jnp.dtype(config.dtype)
  shapes = (text.num_attention_heads, text.num_key_value_heads)
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), size)

  def program(modules, module, tokens, last, pruning, slots):
    tokens, pruning = seg.run_module(modules, module, tokens, last, pruning)
    tokens, counts = seg.to_front(tokens, pruning)
    return seg.cut(tokens, slots), counts, pruning
  runs = []
  for module, slots in enumerate(state.slots[:-1]):
    some = model.cut(tokens, slots)
    q, k = (draw(num_rows, slots, n, text.size_per_head) for n in shapes)
    lse = jnp.full((num_rows, slots, shapes[0]), 8.0)
    last = seg.LayerState(q, k, k, lse)
    run = jax.jit(functools.partial(program, module=module,
                                    slots=state.slots[module + 1]))
    runs.append(functools.partial(run, subject.model.rest['atp'], tokens=some,
                                  last=last, pruning=pruning))
  return lambda: [run() for run in runs]


def measure(subject: Subject, num_rows: int, *, repeats: int,
            shares: tuple[float, ...] = (0.25, 0.15),
            voco_tokens: tuple[int, ...] = (1, 8), encode: Any = None,
            outside: dict[str, Any] | None = None,
            tick: Callable[[str], Any] = lambda name: None
            ) -> list[dict[str, Any]]:
  """Times all methods on one subject and batch size.

  Args:
    subject: the model.
    num_rows: B.
    repeats: rounds that count.
    shares, voco_tokens: see `cases`.
    encode: runs the vision tower on so many pictures, if not CLIP's.
    outside: name -> torch_reference.Reference, measured in the same rounds.
    tick: called with the name of what has been run.

  Returns:
    A row per method; see report.INFERENCE.
  """
  found = cases(subject, num_rows, shares, voco_tokens)
  outside = outside or {}
  room = ANSWER * (repeats + 2)
  states = {case.method: case.prefill(room) for case in found}
  runs = {('vision', ''): vision_encoder(subject, num_rows, encode)}
  for case in found:
    runs |= _runs(subject, case, states[case.method], num_rows)
  for name, other in outside.items():
    runs['prefill', name], runs['decode', name] = other.prefill, other.decode
  seconds = alternate(runs, repeats, tick=lambda name: tick(' '.join(name)),
                      pause=lambda name: OUTSIDE_REST * (name[1] in outside))
  rows = [_row(subject, case.method, num_rows, seconds, case.encodes,
               _values(subject, case, states[case.method])) for case in found]
  rows += [_row(subject, name, num_rows, seconds, True,
                _outside_values(subject, other))
           for name, other in outside.items()]
  return relate(rows)


def _runs(subject: Subject, case: Case, state: Prefilled, num_rows: int
          ) -> dict[tuple[str, str], Callable[[], Any]]:
  """What is timed of a case."""
  token = np.zeros(num_rows, np.int32)

  def decode():
    for _ in range(ANSWER):
      logits = case.model.extend(token, state)
    return logits
  runs = {('prefill', case.method): lambda: case.prefill(ANSWER).logits,
          ('decode', case.method): decode}
  if case.method.startswith('ATP'):
    runs['selector', case.method] = selector(subject, case, num_rows)
  return runs


def _values(subject: Subject, case: Case, state: Prefilled) -> dict[str, Any]:
  """The columns of a row that are not times."""
  return {
      'visual_tokens': float(case.entering.mean()), 'reached': case.reached,
      'prefill_flops': case.flops, 'prefill_flops_dense': case.dense_flops,
      'selector_flops': case.selector_flops,
      'kv_bytes': float(np.mean(efficiency.kv_bytes(
          subject.plain.text, case.cached, subject.plain.dtype))),
      'slot_waste': count_slots(case.model, state).waste,
      'slots': list(state.slots),
      'peak_bytes': peak_rise(lambda: case.prefill(ANSWER).logits)}


def _outside_values(subject: Subject, other: Any) -> dict[str, Any]:
  text = subject.plain.text
  tokens = np.full((1, text.num_hidden_layers), float(other.num_visual))
  cost = efficiency.prefill_cost(subject.plain, tokens, subjects.NUM_TEXT)
  flops, dense = (float(np.mean(cost.prefill - cost.decoder + n))  # no projector
                  for n in (cost.decoder, cost.decoder_dense))
  return {
      'visual_tokens': float(other.num_visual), 'prefill_flops': flops,
      'prefill_flops_dense': dense, 'selector_flops': 0.0,
      'kv_bytes': float(efficiency.kv_bytes(
          text, tokens[0] + subjects.NUM_TEXT, subject.plain.dtype)),
      'slot_waste': 1.0, 'slots': [], 'peak_bytes': peak_rise(other.prefill)}


def _row(subject: Subject, method: str, num_rows: int,
         seconds: dict[tuple[str, str], list[float]], encodes: bool,
         values: dict[str, Any]) -> dict[str, Any]:
  ms = {key: median_ms(value) for key, value in seconds.items()}
  vision = ms['vision', ''] if encodes else 0.0
  decode = ms['decode', method] / ANSWER
  prefill = ms['prefill', method]
  return {'subject': subject.name, 'dtype': subject.plain.dtype,
          'batch': num_rows, 'method': method, 'vision_ms': vision,
          'selector_ms': ms.get(('selector', method), 0.0),
          'prefill_ms': prefill, 'decode_ms': decode,
          'answer_ms': vision + prefill + (ANSWER - 1) * decode,
          'spread': spread(seconds['prefill', method]), **values}


def relate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Adds ratios to the row of the full model."""
  full = next(row for row in rows if row['method'] == FULL)
  for row in rows:
    row['time_ratio'] = row['prefill_ms'] / full['prefill_ms']
    row['flop_ratio'] = row['prefill_flops'] / full['prefill_flops']
    row['time_over_flops'] = row['time_ratio'] / row['flop_ratio']
  return rows
