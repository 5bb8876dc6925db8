"""What a record of a prepared data set holds, and both ways to and from it.

A record is a `tf.train.Example` with the features of `features()`, so that
TFDS reads it, too.  Pictures are the bytes of their files, unchanged: nothing
is decoded and encoded again, and rows may have none, one or several.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vlm_compress.data.errors import DataError
from vlm_compress.data.examples import Example, Turn
from vlm_compress.data.llava_json import LlavaRow


def features():
  """TFDS's description of a record.

  Returns:
    A FeaturesDict: id (text), row (place in the source file, from 0), images
    (bytes of picture files), image_names (their paths in the source), turns
    (question and answer), extra (JSON of the row's other fields and its id).
  """
  import numpy as np
  import tensorflow_datasets as tfds
  text = tfds.features.Text()
  return tfds.features.FeaturesDict({
      'id': text, 'row': np.int64, 'extra': text,
      # Not Text: it is no text; not Image: TFDS would decode what it can.
      'images': tfds.features.Sequence(
          tfds.features.Tensor(shape=(), dtype=np.object_)),
      'image_names': tfds.features.Sequence(text),
      'turns': tfds.features.Sequence({'question': text, 'answer': text})})


def to_record(row: LlavaRow, images: Sequence[bytes]) -> bytes:
  """The record of a row.

  Args:
    row: a checked row.
    images: bytes of its pictures.

  Returns:
    A serialised tf.train.Example; the same bytes for the same arguments.

  Raises:
    DataError: a text holds half characters, which UTF-8 cannot write.
  """
  from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2
  texts = {'id': [str(row.row_id)],
           'extra': [json.dumps({**row.extra, 'id': row.row_id})],
           'image_names': row.names,
           'turns/question': [t.question for t in row.turns],
           'turns/answer': [t.answer for t in row.turns]}
  example = tf_example_pb2.Example()
  feature = example.features.feature
  try:
    for name, values in texts.items():
      feature[name].CopyFrom(tf_feature_pb2.Feature(
          bytes_list=tf_feature_pb2.BytesList(
              value=[v.encode('utf-8') for v in values])))
  except UnicodeEncodeError as e:
    raise DataError(f'a text holds characters that are no UTF-8 '
                    f'({e.object[e.start:e.end]!r}); correct it') from e
  feature['images'].CopyFrom(tf_feature_pb2.Feature(
      bytes_list=tf_feature_pb2.BytesList(value=images)))
  feature['row'].CopyFrom(tf_feature_pb2.Feature(
      int64_list=tf_feature_pb2.Int64List(value=[row.index])))
  # A map has no order of its own; shards are compared by their sums.
  return example.SerializeToString(deterministic=True)


def to_example(record: bytes) -> Example:
  """The Example of a record, the same as `LlavaJson` gives for the row."""
  from tensorflow_datasets.proto import tf_example_pb2
  feature = tf_example_pb2.Example.FromString(record).features.feature
  texts = lambda name: [v.decode('utf-8')
                        for v in feature[name].bytes_list.value]
  extra: dict[str, Any] = json.loads(texts('extra')[0])
  row_id = extra.pop('id')
  turns = tuple(Turn(question, answer) for question, answer in zip(
      texts('turns/question'), texts('turns/answer'), strict=True))
  metadata = {**extra, 'id': row_id, 'row': feature['row'].int64_list.value[0],
              'image': texts('image_names')}
  return Example(example_id=texts('id')[0], turns=turns,
                 images=tuple(feature['images'].bytes_list.value),
                 metadata=metadata)
