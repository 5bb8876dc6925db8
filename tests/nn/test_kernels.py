"""Every implementation of attention against one loop-free numpy formula.

Splash runs interpreted here.  That the TPU compiler takes it is tested too,
where libtpu is installed; no TPU is needed for that.
"""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_compress import sharding
from vlm_compress.config import ConfigError
from vlm_compress.nn import attention as attention_lib
from vlm_compress.nn import kernels
from vlm_compress.nn.attention import attention, attention_and_lse
from vlm_compress.nn.masks import Causal

# B, T, S, N, K, H and which tokens are padding
CASES = {
    'queries that see nothing': ((2, 37, 37, 4, 4, 8), 'left'),
    'behind a prefix': ((2, 37, 200, 4, 2, 64), 'right'),
    'two blocks': ((2, 200, 200, 4, 2, 8), 'middle'),
    'one key head, rows differ': ((3, 130, 300, 4, 1, 128), 'mixed'),
    'whole blocks': ((2, 128, 256, 2, 1, 64), 'none'),
    'large blocks': ((2, 256, 512, 2, 1, 8), 'mixed'),
}


def _valid(B, S, padding):
  valid = np.ones((B, S), bool)
  for row in range(B):
    kind = ('right', 'left', 'middle')[row % 3] if padding == 'mixed' else padding
    count = 5 + 12 * row  # rows differ
    if kind != 'none':
      start = {'right': S - count, 'left': 0, 'middle': S // 3}[kind]
      valid[row, start:start + count] = False
  return valid


def _inputs(shape, padding='mixed', dtype=np.float32):
  B, T, S, N, K, H = shape
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=s).astype(np.float32) for s in (
      (B, T, N, H), (B, S, K, H), (B, S, K, H)))
  valid = _valid(B, S, padding)
  k[~valid] = v[~valid] = 100.0  # must not be seen
  return *(jnp.asarray(x, dtype) for x in (q, k, v)), valid


