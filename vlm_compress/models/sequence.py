"""Rows of text, visual and VoCo tokens as data.

What a token is, where it stands and who may see it is decided here, once, on
the host.  The model receives arrays and never recomputes an offset, which is
what goes wrong in the released VoCo code (decoding drifts, mixed batches are
misaligned, truncation breaks).
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import numpy as np

from vlm_compress.config import LlavaConfig, check

PAD, TEXT, VISUAL, VOCO = 0, 1, 2, 3
PREFIX = -1  # image_id of BOS in a row with VoCo tokens: shared by all images


@flax.struct.dataclass
class Batch:
  """A batch of rows; T tokens, I images of P' patch features each.

  Attributes:
    input_ids: int32[B, T], 0 where the token is not text.
    token_types: int32[B, T], PAD, TEXT, VISUAL or VOCO.
    positions: int32[B, T], for rotary embedding and learned by nothing else.
    read_positions: int32[B, T], position at which text reads a token's key;
      differs from positions only for the VoCo tokens of the second and later
      images, whose compression does not depend on where they stand.
    image_ids: int32[B, T], i >= 1 in the compression segment of image i
      (visual tokens, newline, VoCo tokens), 0 for text, PREFIX for BOS of a
      row with VoCo tokens.
    visual_slots: int32[B, T], which of the row's I * P visual tokens, or -1.
    voco_slots: int32[B, T], which of the image's VoCo tokens, or -1.
    turn_ids: int32[B, T], 0 seen by all, t >= 1 sees 0 and itself; None where
      all of a row see each other.
    prompt_mask: bool[B, T], text that exists at prefill and follows an image.
    loss_mask: bool[B, T], the token is a training target.
    features: float[B, I, P', Dv], frozen vision features; or, on the way from
      the data to the tower, uint8[B, I, S, S, 3] pixels.
    image_valid: bool[B, I].
    records: int32[B], number of each row's record in the data set, or None.
  """
  input_ids: np.ndarray
  token_types: np.ndarray
  positions: np.ndarray
  read_positions: np.ndarray
  image_ids: np.ndarray
  visual_slots: np.ndarray
  voco_slots: np.ndarray
  turn_ids: np.ndarray | None
  prompt_mask: np.ndarray
  loss_mask: np.ndarray
  features: np.ndarray
  image_valid: np.ndarray
  records: np.ndarray | None = None

  @property
  def valid(self):
    """bool[B, T], False for padding."""
    return self.token_types != PAD


ROW_FIELDS = ('input_ids', 'token_types', 'positions', 'read_positions',
              'image_ids', 'visual_slots', 'voco_slots', 'turn_ids',
              'prompt_mask', 'loss_mask')
_PAD_VALUES = {'visual_slots': -1, 'voco_slots': -1, 'prompt_mask': False,
               'loss_mask': False}


class _RowBuilder:
  """Appends tokens to a row and knows where the next one stands."""

  def __init__(self, has_voco: bool):
    self.out: dict[str, list] = {name: [] for name in ROW_FIELDS}
    self.has_voco = has_voco
    self.position = 0  # running position
    self.image = self.voco = self.turn = self.turn_start = 0
    self.segment_position = 0  # own position in a later image's segment

  def start_turn(self, turn: int) -> None:
    """Turns start over where the shared tokens end."""
    if turn != self.turn:
      check(turn != 0, 'turn_ids: shared tokens must come first')
      if self.turn == 0:
        self.turn_start = self.position
      self.turn, self.position = turn, self.turn_start

  def start_image(self) -> None:
    """A later segment restarts behind BOS."""
    self.image += 1
    self.voco, self.segment_position = 0, 1

  def put(self, kind: int, *, token: int = 0, visual: int = -1,
          voco: int = -1, image_id: int = 0, loss: bool = False) -> None:
    """Appends one token."""
    restarted = image_id > 1 and self.has_voco
    own = self.segment_position if restarted else self.position
    in_text = kind == TEXT and image_id == 0
    values = {
        'input_ids': token, 'token_types': kind, 'positions': own,
        'read_positions': self.position if kind == VOCO else own,
        'image_ids': image_id, 'visual_slots': visual, 'voco_slots': voco,
        'turn_ids': self.turn, 'loss_mask': loss,
        'prompt_mask': in_text and self.image > 0 and not loss}
    for name, value in values.items():
      self.out[name].append(value)
    self.segment_position += restarted
    self.position += not restarted or kind == VOCO


def expand_row(input_ids: Sequence[int], loss_mask: Sequence[bool],
               turn_ids: Sequence[int], config: LlavaConfig
               ) -> dict[str, np.ndarray]:
  """Expands placeholders and gives every token its place.

  A row holds text ids, config.image_token_index for a whole image and
  config.voco_token_index for one VoCo token.  With VoCo tokens, an image, the
  newline behind it and its VoCo tokens form a compression segment.  Running
  positions count every token of the first segment; a later segment restarts
  behind BOS and takes only its VoCo tokens from the running count, at their
  read positions.  Turns start over where the shared tokens end.

  Args:
    input_ids, loss_mask, turn_ids: of one row, unexpanded.
    config: gives P and the placeholder ids.

  Returns:
    The fields of ROW_FIELDS, each [T].

  Raises:
    ConfigError: VoCo tokens without an image, or a row longer than
      max_position_embeddings.
  """
  num_visual = config.num_visual_tokens
  has_voco = config.voco_token_index in input_ids
  segments = _segment_ends(input_ids, config) if has_voco else {}
  row = _RowBuilder(has_voco)
  for index, (token, loss, turn) in enumerate(
      zip(input_ids, loss_mask, turn_ids, strict=True)):
    row.start_turn(turn)
    if token == config.image_token_index:
      row.start_image()
      start = (row.image - 1) * num_visual
      # Without VoCo tokens there is no segment, but the id tells images apart.
      for slot in range(num_visual):
        row.put(VISUAL, visual=start + slot, image_id=row.image)
    elif token == config.voco_token_index:
      row.put(VOCO, voco=row.voco, image_id=row.image)
      row.voco += 1
    elif index == 0 and has_voco:
      row.put(TEXT, token=token, image_id=PREFIX)
    else:
      in_segment = any(s < index <= e for s, e in segments.items())
      row.put(TEXT, token=token, loss=bool(loss),
              image_id=row.image if in_segment else 0)
  longest = max(row.out['positions'], default=0)
  limit = config.text.max_position_embeddings
  check(longest < limit,
        f'a row needs {longest + 1} positions, but text.max_position_'
        f'embeddings={limit}; shorten the prompt or compress the images')
  return {name: np.asarray(values, bool if 'mask' in name else np.int32)
          for name, values in row.out.items()}


def _segment_ends(input_ids: Sequence[int], config: LlavaConfig
                  ) -> dict[int, int]:
  """Index of each image placeholder -> index of its last VoCo token."""
  ends: dict[int, int] = {}
  start = None
  for index, token in enumerate(input_ids):
    if token == config.image_token_index:
      check(start is None or start in ends,
            'a row has VoCo tokens, but not for every image')
      check(ends or index == 1, 'with VoCo tokens the first image stands '
            'directly behind BOS: a compressed image knows no text')
      start = index
    elif token == config.voco_token_index:
      check(start is not None, 'VoCo tokens stand before the first image')
      ends[start] = index
  check(start is None or start in ends,
        'a row has VoCo tokens, but not for every image')
  return ends


def make_batch(rows: Sequence[dict[str, np.ndarray]],
               features: Sequence[np.ndarray], *, length: int,
               num_images: int, pad_left: bool = False,
               truncate: bool = False) -> Batch:
  """Pads rows to a static shape.

  Args:
    rows: from `expand_row`.
    features: per row float[number of its images, P', Dv], or pixels
      uint8[number of its images, S, S, 3], which stay uint8.
    length: T.
    num_images: I.
    pad_left: padding in front instead of behind; no result depends on it.
    truncate: cut longer rows at the end (training) instead of raising.

  Returns:
    A Batch of numpy arrays.

  Raises:
    ConfigError: a row or its images do not fit, or the counts differ.
  """
  out = {name: np.full((len(rows), length), _PAD_VALUES.get(name, 0),
                       bool if 'mask' in name else np.int32)
         for name in ROW_FIELDS}
  for b, row in enumerate(rows):
    size = len(row['input_ids'])
    check(size <= length or truncate,
          f'row {b} has {size} tokens, but batches have {length}; raise the '
          'length or shorten the row')
    size = min(size, length)
    span = slice(length - size, length) if pad_left else slice(0, size)
    for name in ROW_FIELDS:
      out[name][b, span] = row[name][:size]
    placeholders = len(set(row['image_ids'][row['token_types'] == VISUAL]))
    check(placeholders <= len(features[b]),
          f'row {b} has {placeholders} image placeholder(s), but '
          f'{len(features[b])} image(s)')
  pixels, image_valid = _stack_images(features, num_images)
  return Batch(features=pixels, image_valid=image_valid, **out)


def _stack_images(features: Sequence[np.ndarray], num_images: int
                  ) -> tuple[np.ndarray, np.ndarray]:
  """Pads the images of each row to I; returns [B, I, ...] and bool[B, I]."""
  shape = next((f.shape[1:] for f in features if len(f)), None)
  check(shape is not None or num_images == 0 or features[0].ndim > 1,
        'a batch without images needs features of shape [0, P, Dv] or '
        '[0, S, S, 3]')
  shape = shape if shape is not None else features[0].shape[1:]
  pixels = all(f.dtype == np.uint8 for f in features)
  out = np.zeros((len(features), num_images, *shape),
                 np.uint8 if pixels else np.float32)
  valid = np.zeros((len(features), num_images), bool)
  for b, f in enumerate(features):
    check(len(f) <= num_images, f'row {b} has {len(f)} images, but batches '
          f'have {num_images}')
    out[b, :len(f)] = f
    valid[b, :len(f)] = True
  return out, valid


@flax.struct.dataclass
class VocoBatch:
  """The same rows for the two-pass form of VoCo (ours, exact).

  Attributes:
    text: the rows without their compression segments; [B, Tt].
    segment_ids: S1 token ids of every segment: BOS, P visual, newline, C VoCo
      (0 where the token is not text); static, so that shapes follow from it.
    voco_positions: int32[B, I, C], read positions of the VoCo tokens.
  """
  text: Batch
  voco_positions: np.ndarray
  segment_ids: tuple[int, ...] = flax.struct.field(pytree_node=False)


def split_voco(batch: Batch, config: LlavaConfig, text_length: int
               ) -> VocoBatch:
  """Separates compression segments from text.

  Args:
    batch: rows of a VoCo layout; text-only rows are allowed.
    config: gives P.
    text_length: Tt, static length of the text rows.

  Returns:
    A VocoBatch of numpy arrays.  The features stay with the text batch.

  Raises:
    ConfigError: images of the batch differ in their number of VoCo tokens or
      in the text tokens of their segments.
  """
  num_rows, num_images = batch.image_valid.shape
  is_text = (batch.image_ids == 0) & (batch.token_types == TEXT)
  check(int(is_text.sum(1).max(initial=0)) <= text_length,
        f'a row has {int(is_text.sum(1).max(initial=0))} text tokens, but '
        f'text_length={text_length}')
  fields = {name: np.full((num_rows, text_length), _PAD_VALUES.get(name, 0),
                          bool if 'mask' in name else np.int32)
            for name in ROW_FIELDS if getattr(batch, name) is not None}
  for b in range(num_rows):
    index = np.flatnonzero(is_text[b])
    for name in fields:
      fields[name][b, :len(index)] = getattr(batch, name)[b, index]
  check(not fields['loss_mask'][:, :1].any(), 'a target stands directly '
        'behind VoCo tokens; put a newline between, which predicts it')
  segments, positions = [], {}
  for b in range(num_rows):
    for i in range(1, num_images + 1):
      members = batch.image_ids[b] == i
      if not members.any():
        continue
      prefix = batch.image_ids[b] == PREFIX
      segments.append(batch.input_ids[b, prefix | members])
      voco = members & (batch.token_types[b] == VOCO)
      positions[b, i - 1] = batch.read_positions[b, voco]
  check(len(segments) > 0, 'a VoCo batch needs at least one image')
  check(all(np.array_equal(s, segments[0]) for s in segments),
        'the compression segments of a batch must agree in their text tokens '
        'and in the number of VoCo tokens')
  num_voco = len(next(iter(positions.values())))
  voco_positions = np.zeros((num_rows, num_images, num_voco), np.int32)
  for (b, i), value in positions.items():
    voco_positions[b, i] = value
  return VocoBatch(
      text=Batch(features=batch.features, image_valid=batch.image_valid,
                 records=batch.records, **{'turn_ids': None, **fields}),
      segment_ids=tuple(segments[0].tolist()), voco_positions=voco_positions)
