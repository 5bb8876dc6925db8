"""What a program moves, counted by hand on small texts and on compiled programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm_compress import sharding
from vlm_compress.eval import hlo, hlo_cost

HEAD = 'HloModule jit_f, is_scheduled=true, num_partitions=8\n\n'
SUM = '''%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

'''


def entry(*lines):
  """A module whose entry has these lines."""
  return HEAD + SUM + 'ENTRY %main (p: f32[8,16]) -> f32[8,16] {\n' + ''.join(
      f'  {line}\n' for line in (
          '%p = f32[8,16]{1,0} parameter(0)', *lines)) + '}\n'


def moved(text, **options):
  return hlo_cost.moved(hlo.parse(text), **options)


def test_shapes():
  found = hlo.arrays('(f32[8,16]{1,0:T(8,128)S(1)}, (pred[], bf16[3]{0}), /*index=2*/'
                     's4[5]{0:T(1024)}, token[], f8e4m3fn[2,2])')
  assert [str(a) for a in found] == ['f32[8,16]', 'pred[]', 'bf16[3]', 's4[5]',
                                     'token[]', 'f8e4m3fn[2,2]']
  assert [a.nbytes for a in found] == [512, 1, 6, 3, 0, 4]
  assert [a.space for a in found] == [1, 0, 0, 0, 0, 0]


def test_instructions():
  module = hlo.parse(entry(
      'ROOT %r.1 = f32[8,16]{1,0} all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[8], '
      'to_apply=%sum, metadata={op_name="jit(f)/dot (general)" source_line=3}'))
  root = module.computations[module.entry].root
  assert (root.name, root.opcode, root.operands) == ('r.1', 'all-reduce', ('p',))
  assert root.op_name == 'jit(f)/dot (general)'
  assert root.called == {'to_apply': 'sum'} and root.group_size(8) == 4
  assert module.num_devices == 8 and set(module.computations) == {'sum', 'main'}
  with pytest.raises(ValueError, match='no HLO module'):
    hlo.parse('ENTRY')


def test_a_kernel_whose_attributes_go_over_lines():
  module = hlo.parse(entry(
      '%k = f32[8,16]{1,0} custom-call(%p), backend_config={"a": {',
      '"b": 1', '}}, metadata={}', 'ROOT %r = f32[8,16]{1,0} negate(%k)').replace(
          '  }}', '}}'))
  assert list(module.computations['main'].instructions) == ['p', 'k', 'r']


def test_a_computation_of_another_core_and_a_call_of_it():
  other = SUM.replace('%sum', '%busy').replace('}\n', '}, execution_thread="sparsecore"\n')
  text = entry(
      '%c = ((f32[], f32[]), f32[], u32[]) call-start(%p), to_apply=%busy',
      'ROOT %r = f32[] call-done(%c)').replace('ENTRY', other + 'ENTRY')
  assert set(hlo.parse(text).computations) == {'sum', 'busy', 'main'}
  assert moved(text).hbm_bytes == 3 * 4  # two read and their sum written


BYTES = 8 * 16 * 4


@pytest.mark.parametrize('line, kind, payload, sent', [
    ('f32[8,16]{1,0} all-reduce(%p), replica_groups={}, to_apply=%sum',
     'all-reduce', BYTES, 2 * BYTES * 7 / 8),
    ('f32[8,16]{1,0} all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, '
     'to_apply=%sum', 'all-reduce', BYTES, BYTES),
    ('f32[32,16]{1,0} all-gather(%p), replica_groups=[2,4]<=[2,4]T(1,0), dimensions={0}',
     'all-gather', 4 * BYTES, 3 * BYTES),
    ('(f32[8,16], f32[32,16]) all-gather-start(%p), replica_groups=[2,4]<=[8]',
     'all-gather', 4 * BYTES, 3 * BYTES),
    ('f32[2,16]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%sum',
     'reduce-scatter', BYTES, BYTES * 3 / 4),
    ('f32[8,16]{1,0} all-to-all(%p), replica_groups=[4,2]<=[8]', 'all-to-all',
     BYTES, BYTES / 2),
    ('f32[8,16]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}',
     'collective-permute', BYTES, BYTES),
    ('f32[8,16]{1,0} all-reduce(%p), replica_groups=[8,1]<=[8], to_apply=%sum',
     'all-reduce', BYTES, 0),
])
def test_one_collective(line, kind, payload, sent):
  found = moved(entry(f'ROOT %r = {line}')).collectives
  assert found == {kind: hlo_cost.Collective(1, payload, sent)}


def test_a_start_and_its_done_are_one():
  found = moved(entry(
      '%s = f32[8,16]{1,0} all-reduce-start(%p), replica_groups={}, to_apply=%sum',
      'ROOT %d = f32[8,16]{1,0} all-reduce-done(%s)'))
  assert found.collectives['all-reduce'].count == 1
  assert found.hbm_bytes == 2 * BYTES


LOOP = HEAD + SUM + '''%body (t: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %t = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%t), index=1
  %y = f32[8,16]{1,0} all-reduce(%x), replica_groups={}, to_apply=%sum
  ROOT %out = (s32[], f32[8,16]{1,0}) tuple(%i, %y)
}

%cond (t: (s32[], f32[8,16])) -> pred[] {
  %t.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[8,16]{1,0}) while(%p), condition=%cond, body=%body%TRIPS%
}
'''


@pytest.mark.parametrize('change, count, once', [
    (('%TRIPS%', ', backend_config={"known_trip_count":{"n":"5"},"other":1}'), 5, 0),
    (('%TRIPS%', ''), 7, 0),  # what the counter is compared with
    (('constant(7)', 'copy(%i.1)'), 1, 1)])
def test_a_loop_counts_as_often_as_it_runs(change, count, once):
  text = LOOP.replace(*change).replace('%TRIPS%', '')
  found = moved(text)
  assert found.collectives['all-reduce'].count == count
  assert found.collectives['all-reduce'].sent == count * 2 * BYTES * 7 / 8
  assert found.hbm_bytes == count * 2 * BYTES and found.loops_once == once


def test_a_conditional_counts_its_busiest_branch_in_its_share():
  branch = '''%{0} (q: f32[8,16]) -> f32[8,16] {{
  %q.{0} = f32[8,16]{{1,0}} parameter(0)
  ROOT %r.{0} = f32[8,16]{{1,0}} {1}
}}

'''
  text = entry('%i = s32[] constant(0)', 'ROOT %c = f32[8,16]{1,0} conditional(%i, %p, %p), '
               'branch_computations={%idle, %busy}, metadata={op_name="a/cond"}')
  text = text.replace('ENTRY', branch.format('idle', 'bitcast(%q.idle)') + branch.format(
      'busy', 'all-reduce(%q.busy), replica_groups={}, to_apply=%sum') + 'ENTRY')
  assert moved(text).collectives['all-reduce'].count == 1
  seen = []
  found = moved(text, taken=lambda name: seen.append(name) or 0.25)
  assert seen == ['a/cond'] and found.collectives['all-reduce'].count == 0.25
  assert found.hbm_bytes == 0.25 * 2 * BYTES


FUSED = HEAD + '''%inside (w: f32[4,8,16], i: s32[], x: f32[8,16]) -> f32[8,16] {
  %w = f32[4,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[8,16]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %s = f32[1,8,16]{2,1,0} dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,8,16}
  %b = f32[8,16]{1,0} bitcast(%s)
  ROOT %m = f32[8,16]{1,0} multiply(%b, %x)
}

%update (w: f32[4,8,16], i: s32[], x: f32[8,16]) -> f32[4,8,16] {
  %w.1 = f32[4,8,16]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %x.1 = f32[8,16]{1,0} parameter(2)
  %zero.1 = s32[] constant(0)
  %b.1 = f32[1,8,16]{2,1,0} bitcast(%x.1)
  ROOT %u = f32[4,8,16]{2,1,0} dynamic-update-slice(%w.1, %b.1, %i.1, %zero.1, %zero.1)
}

ENTRY %main (w: f32[4,8,16], i: s32[], x: f32[8,16]) -> f32[4,8,16] {
  %w.2 = f32[4,8,16]{2,1,0} parameter(0)
  %i.2 = s32[] parameter(1)
  %x.2 = f32[8,16]{1,0%SPACE%} parameter(2)
  %f = f32[8,16]{1,0%SPACE%} fusion(%w.2, %i.2, %x.2), kind=kLoop, calls=%inside
  ROOT %g = f32[4,8,16]{2,1,0} fusion(%w.2, %i.2, %f), kind=kLoop, calls=%update
}
'''


@pytest.mark.parametrize('space, want', [
    # slice read, x read, f written; f read, its place in w written; two indices
    ('', 5 * BYTES + 8), (':S(1)', 2 * BYTES + 8)])
def test_a_fusion_reads_and_writes_what_it_needs(space, want):
  """Of a stack of layers one slice is read, and one is written in place."""
  assert moved(FUSED.replace('%SPACE%', space)).hbm_bytes == want


CHAIN = HEAD + """%first (a: f32[8,16]) -> (f32[8,16], f32[64,16]) {
  %a = f32[8,16]{1,0} parameter(0)
  %g = f32[64,16]{1,0} all-gather(%a), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %c = (f32[8,16]{1,0}, f32[64,16]{1,0}) custom-call(%g), custom_call_target="Start"
}