def _by_hand(q, k, v, valid):
  """Output, log-sum-exp and the mask, in float64."""
  (_, T, N, H), S, K = q.shape, k.shape[1], k.shape[2]
  k, v = (np.repeat(np.asarray(x, np.float64), N // K, axis=2) for x in (k, v))
  mask = valid[:, None] & (np.arange(S) <= np.arange(S - T, S)[:, None])
  logits = np.einsum('BTNH,BSNH->BTNS', np.asarray(q, np.float64), k) / H ** 0.5
  weights = np.exp(logits) * mask[:, :, None]
  total = weights.sum(-1)
  sees = mask.any(-1)
  total[~sees] = 1.0
  return (np.einsum('BTNS,BSNH->BTNH', weights, v) / total[..., None],
          np.log(total), mask)


def _run(name, q, k, v, valid):
  if name == 'splash':
    return kernels.splash(q, k, v, jnp.asarray(valid))
  mask = Causal(jnp.asarray(valid))
  if name == 'jax':
    return kernels.fused(q, k, v, mask.dense(q.shape[1]))
  return attention_and_lse(q, k, v, mask, implementation='dense')


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('name', ['dense', 'jax', 'splash'])
def test_output_and_lse_by_hand(name, case):
  q, k, v, valid = _inputs(*CASES[case])
  want, want_lse, mask = _by_hand(q, k, v, valid)
  out, lse = jax.jit(lambda *x: _run(name, *x, valid))(q, k, v)
  assert out.dtype == lse.dtype == jnp.float32
  assert out.shape == q.shape and lse.shape == q.shape[:3]
  sees = mask.any(-1)
  np.testing.assert_allclose(out[sees], want[sees], atol=1e-5)
  np.testing.assert_allclose(lse[sees], want_lse[sees], atol=1e-5)
  assert np.isfinite(out).all() and np.isfinite(lse).all()
  assert sees.all() == (case != 'queries that see nothing')
  if name != 'dense':
    assert (np.asarray(out)[~sees] == 0).all()
    assert (np.asarray(lse)[~sees] == np.float32(kernels.MASK_VALUE)).all()


@pytest.mark.parametrize('case', ['two blocks', 'one key head, rows differ',
                                  'large blocks'])
def test_groups_of_several_blocks(case, monkeypatch):
  """As behind 1,024 tokens, where a group is a loop over its blocks."""
  monkeypatch.setattr(attention_lib, 'MAX_GROUPS', 1)
  monkeypatch.setattr(attention_lib, 'BLOCK', 48)
  q, k, v, valid = _inputs(*CASES[case])
  assert q.shape[1] > 2 * 48
  want, want_lse, mask = _by_hand(q, k, v, valid)
  out, lse = jax.jit(lambda *x: _run('dense', *x, valid))(q, k, v)
  sees = mask.any(-1)
  np.testing.assert_allclose(out[sees], want[sees], atol=1e-5)
  np.testing.assert_allclose(lse[sees], want_lse[sees], atol=1e-5)


@pytest.mark.parametrize('name', ['dense', 'jax', 'splash'])
def test_bfloat16(name):
  q, k, v, valid = _inputs((2, 40, 200, 4, 2, 128), dtype=jnp.bfloat16)
  want, want_lse, _ = _by_hand(q, k, v, valid)
  out, lse = jax.jit(lambda *x: _run(name, *x, valid))(q, k, v)
  assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
  # Outputs below 2, rounded to 8 bits; splash also rounds scaled queries.
  np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=1.5e-2)
  np.testing.assert_allclose(lse, want_lse,
                             atol=5e-3 if name == 'splash' else 1e-5)


@pytest.mark.parametrize('name', ['jax', 'splash'])
@pytest.mark.parametrize('shape', [(2, 37, 60, 4, 2, 8), (3, 260, 300, 2, 1, 8)])
def test_gradients_of_both_outputs(name, shape):
  q, k, v, valid = _inputs(shape)
  sees = _by_hand(q, k, v, valid)[2].any(-1)
  rng = np.random.default_rng(1)
  of_out = rng.normal(size=q.shape) * sees[..., None, None]
  of_lse = rng.normal(size=q.shape[:3]) * sees[..., None]

  def loss(name, *qkv):
    out, lse = _run(name, *qkv, valid)
    return jnp.sum(jnp.sin(out) * of_out) + jnp.sum(jnp.sin(lse) * of_lse)

  got, want = (jax.jit(jax.grad(lambda *x, n=n: loss(n, *x), argnums=(0, 1, 2)))(
      q, k, v) for n in (name, 'dense'))
  for x, y in zip(got, want):
    np.testing.assert_allclose(x, y, atol=1e-5)
    assert np.abs(y).max() > 0.1


@pytest.mark.parametrize('name', ['jax', 'splash'])
def test_a_query_that_sees_nothing_moves_nothing(name):
  q, k, v, valid = _inputs((2, 37, 37, 4, 2, 8), 'left')
  blind = ~_by_hand(q, k, v, valid)[2].any(-1)
  assert blind.sum() == 5 + 17

  def loss(*qkv):
    out, lse = _run(name, *qkv, valid)
    return jnp.sum(jnp.sin(out)[blind]) + jnp.sum(lse[blind])

  for slope in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v):
    assert (np.asarray(slope) == 0).all()


def test_jax_pays_for_lse_only_if_it_is_read():
  q, k, v, valid = _inputs((1, 256, 256, 4, 2, 64))
  mask = Causal(jnp.asarray(valid)).dense(256)
  flops = lambda f: jax.jit(f).lower(q, k, v).compile().cost_analysis()['flops']
  alone = flops(lambda *x: jax.nn.dot_product_attention(*x, mask=mask[:, None]))
  assert flops(lambda *x: kernels.fused(*x, mask)[0]) < 1.1 * alone
  assert flops(lambda *x: kernels.fused(*x, mask)) > 1.4 * alone


@pytest.mark.parametrize('name', ['jax', 'splash'])
def test_no_logits_wait_for_the_backward_pass(name):
  q, k, v, valid = _inputs((1, 256, 256, 2, 1, 8))
  read = lambda out, lse: lse if name == 'jax' else (out, lse)
  pull = jax.eval_shape(lambda *x: jax.vjp(
      lambda *x: read(*_run(name, *x, valid)), *x)[1], q, k, v)
  sizes = [x.size for x in jax.tree.leaves(pull)]
  # Logits of both heads for the smallest block; a mask of it is half of that.
  assert max(sizes) < 2 * kernels.BLOCK * 256


