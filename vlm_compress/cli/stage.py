"""One training stage: the bridge from a ConfigDict, and running it."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlm_compress import remote
from vlm_compress.atomic import write_text
from vlm_compress.cli.claims import claim_together
from vlm_compress.cli.start_weights import Digests, content_digest
from vlm_compress.cli.together import agreed, appears, first_alone
from vlm_compress.cli.workspace import (
  DataSpec,
  Message,
  Split,
  check_tower,
  model_config,
  tokenizer_for,
)
from vlm_compress.config import ConfigError, LlavaConfig, VisionConfig, check
from vlm_compress.config_values import from_dict
from vlm_compress.convert.files import CONFIG, WEIGHTS, load_config, load_params, save_model
from vlm_compress.convert.lora import merge
from vlm_compress.convert.processor import Processor
from vlm_compress.data.buckets import Schedule, padding, plain_padding
from vlm_compress.data.input_pipeline import make_bucketed, make_dataset
from vlm_compress.data.lengths import row_lengths
from vlm_compress.data.prepared import PreparedSource
from vlm_compress.data.rows import RowSpec, plain_collate, row_maker, voco_collate
from vlm_compress.data.tokenizer import Tokenizer
from vlm_compress.models.llava import Llava
from vlm_compress.sharding import MeshSpec, make_mesh
from vlm_compress.train.loop import check_mesh, data_share, fit
from vlm_compress.train.recipe import Recipe
from vlm_compress.train.shapes import reads_pixels
from vlm_compress.train.space import check_space
from vlm_compress.train.state import Given

_MEASURED_HERE = 5000  # rows; for fewer of them no processes are started
SECTIONS = ('model', 'data', 'rows', 'train', 'eval', 'init_from')
OPTIONAL = ('mesh',)


@dataclasses.dataclass(frozen=True)
class Stage:
  """A training stage as frozen dataclasses.

  Attributes:
    model: fields of LlavaConfig, without the vocabulary size.
    data, rows, recipe: what to train on, and how.
    per_kind: evaluation, questions per picture and kind.
    num_test: evaluation, pictures.
    headline: kinds whose questions make the accuracy of a result row.
    init_from: a model directory, local or gs://, or '' to start fresh.
    mesh: devices; a run may go on with others.
  """
  model: dict[str, Any]
  data: DataSpec
  rows: RowSpec
  recipe: Recipe
  per_kind: dict[str, int]
  num_test: int
  headline: tuple[str, ...]
  init_from: str
  mesh: MeshSpec = MeshSpec()


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
  unknown = sorted(set(values) - {*SECTIONS, *OPTIONAL})
  check(not unknown, f'unknown config section(s) {unknown}; known: '
        f'{(*SECTIONS, *OPTIONAL)}')
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
        headline=tuple(ev['headline']), init_from=values['init_from'],
        mesh=_dataclass(MeshSpec, values.get('mesh', {}), 'mesh'))
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
  vision = vision_of(stage)
  check_tower(stage.data, vision, 'config.model', pixels=True)
  check(reads_pixels(vision) or stage.rows.image_aspect_ratio == 'pad',
        'config.rows.image_aspect_ratio: frozen features are of padded '
        'pictures; use "pad"')
  return stage


def vision_of(stage: Stage) -> VisionConfig:
  """The tower of the stage's model."""
  return from_dict(stage.model.get('vision', {}), VisionConfig)


def _check_voco_rows(stage: Stage) -> None:
  """Rows must not carry VoCo tokens that the model has no embedding for."""
  most = max(stage.rows.num_voco_tokens, default=0)
  voco = stage.model.get('voco')
  have = 0 if voco is None else voco.get('num_voco_tokens', 1)
  check(most <= have, f'config.rows.num_voco_tokens='
        f'{stage.rows.num_voco_tokens} is more than the '
        f'{have} of config.model.voco; set both')


def describe(stage: Stage, digest: Callable[[remote.Path], str] = content_digest
             ) -> dict[str, Any]:
  """A stage as plain types, for config.json.

  The weights that it starts from are named by their content: a workdir may
  move, but must not go on from other weights.

  Args:
    stage: what to do.
    digest: of a file's content.

  Raises:
    ConfigError: init_from holds no weights.
  """
  weights = ''
  if stage.init_from:
    path = remote.to_path(stage.init_from) / WEIGHTS
    check(remote.exists(path), f'init_from={stage.init_from}: {path} does not '
          'exist; train that model first or name another directory')
    weights = digest(path)
  values = {**dataclasses.asdict(stage), 'init_from': weights}
  del values['mesh']
  return values


