"""TFDS builder of `openmoji_grid`: emoji on a 3 x 3 grid and questions.

Why a TFDS data set and not pictures made on the fly: the files on disk are
the data set, so two runs, machines or methods are compared on the same
pictures, and any tool that reads TFDS can open them.  Stored as array_record
for random access; neither writing nor reading needs TensorFlow.

The number of pictures and their size are part of the config's name, and so
of the directory: data of another size is never taken by mistake.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow_datasets as tfds

from vlm_compress.config import check
from vlm_compress.data import grids, openmoji

_DESCRIPTION = """
Pictures of four to eight emoji on a 3 x 3 grid, with size variation and
jitter, and questions about them: what is at a place, where is an object, is
there an object, how many, what category, and all nine cells in order.  Each
object has one cell where it stands in test pictures only (held-out pairs).
The emoji are real artwork; layouts and questions are generated.
"""

_CITATION = """
@misc{openmoji,
  title = {OpenMoji: the open-source emoji and icon project},
  author = {{OpenMoji}},
  note = {Licensed CC BY-SA 4.0},
  url = {https://openmoji.org}
}
"""


@dataclasses.dataclass(eq=False)
class OpenmojiGridConfig(tfds.core.BuilderConfig):
  """What is configurable about the data set; make it with `make_config`.

  Attributes:
    image_size: side of a picture in pixels.
    num_train, num_validation, num_test: pictures per split.
    seed: of all layouts.
  """
  image_size: int = 128
  num_train: int = 4000
  num_validation: int = 250
  num_test: int = 500
  seed: int = 0


def make_config(*, image_size: int = 128, num_train: int = 4000,
                num_validation: int = 250, num_test: int = 500,
                seed: int = 0) -> OpenmojiGridConfig:
  """Returns a config whose name holds every setting.

  Raises:
    ConfigError: a split without pictures.
  """
  sizes = {'num_train': num_train, 'num_validation': num_validation,
           'num_test': num_test}
  for field, value in sizes.items():
    check(value > 0, f'openmoji_grid: {field}={value}; use 1 or more pictures')
  check(seed >= 0, f'openmoji_grid: seed={seed}; use 0 or more')
  name = f'px{image_size}_{num_train}_{num_validation}_{num_test}_seed{seed}'
  return OpenmojiGridConfig(
      name=name, image_size=image_size, seed=seed, **sizes,
      description=f'{image_size} px; {num_train}/{num_validation}/{num_test} '
      f'pictures for training/validation/test; seed {seed}.')


class OpenmojiGrid(tfds.core.GeneratorBasedBuilder):
  """Builder of `openmoji_grid`."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First version.'}
  BUILDER_CONFIGS = [make_config()]
  # Nothing is downloaded, so there are no checksums to look for (the search
  # needs importlib_resources, which TFDS 4.9.10 does not install).
  url_infos = None

  def _info(self) -> tfds.core.DatasetInfo:
    size = self.builder_config.image_size
    cells = grids.NUM_CELLS
    return self.dataset_info_from_configs(
        description=_DESCRIPTION,
        citation=_CITATION,
        homepage='https://openmoji.org',
        license=openmoji.ATTRIBUTION,
        features=tfds.features.FeaturesDict({
            'picture_id': tfds.features.Text(),
            'image': tfds.features.Image(shape=(size, size, 3),
                                         encoding_format='png'),
            'caption': tfds.features.Text(),
            'turns': tfds.features.Sequence({
                'question': tfds.features.Text(),
                'answer': tfds.features.Text(),
                'kind': tfds.features.Text(),
                'heldout': np.bool_,
            }),
            'cells': tfds.features.Tensor(shape=(cells,), dtype=np.int32),
            'boxes': tfds.features.Tensor(shape=(cells, 4), dtype=np.int32),
            'heldout': tfds.features.Tensor(shape=(cells,), dtype=np.bool_),
        }),
        metadata=tfds.core.MetadataDict(
            objects=list(openmoji.NAMES),
            categories=[item.category for item in openmoji.OBJECTS],
            cells=list(grids.CELL_NAMES),
            openmoji_version=openmoji.version(),
            attribution=openmoji.ATTRIBUTION),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download: the art is an installed package
    config = self.builder_config
    return {'train': self._generate_examples('train', config.num_train),
            'validation': self._generate_examples('validation',
                                                  config.num_validation),
            'test': self._generate_examples('test', config.num_test)}

  def _generate_examples(self, split: str, count: int):
    for index in range(count):
      grid = grids.make_grid(split, index, seed=self.builder_config.seed,
                             image_size=self.builder_config.image_size)
      yield grid.picture_id, {
          'picture_id': grid.picture_id,
          'image': grid.png(),
          'caption': grid.turns[-1].answer,
          'turns': {
              'question': [turn.question for turn in grid.turns],
              'answer': [turn.answer for turn in grid.turns],
              'kind': [turn.kind for turn in grid.turns],
              'heldout': [turn.heldout for turn in grid.turns],
          },
          'cells': grid.cells,
          'boxes': grid.boxes,
          'heldout': grid.heldout,
      }
