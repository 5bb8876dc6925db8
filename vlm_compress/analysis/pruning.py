"""What compression keeps, over many pictures of a quickstart's result.

The layout of `openmoji_grid` pictures is known, so a visual token can be
called a token of the object that is asked for, of another object, or of the
ground; the functions here say how many of each are kept.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_compress.analysis.capture import keep_maps, kept_statistics
from vlm_compress.api import load
from vlm_compress.config import ConfigError, LlavaConfig, check
from vlm_compress.convert.efficientnet import load_efficientnet_lite0
from vlm_compress.data import grids, images
from vlm_compress.data.examples import Example, Turn
from vlm_compress.data.sources import open_source
from vlm_compress.eval import evaluator, scoring
from vlm_compress.models.efficientnet import extract_features
from vlm_compress.vlm import Vlm

WORKDIR_VARIABLE = 'VLM_COMPRESS_WORKDIR'
DEFAULT_WORKDIR = 'quickstart'
PLACES = ('asked object', 'other objects', 'ground')
_TITLE_WIDTH = 32  # characters that fit beside a picture
_DATA_NAME = re.compile(r'px(\d+)_(\d+)_(\d+)_(\d+)_seed(\d+)')
_DATA_OPTIONS = ('image_size', 'num_train', 'num_validation', 'num_test',
                 'seed')


@dataclasses.dataclass(frozen=True)
class Quickstart:
  """A quickstart's models and some of its test pictures.

  Attributes:
    workdir: where it was read from.
    atp: the ATP model.
    voco: C -> the VoCo model trained with C tokens, largest C first.
    examples: N test pictures with their questions.
    images: N of uint8[S, S, 3].
    features: float32[N, P, Dv], vision features as in training (float16).
    kinds: kinds of questions that the quickstart evaluated.
    attribution: to be shown with the pictures.
  """
  workdir: pathlib.Path
  atp: Vlm
  voco: dict[int, Vlm]
  examples: list[Example]
  images: list[np.ndarray]
  features: np.ndarray
  kinds: tuple[str, ...]
  attribution: str

  @property
  def labels(self) -> list[str]:
    """A name for each pruning module."""
    return module_labels(self.atp.config)


@dataclasses.dataclass(frozen=True)
class Asked:
  """One question and what the ATP model did.

  Attributes:
    image: uint8[S, S, 3].
    turn: question, true answer, kind.
    maps: see `capture.keep_maps`.
  """
  image: np.ndarray
  turn: Turn
  maps: dict[str, Any]

  @property
  def title(self) -> str:
    """Lines: question, answer given, and the true one if it differs."""
    given = self.maps['answer']
    lines = [self.turn.question, given]
    if not scoring.exact_match([given], [self.turn.answer])[0]:
      lines.append(f'not: {self.turn.answer}')
    return '\n'.join(textwrap.shorten(line, _TITLE_WIDTH, placeholder=' ...')
                     for line in lines)


@dataclasses.dataclass(frozen=True)
class Survey:
  """Many questions to the ATP model.

  Attributes:
    questions: Q of them.
    answers: see `evaluator.Answers`.
  """
  questions: list[evaluator.Question]
  answers: evaluator.Answers

  @property
  def counts(self) -> np.ndarray:
    """int[Q, L], tokens kept after each module."""
    return self.answers.module_keep.sum(-1)

  @property
  def kinds(self) -> list[str]:
    """Kind of every question."""
    return [q.turn.kind for q in self.questions]


def open_quickstart(workdir: str | os.PathLike | None = None, *,
                    num_examples: int = 50,
                    options: Mapping[str, Any] | None = None) -> Quickstart:
  """Opens the result of `vlm-compress quickstart`.

  Args:
    workdir: of the quickstart; None takes $VLM_COMPRESS_WORKDIR, or else the
      folder `quickstart` here or one level up.
    num_examples: pictures, from the start of the test split.
    options: of the data set; None finds the one that is in workdir/data.

  Raises:
    ConfigError: something is missing; the message says what and the remedy.
  """
  workdir = _find_workdir(workdir)
  report = workdir / 'report.json'
  remedy = f'run `vlm-compress quickstart --workdir {workdir}` to its end'
  check(report.is_file(), f'{report} does not exist; {remedy}')
  try:
    rows = json.loads(report.read_text(encoding='utf-8'))['rows']
    found = {kind for row in rows for kind in row['by_kind']}
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f'{report} is no report of a quickstart '
                      f'({type(error).__name__}); {remedy}') from error
  kinds = tuple(kind for kind in grids.KINDS if kind in found)
  check(len(kinds) > 0, f'{report} has no questions of openmoji_grid; {remedy}')
  voco = {int(path.name.removeprefix('voco')): load(path / 'model')
          for path in workdir.glob('voco*')
          if path.name.removeprefix('voco').isdigit()}
  check(len(voco) > 0, f'{workdir} has no VoCo model (voco8/model); {remedy}')
  atp = load(workdir / 'atp' / 'model')
  data = workdir / 'data'
  source = open_source('openmoji_grid', data, 'test', options=dict(
      options or _data_options(data / 'openmoji_grid', atp.config, remedy)))
  examples = [source[i] for i in range(min(num_examples, len(source)))]
  pictures = [images.decode(e.images[0], name=e.example_id) for e in examples]
  return Quickstart(
      workdir, atp, dict(sorted(voco.items(), reverse=True)), examples,
      [np.asarray(picture) for picture in pictures],
      _features(pictures, atp.config), kinds, source.metadata['attribution'])


def _find_workdir(workdir: str | os.PathLike | None) -> pathlib.Path:
  given = workdir or os.environ.get(WORKDIR_VARIABLE)
  if given:
    return pathlib.Path(given).expanduser()
  # A notebook runs in its own folder, the quickstart in the one above.
  above = pathlib.Path.cwd().parent / DEFAULT_WORKDIR
  return above if above.is_dir() else pathlib.Path(DEFAULT_WORKDIR)


def _data_options(directory: pathlib.Path, config: LlavaConfig, remedy: str
                  ) -> dict[str, int]:
  """Options of the data set on disk: its directory's name holds them all."""
  found = [match for path in sorted(directory.glob('px*'))
           if (match := _DATA_NAME.fullmatch(path.name))]
  if len(found) > 1:
    found = [m for m in found if int(m[1]) == config.vision.image_size]
  check(len(found) > 0, f'{directory} has no data set; {remedy}')
  check(len(found) == 1, f'{directory} has several data sets for this model; '
        'give open_quickstart the options of one')
  return dict(zip(_DATA_OPTIONS, map(int, found[0].groups()), strict=True))