def stage_batches(stage: Stage, config: LlavaConfig, split: Split,
                  tokenizer: Tokenizer, message: Message | None = None,
                  share: tuple[int, int] = (0, 1)) -> Any:
  """The iterator of a stage: this process's part of every batch.

  Args:
    stage: what to do.
    config: of the model.
    split: training data.
    tokenizer: of the model.
    message: called with lines for the user; None prints nothing.
    share: which part of how many, see `data_share`.

  Raises:
    ConfigError: the batch is too large.
    DataError: a row cannot be made.
  """
  rows = stage.rows
  if split.features is None:
    _check_pictures(split.examples, rows.max_images, message or (lambda line: None))
  is_voco = stage.recipe.stage == 'voco'
  collate = voco_collate(rows, config) if is_voco else plain_collate(rows)
  transform = row_maker(rows, tokenizer, config, split.features,
                        with_uncompressed=stage.recipe.teacher != 'none')
  # Pictures are decoded in threads; features and text take no time.
  threads = 0 if split.features is not None else min(16, os.cpu_count() or 1)
  shared = dict(collate=collate, prefetch=2, num_threads=threads,
                process_index=share[0], process_count=share[1])
  if rows.bucket_lengths:
    return make_bucketed(
        split.examples, transform,
        _schedule(stage, config, split, tokenizer, message), **shared)
  return make_dataset(split.examples, transform, seed=stage.recipe.seed,
                      batch_size=stage.recipe.batch_size // share[1],
                      fingerprint=split.fingerprint, **shared)


def _check_pictures(source: Any, max_images: int, say: Message) -> None:
  """Whether all rows' pictures have place, where that is known without reading
  the rows.

  Raises:
    ConfigError: a row has more.
  """
  if not hasattr(source, 'most_pictures'):
    return
  most, exact = source.most_pictures()
  check(most <= max_images, f'a row of {source!r} has {"" if exact else "at least "}'
        f'{most} pictures, more than rows.max_images={max_images}; raise it, or '
        'prepare a file without such rows')
  if not exact:
    say(f'warning: rows have several pictures, and only when one with more than '
        f'rows.max_images={max_images} is drawn will it be found: the data were '
        'prepared by an older version; prepare-data with the same arguments adds '
        'what says so')


def _schedule(stage: Stage, config: LlavaConfig, split: Split,
              tokenizer: Tokenizer, message: Message | None) -> Schedule:
  """Which batch has which rows; says what is left out, and the padding."""
  say = message or (lambda line: None)
  recipe, source = stage.recipe, split.examples
  many = isinstance(source, PreparedSource) and len(source) > _MEASURED_HERE
  waits = {} if jax.process_index() == 0 else {'wait_for': appears}
  measured = first_alone('the rows are measured', lambda: row_lengths(
      source, stage.rows, tokenizer, config, cache_dir=split.lengths,
      frozen=split.features is not None, fingerprint=split.fingerprint,
      workers=min(16, os.cpu_count() or 1) if many else 1, message=say, **waits))
  has_image, records = measured.images > 0, np.arange(len(measured))
  if recipe.stage == 'voco' and not has_image.all():
    say(f'{int((~has_image).sum())} rows without a picture are left out: they '
        'teach no compression')
    records = np.flatnonzero(has_image)
  lengths, buckets = measured.tokens[records], stage.rows.bucket_lengths
  schedule = Schedule(
      lengths, has_image[records], bucket_lengths=buckets,
      batch_size=recipe.batch_size, seed=recipe.seed,
      fingerprint=split.fingerprint, records=records)
  first = schedule.plan(0)
  say(f'{len(records)} rows, {len(first)} batches an epoch (leaves out '
      f'{len(records) - first.rows.size} rows, which fill no batch of their '
      f'kind); padding is {padding(lengths, first).waste:.0%} of the tokens, '
      f'{plain_padding(lengths, first, buckets[-1]).waste:.0%} if all batches '
      f'had {buckets[-1]}; {int((lengths > buckets[-1]).sum())} rows are cut')
  return schedule