def test_splash_in_a_rematerialised_scan_and_in_two_programs():
  """No program keeps an array of another's trace."""
  q, k, v, valid = _inputs((2, 37, 37, 2, 1, 8), 'right')

  def two_layers(q, name):
    layer = jax.checkpoint(lambda x, _: (_run(name, x, k, v, valid)[0], None))
    return jnp.sum(jax.lax.scan(layer, q, None, length=2)[0] ** 2)

  slope = lambda scale, name: jax.jit(jax.grad(
      lambda q: two_layers(q * scale, name)))(q)
  for scale in (1.0, 2.0):
    np.testing.assert_allclose(slope(scale, 'splash'), slope(scale, 'dense'),
                               atol=1e-5)


@pytest.mark.parametrize('B, K, spec', [
    (4, 2, (('data', 'fsdp'), None, 'tensor')), (3, 1, ())])
def test_splash_under_a_mesh(B, K, spec):
  q, k, v, valid = _inputs((B, 37, 60, 4, K, 8))
  want, want_lse, mask = _by_hand(q, k, v, valid)
  mesh = sharding.make_mesh(2, 2, 2)

  @jax.jit
  def run(q, k, v):
    out, pull, lse = jax.vjp(lambda *x: kernels.splash(*x, jnp.asarray(valid)),
                             q, k, v, has_aux=True)
    return out, lse, pull(out)

  with jax.set_mesh(mesh):
    out, lse, slopes = run(q, k, v)
  for x in (out, lse):
    assert x.sharding.is_equivalent_to(jax.NamedSharding(
        mesh, jax.sharding.PartitionSpec(*spec)), x.ndim)
  sees = mask.any(-1)
  np.testing.assert_allclose(np.asarray(out)[sees], want[sees], atol=1e-5)
  np.testing.assert_allclose(np.asarray(lse)[sees], want_lse[sees], atol=1e-5)
  for x, y in zip(slopes, run(q, k, v)[2]):
    np.testing.assert_allclose(x, y, atol=1e-5)


# Which implementation serves ----------------------------------------------

CALL = dict(num_queries=300, num_keys=400, causal=True, plain=True,
            dtype=jnp.dtype(jnp.bfloat16))


@pytest.mark.parametrize('backend, change, want', [
    ('cpu', {}, 'dense'),
    ('tpu', {}, 'splash'),
    ('tpu', dict(dtype=jnp.dtype(jnp.float32)), 'splash'),
    ('tpu', dict(num_queries=128, num_keys=128), 'splash'),
    ('tpu', dict(num_queries=127), 'dense'),
    ('tpu', dict(num_queries=100, num_keys=127), 'dense'),
    ('tpu', dict(num_queries=1), 'dense'),
    ('tpu', dict(causal=False), 'dense'),
    ('tpu', dict(plain=False), 'dense'),
    ('gpu', {}, 'jax'),
    ('gpu', dict(dtype=jnp.dtype(jnp.float16)), 'jax'),
    ('gpu', dict(dtype=jnp.dtype(jnp.float32)), 'dense'),
    ('gpu', dict(causal=False, num_queries=2), 'jax'),
    ('gpu', dict(num_queries=1), 'dense'),
    ('gpu', dict(plain=False), 'dense'),
])
def test_auto(monkeypatch, backend, change, want):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  assert kernels.choose('auto', **(CALL | change)) == want


