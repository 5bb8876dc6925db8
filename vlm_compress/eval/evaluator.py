"""Asks a model every question of a split, and keeps what it did.

A question is a row of its own: prompt in, greedy answer out, so an answer
depends on nothing else in the batch.  Besides the answer, the evaluator keeps
how many visual tokens entered each layer, per question.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from vlm_compress import sharding
from vlm_compress.config import LlavaConfig, check
from vlm_compress.data.examples import Example, Turn
from vlm_compress.data.rows import RowSpec, layout
from vlm_compress.data.tokenizer import Tokenizer
from vlm_compress.decode.generate import answer_ids, generate
from vlm_compress.eval import efficiency
from vlm_compress.models.llava import Llava, PruneOptions
from vlm_compress.models.sequence import TEXT, make_batch, split_voco


@dataclasses.dataclass(frozen=True)
class Method:
  """A model and how it is run.

  Attributes:
    name: as in the report.
    config: of the model, with the method that it runs.
    params: parameters.
    mask: 'causal' or 'voco'.
    num_voco_tokens: C in the prompts; 0 for none.
    trained: the decoder was trained under this selection of tokens.
    seed: of the random selector, and of the training run.
    threshold_shift: see AtpConfig; None takes the config's.
  """
  name: str
  config: LlavaConfig
  params: Any
  mask: str = 'causal'
  num_voco_tokens: int = 0
  trained: bool = True
  seed: int = 0
  threshold_shift: float | None = None


@dataclasses.dataclass(frozen=True)
class Question:
  """One question of the evaluation.

  Attributes:
    example: number of the example, which is also its row in the features.
    turn: question, answer, kind.
  """
  example: int
  turn: Turn


@dataclasses.dataclass(frozen=True)
class Answers:
  """What a method answered.

  Attributes:
    texts: one per question.
    entering: float32[Q, M], visual tokens that entered each layer.
    module_keep: bool[Q, L, P], keep masks after each module; L may be 0.
    thresholds: float32[Q, L, 2].
    text_tokens: int32[Q], text tokens of the prompt, BOS included.
    prompt_tokens: int32[Q], those of them that follow the image.
  """
  texts: list[str]
  entering: np.ndarray
  module_keep: np.ndarray
  thresholds: np.ndarray
  text_tokens: np.ndarray
  prompt_tokens: np.ndarray


# An object of a held-out pair is there: to ask about those first would make
# nearly every answer "yes".
GIVEN_AWAY = ('exists',)


def questions_of(examples: Sequence[Example], per_kind: dict[str, int]
                 ) -> list[Question]:
  """A fixed choice of questions: of every example, up to so many per kind.

  They are drawn, because turns have an order (cells from top left on), and the
  draw is the same for the same examples.

  Args:
    examples: of the split.
    per_kind: kind -> number per example; those about held-out pairs first,
      but not of GIVEN_AWAY.

  Returns:
    Questions in the order of the examples.
  """
  chosen = []
  for index, example in enumerate(examples):
    for kind, count in per_kind.items():
      turns = [t for t in example.turns if t.kind == kind]
      rng = np.random.default_rng([index, zlib.crc32(kind.encode())])
      turns = [turns[i] for i in rng.permutation(len(turns))]
      turns.sort(key=lambda t: not t.heldout or kind in GIVEN_AWAY)
      chosen += [Question(index, t) for t in turns[:count]]
  return chosen


def answer(method: Method, examples: Sequence[Example], features: Any,
           questions: Sequence[Question], tokenizer: Tokenizer, *,
           template: str = 'short', batch_size: int = 64,
           progress: bool = True) -> Answers:
  """Asks all questions.

  Args:
    method: the model and how to run it.
    examples: of the split; features[i] is float[P', Dv] of example i.
    questions: what to ask.
    tokenizer, template: as in training.
    batch_size: questions at a time.
    progress: show a bar if stderr is a terminal.

  Returns:
    Answers in the order of the questions.
  """
  check(bool(questions), 'there is nothing to ask: no question of the kinds in '
        'eval.per_kind about the first eval.num_test pictures')
  spec = RowSpec(template=template)
  rows = [layout(examples[q.example], [q.turn], spec, tokenizer,
                 method.config, method.num_voco_tokens, prompt_only=True)
          for q in questions]
  budgets = [len(tokenizer.encode(q.turn.answer)) + 2 for q in questions]
  mesh = sharding.make_mesh()
  shards = sharding.batch_sharding(mesh)
  batch_size = -(-batch_size // mesh.size) * mesh.size
  length = max(len(row['input_ids']) for row in rows)  # one shape: one program
  text_length = max(int((row['image_ids'] == 0).sum()) for row in rows)
  run = _compiled(method, tokenizer.eos_id, max(budgets))
  params = jax.device_put(method.params, sharding.replicated(mesh))
  out: list[Any] = [None] * len(questions)
  console = Console(stderr=True)
  with Progress(console=console, transient=True,
                disable=not (progress and console.is_terminal)) as bar:
    task = bar.add_task(f'asking {method.name}', total=len(questions))
    for group in _groups(budgets):
      limit = np.int32(max(budgets[i] for i in group))
      for start in range(0, len(group), batch_size):
        part = group[start:start + batch_size]
        padded = part + [part[-1]] * (batch_size - len(part))
        batch = make_batch(
            [rows[i] for i in padded],
            [np.asarray(features[questions[i].example])[None] for i in padded],
            length=length, num_images=1)
        ids = np.asarray([_row_id(questions[i]) for i in padded], np.int32)
        if method.mask == 'voco':  # in two passes
          batch = split_voco(batch, method.config, text_length)
        batch, ids = jax.device_put((batch, ids), shards)
        with jax.set_mesh(mesh):
          result = run(params, batch, ids, limit)
        for slot, i in enumerate(part):
          out[i] = [np.asarray(x)[slot] for x in result]
        bar.update(task, advance=len(part))
  tokens, *columns = zip(*out)
  texts = [tokenizer.decode(answer_ids(t, tokenizer.eos_id)) for t in tokens]
  text_tokens, prompt_tokens = np.asarray(
      [[int((r['token_types'] == TEXT).sum()), int(r['prompt_mask'].sum())]
       for r in rows]).T
  return Answers(texts, *map(np.stack, columns), text_tokens, prompt_tokens)


def _groups(budgets: Sequence[int], short: int = 8) -> list[list[int]]:
  """Short and long answers apart, so that few captions do not cost all."""
  groups = [[i for i, b in enumerate(budgets) if b <= short],
            [i for i, b in enumerate(budgets) if b > short]]
  return [g for g in groups if g]


def _row_id(question: Question) -> int:
  """Names a question for the random selector, whatever its batch."""
  text = question.turn.question.encode()
  return (question.example * 1009 + sum(text)) % (2 ** 31 - 1)


def _compiled(method: Method, eos_id: int, max_new_tokens: int):
  """A jitted function of (params, batch, row ids, limit on new tokens)."""
  config = method.config
  model = Llava(config)
  P, M = config.num_visual_tokens, config.text.num_hidden_layers

  def run(params, batch, row_ids, limit):
    prune = None
    if config.atp is not None:
      prune = PruneOptions(row_ids=row_ids, seed=method.seed,
                           threshold_shift=method.threshold_shift)
    result = generate(model, params, batch, max_new_tokens=max_new_tokens,
                      eos_id=eos_id, mask=method.mask, prune=prune,
                      limit=limit)
    B = row_ids.shape[0]
    if prune is None:
      entering = jnp.full((B, M), P, jnp.float32)
      return (result.tokens, entering, jnp.zeros((B, 0, P), bool),
              jnp.zeros((B, 0, 2)))
    out = result.outputs
    entering = jnp.sum(out.entering, axis=(2, 3)).T
    keep = jnp.moveaxis(out.prune.module_keep[:, :, 0] > 0.5, 0, 1)
    theta = jnp.moveaxis(out.prune.thresholds[:, :, 0], 0, 1)
    return result.tokens, entering, keep, theta

  return jax.jit(run)


def cost(method: Method, answers: Answers, num_images: int = 1) -> dict[str, float]:
  """What a method costs, as means over its questions.

  VoCo is charged for compressing every image; its cache holds the VoCo
  tokens and the text.

  Args:
    method, answers: what answered what.
    num_images: images of every question, all in front of its text; the newlines
      between them are counted as if they stood behind all.

  Returns:
    prefill_flops (decoder, selector, LM head; needed query-key pairs),
    prefill_flops_dense (attention as full squares, masked afterwards),
    vision_flops, projector_flops (with the resampler), selector_flops, and
    kv_bytes.
  """
  config = method.config
  text = answers.text_tokens.astype(np.float64)
  M = config.text.num_hidden_layers
  if method.mask == 'voco':
    # BOS and the newlines behind the images are compressed.
    read = text - 1 - num_images
    parts = efficiency.voco_cost(config, read, num_images=num_images,
                                 num_voco_tokens=method.num_voco_tokens)
    cached = read + num_images * (
        method.num_voco_tokens + (2 if config.voco.text_sees_prefix else 0))
    tokens = np.repeat(cached[:, None], M, axis=1)
  else:
    extra = text + num_images * method.num_voco_tokens
    parts = efficiency.prefill_cost(
        config, answers.entering, extra, prompt_tokens=answers.prompt_tokens,
        num_images=num_images,
        resampler_flops=efficiency.resampler_flops(config))
    tokens = answers.entering + extra[:, None]
  values = {
      'prefill_flops': parts.prefill,
      'prefill_flops_dense': parts.prefill - parts.decoder
                             + parts.decoder_dense,
      'vision_flops': parts.vision,
      'projector_flops': parts.projector + parts.resampler,
      'selector_flops': parts.selector,
      'kv_bytes': efficiency.kv_bytes(config.text, tokens, config.dtype)}
  return {name: float(np.mean(value)) for name, value in values.items()}
