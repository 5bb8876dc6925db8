"""Dense layers with a low-rank update, by hand."""

from __future__ import annotations

import functools

import core_helpers as helpers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_compress.nn.linear import linear

IN, OUT, RANK, SCALE = 16, 6, 3, 1.5
make = functools.partial(linear, OUT, ('embed', 'mlp'), name=None, std=0.5,
                         use_bias=True)
X = np.random.default_rng(0).normal(size=(2, 5, IN)).astype(np.float32)


def test_fresh_it_is_the_plain_layer_bit_for_bit():
  plain, adapted = make(), make(low_rank=(RANK, SCALE))
  params = adapted.init(jax.random.key(3), X)['params']
  assert set(params) == {'kernel', 'bias', 'lora_a', 'lora_b'}
  assert params['lora_a'].names == ('embed', None)
  assert params['lora_b'].names == (None, 'mlp')
  params = nn.unbox(params)
  assert params['lora_a'].shape == (IN, RANK)
  assert params['lora_b'].shape == (RANK, OUT) and not params['lora_b'].any()
  want = {name: params[name] for name in ('kernel', 'bias')}
  np.testing.assert_array_equal(adapted.apply({'params': params}, X),
                                plain.apply({'params': want}, X))


def test_the_update_by_hand():
  rng = np.random.default_rng(1)
  kernel, bias, a, b = (rng.normal(size=shape).astype(np.float32) for shape in (
      (IN, OUT), (OUT,), (IN, RANK), (RANK, OUT)))
  params = {'kernel': kernel, 'bias': bias, 'lora_a': a, 'lora_b': b}
  out = make(low_rank=(RANK, SCALE)).apply({'params': params}, X)
  helpers.close(out, X @ kernel + bias + SCALE * (X @ a @ b))
  half = make(low_rank=(RANK, SCALE), dtype=jnp.bfloat16)
  got = half.apply({'params': params}, X)
  assert got.dtype == jnp.bfloat16
  assert np.abs(got.astype(np.float32) - out).max() < 0.05 * np.abs(out).max()


def test_a_is_drawn_as_peft_draws_it():
  layer = linear(4, ('embed', None), name=None, std=0.5, low_rank=(64, 1.0),
                 param_dtype=jnp.bfloat16)
  a = nn.unbox(layer.init(jax.random.key(0), np.zeros((1, 100))))['params']['lora_a']
  assert a.dtype == jnp.bfloat16
  a = np.float32(a)
  assert 0.098 < np.abs(a).max() <= 0.101  # 1 / sqrt(100), rounded
  assert abs(a.std() - 0.1 / 3 ** 0.5) < 2e-3 and abs(a.mean()) < 2e-3