def test_auto_goes_by_the_devices_of_the_mesh(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  with jax.set_mesh(sharding.make_mesh()):
    assert kernels.choose('auto', **CALL) == 'dense'


@pytest.mark.parametrize('backend', ['cpu', 'gpu', 'tpu'])
@pytest.mark.parametrize('change, dense', [
    ({}, ()),
    (dict(num_queries=2, num_keys=2, dtype=jnp.dtype(jnp.float32)), ()),
    (dict(causal=False), ('splash',)),
    (dict(num_queries=1), ('jax', 'splash')),
    (dict(plain=False), ('jax', 'splash')),
])
def test_override_concerns_what_a_kernel_can_do(monkeypatch, backend, change, dense):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  for asked in ('dense', 'jax', 'splash'):
    got = kernels.choose(asked, **(CALL | change))
    assert got == ('dense' if asked in dense else asked)


def test_unknown_implementation_raises():
  with pytest.raises(ConfigError, match="attention_implementation='flash'.*'splash'"):
    kernels.choose('flash', **CALL)


@pytest.mark.parametrize('asked', ['dense', 'jax', 'splash'])
def test_override_reaches_the_kernel(monkeypatch, asked):
  q, k, v, valid = _inputs((2, 9, 20, 4, 2, 8), 'right')
  mask = Causal(jnp.asarray(valid))
  want = _by_hand(q, k, v, valid)[0]
  called = []
  for name, attribute in (('jax', 'fused'), ('splash', 'splash')):
    run = getattr(kernels, attribute)
    monkeypatch.setattr(kernels, attribute, lambda *x, name=name, run=run: (
        called.append(name), run(*x))[1])
  got = jax.jit(lambda *x: attention(*x, mask, implementation=asked))(q, k, v)
  assert called == [asked] * (asked != 'dense')
  np.testing.assert_allclose(got, want, atol=1e-5)
  jax.eval_shape(lambda *x: attention(*x, mask, implementation=asked),
                 q[:, -1:], k, v)
  assert len(called) == (asked != 'dense')  # not for a single query


@pytest.mark.parametrize('shape, dtype, backend, want', [
    ((1, 4, 6, 2, 1, 64), jnp.bfloat16, 'gpu', 'cudnn'),
    ((1, 4, 6, 2, 1, 128), jnp.float16, 'gpu', 'cudnn'),
    ((1, 4, 6, 2, 1, 64), jnp.bfloat16, 'cpu', 'xla'),
    ((1, 4, 6, 2, 1, 64), jnp.float32, 'gpu', 'xla'),
    ((1, 4, 6, 2, 1, 12), jnp.bfloat16, 'gpu', 'xla'),
    ((1, 4, 6, 2, 1, 256), jnp.bfloat16, 'gpu', 'xla'),
    ((1, 3, 6, 2, 1, 64), jnp.bfloat16, 'gpu', 'xla'),
    ((1, 4, 5, 2, 1, 64), jnp.bfloat16, 'gpu', 'xla'),
])
def test_cudnn_is_asked_for_what_it_can_do(monkeypatch, shape, dtype, backend, want):
  q, k, v, valid = _inputs(shape, 'none', dtype)
  original, asked = jax.nn.dot_product_attention, []
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(
      jax.nn, 'dot_product_attention', lambda *x, implementation, **options: (
          asked.append(implementation), original(*x, **options))[1])
  jax.eval_shape(lambda *x: _run('jax', *x, valid), q, k, v)
  assert asked == [want]


FOR_A_TPU = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from vlm_compress import sharding
from vlm_compress.nn import attention as attention_lib
from vlm_compress.nn import kernels

devices = list(topologies.get_topology_desc(
    platform='tpu', topology_name='v5e:2x2').devices)
assert jax.default_backend() == 'cpu'

def compiled(mesh, B, T, S, N, K, H, dtype, fun):
  with jax.set_mesh(mesh):
    assert kernels.choose('auto', T, S, True, True, dtype) == 'splash'
    array = lambda shape, dtype=dtype: jax.ShapeDtypeStruct(
        shape, dtype, sharding=sharding.replicated(mesh))
    return jax.jit(fun).lower(
        array((B, T, N, H)), array((B, S, K, H)), array((B, S, K, H)),
        array((B, S), jnp.bool_)).compile().as_text()

def loss(*x):
  return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in kernels.splash(*x))

one = sharding.make_mesh(devices=devices[:1])
for H, dtype in ((8, jnp.float32), (64, jnp.bfloat16), (128, jnp.bfloat16)):
  text = compiled(one, 2, 200, 300, 4, 2, H, dtype, kernels.splash)
  assert text.count('tpu_custom_call') == 1
for B, K in ((4, 2), (3, 1)):
  text = compiled(sharding.make_mesh(2, 1, 2, devices=devices), B, 200, 300, 4,
                  K, 64, jnp.bfloat16, jax.grad(loss, argnums=(0, 1, 2)))
  assert text.count('tpu_custom_call') == 1
print('compiled')
"""


@pytest.mark.tpu
def test_splash_compiles_for_a_tpu():
  done = subprocess.run(
      [sys.executable, '-c', FOR_A_TPU], text=True, capture_output=True, check=False,
      env=os.environ | dict(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1',
                            TPU_WORKER_HOSTNAMES='localhost'))
  assert done.returncode == 0 and 'compiled' in done.stdout, done.stderr[-3000:]