def run_stage(stage: Stage, workdir: remote.Path, split: Split, *,
              message: Message, tensorboard: bool = True,
              settings: dict[str, Any] | None = None,
              allow_change: bool = False,
              profile_steps: tuple[int, int] | None = None
              ) -> tuple[LlavaConfig, float]:
  """Trains a stage, or goes on with it, or finds it done.

  The model is left on the disk: no host needs to have it whole.

  Args:
    stage: what to do.
    workdir: of this stage, on a disk or on gs:// as remote.to_path gives it;
      workdir/model is the result.
    split: training data.
    message: called with lines for the user.
    tensorboard: write event files.
    settings: what the workdir is known by; describe(stage) by default.
    allow_change: go on although they are others.
    profile_steps: see `fit`.

  Returns:
    The model's config, and seconds of all sittings but killed ones.
  """
  tokenizer = tokenizer_for(stage.data, split.examples)
  config = model_config(stage.model, tokenizer)
  _check_start(stage, config, message)
  mesh = make_mesh(**dataclasses.asdict(stage.mesh))
  check_mesh(config, stage.recipe, mesh)
  digests = Digests(workdir)
  claim_together(
      workdir, lambda: describe(stage, digests) if settings is None else settings,
      split.fingerprint, allow_change, message)
  digests.save()
  result, clock = workdir / 'model', workdir / 'seconds.txt'
  before = float(clock.read_text()) if clock.exists() else 0.0
  if agreed((result / CONFIG).exists()):  # written last
    return config, before
  model = Llava(config, unroll=_unroll(config, stage.recipe.steps))
  if jax.process_index() == 0:  # the one that writes the model
    check_space(workdir, model, stage.recipe, mesh, reads_pixels(config.vision))
  given = _given(stage.init_from, config, message)
  started = time.perf_counter()
  try:
    params = fit(model, stage.recipe, stage_batches(
                     stage, config, split, tokenizer, message, data_share(
                         mesh, stage.recipe.batch_size)),
                 workdir, params=given, mesh=mesh, tensorboard=tensorboard,
                 message=message, profile_steps=profile_steps,
                 with_vision=reads_pixels(config.vision))
  finally:
    seconds = before + time.perf_counter() - started
    if jax.process_index() == 0:
      write_text(clock, f'{seconds:.1f}')
  _save(result, params, config, tokenizer, stage.rows)
  return config, seconds


def _check_start(stage: Stage, config: LlavaConfig, message: Message) -> None:
  """Whether what stays as it is has been trained.

  Raises:
    ConfigError: it would stay random.
  """
  learns = stage.recipe.trainable
  check(bool(stage.init_from) or not (
      stage.recipe.teacher == 'frozen' or config.lora is not None or
      learns and all(prefix.startswith('atp') for prefix in learns)),
        'a frozen teacher or a frozen decoder (as with lora) needs trained '
        'weights: set --config.init_from')
  if not stage.init_from and stage.recipe.stage in ('voco', 'atp'):
    message(f'warning: stage {stage.recipe.stage} starts from random weights; '
            'both methods start from a trained model: --config.init_from')


def _save(result: remote.Path, params: dict[str, Any], config: LlavaConfig,
          tokenizer: Tokenizer, rows: RowSpec) -> None:
  """Writes the model; every host sees it then, as far as the disk allows.

  The scripts of launch/ ask on every host whether it is there.
  """
  save_model(result, params, config, tokenizer,
             processor=Processor(rows.template, rows.image_aspect_ratio))
  multihost_utils.sync_global_devices('the model is saved')
  appears(result / CONFIG)


def _given(init_from: str, config: LlavaConfig, message: Message) -> Given:
  """Reads the parameters of init_from onto a mesh; None without it.

  Adapters of another shape, scale or place than the stage's are merged: what
  training starts from is the same model.
  """
  if not init_from:
    return None

  def read(mesh: Mesh) -> dict[str, Any]:
    with remote.local_copy(init_from, (WEIGHTS, CONFIG)) as folder:
      params, source = load_params(folder, mesh), load_config(folder)
    if source.lora not in (None, config.lora):
      message(f'LoRA adapters of {init_from} are merged into its weights')
      params, _ = merge(params, source)
    return params
  return read


def _unroll(config: LlavaConfig, steps: int) -> int:
  """Layers per scan step: all of them where that pays.

  XLA's CPU backend runs the body of a loop with less parallelism; without
  one, steps of the demo model are faster, but compiling takes longer.
  """
  layers = config.text.num_hidden_layers
  pays = jax.default_backend() == 'cpu' and layers <= 16 and steps >= 50
  return layers if pays else 1