def _features(pictures: Sequence[Any], config: LlavaConfig) -> np.ndarray:
  """float32[N, P, 112], rounded to float16 as in the features on disk."""
  check(config.vision.model_type == 'efficientnet_lite0',
        f'vision.model_type={config.vision.model_type!r}: a quickstart has '
        'efficientnet_lite0')
  params = load_efficientnet_lite0()
  pixels = np.stack([images.tower_pixels(p, config.vision) for p in pictures])
  features = np.asarray(extract_features(params, pixels))
  return features.astype(np.float16).astype(np.float32)


def module_labels(config: LlavaConfig) -> list[str]:
  """'after layer 2', ... for each pruning module."""
  return [f'after layer {layer}' for layer in config.atp.prune_after]


def ask(results: Quickstart, count: int = 6, kind: str | None = None
        ) -> list[Asked]:
  """One question about each of the first pictures.

  Args:
    results: of a quickstart.
    count: pictures.
    kind: of the questions; None takes the first kind that was evaluated.
  """
  kind = kind or results.kinds[0]
  questions = evaluator.questions_of(results.examples[:count], {kind: 1})
  return [_asked(results, q.example, q.turn) for q in questions]


def ask_one_picture(results: Quickstart, example: int = 0, count: int = 5,
                    kind: str | None = None) -> list[Asked]:
  """Several questions about the same picture; arguments as in `ask`."""
  kind = kind or results.kinds[0]
  turns = [t for t in results.examples[example].turns if t.kind == kind]
  return [_asked(results, example, turn) for turn in turns[:count]]


def _asked(results: Quickstart, example: int, turn: Turn) -> Asked:
  return Asked(results.images[example], turn, keep_maps(
      results.atp, results.examples[example], results.features[example],
      turn.question))


def survey(results: Quickstart, per_kind: int = 2) -> Survey:
  """Asks the ATP model several questions of each kind about every picture.

  Args:
    results: of a quickstart.
    per_kind: questions per picture and kind, held-out ones first.
  """
  questions = evaluator.questions_of(
      results.examples, {kind: per_kind for kind in results.kinds})
  method = evaluator.Method('ATP', results.atp.config, results.atp.params)
  return Survey(questions, evaluator.answer(
      method, results.examples, results.features, questions,
      results.atp.tokenizer, progress=False))


