"""TFDS builder of `easy_vqa`: a published VQA set with an official split.

The data lie complete in the PyPI package easy-vqa (MIT): 4,000 + 1,000
pictures of one coloured shape, 38,575 + 9,673 questions, 13 answers.  All
questions about one picture make one example.  A model that never sees the
picture already answers two thirds of the test questions (most are yes/no
with a guessable answer), so that floor belongs beside every figure.
"""

from __future__ import annotations

import collections
import importlib
import json
import os

import numpy as np
import tensorflow_datasets as tfds

from vlm_compress.config import ConfigError

_DESCRIPTION = """
easy-VQA: pictures (64 px) of one coloured shape, and simple questions about
its shape and colour.  Official split into train and test.  Kinds of question:
yesno (the answer is yes or no) and open (a shape or a colour).
"""

_CITATION = """
@misc{zhou2019easyvqa,
  title = {easy-VQA: an easy dataset for visual question answering},
  author = {Victor Zhou},
  year = {2019},
  url = {https://github.com/vzhou842/easy-VQA}
}
"""

_IMAGE_SIZE = 64


def package_dir() -> str:
  """Returns the directory of the data inside the package easy-vqa.

  Raises:
    ConfigError: the package is not installed.
  """
  try:
    package = importlib.import_module('easy_vqa')
  except ImportError as error:
    raise ConfigError('the data set easy_vqa needs the package easy-vqa: '
                      "pip install -e '.[demo]'") from error
  return os.path.join(os.path.dirname(os.path.abspath(package.__file__)),
                      'data')


class EasyVqa(tfds.core.GeneratorBasedBuilder):
  """Builder of `easy_vqa`."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'The data of the package easy-vqa 1.0.'}
  # Nothing is downloaded, so there are no checksums to look for (the search
  # needs importlib_resources, which TFDS 4.9.10 does not install).
  url_infos = None

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
        description=_DESCRIPTION,
        citation=_CITATION,
        homepage='https://github.com/vzhou842/easy-VQA',
        license='MIT',
        features=tfds.features.FeaturesDict({
            'picture_id': tfds.features.Text(),
            'image': tfds.features.Image(
                shape=(_IMAGE_SIZE, _IMAGE_SIZE, 3), encoding_format='png'),
            'turns': tfds.features.Sequence({
                'question': tfds.features.Text(),
                'answer': tfds.features.Text(),
                'kind': tfds.features.Text(),
                'heldout': np.bool_,
            }),
        }),
        metadata=tfds.core.MetadataDict(
            attribution='Pictures and questions: easy-VQA by Victor Zhou '
            '(https://github.com/vzhou842/easy-VQA), MIT license.'),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download: the data are an installed package
    return {split: self._generate_examples(os.path.join(package_dir(), split))
            for split in ('train', 'test')}

  def _generate_examples(self, directory: str):
    with open(os.path.join(directory, 'questions.json')) as stream:
      questions = json.load(stream)
    by_picture = collections.defaultdict(list)
    for text, answer, picture in questions:
      by_picture[picture].append((text, answer))
    split = os.path.basename(directory)
    for picture, pairs in sorted(by_picture.items()):
      path = os.path.join(directory, 'images', f'{picture}.png')
      with open(path, 'rb') as stream:
        image = stream.read()
      picture_id = f'{split}-{picture:06d}'
      yield picture_id, {
          'picture_id': picture_id,
          'image': image,
          'turns': {
              'question': [text for text, _ in pairs],
              'answer': [answer for _, answer in pairs],
              'kind': ['yesno' if answer in ('yes', 'no') else 'open'
                       for _, answer in pairs],
              'heldout': [False] * len(pairs),
          },
      }
