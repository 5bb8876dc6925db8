"""What a model does with one picture and one question, as arrays.

Everything works on a model in memory (`api.load`) and Examples with their
frozen vision features.  Functions are pure: nothing is drawn (see
plots.py), nothing is written.  A prompt is padded to a multiple of 16 tokens,
which changes no result, so that questions of similar length share a compiled
program.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from vlm_compress.config import LlavaConfig, check
from vlm_compress.data.examples import Example, Turn
from vlm_compress.data.rows import RowSpec, layout
from vlm_compress.decode.generate import answer_ids, generate
from vlm_compress.eval.evaluator import Answers
from vlm_compress.models.llava import Llava, PruneOptions
from vlm_compress.models.sequence import TEXT, VISUAL, VOCO, Batch, make_batch
from vlm_compress.vlm import Vlm

_LENGTH_STEP = 16  # tokens


def keep_maps(loaded: Vlm, example: Example, features: np.ndarray,
              question: str, *, template: str = 'short',
              threshold_shift: float | None = None, seed: int = 0,
              max_new_tokens: int = 16) -> dict[str, Any]:
  """Which visual tokens an ATP model keeps for a question, and its answer.

  Args:
    loaded: a model with pruning modules.
    example: gives the picture.
    features: float[P', Dv], vision features of the picture.
    question: text; its words must be in the tokenizer.
    template: name of the conversation template, as in training.
    threshold_shift: see AtpConfig; None takes the config's.
    seed: of the selector 'random'.
    max_new_tokens: longest answer, in tokens.

  Returns:
    'keep' bool[L, g, g], tokens left after each module; 'thresholds'
    float[L, 2], theta_r and theta_s; 'redundancy' float[L, g, g], redundancy
    scores, 0 where a token was gone before the module; 'entering' float[M],
    visual tokens that enter each layer; 'answer' the text.

  Raises:
    ConfigError: the model has no pruning modules.
  """
  config = loaded.config
  check(config.atp is not None,
        'keep maps: the model prunes nothing (atp is null in its config.json); '
        'name the directory of an ATP model')
  batch = _prompt(loaded, example, features, question, template, 0)
  prune = _options(config, threshold_shift, seed)
  result = _generate(loaded.model, loaded.on_device, batch, prune,
                     max_new_tokens, loaded.tokenizer.eos_id)
  pruned = result.outputs.prune
  grid = (len(config.atp.prune_after),) + (config.vision.grid_size,) * 2
  tokens = answer_ids(result.tokens[0], loaded.tokenizer.eos_id)
  return {
      'keep': np.asarray(pruned.module_keep[:, 0, 0] > 0.5).reshape(grid),
      'thresholds': np.asarray(pruned.thresholds[:, 0, 0]),
      'redundancy': np.asarray(pruned.redundancy[:, 0, 0]).reshape(grid),
      'entering': np.asarray(result.outputs.entering)[:, 0].sum((1, 2)),
      'answer': loaded.tokenizer.decode(tokens)}


def attention_to_image(loaded: Vlm, example: Example, features: np.ndarray,
                       question: str, mask: str = 'causal',
                       num_voco_tokens: int = 0, *, template: str = 'short',
                       threshold_shift: float | None = None
                       ) -> dict[str, np.ndarray]:
  """Where the prompt's text behind the image looks, layer by layer.

  Attention is after the softmax, mean over heads and over the text tokens of
  the prompt that follow the image.  An ATP model runs with its modules, so
  nobody looks at a token that is gone.

  Args:
    loaded: any model.
    example, features, question, template, threshold_shift: as in `keep_maps`.
    mask: 'causal', or 'voco': text sees the VoCo tokens and not the image.
    num_voco_tokens: C in the prompt, 0 for none; 'voco' needs some.

  Returns:
    'visual', 'voco', 'text': float[M], shares of the attention that go to
    visual tokens, VoCo tokens and text (BOS and newlines included); they sum
    to 1.  'text_to_visual' float[M, g, g], the first of them per position of
    the grid.  'voco_to_visual' float[M, g, g], the same seen from the VoCo
    tokens (mean over them), 0 without any.

  Raises:
    ConfigError: the mask or the VoCo tokens do not fit the model, or its
      visual tokens have no place on the grid.
  """
  config = loaded.config
  g, P = config.vision.grid_size, config.num_visual_tokens
  check(P == g * g, f'attention: {P} visual tokens have no place on the grid '
        f'of {g} x {g}; use a model without resampler and class token')
  trained = config.voco.num_voco_tokens if config.voco is not None else 0
  check(0 <= num_voco_tokens <= trained,
        f'attention: num_voco_tokens={num_voco_tokens}, but the model was '
        f'made for at most {trained}')
  check(mask != 'voco' or num_voco_tokens > 0,
        "attention: mask='voco' hides the image from the text; set "
        'num_voco_tokens to 1 or more')
  batch = _prompt(loaded, example, features, question, template,
                  num_voco_tokens)
  prune = None
  if config.atp is not None:
    prune = _options(config, threshold_shift)
  maps = np.asarray(_attention(loaded.model, loaded.on_device, batch, prune,
                               mask))[:, 0]
  types, slots = batch.token_types[0], batch.visual_slots[0]
  looks = _mean_rows(maps, batch.prompt_mask[0])
  share = lambda kind: looks[:, types == kind].sum(-1)

  def on_grid(rows):
    canvas = np.zeros((len(rows), P), np.float32)
    canvas[:, slots[types == VISUAL]] = rows[:, types == VISUAL]
    return canvas.reshape(-1, g, g)

  return {'visual': share(VISUAL), 'voco': share(VOCO), 'text': share(TEXT),
          'text_to_visual': on_grid(looks),
          'voco_to_visual': on_grid(_mean_rows(maps, types == VOCO))}


def kept_statistics(answers: Answers) -> dict[str, np.ndarray]:
  """How many visual tokens the modules keep, over the questions.

  Args:
    answers: of an evaluated method; Q questions.

  Returns:
    'mean', 'std', 'min', 'p50', 'p90', 'p99', 'max': float[L], of the tokens
    kept after each module; 'theta_mean', 'theta_std': float[L, 2];
    'entering_mean', 'entering_std': float[M], of the tokens that enter each
    layer; 'layer_average': float[Q], mean of those over the layers.

  Raises:
    ValueError: no questions.
  """
  if not answers.texts:
    raise ValueError('kept_statistics: no questions were answered')
  counts = answers.module_keep.sum(-1).astype(np.float64)
  percentiles = np.percentile(counts, [50, 90, 99], axis=0)
  return {
      'mean': counts.mean(0), 'std': counts.std(0), 'min': counts.min(0),
      **dict(zip(('p50', 'p90', 'p99'), percentiles, strict=True)),
      'max': counts.max(0),
      'theta_mean': answers.thresholds.mean(0),
      'theta_std': answers.thresholds.std(0),
      'entering_mean': answers.entering.mean(0),
      'entering_std': answers.entering.std(0),
      'layer_average': answers.entering.mean(1)}


def _options(config: LlavaConfig, threshold_shift: float | None,
             seed: int = 0) -> PruneOptions:
  shift = config.atp.threshold_shift
  return PruneOptions(seed=seed, threshold_shift=(
      shift if threshold_shift is None else threshold_shift))


def _prompt(loaded: Vlm, example: Example, features: np.ndarray,
            question: str, template: str, num_voco_tokens: int) -> Batch:
  """A batch of one prompt, padded to a multiple of _LENGTH_STEP tokens."""
  row = layout(example, [Turn(question)], RowSpec(template=template),
               loaded.tokenizer, loaded.config, num_voco_tokens,
               prompt_only=True)
  length = -(-len(row['input_ids']) // _LENGTH_STEP) * _LENGTH_STEP
  return make_batch([row], [np.asarray(features, np.float32)[None]],
                    length=length, num_images=1)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _generate(model: Llava, params: Any, batch: Batch, prune: PruneOptions,
              max_new_tokens: int, eos_id: int):
  return generate(model, params, batch, max_new_tokens=max_new_tokens,
                  eos_id=eos_id, prune=prune)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _attention(model: Llava, params: Any, batch: Batch,
               prune: PruneOptions | None, mask: str) -> jax.Array:
  """float32[M, 1, T, T], mean over heads."""
  _, out = model.apply({'params': params}, batch, mask=mask, prune=prune,
                       collect=True, method='hidden')
  return out.attention


def _mean_rows(maps: np.ndarray, queries: np.ndarray) -> np.ndarray:
  """Mean attention of some queries, float[M, T]; zeros if there are none."""
  if not queries.any():
    return np.zeros((maps.shape[0], maps.shape[2]), maps.dtype)
  return maps[:, queries].mean(1)