def statistics_table(found: Survey, labels: Sequence[str]) -> str:
  """Kept tokens and thresholds after each module, as aligned text."""
  stats = kept_statistics(found.answers)
  columns = ('mean', 'std', 'min', 'p50', 'p90', 'p99', 'max')
  lines = [f'{"kept tokens":16}' + ''.join(f'{c:>8}' for c in columns) +
           f'{"θr":>8}{"θs":>8}']
  for module, label in enumerate(labels):
    numbers = [stats[c][module] for c in columns]
    lines.append(f'{label:16}' + ''.join(f'{n:8.1f}' for n in numbers) +
                 ''.join(f'{t:8.3f}' for t in stats['theta_mean'][module]))
  average = stats['layer_average']
  lines.append(f'layer average {average.mean():.1f} ± {average.std():.1f} '
               f'tokens over {len(average)} questions')
  return '\n'.join(lines)


def entering(found: Survey) -> tuple[np.ndarray, np.ndarray]:
  """Visual tokens that enter each layer: mean and std over questions."""
  stats = kept_statistics(found.answers)
  return stats['entering_mean'], stats['entering_std']


def places(example: Example, question: str, image_size: int, grid_size: int
           ) -> dict[str, np.ndarray]:
  """Which visual tokens show what.

  A token belongs to an object if its patch touches the object's box.

  Args:
    example: of openmoji_grid.
    question: if it names a cell ('what', 'category') or an object that
      stands in one cell ('where'), that object is the asked one.
    image_size: side of the picture, in pixels.
    grid_size: visual tokens per side.

  Returns:
    PLACES -> bool[g, g]; every token is in exactly one of them.
  """
  edges = np.arange(grid_size + 1) * image_size / grid_size
  touched = np.zeros((grids.NUM_CELLS, grid_size, grid_size), bool)
  for cell, (left, top, right, bottom) in enumerate(
      example.metadata['boxes']):
    columns = (edges[:-1] < right) & (edges[1:] > left)
    rows = (edges[:-1] < bottom) & (edges[1:] > top)
    touched[cell] = rows[:, None] & columns[None, :] & (right > left)
  asked = np.zeros_like(touched[0])
  for cell in _asked_cells(np.asarray(example.metadata['cells']), question):
    asked |= touched[cell]
  any_object = touched.any(0)
  return dict(zip(PLACES, (asked, any_object & ~asked, ~any_object),
                  strict=True))


def _asked_cells(cells: np.ndarray, question: str) -> list[int]:
  """The cell that a question is about, as a list of one or none."""
  for cell in np.flatnonzero(cells != grids.EMPTY):
    subjects = {'what': cell, 'category': cell, 'where': cells[cell]}
    if question in {grids.question(k, v) for k, v in subjects.items()}:
      return [int(cell)]
  return []


def kept_by_place(results: Quickstart, found: Survey
                  ) -> dict[str, np.ndarray]:
  """Share of the tokens of each place that enter each layer.

  Args:
    results: of a quickstart.
    found: of `survey`; questions that name no object count for the others.

  Returns:
    place -> float[M] in 0..1; places that never occur are left out.
  """
  config = results.atp.config
  g, P = config.vision.grid_size, config.num_visual_tokens
  keep = found.answers.module_keep
  kept, total = {}, {}
  for number, question in enumerate(found.questions):
    example = results.examples[question.example]
    side = results.images[question.example].shape[0]
    layers = _per_layer(keep[number], config)
    for name, place in places(example, question.turn.question, side,
                              g).items():
      inside = layers.reshape(-1, P)[:, place.ravel()].sum(1)
      kept[name] = kept.get(name, 0) + inside
      total[name] = total.get(name, 0) + place.sum()
  return {name: kept[name] / total[name] for name in PLACES
          if total.get(name, 0) > 0}


def _per_layer(keep: np.ndarray, config: LlavaConfig) -> np.ndarray:
  """bool[L, P] after each module -> bool[M, P] entering each layer."""
  out = np.ones((config.text.num_hidden_layers, keep.shape[1]), bool)
  for module, layer in enumerate(config.atp.prune_after):
    out[layer:] = keep[module]
  return out
