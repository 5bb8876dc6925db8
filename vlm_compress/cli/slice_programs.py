"""The programs of a stage as they would run on a slice: lowered, not compiled.

`train` is the loop's own step on shapes that lie as its state and batches do.
`prefill` and `decode` serve one batch of prompts with one picture each, from
vision features, with parameters stored in the dtype of the activations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_compress import sharding
from vlm_compress.cli.stage import Stage
from vlm_compress.config import LlavaConfig, check
from vlm_compress.decode.prefilled import TEXT_STEP
from vlm_compress.eval import efficiency
from vlm_compress.eval.hlo import Array
from vlm_compress.eval.hlo_cost import Buffer
from vlm_compress.eval.training_cost import step_cost
from vlm_compress.models import segments as seg
from vlm_compress.models.clip_vit import num_layers_run
from vlm_compress.models.inputs import PruneOptions
from vlm_compress.models.llava import Llava, init_params
from vlm_compress.nn.kv_cache import KVCache, grow
from vlm_compress.train import shapes
from vlm_compress.train.loop import check_mesh
from vlm_compress.train.state import TrainState, abstract_state
from vlm_compress.train.steps import make_step
from vlm_compress.train.throughput import row_shape

PROGRAMS = ('train', 'prefill', 'decode')


@dataclasses.dataclass(frozen=True)
class Program:
  """A program that can be compiled for a slice.

  Attributes:
    name: for people.
    batch_size: rows, on all chips.
    lower: gives a jax.stages.Lowered.
    model_flops, hardware_flops: per run on all chips, by formula.
    taken: op_name of a conditional -> share of its passes with the busiest
      branch.
    arguments: tree of jax.ShapeDtypeStruct with shardings, the large ones.
  """
  name: str
  batch_size: int
  lower: Callable[[], Any]
  model_flops: float
  hardware_flops: float
  taken: Callable[[str], float] = lambda op_name: 1.0
  arguments: Any = ()


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Slots of a prompt that is served.

  Attributes:
    text: text tokens; room: tokens that are added later.
  """
  text: int = 64
  room: int = 64


def train_program(config: LlavaConfig, stage: Stage, mesh: Mesh) -> Program:
  """The training step of a stage.

  Raises:
    ConfigError: mesh and batch, heads or hidden sizes do not fit.
  """
  recipe, with_vision = stage.recipe, shapes.reads_pixels(config.vision)
  check_mesh(config, recipe, mesh)
  model = Llava(config)
  batch = shapes.step_batch(config, recipe, stage.rows,
                            sharding.batch_sharding(mesh))
  state = abstract_state(model, recipe, mesh, with_vision)
  teacher = state.params if recipe.teacher == 'frozen' else None
  cost = step_cost(config, recipe.stage, row_shape(batch), recipe.batch_size,
                   {path: x.size for path, x in state.trainable.items()},
                   recipe.teacher != 'none')

  def lower():
    with jax.set_mesh(mesh):
      return jax.jit(make_step(model, recipe), donate_argnums=0).lower(
          state, batch, teacher)
  return Program(f'train ({recipe.stage})', recipe.batch_size, lower, cost.model,
                 cost.hardware, functools.partial(taken_branches, config), state)


def _on_a_chip(x: jax.ShapeDtypeStruct) -> Array:
  return Array(jnp.dtype(x.dtype).name, x.sharding.shard_shape(x.shape))


def state_bytes(state: TrainState) -> int:
  """Bytes of a state on one chip, without padding."""
  return sum(jnp.dtype(x.dtype).itemsize * math.prod(_on_a_chip(x).dims)
             for x in jax.tree.leaves(state))


def largest_arguments(program: Program, count: int = 8) -> list[Buffer]:
  """What of a program's arguments takes most of a chip, without padding."""
  found = []
  for path, x in jax.tree_util.tree_leaves_with_path(program.arguments):
    one = _on_a_chip(x)
    found.append(Buffer(str(one), jnp.dtype(x.dtype).itemsize * math.prod(one.dims),
                        'argument/' + jax.tree_util.keystr(
                            path, simple=True, separator='/')))
  return sorted(found, key=lambda b: -b.nbytes)[:count]


