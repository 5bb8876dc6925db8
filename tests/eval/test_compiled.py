"""Verdicts, bounds and tables of compiled programs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from vlm_compress.eval import compile_report, compiled, efficiency
from vlm_compress.eval.hardware import chip_of
from vlm_compress.eval.hlo_cost import Buffer, Collective, Moved
from vlm_compress.eval.training_cost import RowShape, step_cost
from vlm_compress.presets import preset

V5E = chip_of('TPU v5 lite')
REFUSAL = '''RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory \
space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.

Total hbm usage >= 20.76G:
    reserved        260.00M
    program          20.50G
    arguments            0B

Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(step)/transpose/dot_general" source_file="a.py" source_line=3
     Shape: bf16[32,16,2048,2048]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 4.00G
     XLA label: fusion.12 = fusion(...)
     Allocation type: HLO temp
     ==========================

  2. Size: 512.50M
     Shape: f32[1024,131072]{1,0:T(8,128)}
     Unpadded size: 512.50M
     XLA label: copy.3 = copy(...)
     Allocation type: HLO temp
     ==========================
'''


def test_out_of_memory_is_a_verdict():
  error = RuntimeError(REFUSAL)
  assert compiled.is_out_of_memory(error)
  one = compiled.out_of_memory('train', error, batch_size=128, model_flops=1e15,
                               hardware_flops=2e15)
  assert one.verdict == compiled.TOO_LARGE and one.memory is None and one.bound is None
  assert one.needed_bytes == 20.5 * 2**30 and one.hbm_bytes == 15.75 * 2**30
  assert one.buffers == (
      Buffer('bf16[32,16,2048,2048]', 4 * 2**30, 'jit(step)/transpose/dot_general'),
      Buffer('f32[1024,131072]', int(512.5 * 2**20), 'copy.3'))


def test_a_refusal_without_a_list_names_arguments():
  error = RuntimeError('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory '
                       'required for HLO temporaries (30.41G) exceeds available HBM (15.75G).')
  assert compiled.is_out_of_memory(error)
  given = Buffer('f32[8]', 32, 'argument')
  one = compiled.out_of_memory('train', error, batch_size=8, model_flops=1.0,
                               hardware_flops=1.0, arguments=[given])
  assert (one.needed_bytes, one.hbm_bytes) == (30.41 * 2**30, 15.75 * 2**30)
  assert one.buffers == (given,)


@pytest.mark.parametrize('text', [
    'INTERNAL: something else', 'RESOURCE_EXHAUSTED: no disk',
    'Used 20.50G of 15.75G hbm'])
def test_other_failures_are_none(text):
  assert not compiled.is_out_of_memory(RuntimeError(text))


def test_the_bound_is_the_slowest_part():
  moved = Moved(hbm_bytes=819e9 * 0.5, collectives={
      'all-gather': Collective(2, 1.0, 200e9 * 0.25)})
  bound = compiled.bound_of(V5E, 4, 4 * 197e12 * 0.1, moved)
  assert (bound.compute, bound.memory, bound.links) == pytest.approx((0.1, 0.5, 0.25))
  assert bound.seconds == bound.memory and bound.limit == 'memory'


def test_hours():
  assert compiled.hours(7200, 0.5) == 1.0
  assert compiled.seconds_at(197e12, 2, V5E, 0.25) == 2.0


@pytest.fixture(scope='module', name='report')
def fixture_report():
  """A product of two matrices, on one device."""
  shape = jax.ShapeDtypeStruct((256, 256), jnp.float32)
  done = jax.jit(lambda x, w: x @ w).lower(shape, shape).compile()
  return compiled.report('train (instruct)', done, V5E, 1, batch_size=8, model_flops=3e12,
                         hardware_flops=4e12, compile_seconds=1.5)


def test_report_of_a_compiled_program(report):
  array = 256 * 256 * 4
  assert report.memory.arguments == 2 * array and report.memory.outputs == array
  assert report.needed_bytes == report.memory.peak >= 3 * array
  assert report.verdict == compiled.FITS and report.hbm_moved == 3 * array
  assert report.bound.compute == pytest.approx(4e12 / 197e12)
  assert compiled.from_dict(compiled.to_dict(report)) == report
  small = dataclasses.replace(V5E, hbm_bytes=array)
  done = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct(
      (256, 256), jnp.float32)).compile()
  assert compiled.report('p', done, small, 1, batch_size=1, model_flops=0,
                         hardware_flops=0).verdict == compiled.TOO_LARGE


def test_pages(report):
  refused = compiled.out_of_memory('train (voco)', RuntimeError(REFUSAL), batch_size=16,
                                   model_flops=1e15, hardware_flops=2e15)
  found = {'config': 'configs/a.py:b', 'topology': 'v5e:2x2', 'chip': 'v5e',
           'num_chips': 1, 'mesh': {'data': 1, 'fsdp': 2, 'tensor': 2}, 'steps': 1000,
           'batch_size': 8, 'mfu': 0.4, 'versions': {'jax': '1'},
           'programs': [compiled.to_dict(report), compiled.to_dict(refused)]}
  page = compile_report.markdown(found)
  for part in (compile_report.LABEL, 'data=1, fsdp=2, tensor=2', 'does not fit',
               '20.50 GiB of 15.75 GiB', '| compute |', 'bf16\\[32,16,2048,2048\\]',
               'at 0.4 MFU (assumed)'):
    assert part in page, part
  lines = compile_report.summary([found]).splitlines()
  assert len(lines) == 4 and lines[3].count('–') == 5
  faster = dict(found, mfu=1.0)
  assert any('MFU of 1 is out of reach' in line for line in compile_report.notes(faster))
  assert 'out of reach (1)' in compile_report.summary([faster])
  assert 'out of reach' not in page + compile_report.summary([found])
  # As many rows in batches of 16 are half the steps.
  assert [compile_report.recipe_steps(found, one) for one in (report, refused)] == [1000, 500]
  least, assumed = compile_report.recipe_hours(found, report)
  assert least == pytest.approx(1000 * 4e12 / 197e12 / 3600)
  assert assumed == pytest.approx(1000 * 3e12 / (197e12 * 0.4) / 3600)


def test_best_of_a_sweep():
  row = lambda verdict, bound: {'verdict': verdict, 'bound_per_example': bound}
  rows = [row(compiled.TOO_LARGE, 0.1), row(compiled.FITS, 0.3), row(compiled.FITS, 0.2)]
  assert compile_report.best(rows) is rows[2]
  assert compile_report.best(rows[:1]) is None


def test_what_is_recomputed_depends_on_the_policy():
  def recompute(policy):
    config = dataclasses.replace(preset('tiny'), remat=True, remat_policy=policy)
    return step_cost(config, 'instruct', RowShape(20), 2, {}).recompute
  text, pairs = preset('tiny').text, float(efficiency.causal_pairs(20))
  layers = 2 * text.num_hidden_layers
  assert recompute('nothing_saveable') == layers * efficiency.layer_flops(text, 20, pairs)
  assert recompute('dots_with_no_batch_dims_saveable') == layers * efficiency.layer_flops(
      text, 0, pairs)
  assert recompute('dots_saveable') == 0
