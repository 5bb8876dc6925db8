"""Serving: prefill and decode in segments, by programs compiled once.

Which program runs next depends on how much was kept, so a Python loop picks
it: run a segment, read how many tokens of each row stay, cut the rows to a
rung of the ladder, go on.  Programs are kept by what their shapes depend on
(layers, slots, batch), can be compiled ahead of time, and are counted.

The plain model, and VoCo's compressing and reading, are the same with one
segment.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_compress import sharding
from vlm_compress.config import LlavaConfig, check, check_whole
from vlm_compress.decode.prefilled import TEXT_STEP, Prefilled, text_slots
from vlm_compress.decode.programs import Programs
from vlm_compress.models import segments as seg
from vlm_compress.models.inputs import (
  CompressedImages,
  KeptTokens,
  Prefix,
  PruneOptions,
  place,
  voco_states,
)
from vlm_compress.models.llava import example_batch
from vlm_compress.models.segments import Pruning, Ran, Tokens
from vlm_compress.models.sequence import VISUAL, Batch


class SegmentedModel:
  """A model's parameters, layer by layer, and its compiled programs.

  Args:
    config: of the model.
    params: parameters with stacked decoder layers, or with a list of layers.
      A stack of device arrays is copied, layer by layer.
  """

  def __init__(self, config: LlavaConfig, params: Any):
    self.config = config
    language = dict(params['language_model'])
    stack = language.pop('layers')
    # On a CPU, device_put shares the memory of aligned numpy arrays.
    self.rest = jax.device_put({**params, 'language_model': language})
    one = lambda i: (stack[i] if isinstance(stack, list) else
                     jax.tree.map(lambda x: x[i], stack))
    self.layers = [jax.device_put(one(i))
                   for i in range(config.text.num_hidden_layers)]
    spread = [x.sharding for x in jax.tree.leaves(self.rest)
              if len(x.sharding.device_set) > 1]
    # Where parameters are spread over devices, activations are on all of them.
    self.programs = Programs(
        sharding.replicated(spread[0].mesh) if spread else None)

  def with_config(self, config: LlavaConfig) -> SegmentedModel:
    """The same parameters under another method, with programs of its own."""
    other = copy.copy(self)
    other.config, other.programs = config, Programs(self.programs.out)
    return other

  def prefill(self, batch: Batch, options: PruneOptions | None = None,
              room: int = 0) -> Prefilled:
    """Runs prompts.

    Args:
      batch: prompts without turns, of numpy arrays.
      options: how the modules run, hard; None is the plain model.
      room: tokens that can be added later.

    Raises:
      ConfigError: soft masks, modules that the model has not, not an id per
        row, turns, a row that ends in an image, or room below 0.
    """
    check_whole('room', room, 0)
    num_images = batch.features.shape[1]
    fit = functools.partial(self.fit, text=text_slots(batch),
                            num_images=num_images)
    tokens, pruning, counts = self.start(batch, options)
    tokens = fit(tokens, counts)
    caches, slots, index = [], [], 0
    if counts is None:
      counts = np.sum(batch.valid, axis=1)
    all_counts = [np.asarray(counts)]
    while True:
      slots.append(tokens.valid.shape[1])
      ran = self.run(index, tokens, pruning, room)
      caches.append(ran.cache)
      if ran.tokens is None:
        return Prefilled(ran.logits, ran.positions, caches, slots, all_counts,
                         room, pruning=pruning)
      all_counts.append(np.asarray(ran.counts))
      pruning, tokens, index = ran.pruning, fit(ran.tokens, ran.counts), index + 1

  def compress(self, features: jax.Array, segment_ids: tuple[int, ...],
               num_voco_tokens: int) -> CompressedImages:
    """Llava.compress_images."""
    B, I = features.shape[:2]

    def program(layers, rest, features):
      tokens = seg.start_segments(self.config, rest, features, segment_ids,
                                  num_voco_tokens)
      _, cache, _ = seg.run_layers(self.config, layers, tokens, 0)
      return voco_states(self.config, (B, I), jnp.stack(cache.keys),
                         jnp.stack(cache.values), num_voco_tokens)
    key = ('compress', segment_ids, num_voco_tokens)
    return self.programs.call(key, program, (self.layers, self.rest), features)

  def read(self, text: Batch, images: CompressedImages,
           voco_positions: jax.Array, room: int = 0) -> Prefilled:
    """Runs text behind compressed images.

    Args:
      text: rows without their compression segments (`VocoBatch.text`).
      images: I images per row; image_valid of `text` says which are there.
      voco_positions: int32[B, I, C], see `place`.
      room: tokens that can be added later.
    """
    prefix = self.programs.call(
        ('place',), functools.partial(
            place, rope_theta=self.config.text.rope_theta), (), images,
        text.image_valid, voco_positions)
    return self.read_behind(text, [prefix], room)

  def read_behind(self, text: Batch, prefixes: Sequence[Prefix], room: int = 0
                  ) -> Prefilled:
    """Runs text behind keys and values, without any module.

    Args:
      text: rows without images.
      prefixes: of the only segment, or of each of the segments of a pruned
        model, whose layers then read what earlier prompts had kept.
      room: tokens that can be added later.

    Raises:
      ConfigError: turns, prefixes of another number of segments, or room below
        0.
    """
    _check_turns(text)
    check_whole('room', room, 0)
    bounds = self.bounds(len(prefixes) > 1 and self.config.atp is not None)
    check(len(prefixes) == len(bounds), f'there are {len(prefixes)} prefixes; '
          'give one of all layers, or one for each segment of a pruned model')
    text = text.replace(features=text.features[:, :0],
                        image_valid=text.image_valid[:, :0])
    tokens = self.programs.call(('text',), lambda rest, text: (
        seg.start(self.config, rest, text, None)[0]), (self.rest,), text)
    caches, slots, counts = [], [], []
    for (first, last), prefix in zip(bounds, prefixes, strict=True):
      program = functools.partial(
          seg.read_segment, self.config, room, last == self.config.text.num_hidden_layers)
      ran = self.programs.call(
          ('read', first, last, room), program,
          (self.layers[first:last], self.rest), tokens, prefix)
      caches.append(ran.cache)
      tokens = ran.tokens
      slots.append(ran.cache.readable.shape[1] - room)
      counts.append(np.sum(np.asarray(ran.cache.readable), axis=1))
    return Prefilled(ran.logits, ran.positions, caches, slots, counts, room)

  def keep(self, state: Prefilled, num_after: int) -> KeptTokens:
    """Takes the image, and the text in front of it, out of a prompt's state.

    Args:
      state: of one row, padded on the right, before `extend`.
      num_after: tokens of the row behind the image.
    """
    first = lambda y, count: y[0, :int(count[0]) - num_after]
    stacked = lambda name: tuple(
        np.stack([first(y, count) for y in map(np.asarray, getattr(cache, name))])
        for cache, count in zip(state.caches, state.counts))
    return KeptTokens(stacked('keys'), stacked('values'))

  def read_kept(self, text: Batch, kept: KeptTokens, num_before: int,
                room: int = 0) -> Prefilled:
    """Runs text behind an image that an earlier prompt has pruned.

    Args:
      text: one row, what follows the image.
      kept: of the image; num_before: tokens in front of it.
      room: tokens that can be added later.
    """
    whole = -(-num_before // TEXT_STEP) * TEXT_STEP
    prefixes = []
    for keys, values in zip(kept.keys, kept.values):
      sizes = self.sizes(whole + self.config.num_visual_tokens, whole, 1)
      slots = next(s for s in sizes if s >= keys.shape[1])
      prefixes.append(seg.as_prefix(keys, values, slots))
    return self.read_behind(text, prefixes, room)

  def extend(self, tokens: jax.Array, state: Prefilled) -> jax.Array:
    """One more token per row, int32[B]; float32[B, V] logits of the next.

    `state` moves on; its old caches are used up.
    """
    check(state.used < state.room, f'the cache has room for {state.room} new '
          'tokens; prefill with more')
    x, positions = tokens, state.positions
    pruned = len(state.caches) > 1
    for index, cache in enumerate(state.caches):
      x, state.caches[index], positions = self._extend(
          index, pruned, x, cache, state.positions,
          np.int32(state.slots[index] + state.used))
    state.logits, state.positions = x, positions
    state.used += 1
    return x

  def _extend(self, index: int, pruned: bool, *args: Any) -> Any:
    """Segment number `index` of `extend`; see seg.extend_segment."""
    first, last = self.bounds(pruned)[index]
    program = functools.partial(seg.extend_segment, self.config, (
        index == 0, last == self.config.text.num_hidden_layers))
    return self.programs.call(
        ('extend', first, last), program, (self.layers[first:last], self.rest),
        *args, donate=(3,))

  def compile_ahead(self, batch_size: int, length: int, text: int, room: int,
                    num_images: int = 1, pruned: bool = True,
                    shortest: int = 1) -> int:
    """Compiles all that `prefill` and `extend` can need for such batches.

    `prefill_regrouped` runs the same segments; its own programs, which move
    rows between batches, are not among these.

    Args:
      batch_size: rows; length: their slots, T, enough for images and text.
      text: text tokens of the longest prompt; shortest: of the shortest one.
      room: as for prefill.
      num_images: images per row.
      pruned: with modules, or the plain model.

    Returns:
      How many programs there are now.

    Raises:
      ConfigError: a number that cannot be, or pruned without modules.
    """
    self._check_ahead(batch_size, length, text, room, num_images, pruned,
                      shortest)
    batch = jax.eval_shape(lambda: example_batch(
        self.config, batch_size, num_images,
        length - num_images * self.config.num_visual_tokens))
    options = PruneOptions(threshold_shift=0.0) if pruned else None
    whole = lambda tokens: -(-tokens // TEXT_STEP) * TEXT_STEP
    texts = range(whole(shortest), whole(text) + 1, TEXT_STEP)

    def all_cuts(some: dict[int, Tokens]) -> dict[int, Tokens]:
      out = {}
      for slots, rows in some.items():
        for size in {s for t in texts for s in self.sizes(slots, t, num_images)}:
          out[size] = rows if size == slots else self.cut(rows, size)
      return out

    self.programs.only_compiling = True
    try:
      tokens, pruning, counts = self._start(batch, options)
      rows = {length: tokens} if counts is None else all_cuts({length: tokens})
      x = jax.ShapeDtypeStruct((batch_size,), np.int32)
      position = jax.ShapeDtypeStruct((batch_size,), np.int32,
                                      sharding=self.programs.out)
      for index in range(len(self.bounds(pruned))):
        ran = {slots: self.run(index, rows[slots], pruning, room)
               for slots in rows}
        if room > 0:
          x = [self._extend(index, pruned, x, r.cache, position, np.int32(0))
               for r in ran.values()][0][0]
        one = next(iter(ran.values()))
        if one.tokens is not None:
          rows = all_cuts({slots: r.tokens for slots, r in ran.items()})
          pruning = one.pruning
    finally:
      self.programs.only_compiling = False
    return len(self.programs)

  def _check_ahead(self, batch_size: int, length: int, text: int, room: int,
                   num_images: int, pruned: bool, shortest: int) -> None:
    check(not pruned or self.config.atp is not None, 'pruned=True for a model '
          'without modules (config.atp is None)')
    for name, value, least in (
        ('batch_size', batch_size, 1), ('length', length, 1), ('text', text, 1),
        ('room', room, 0), ('num_images', num_images, int(pruned)),
        ('shortest', shortest, 1)):
      check_whole(name, value, least)
    check(shortest <= text, f'shortest={shortest} is above text={text}')
    need = num_images * self.config.num_visual_tokens + text
    check(length >= need, f'length={length}: {num_images} image(s) and text='
          f'{text} take {need} slots; give as many or more')

  # ------------------------------------------------- what prefill is made of

  def bounds(self, pruned: bool) -> list[tuple[int, int]]:
    """See seg.segment_bounds."""
    return seg.segment_bounds(self.config, pruned)

  def start(self, batch: Batch, options: PruneOptions | None
            ) -> tuple[Tokens, Pruning | None, jax.Array | None]:
    """Embedded rows, modules in their first state, and how many tokens stay
    where a module stands in front of all layers (else None).

    Raises:
      ConfigError: see `prefill`.
    """
    check(options is None or self.config.atp is not None, 'pruning options for '
          'a model without modules (config.atp is None); leave them out')
    check(options is None or options.hard, 'PruneOptions.hard=False: soft masks '
          'are for training; rows can only be shortened by hard ones')
    _check_turns(batch)
    ends = batch.token_types[np.arange(len(batch.valid)), _last(batch.valid)]
    check(options is None or not np.any(ends == VISUAL), 'a prompt ends in an '
          'image, whose last token may be pruned; let text follow')
    return self._start(batch, options)

  def _start(self, batch: Batch, options: PruneOptions | None
             ) -> tuple[Tokens, Pruning | None, jax.Array | None]:
    first = options is not None and self.config.atp.prune_after[0] == 0

    def program(rest, batch, options):
      tokens, pruning = seg.start(self.config, rest, batch, options)
      counts = None
      if first:
        tokens, counts = seg.to_front(tokens, pruning)
      return tokens, pruning, counts
    if options is not None:
      options = self._as_arrays(options, len(batch.input_ids))
    return self.programs.call(('start',), program, (self.rest,), batch, options)

  def _as_arrays(self, options: PruneOptions, num_rows: int) -> PruneOptions:
    """Options of one form, so that there is one program for all of them."""
    shift, ids = options.threshold_shift, options.row_ids
    check(ids is None or np.shape(ids) == (num_rows,), 'PruneOptions.row_ids: '
          f'shape {np.shape(ids)} for {num_rows} row(s); give each row its id')
    return options.replace(
        temperature=np.float32(options.temperature),
        threshold_shift=np.float32(
            self.config.atp.threshold_shift if shift is None else shift),
        row_ids=np.asarray(
            np.zeros(num_rows) if ids is None else ids, np.int32),
        seed=np.int32(options.seed))

  def fit(self, tokens: Tokens, counts: jax.Array | None, text: int,
          num_images: int) -> Tokens:
    """Cuts rows to the smallest rung that holds the fullest of them."""
    B, slots = tokens.valid.shape
    if counts is None:
      return tokens
    need = int(np.max(np.asarray(counts)))
    size = next(s for s in self.sizes(slots, text, num_images) if s >= need)
    return tokens if size == slots else self.cut(tokens, size)

  def sizes(self, slots: int, text: int, num_images: int) -> list[int]:
    """Numbers of slots that rows of `slots` can be cut to, increasing."""
    rungs = [c * num_images + text for c in seg.capacity_ladder(self.config)]
    return [r for r in rungs if r < slots] + [slots]

  def cut(self, tokens: Tokens, slots: int) -> Tokens:
    """The first `slots` of every row."""
    return self.programs.call(('cut', slots), lambda t: seg.cut(t, slots), (),
                              tokens)

  def run(self, index: int, tokens: Tokens, pruning: Pruning | None,
          room: int) -> Ran:
    """Runs segment number `index`, and the module behind it."""
    first, last = self.bounds(pruning is not None)[index]
    is_last = last == self.config.text.num_hidden_layers
    program = functools.partial(seg.run_segment, self.config, index, room, is_last)
    end = last + seg.num_ahead(self.config, is_last)
    return self.programs.call(
        ('run', first, last, room), program,
        (self.layers[first:end], self.rest), tokens, pruning)


def _check_turns(batch: Batch) -> None:
  check(not np.any(batch.turn_ids), 'Batch.turn_ids: a prompt has no turns that '
        'do not see each other; give each of them as a prompt')


def _last(valid: np.ndarray) -> np.ndarray:
  """int[B], the last True of each row."""
  return valid.shape[1] - 1 - np.argmax(valid[:, ::-1], axis=1)
