"""What makes the recipes of configs/llava_7b.py the papers', as one table."""

from __future__ import annotations

import json
import pathlib
import re

import pytest

from vlm_compress.cli.stage import bridge
from vlm_compress.cli.train import load_module, load_page
from vlm_compress.config import PROJECTIONS
from vlm_compress.sharding import MeshSpec

ROOT = pathlib.Path(__file__).parents[2]
PAGE = str(ROOT / 'configs/llava_7b.py')
PROJECTOR, DECODER = 'multi_modal_projector/', 'language_model/'
ALL, ADAPTED = (PROJECTOR, DECODER), (PROJECTOR, '*/lora_*')
MIX, PICTURES = 665_298, 665_298 - 40_688  # rows, and those with a picture
# page: stage, peak rate, batch, rows, epochs, template, pictures are, one turn,
# what learns, start.
TABLE = {
    'align': ('align', 1e-3, 256, 558_128, 1, 'plain', 'crop', False,
              (PROJECTOR,), 'start'),
    'instruct': ('instruct', 2e-5, 128, MIX, 1, 'vicuna_v1', 'pad', False,
                 ALL, 'align/model'),
    'voco': ('voco', 2e-5, 128, PICTURES, 2, 'voco', 'pad', False,
             (*ALL, 'voco_embedding'), 'instruct/model'),
    'voco_kl': ('voco', 2e-5, 128, PICTURES, 2, 'voco', 'pad', False,
                (*ALL, 'voco_embedding'), 'instruct/model'),
    'atp': ('atp', 2e-5, 128, MIX, 1, 'vicuna_v1', 'pad', True,
            (*ALL, 'atp/'), 'instruct/model'),
    'atp88': ('atp', 2e-5, 128, MIX, 1, 'vicuna_v1', 'pad', True,
              (*ALL, 'atp/'), 'instruct/model'),
    'atp_frozen': ('atp', 2e-5, 128, MIX, 1, 'vicuna_v1', 'pad', True,
                   ('atp/',), 'instruct/model'),
    'instruct_lora': ('instruct', 2e-4, 128, MIX, 1, 'vicuna_v1', 'pad', False,
                      ADAPTED, 'align/model'),
    'voco_lora': ('voco', 2e-4, 128, PICTURES, 2, 'voco', 'pad', False,
                  (*ADAPTED, 'voco_embedding'), 'instruct/model'),
    'atp_lora': ('atp', 2e-4, 128, MIX, 1, 'vicuna_v1', 'pad', True,
                 (*ADAPTED, 'atp/'), 'instruct/model')}
TARGETS = {'atp': 144.0, 'atp88': 88.0, 'atp_frozen': 144.0, 'atp_lora': 144.0}
MODULES = {'': (4, 14, 24), '13b_': (5, 17, 30)}


def test_the_table_has_all_pages():
  assert set(load_module(PAGE).STAGES) == set(TABLE)


@pytest.mark.parametrize('size', MODULES)
@pytest.mark.parametrize('name', TABLE)
def test_a_recipe_is_the_papers(size, name):
  (kind, rate, batch_size, rows, epochs, template, aspect, one_turn, learns,
   start) = TABLE[name]
  stage = bridge(load_page(f'{PAGE}:{size}{name}'))
  recipe = stage.recipe
  assert (recipe.stage, recipe.learning_rate, recipe.batch_size) == (
      kind, rate, batch_size)
  assert recipe.steps == rows * epochs // batch_size
  assert recipe.warmup_steps == int(0.03 * recipe.steps)
  # Adam's first beta is optax's 0.9, which tests/train/test_schedule.py pins.
  assert (recipe.b2, recipe.weight_decay, recipe.final_learning_rate) == (
      0.999, 0.0, 0.0)
  assert (recipe.clip_norm, recipe.accumulate_steps, recipe.teacher) == (
      1.0, 2 if name == 'atp_lora' else 1, 'frozen' if name == 'voco_kl' else 'none')
  assert recipe.spike_factor == 5.0
  assert recipe.trainable == learns
  assert (stage.rows.template, stage.rows.image_aspect_ratio, stage.rows.one_turn,
          stage.rows.length) == (template, aspect, one_turn,
                                 1024 if name == 'align' else 2048)
  folder = 'llava_' + ('13b' if size else '7b')
  assert stage.init_from == f'runs/{folder}/{start}'
  assert stage.mesh == (MeshSpec(data=-1, fsdp=16, tensor=1) if name.endswith('_lora')
                        else MeshSpec(data=-1, fsdp=32, tensor=2))
  assert (stage.model['dtype'], stage.model['param_dtype'], stage.model['remat']) == (
      'bfloat16', 'float32', True)


@pytest.mark.parametrize('size', MODULES)
@pytest.mark.parametrize('name', TABLE)
def test_a_method_is_the_papers(size, name):
  stage = bridge(load_page(f'{PAGE}:{size}{name}'))
  voco, atp = (stage.model.get(method) for method in ('voco', 'atp'))
  want = {'num_voco_tokens': 1} if name.startswith('voco') else None
  assert voco == (want and {**want, 'distill_weight': 1.0} if name == 'voco_kl' else want)
  assert stage.rows.num_voco_tokens == ((1,) if want else (0,))
  lora = stage.model.get('lora')
  assert (lora and (lora['rank'], lora['alpha'], set(lora['targets']))) == (
      (128, 256.0, set(PROJECTIONS)) if name.endswith('_lora') else None)
  want = {'target_tokens': TARGETS[name], 'prune_after': MODULES[size]} if (
      name in TARGETS) else None
  assert atp == want


@pytest.mark.parametrize('name', TABLE)
def test_tiny_recipes_learn_the_same(name):
  tiny, big = (bridge(load_page(f'{PAGE}:{size}{name}')) for size in ('tiny_', ''))
  assert tiny.recipe.trainable == big.recipe.trainable
  assert (tiny.recipe.learning_rate, tiny.rows.template) == (
      big.recipe.learning_rate, big.rows.template)
  assert tiny.recipe.steps <= 12 and tiny.mesh == MeshSpec(-1, 1, 1)


def test_every_page_has_hours_and_what_to_expect():
  text = load_module(PAGE).__doc__
  hours, expected = (part.partition('\n\n')[0] for part in (
      text.partition('Hours:')[2].partition('Expected:')[0],
      text.partition('Expected:')[2]))
  assert 'compiler bound, not measured' in hours and 'The literature' in expected
  for name in TABLE:
    assert re.search(rf'\b{name}\b', hours) and re.search(rf'\b{name}\b', expected)


SLICES = {'v5e-256': 'v5e-16x16', 'v5e-16': 'v5e-4x4',
          'v5p with 64 chips': 'v5p-4x4x4-fsdp64'}


def test_hours_are_the_bound_of_a_step_times_steps():
  text = load_module(PAGE).__doc__.partition('Hours:')[2].partition('Expected:')[0]
  seen = set()
  for name, line in re.findall(r'^ +(\w+) +([\d.]+ on .*)$', text, re.M):
    steps = bridge(load_page(f'{PAGE}:{name}')).recipe.steps
    for part in line.split(', '):
      said, where = part.split(' on ')
      report = f'{name}_{SLICES[where]}'
      found = json.loads((ROOT / 'results/compile' / report / 'compile.json').read_text())
      (one,) = [p for p in found['programs'] if p['name'].startswith('train')]
      assert said == f'{steps * one["bound"]["seconds"] / 3600:.2f}', report
      assert found['config'].endswith(f':{name}') and one['verdict'] == 'fits'
      seen.add(name)
  assert seen >= set(TABLE) - {'atp88'}
