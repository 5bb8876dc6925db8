"""One training stage: the bridge from a ConfigDict, and running it."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from vlm_compress.atomic import write_text
from vlm_compress.cli.workspace import (
  DataSpec,
  Message,
  Split,
  check_tower,
  model_config,
  tokenizer_for,
)
from vlm_compress.config import ConfigError, LlavaConfig, VisionConfig, check, from_dict
from vlm_compress.convert.files import WEIGHTS, load_params, save_model
from vlm_compress.convert.processor import Processor
from vlm_compress.data.input_pipeline import make_dataset
from vlm_compress.data.rows import RowSpec, plain_collate, row_maker, voco_collate
from vlm_compress.data.tokenizer import Tokenizer
from vlm_compress.models.llava import Llava
from vlm_compress.train.checkpoint import claim_workdir
from vlm_compress.train.loop import fit
from vlm_compress.train.recipe import Recipe

SECTIONS = ('model', 'data', 'rows', 'train', 'eval', 'init_from')


@dataclasses.dataclass(frozen=True)
class Stage:
  """A training stage as frozen dataclasses.

  Attributes:
    model: fields of LlavaConfig, without the vocabulary size.
    data, rows, recipe: what to train on, and how.
    per_kind: evaluation, questions per picture and kind.
    num_test: evaluation, pictures.
    headline: kinds whose questions make the accuracy of a result row.
    init_from: a model directory, or '' to start fresh.
  """
  model: dict[str, Any]
  data: DataSpec
  rows: RowSpec
  recipe: Recipe
  per_kind: dict[str, int]
  num_test: int
  headline: tuple[str, ...]
  init_from: str


def _dataclass(cls: type, values: dict[str, Any], section: str) -> Any:
  names = {f.name for f in dataclasses.fields(cls)}
  unknown = sorted(set(values) - names)
  check(not unknown, f'unknown config field(s) {unknown} in config.{section}; '
        f'known: {sorted(names)}')
  return cls(**{k: _tuples(v) for k, v in values.items()})


def _tuples(value: Any) -> Any:
  if isinstance(value, (list, tuple)):
    return tuple(_tuples(v) for v in value)
  return value


def bridge(config: ConfigDict) -> Stage:
  """ConfigDict outside, frozen dataclasses inside; the only crossing.

  Raises:
    ConfigError: an unknown or missing section or field, with its name, or
      sections that do not fit each other.
  """
  values = config.to_dict()
  unknown = sorted(set(values) - set(SECTIONS))
  check(not unknown, f'unknown config section(s) {unknown}; known: {SECTIONS}')
  missing = sorted(set(SECTIONS) - set(values))
  check(not missing, f'config section(s) {missing} are missing')
  data = dict(values['data'])
  data['options'] = tuple(sorted(data.get('options', {}).items()))
  rows = dict(values['rows'])
  rows['kinds'] = tuple(sorted(rows.get('kinds', {}).items()))
  ev = values['eval']
  unknown = sorted(set(ev) - {'per_kind', 'num_test', 'headline'})
  check(not unknown, f'unknown config field(s) {unknown} in config.eval; known: '
        'headline, num_test, per_kind')
  for kind, count in ev.get('per_kind', {}).items():
    check(count >= 0, f'config.eval.per_kind.{kind}={count}: not negative')
  try:
    stage = Stage(
        model=values['model'], data=_dataclass(DataSpec, data, 'data'),
        rows=_dataclass(RowSpec, rows, 'rows'),
        recipe=_dataclass(Recipe, values['train'], 'train'),
        per_kind=dict(ev['per_kind']), num_test=ev['num_test'],
        headline=tuple(ev['headline']), init_from=values['init_from'])
  except KeyError as e:
    raise ConfigError(f'config field {e} is missing') from e
  lost = sorted(set(stage.headline) - {
      kind for kind, count in stage.per_kind.items() if count > 0})
  check(bool(stage.headline) and not lost, f'config.eval.headline='
        f'{list(stage.headline)}: needs kinds that eval.per_kind asks')
  check(stage.num_test >= 1, 'config.eval.num_test: at least 1')
  _check_voco_rows(stage)
  check(stage.recipe.stage != 'atp' or stage.rows.one_turn,
        'train.stage="atp" needs rows.one_turn=True: at inference the '
        'thresholds come from the first question alone')
  check_tower(stage.data, from_dict(stage.model.get('vision', {}),
                                    VisionConfig), 'config.model')
  return stage


def _check_voco_rows(stage: Stage) -> None:
  """Rows must not carry VoCo tokens that the model has no embedding for."""
  most = max(stage.rows.num_voco_tokens, default=0)
  voco = stage.model.get('voco')
  have = 0 if voco is None else voco.get('num_voco_tokens', 1)
  check(most <= have, f'config.rows.num_voco_tokens='
        f'{stage.rows.num_voco_tokens} is more than the '
        f'{have} of config.model.voco; set both')


def describe(stage: Stage) -> dict[str, Any]:
  """A stage as plain types, for config.json.

  The weights that it starts from are named by their content: a workdir may
  move, but must not go on from other weights.

  Raises:
    ConfigError: init_from holds no weights.
  """
  digest = ''
  if stage.init_from:
    path = pathlib.Path(stage.init_from) / WEIGHTS
    check(path.is_file(), f'init_from={stage.init_from}: {path} does not '
          'exist; train that model first or name another directory')
    with open(path, 'rb') as file:
      digest = 'sha256:' + hashlib.file_digest(file, 'sha256').hexdigest()
  return {**dataclasses.asdict(stage), 'init_from': digest}


def stage_batches(stage: Stage, config: LlavaConfig, split: Split,
                  tokenizer: Tokenizer) -> Any:
  """The grain iterator of a stage."""
  rows = stage.rows
  is_voco = stage.recipe.stage == 'voco'
  collate = voco_collate(rows, config) if is_voco else plain_collate(rows)
  transform = row_maker(rows, tokenizer, config, split.features,
                        with_uncompressed=stage.recipe.teacher != 'none')
  return make_dataset(split.examples, transform, seed=stage.recipe.seed,
                      batch_size=stage.recipe.batch_size, collate=collate,
                      prefetch=2)


def run_stage(stage: Stage, workdir: pathlib.Path, split: Split, *,
              message: Message, tensorboard: bool = True,
              settings: dict[str, Any] | None = None
              ) -> tuple[LlavaConfig, dict[str, Any], float]:
  """Trains a stage, or goes on with it, or finds it done.

  Args:
    stage: what to do.
    workdir: of this stage; workdir/model is the result.
    split: training data.
    message: called with lines for the user.
    tensorboard: write event files.
    settings: what the workdir is known by; describe(stage) by default.

  Returns:
    The model's config, its parameters, and seconds of all sittings but killed
    ones.
  """
  tokenizer = tokenizer_for(stage.data, split.examples)
  config = model_config(stage.model, tokenizer)
  learns = stage.recipe.trainable
  check(bool(stage.init_from) or not (
      stage.recipe.teacher == 'frozen' or learns and all(
          prefix.startswith('atp') for prefix in learns)),
        'a frozen teacher or a frozen decoder needs trained weights: set '
        '--config.init_from')
  if not stage.init_from and stage.recipe.stage in ('voco', 'atp'):
    message(f'warning: stage {stage.recipe.stage} starts from random weights; '
            'both methods start from a trained model: --config.init_from')
  claim_workdir(workdir, describe(stage) if settings is None else settings)
  result, clock = workdir / 'model', workdir / 'seconds.txt'
  if (result / 'config.json').exists():  # written last
    return config, load_params(result), float(clock.read_text())
  given = load_params(stage.init_from) if stage.init_from else None
  before = float(clock.read_text()) if clock.exists() else 0.0
  started = time.perf_counter()
  try:
    params = fit(Llava(config, unroll=_unroll(config, stage.recipe.steps)),
                 stage.recipe, stage_batches(stage, config, split, tokenizer),
                 workdir, params=given, tensorboard=tensorboard,
                 message=message)
  finally:
    seconds = before + time.perf_counter() - started
    write_text(clock, f'{seconds:.1f}')
  save_model(result, params, config, tokenizer,
             processor=Processor(stage.rows.template))
  return config, params, seconds


def _unroll(config: LlavaConfig, steps: int) -> int:
  """Layers per scan step: all of them where that pays.

  XLA's CPU backend runs the body of a loop with less parallelism; without
  one, steps of the demo model are faster, but compiling takes longer.
  """
  layers = config.text.num_hidden_layers
  pays = jax.default_backend() == 'cpu' and layers <= 16 and steps >= 50
  return layers if pays else 1
