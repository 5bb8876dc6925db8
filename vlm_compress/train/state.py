"""The state of training, made where it lives: every device gets its shards.

A 7B model with its optimiser's moments is 84 GB; no host ever holds a whole
copy of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlm_compress import sharding
from vlm_compress.config import LlavaConfig, check
from vlm_compress.convert.lora import adapter_of, is_lora
from vlm_compress.models.llava import Llava, init_params
from vlm_compress.train.optimizer import make_optimizer, merge, split
from vlm_compress.train.recipe import Recipe

Tree = dict[str, Any]
# A tree, or a function that reads one onto a mesh.
Given = Tree | Callable[[Mesh], Tree] | None


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes, and the frozen parameters.

  Attributes:
    step: int32[].
    trainable, frozen: flat parameters by path.
    opt_state: of the trainable parameters.
  """
  step: jax.Array
  trainable: dict[str, jax.Array]
  frozen: dict[str, jax.Array]
  opt_state: Any

  @property
  def params(self) -> dict[str, Any]:
    """The parameter tree of the model."""
    return merge(self.trainable, self.frozen)


def _check_lora(config: LlavaConfig, trainable: dict[str, Any],
                frozen: dict[str, Any]) -> None:
  """With LoRA adapters learn, and the kernels that they adapt do not."""
  if config.lora is None:
    return
  check(any(map(is_lora, trainable)), 'the model has lora, but none of its '
        'adapters learns: add "*/lora_*" to train.trainable, or leave lora out')
  paths = trainable.keys() | frozen.keys()
  both = sorted(path for path in trainable if adapter_of(path, paths))
  check(not both, f'{both[:1]} would learn beside its LoRA adapter, which is for '
        'frozen kernels: say in train.trainable what learns, such as '
        '("*/lora_*", "multi_modal_projector/")')


def abstract_state(model: Llava, recipe: Recipe, mesh: Mesh,
                   with_vision: bool = False) -> TrainState:
  """Shapes, dtypes and shardings of a state; nothing is computed.

  The optimiser's moments lie where their parameters lie, so that fsdp splits
  them over its devices as ZeRO does.

  Args:
    model: the model.
    recipe: says what learns, and so has moments.
    mesh: devices.
    with_vision: the CLIP tower is part of it.

  Returns:
    A TrainState of jax.ShapeDtypeStruct.
  """
  def make(key):
    params = init_params(model, key, with_vision)
    trainable, frozen = split(params, recipe.trainable)
    _check_lora(model.config, trainable, frozen)
    return TrainState(step=jnp.int32(0), trainable=trainable, frozen=frozen,
                      opt_state=make_optimizer(recipe).init(trainable))
  boxed = jax.eval_shape(make, jax.random.key(0))
  return jax.tree.map(
      lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
      sharding.unbox(boxed), sharding.tree_shardings(boxed, mesh))


def start_params(model: Llava, seed: int, given: Tree | None,
                 message: Callable[[str], Any] | None = None, *,
                 mesh: Mesh | None = None, with_vision: bool = False,
                 learns: tuple[str, ...] = ()) -> Tree:
  """Parameters to begin with: given ones, fresh ones for what is missing.

  Args:
    model: the model.
    seed: of the fresh ones.
    given: a parameter tree that may lack a method's own parameters, or have
      more than the model uses.
    message: called with lines that name what is fresh, and what of the given
      ones the model does not use.
    mesh: devices; by default the first one.
    with_vision: the CLIP tower is part of it.
    learns: names of the parameters that will be trained, see Recipe.trainable.

  Returns:
    Unboxed parameters of the model's param_dtype.

  Raises:
    ConfigError: a given parameter has the wrong shape, or is of an adapter
      that the model does not have: without it the kernel means another model;
      or one is missing that nothing would train.
  """
  mesh = sharding.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
  init = lambda key: init_params(model, key, with_vision)
  boxed = jax.eval_shape(init, jax.random.key(0))
  shapes = _flat(sharding.unbox(boxed))
  placed = _flat(sharding.tree_shardings(boxed, mesh))
  old = _flat({} if given is None else given)
  for path in sorted(shapes.keys() & old.keys()):
    check(shapes[path].shape == old[path].shape,
          f'parameter {path} has shape {old[path].shape} in the checkpoint, '
          f'but the model needs {shapes[path].shape}')
  lost = sorted(path for path in old.keys() - shapes.keys() if is_lora(path))
  check(not lost, f'the given parameters have LoRA adapters such as {lost[:1]} '
        'that the model in the config has not; merge them first, see '
        'convert/lora.py')
  missing = sorted(shapes.keys() - old.keys())
  if given is not None:
    _check_fresh(missing, split(sharding.unbox(boxed), learns)[1])
    for what, paths in (('fresh parameters', missing), (
        'given parameters that the model does not use', sorted(
            old.keys() - shapes.keys()))):
      if paths and message is not None:
        message(f'{what}: {", ".join(paths)}')
  # jitted: eager initialisation would compile every operation by itself, and
  # what is not asked for would be drawn.
  fresh = jax.jit(
      lambda key: {path: x for path, x in _flat(sharding.unbox(init(key)))
                   .items() if path in missing},
      out_shardings={path: placed[path] for path in missing})(
          jax.random.key(seed)) if missing else {}
  return merge({path: fresh[path] if path in fresh else jax.device_put(
      old[path], placed[path]).astype(x.dtype) for path, x in shapes.items()}, {})


def _check_fresh(missing: list[str], frozen: Tree) -> None:
  """What a start from given parameters lacks must learn: drawn at random and
  frozen, it would spoil all that learns around it.
  """
  lost = [path for path in missing if path in frozen]
  check(not lost, f'init_from lacks parameters that do not learn: '
        f'{", ".join(lost)}; they would stay random: start from a model that has '
        'them (vlm-compress convert joins --vision with --llm), or add them to '
        'train.trainable')


def make_state(model: Llava, recipe: Recipe, mesh: Mesh, given: Given = None,
               message: Callable[[str], Any] | None = None,
               with_vision: bool = False) -> TrainState:
  """The state in front of the first step.

  Args:
    model, recipe, mesh, with_vision: see `abstract_state`.
    given: parameters to start from, see `start_params`; a tree stays the
      caller's, what a function returns is used up.
    message: called with lines for the user.
  """
  owned = callable(given)
  params = start_params(model, recipe.seed, given(mesh) if owned else given,
                        message, mesh=mesh, with_vision=with_vision,
                        learns=recipe.trainable)
  if not owned and given is not None:
    # Steps donate their state: never the caller's arrays.
    params = jax.tree.map(jnp.copy, params)
  trainable, frozen = split(params, recipe.trainable)
  placed = jax.tree.map(lambda x: x.sharding, abstract_state(
      model, recipe, mesh, with_vision))
  opt_state = jax.jit(make_optimizer(recipe).init,
                      out_shardings=placed.opt_state)(trainable)
  return TrainState(step=jax.device_put(jnp.int32(0), placed.step),
                    trainable=trainable, frozen=frozen, opt_state=opt_state)


def _flat(tree: Tree) -> Tree:
  return flax.traverse_util.flatten_dict(tree, sep='/')