def taken_branches(config: LlavaConfig, op_name: str) -> float:
  """Share of a conditional's passes that do work.

  CLIP's layers behind the one whose features are read do not run, and ATP's
  modules stand behind a few layers only.
  """
  if 'vision_tower' in op_name:
    return (num_layers_run(config.vision, config.vision_feature_layer)
            / config.vision.num_hidden_layers)
  if config.atp is not None and 'language_model' in op_name:
    return len(config.atp.prune_after) / config.text.num_hidden_layers
  return 1.0


def serving_programs(config: LlavaConfig, mesh: Mesh, which: str, num_rows: int,
                     prompt: Prompt) -> Iterator[Program]:
  """Prefill or decoding, as the model's method is served.

  Args:
    config: of the model.
    mesh: devices.
    which: 'prefill' or 'decode'.
    num_rows: prompts in a batch.
    prompt: slots.

  Raises:
    ConfigError: rows, heads or the hidden size do not divide over the mesh.
  """
  sharding.check_sizes(config, mesh, with_vision=False)
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  check(num_rows % shards == 0, f'--batch-sizes: {num_rows} prompts do not divide '
        f'over {shards} devices (mesh data x fsdp)')
  config = dataclasses.replace(config, param_dtype=config.dtype, remat=False)
  if config.atp is not None:
    yield from _segments(config, mesh, which, num_rows, prompt)
  else:
    yield _whole(config, mesh, which, num_rows, prompt)


def abstract_params(config: LlavaConfig, mesh: Mesh) -> Any:
  """Shapes of the parameters, without the vision tower, where they lie."""
  boxed = jax.eval_shape(lambda key: init_params(Llava(config), key),
                         jax.random.key(0))
  return jax.tree.map(
      lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
      sharding.unbox(boxed), sharding.tree_shardings(boxed, mesh))


def _whole(config: LlavaConfig, mesh: Mesh, which: str, num_rows: int,
           prompt: Prompt) -> Program:
  """Llava.prefill (VoCo: two passes), or one `extend` of its cache."""
  model, params = Llava(config), abstract_params(config, mesh)
  rows, P, text = sharding.batch_sharding(mesh), config.num_visual_tokens, prompt.text
  if config.voco is None:
    batch, method, visual = shapes.batch(
        config, num_rows, P + text, placed=rows), 'prefill', P
    cost = efficiency.prefill_cost(config, float(P), text)
  else:
    visual = config.voco.num_voco_tokens
    batch, method = shapes.voco_batch(config, shapes.batch(
        config, num_rows, text, placed=rows), visual), 'prefill_two_pass'
    cost = efficiency.voco_cost(config, text)

  def prefill(params, batch):
    logits, cache, _ = model.apply({'params': params}, batch, method=method)
    return logits, grow(cache, prompt.room)
  if which == 'prefill':
    flops = num_rows * float(cost.prefill + cost.projector)
    return Program(
        f'prefill, {P} + {text} tokens', num_rows,
        lambda: _lower(mesh, prefill, params, batch), flops, flops)

  def decode(params, tokens, cache):
    return model.apply({'params': params}, tokens, cache, method='extend')
  slots = visual + text + prompt.room
  flops = num_rows * _decode_flops(config, config.text.num_hidden_layers, slots)
  tokens = jax.ShapeDtypeStruct((num_rows,), jnp.int32, sharding=rows)
  return Program(
      f'decode, {slots} slots', num_rows, lambda: _lower(
          mesh, decode, params, tokens,
          _placed_cache(jax.eval_shape(prefill, params, batch)[1], mesh),
          donate=(2,)), flops, flops)


def _lower(mesh: Mesh, function: Callable, *args: Any, donate: tuple[int, ...] = (),
           **options: Any) -> Any:
  with jax.set_mesh(mesh):
    return jax.jit(function, donate_argnums=donate, **options).lower(*args)


