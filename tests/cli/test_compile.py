"""compile: programs, mistakes, the sweep; for TPUs where their compiler is.

The eight fake CPU devices stand in for a slice where no TPU compiler is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import core_helpers  # noqa: F401  (programs are compiled without optimising)
import jax
import pytest

from vlm_compress import sharding
from vlm_compress.cli import __main__ as cli
from vlm_compress.cli import compile as compile_lib
from vlm_compress.cli import compile_sweep, slice_programs
from vlm_compress.cli.slice_programs import Prompt
from vlm_compress.cli.stage import bridge
from vlm_compress.cli.train import load_page, override
from vlm_compress.data.rows import Row, plain_collate, voco_collate
from vlm_compress.eval import compiled
from vlm_compress.eval.hardware import chip_of
from vlm_compress.models import sequence
from vlm_compress.train import shapes

PAGE = 'configs/llava_7b.py'
V5E = chip_of('TPU v5 lite')
STAGES = ('align', 'instruct', 'voco', 'atp', 'atp88', 'atp_frozen')
NARROW = ['--config.model.text.hidden_size=12',
          '--config.model.text.num_attention_heads=2']
SHORT = ['--config.rows.length=64', '--config.rows.text_length=40']


def stage_of(arg):
  page = load_page(f'{PAGE}:{arg}')
  if arg.startswith('tiny'):
    override(page, SHORT)
  stage = bridge(page)
  return stage, compile_lib.config_of(stage)


@pytest.mark.parametrize('size', ['', '13b_', 'tiny_'])
@pytest.mark.parametrize('name', STAGES)
def test_every_page_is_a_stage(size, name):
  stage, config = stage_of(size + name)
  recipe = stage.recipe
  assert recipe.final_learning_rate == 0.0 and recipe.weight_decay == 0.0
  assert (config.voco is not None, config.atp is not None) == (
      name == 'voco', name.startswith('atp'))
  assert 'vision_tower' not in ''.join(recipe.trainable)
  if size != 'tiny_':
    assert recipe.batch_size == (256 if name == 'align' else 128)
    assert recipe.steps == {'align': 2180, 'voco': 9759}.get(name, 5197)
    assert recipe.warmup_steps == int(0.03 * recipe.steps)
    assert (config.text.hidden_size, config.text.num_hidden_layers) == (
        (5120, 40) if size else (4096, 32))
    assert stage.init_from.endswith('/start' if name == 'align' else '/model')


@pytest.mark.parametrize('arg', ['tiny_instruct', 'tiny_voco', 'tiny_atp'])
def test_shapes_are_those_of_real_batches(arg):
  stage, config = stage_of(arg)
  rows, C = stage.rows, 1 if config.voco else 0
  ids = [1, config.image_token_index, 5, *[config.voco_token_index] * C, 5, 6, 7]
  tokens = sequence.expand_row(ids, [False] * (len(ids) - 1) + [True], [0] * len(ids), config)
  pixels = jax.numpy.zeros((1, 24, 24, 3), jax.numpy.uint8)
  collate = voco_collate(rows, config) if config.voco else plain_collate(rows)
  batch = collate([Row(tokens, pixels)] * stage.recipe.batch_size)
  want = shapes.step_batch(config, stage.recipe, rows)
  assert jax.tree.structure(batch).num_leaves == jax.tree.structure(want).num_leaves
  for path, x in jax.tree_util.tree_leaves_with_path(batch):
    y = dict(jax.tree_util.tree_leaves_with_path(want))[path]
    assert x.shape == y.shape, path
    assert x.dtype == y.dtype or 'features' in jax.tree_util.keystr(path), path


def test_shapes_are_the_longest():
  stage, config = stage_of('voco')
  rows = dataclasses.replace(stage.rows, max_images=2)
  of = lambda change, teacher='none': shapes.step_batch(
      config, dataclasses.replace(stage.recipe, teacher=teacher),
      dataclasses.replace(rows, **change))
  assert of({})[0].text.input_ids.shape == (128, 2048 - 576 - 1)
  assert of({'bucket_lengths': (700, 900)}, 'self')[1].input_ids.shape == (128, 900)
  assert of({'bucket_lengths': (), 'text_length': 640})[0].text.input_ids.shape == (128, 640)
  assert of({})[0].text.features.shape == (128, 2, 336, 336, 3)


@pytest.fixture(name='mesh')
def fixture_mesh():
  return sharding.make_mesh(2, 2, 2)


def check_report(program, mesh):
  one = compile_lib.compile_program(program, V5E, mesh.size)
  assert one.verdict == compiled.FITS and one.loops_once == 0
  assert one.memory.peak > 0 and one.hbm_moved > 0
  assert one.bound.seconds > 0 and one.buffers and one.hardware_flops > 0
  return one


@pytest.mark.parametrize('arg', ['tiny_voco', 'tiny_atp'])
def test_training_steps_compile(mesh, arg):
  stage, config = stage_of(arg)
  one = check_report(slice_programs.train_program(config, stage, mesh), mesh)
  assert one.name == f'train ({stage.recipe.stage})' and one.batch_size == 8
  assert one.collectives['all-reduce'].count > 0
  assert one.hardware_flops >= one.model_flops


@pytest.mark.parametrize('arg, names', [
    ('tiny_instruct', ['prefill, 16 + 12 tokens', 'decode, 92 slots']),
    ('tiny_voco', ['prefill, 16 + 12 tokens', 'decode, 77 slots']),
    ('tiny_atp', ['prefill, layers 1 to 1 of 4, 32 slots',
                  'prefill, layers 2 to 3 of 4, 24 slots',
                  'decode, layers 1 to 1 of 4, 32 slots',
                  'decode, layers 2 to 3 of 4, 24 slots'])])
def test_serving_programs_compile(mesh, arg, names):
  config = stage_of(arg)[1]
  programs = [p for which in ('prefill', 'decode') for p in
              slice_programs.serving_programs(config, mesh, which, 4, Prompt(text=12))]
  assert [p.name for p in programs] == names
  for program in programs:
    assert check_report(program, mesh).batch_size == 4


def test_conditionals_count_as_often_as_they_work():
  taken = lambda arg, name: slice_programs.taken_branches(stage_of(arg)[1], name)
  assert taken('voco', 'jit/Llava/vision_tower/cond') == 23 / 24
  assert taken('atp', 'jit/Llava/language_model/cond') == 3 / 32
  assert taken('voco', 'jit/Llava/language_model/cond') == 1.0


def test_frozen_parts_take_no_memory_of_the_optimiser(mesh):
  sizes = {}
  for arg in ('tiny_align', 'tiny_instruct'):
    stage, config = stage_of(arg)
    state = slice_programs.abstract_state(
        slice_programs.Llava(config), stage.recipe, mesh, True)
    sizes[arg] = slice_programs.state_bytes(state)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert whole / 8 <= sizes[arg] < whole
  assert sizes['tiny_align'] < 0.6 * sizes['tiny_instruct']


def test_a_refusal_is_a_verdict_with_the_largest_arguments(mesh):
  stage, config = stage_of('tiny_instruct')
  program = slice_programs.train_program(config, stage, mesh)

  def refuse():
    raise jax.errors.JaxRuntimeError(
        'RESOURCE_EXHAUSTED: temporaries (30.4G) exceeds available HBM (15.75G).')
  one = compile_lib.compile_program(dataclasses.replace(program, lower=refuse), V5E, 8)
  assert one.verdict == compiled.TOO_LARGE and one.bound is None
  first = one.buffers[0]
  assert first.nbytes == max(b.nbytes for b in one.buffers)
  assert 'vision_tower' in first.op_name or 'language_model' in first.op_name
  broken = dataclasses.replace(program, lower=lambda: (_ for _ in ()).throw(
      jax.errors.JaxRuntimeError('INTERNAL: a bug')))
  with pytest.raises(jax.errors.JaxRuntimeError, match='a bug'):
    compile_lib.compile_program(broken, V5E, 8)


# The command ---------------------------------------------------------------


@pytest.fixture(name='slice_of_cpus')
def fixture_slice_of_cpus(monkeypatch):
  """Eight CPUs that are taken for v5e chips."""
  monkeypatch.setattr(compile_lib, 'slice_devices', lambda name: jax.devices()[:8])
  for module in (compile_lib, compile_sweep):
    monkeypatch.setattr(module, 'chip_of', lambda kind: V5E)
  monkeypatch.setattr(compile_lib, 'versions', lambda: {'libtpu': 'none'})


def run(*argv):
  return cli.main(['compile', f'--config={PAGE}:tiny_align', '--topology=v5e:2x4', *SHORT,
                   *argv])


def test_report_is_printed_and_written(slice_of_cpus, tmp_path, capsys):
  assert run(f'--out={tmp_path}', '--mesh=fsdp=4,tensor=2', '--programs=decode',
             '--batch-sizes=8') == 0
  printed = capsys.readouterr().out
  page = (tmp_path / 'compile.md').read_text()
  for part in ('Compiler estimates', 'fits', 'all-reduce', 'Largest arrays'):
    assert part in printed and part in page, part
  found = json.loads((tmp_path / 'compile.json').read_text())
  assert found['mesh'] == {'data': 1, 'fsdp': 4, 'tensor': 2} and found['chip'] == 'v5e'
  assert [(one['name'], one['batch_size']) for one in found['programs']] == [
      ('decode, 144 slots', 8)]


@pytest.mark.parametrize('argv, words', [
    (['--mesh=fsdp=3'], ['fsdp=3', 'does not divide', '8 devices']),
    (['--mesh=tensor=8'], ['mesh.tensor=8', 'num_attention_heads=4']),
    (['--mesh=fsdp=8', '--config.model.vision.hidden_size=36'],
     ['mesh.fsdp=8', 'vision.hidden_size=36', 'use a divisor']),
    (['--mesh=fsdp=8', *NARROW], ['mesh.fsdp=8', 'text.hidden_size=12']),
    (['--mesh=fsdp=8', '--programs=decode', *NARROW], ['mesh.fsdp=8', '=12']),
    (['--mesh=pipe=2'], ['pipe=2', 'data, fsdp, tensor']),
    (['--batch-sizes=12'], ['train.batch_size=12', '8 devices']),
    (['--batch-sizes=0'], ["'0' is not a whole number >= 1"]),
    (['--programs=train,serve'], ["'serve'", 'train, prefill, decode']),
    (['--programs=prefill', '--batch-sizes=3'], ['3 prompts', '8 devices']),
    (['--mfu=1.5'], ['1.5', '<= 1']),
    (['--sweep', '--batch-sizes=7'], ['no mesh of 8 chips divides', '7'])])
def test_mistakes_are_one_line(slice_of_cpus, tmp_path, capsys, argv, words):
  assert run(f'--out={tmp_path}', *argv) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: ') and err.count('\n') == 1
  for word in words:
    assert word in err, err


def test_without_the_compiler_the_extra_is_named(monkeypatch, capsys):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: (
      None if name == 'libtpu' else find(name, *a)))
  assert run() == 2
  assert "pip install -e '.[tpu-compile]'" in capsys.readouterr().err


def test_sweep(slice_of_cpus, monkeypatch, tmp_path, capsys):
  """The best that fits is found, and a sweep that was stopped goes on."""
  tried = []

  def fake(program, on, num_chips):
    tried.append(program.name)
    if len(tried) == 4:
      raise KeyboardInterrupt
    bound = compiled.Bound(0.1 * len(tried), 0.0, 0.0)
    return compiled.Report(
        program.name, program.batch_size,
        compiled.TOO_LARGE if len(tried) == 1 else compiled.FITS, 100, 50, None,
        1.0, 1.0, None, {}, 0, bound, ())
  monkeypatch.setattr(compile_lib, 'compile_program', fake)
  argv = ['--sweep', f'--out={tmp_path}', '--max-compiles=5']
  assert run(*argv) == 130
  assert len(list((tmp_path / 'sweep').glob('*.json'))) == 3
  capsys.readouterr()
  assert run(*argv) == 0
  assert len(tried) == 6
  found = json.loads((tmp_path / 'sweep.json').read_text())
  assert len(found['rows']) == 5 and found['not_tried'] > 0
  out = capsys.readouterr().out
  second = found['rows'][1]
  assert 'Best that fits: --mesh=data={},fsdp={},tensor={}'.format(*second['mesh']) in out
  assert out.count('does not fit') == 1 and 'were not tried' in out


def test_candidates_divide_and_come_in_order():
  stage, config = stage_of('tiny_voco')
  config = dataclasses.replace(config, remat=True)
  found = compile_sweep.candidates(stage, config, jax.devices()[:8], (4, 8))
  assert len(set(found)) == len(found)
  for one in found:
    data, fsdp, tensor = one.mesh
    assert data * fsdp * tensor == 8 and 4 % tensor == 0
    assert one.batch_size % (data * fsdp) == 0
  assert {one.remat_policy for one in found} == set(compile_lib.compile_sweep.REMAT_POLICIES)
  assert {one.batch_size for one in found} == {4, 8}
  sends = [compile_sweep._estimate(stage, config, one) for one in found]
  assert sends == sorted(sends)


def test_mesh_flag():
  assert compile_lib._mesh('fsdp=4, tensor=2') == sharding.MeshSpec(-1, 4, 2)
  for text in ('fsdp', 'fsdp=x', '=2', ''):
    with pytest.raises(argparse.ArgumentTypeError, match='AXIS=N'):
      compile_lib._mesh(text)
  with pytest.raises(argparse.ArgumentTypeError, match='mesh.fsdp=0'):
    compile_lib._mesh('fsdp=0')


# For TPUs -------------------------------------------------------------------


def for_a_slice(tmp_path, arg, topology, *argv):
  """Runs the command in a process of its own; gives the report."""
  done = subprocess.run(
      [sys.executable, '-m', 'vlm_compress.cli', 'compile', f'--config={PAGE}:{arg}',
       f'--topology={topology}', f'--out={tmp_path}', *argv],
      text=True, capture_output=True, check=False, env=os.environ | {'XLA_FLAGS': ''})
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads((tmp_path / 'compile.json').read_text())


@pytest.mark.tpu
def test_a_tiny_model_compiles_for_a_slice(tmp_path):
  found = for_a_slice(tmp_path, 'tiny_atp', 'v5e:2x2', '--mesh=fsdp=2,tensor=2', *SHORT)
  assert found['chip'] == 'v5e' and found['num_chips'] == 4
  for one in found['programs']:
    assert one['verdict'] == 'fits' and one['loops_once'] == 0
    assert 0 < one['needed_bytes'] < 2**28 and one['bound']['seconds'] > 0


@pytest.mark.tpu
def test_an_unknown_slice_is_named(capsys):
  done = subprocess.run(
      [sys.executable, '-m', 'vlm_compress.cli', 'compile',
       f'--config={PAGE}:tiny_align', '--topology=v5e:banana'],
      text=True, capture_output=True, check=False)
  assert done.returncode == 2 and '--topology=v5e:banana' in done.stderr
  assert 'v5e:16x16' in done.stderr


@pytest.mark.tpu
@pytest.mark.parametrize('arg', ['voco', 'atp'])
def test_7b_compiles_for_a_slice(tmp_path, arg):
  found = for_a_slice(tmp_path, arg, 'v5e:16x16')
  (one,) = found['programs']
  assert one['verdict'] == 'fits' and one['needed_bytes'] < 16 * 2**30
  assert one['collectives']['all-gather']['count'] >= 32 and one['loops_once'] == 0
