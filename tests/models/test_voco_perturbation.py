"""The mask rule of VoCo, by changing the input of the masked pass.

With the VoCo tokens' states held fixed in every layer, and so their keys and
values, nothing in front of them changes a later logit by a bit; with them free,
everything does.
"""

from __future__ import annotations

import dataclasses
import functools

import core_helpers as helpers
import jax
import jax.numpy as jnp
import numpy as np
from core_helpers import BOS, Sample, segment

from vlm_compress.compress.voco import voco_mask
from vlm_compress.models.layer_stack import LayerStack, StackInputs
from vlm_compress.models.sequence import TEXT, VISUAL, VOCO

SAMPLE = Sample((BOS, *segment(2), 8, 9, 10, 11), 2, seed=1)


@functools.partial(jax.jit, static_argnums=0)
def layer_by_layer(text, layers, x, inputs, held, is_voco):
  """The decoder's layers one at a time.

  Args:
    text: TextConfig.
    layers: stacked parameters.
    x: float[B, T, D].
    inputs: StackInputs of all layers.
    held: float[M, T, D], states of the VoCo tokens, or None.
    is_voco: bool[T].

  Returns:
    float[B, T, D], and float[M, B, T, D], what entered each layer.
  """
  one = LayerStack(dataclasses.replace(text, num_hidden_layers=1), jnp.float32,
                   jnp.float32)
  entered = []
  for layer in range(text.num_hidden_layers):
    if held is not None:
      x = jnp.where(is_voco[:, None], held[layer], x)
    entered.append(x)
    params = jax.tree.map(lambda w, at=layer: w[at:at + 1], layers)
    x, _ = one.apply({'params': {'layers': params}}, x, inputs)
  return x, jnp.stack(entered)


def test_every_position_in_front_of_the_voco_tokens():
  config = helpers.voco_config(2)
  model, params = helpers.build(config)
  batch = helpers.batch((SAMPLE,), config, length=26, num_images=1)
  kinds, ids = batch.token_types[0], batch.image_ids[0]
  voco = kinds == VOCO
  front = np.flatnonzero(np.arange(26) < np.flatnonzero(voco)[0])
  behind = (ids == 0) & (kinds == TEXT)
  assert len(front) == 1 + config.num_visual_tokens + 1 and behind.sum() == 5
  rows = len(front) + 1  # row 0 is left as it is
  wide = lambda x: np.broadcast_to(x, (rows, *x.shape[1:]))
  inputs = StackInputs(
      positions=wide(batch.positions),
      mask=voco_mask(wide(batch.valid), wide(batch.token_types == VOCO),
                     wide(batch.token_types == VISUAL), wide(batch.image_ids),
                     wide(batch.turn_ids)))
  x = helpers.apply(model, params, batch, method='embed')
  x = np.array(wide(np.asarray(x)))
  x[np.arange(1, rows), front] += 0.5
  layers = params['language_model']['layers']
  head = lambda hidden: jax.jit(lambda h: model.apply(
      {'params': params}, h, method=lambda m, h: m.language_model.logits(
          m.language_model.norm(h))))(hidden)[:, behind]
  free, entered = layer_by_layer(config.text, layers, x, inputs, None, voco)
  free = np.asarray(head(free))
  whole = helpers.apply(model, params, batch, mask='voco')[0]
  helpers.close(free[0], whole[0][behind])  # it is the model's own pass
  held, _ = layer_by_layer(config.text, layers, x, inputs, entered[:, 0], voco)
  held = np.asarray(head(held))
  np.testing.assert_array_equal(held[0], free[0])
  for row, position in enumerate(front, start=1):
    assert np.abs(free[row] - free[0]).max() > 1e-5, position
    np.testing.assert_array_equal(held[row], held[0], err_msg=str(position))