def _placed_cache(cache: KVCache, mesh: Mesh) -> KVCache:
  """Rows and heads of a cache over the devices."""
  def at(x, *names):
    spec = sharding.partition_spec(names)
    fitting = [axis if x.shape[i] % _size(mesh, axis) == 0 else None
               for i, axis in enumerate(spec)]
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(
        mesh, PartitionSpec(*fitting)))
  stored = ('layers', 'batch', 'length', 'kv_heads', None)
  return KVCache(at(cache.keys, *stored), at(cache.values, *stored),
                 at(cache.readable, *stored[:3]), at(cache.length),
                 at(cache.positions, 'batch'))


def _size(mesh: Mesh, axes: Any) -> int:
  names = () if axes is None else (axes,) if isinstance(axes, str) else axes
  return math.prod(mesh.shape[name] for name in names)


def _decode_flops(config: LlavaConfig, num_layers: int, slots: int) -> float:
  """Of one token of one row, behind full slots; with the head."""
  return num_layers * float(efficiency.layer_flops(config.text, 1, slots)) + (
      efficiency.lm_head_flops(config.text))


def _segments(config: LlavaConfig, mesh: Mesh, which: str, num_rows: int,
              prompt: Prompt) -> Iterator[Program]:
  """What decode/segmented.py compiles: the first segment on all slots, the
  second one on a lower rung, that of the token budget.

  As there, layers are separate trees, and everything but the parameters is on
  all devices.
  """
  everywhere = sharding.replicated(mesh)
  on_all = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=everywhere), tree)
  layers, rest = _layers(abstract_params(config, mesh))
  text = -(-prompt.text // TEXT_STEP) * TEXT_STEP
  batch = shapes.batch(config, num_rows, config.num_visual_tokens + text)
  options = PruneOptions(threshold_shift=jnp.float32(0.0))
  tokens, pruning = on_all(jax.eval_shape(
      lambda rest, batch: seg.start(config, rest, batch, options), rest, batch))
  bounds = seg.segment_bounds(config, True)
  wanted = config.atp.target_tokens
  rungs = [config.num_visual_tokens, next(
      c for c in seg.capacity_ladder(config) if c >= wanted)]
  for index, ((first, last), rung) in enumerate(zip(bounds, rungs)):
    slots, is_last = rung + text, last == config.text.num_hidden_layers
    own = layers[first:last + seg.num_ahead(config, is_last)]
    cut = on_all(jax.eval_shape(
        functools.partial(seg.cut, num_slots=slots), tokens))
    run = functools.partial(seg.run_segment, config, index, prompt.room, is_last)
    place = f'layers {first + 1} to {last} of {config.text.num_hidden_layers}, {slots} slots'
    if which == 'prefill':
      flops = num_rows * (last - first) * float(efficiency.layer_flops(
          config.text, slots, efficiency.causal_pairs(slots)))
      lower = functools.partial(_lower, mesh, run, own, rest, cut, pruning,
                                out_shardings=everywhere)
    else:
      cache = on_all(jax.eval_shape(run, own, rest, cut, pruning).cache)
      x = on_all(jax.ShapeDtypeStruct((num_rows,), jnp.int32) if index == 0 else
                 jax.eval_shape(lambda y: y[:, :1], cut.x))
      number = on_all(jax.ShapeDtypeStruct((num_rows,), jnp.int32))
      extend = functools.partial(seg.extend_segment, config, (index == 0, is_last))
      flops = num_rows * (last - first) * float(efficiency.layer_flops(
          config.text, 1, slots + prompt.room))
      lower = functools.partial(
          _lower, mesh, extend, own, rest, x, cache, number,
          on_all(jax.ShapeDtypeStruct((), jnp.int32)), donate=(3,),
          out_shardings=everywhere)
    yield Program(f'{which}, {place}', num_rows, lower, flops, flops)


def _layers(params: Any) -> tuple[list[Any], Any]:
  """Parameters layer by layer, and all others."""
  language = dict(params['language_model'])
  stack = language.pop('layers')

  def one(x):
    spec = PartitionSpec(*tuple(x.sharding.spec)[1:])
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=NamedSharding(
        x.sharding.mesh, spec))
  count = jax.tree.leaves(stack)[0].shape[0]
  return ([jax.tree.map(one, stack)] * count,
          {**params, 'language_model': language})