%last (a: f32[8,16], g: f32[64,16], x: f32[8,16]) -> (f32[8,16], f32[64,16]) {
  %a.1 = f32[8,16]{1,0} parameter(0)
  %g.0 = f32[64,16]{1,0} parameter(1)
  %x = f32[8,16]{1,0} parameter(2)
  %g.1 = f32[64,16]{1,0} all-gather(%a.1), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
  %y = f32[8,16]{1,0} sine(%x)
  ROOT %t = (f32[8,16]{1,0}, f32[64,16]{1,0}) tuple(%y, %g.1)
}

ENTRY %main (a: f32[8,16], x: f32[8,16]) -> (f32[8,16], f32[64,16]) {
  %a.2 = f32[8,16]{1,0} parameter(0)
  %x.2 = f32[8,16]{1,0} parameter(1)
  %s = (f32[8,16]{1,0}, f32[64,16]{1,0}) fusion(%a.2), output_to_operand_aliasing=A, calls=%first
  %s.0 = f32[8,16]{1,0} get-tuple-element(%s), index=0
  %s.1 = f32[64,16]{1,0} get-tuple-element(%s), index=1
  ROOT %d = (f32[8,16]{1,0}, f32[64,16]{1,0}) fusion(%s.0, %s.1, %x.2), kind=kCustom, B, calls=%last
}
""".replace('=A', '={{0}: (0, {})}').replace(
    'B,', 'output_to_operand_aliasing={{1}: (1, {})},')


def test_a_collective_beside_products_counts_once():
  """It is in every fusion of a chain, and its result is written once."""
  found = moved(CHAIN)
  assert found.collectives == {'all-gather': hlo_cost.Collective(1, 8 * BYTES, 7 * BYTES)}
  # first: reads a, writes it and what is gathered; last: reads a and x, writes y
  assert found.hbm_bytes == (1 + 1 + 8) * BYTES + 3 * BYTES


def test_largest():
  found = hlo_cost.largest(hlo.parse(FUSED.replace('%SPACE%', '')), 2)
  assert [(b.shape, b.nbytes, b.op_name) for b in found] == [
      ('f32[4,8,16]', 4 * BYTES, 'argument'), ('f32[4,8,16]', 4 * BYTES, '')]


# Programs that a compiler has made ----------------------------------------


@pytest.fixture(name='mesh')
def fixture_mesh():
  return sharding.make_mesh(1, 1, 8)


def compiled(mesh, function, *shapes):
  """The text for arrays of given shapes and specs."""
  args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(
      mesh, PartitionSpec(*spec))) for shape, spec in shapes]
  return jax.jit(function, out_shardings=sharding.replicated(mesh)).lower(
      *args).compile().as_text()


def test_a_split_product_is_an_all_reduce(mesh):
  text = compiled(mesh, lambda x, w: x @ w, ((16, 64), (None, 'tensor')),
                  ((64, 32), ('tensor', None)))
  assert moved(text).collectives == {'all-reduce': hlo_cost.Collective(
      1, 16 * 32 * 4, 2 * 16 * 32 * 4 * 7 / 8)}


def test_a_gathered_array(mesh):
  text = compiled(mesh, lambda x: x + 1, ((64, 32), ('tensor', None)))
  assert moved(text).collectives == {'all-gather': hlo_cost.Collective(
      1, 64 * 32 * 4, 64 * 32 * 4 * 7 / 8)}


def test_a_scan_of_split_products(mesh):
  def loop(x, w):
    return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0]
  text = compiled(mesh, loop, ((16, 64), (None, 'tensor')),
                  ((5, 64, 64), (None, 'tensor', None)))
  found = moved(text).collectives['all-reduce']
  assert (found.count, found.payload) == (5, 5 * 16 * 64 * 4)


def test_traffic_of_a_plain_program():
  """Three arrays of a product, however the compiler names its parts."""
  text = jax.jit(lambda x, w: x @ w).lower(*[jax.ShapeDtypeStruct(
      (256, 256), jnp.float32)] * 2).compile().as_text()
  assert moved(text).hbm_bytes == 3 * 256 * 256 * 4
