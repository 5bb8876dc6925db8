"""Sweeps: a grid of checkpoints, methods, budgets, benchmarks and seeds.

Command:   vlm-compress sweep --config=configs/sweeps.py:tiny --out=sweeps/tiny
           vlm-compress sweep --config=configs/sweeps.py:llava_7b --out=sweeps/llava_7b \
             --config.checkpoints.base=llava7b --config.checkpoints.atp=runs/llava_7b/atp/model
Hardware:  tiny: 2 CPU cores.  llava_7b: a TPU host or several (--distributed), its
           models converted (vlm-compress convert) or trained (configs/llava_7b.py).
Hours:     none was computed or measured for llava_7b.
Expected:  tiny: the table in the README (launch/sweep_tiny.sh makes it).  llava_7b: not run yet;
           the papers' numbers are 62.0 GQA and 78.5 VQAv2 for the full model, and
           98.1 % of it with ATP at 144 tokens (arXiv 2412.00447, table 1).

A checkpoint that is '' is left out, with its methods.  `{seed}` in a path is filled
with each of the seeds.  `methods` are (checkpoint, method, budgets); floors, bounds
and the full model are added (vlm_compress/eval/sweep_plan.py).
"""

from __future__ import annotations

from ml_collections import ConfigDict

COMMON = {'base': 'base', 'seeds': (0,), 'limit': 0, 'shards': 16, 'tensor': 1,
          'template': '', 'allow_partial': False, 'calibrate_with': '',
          'calibrate_data_root': '',
          'frames': 8}  # of every video, in benchmarks that have some


MODELS = 'sweep_tiny/models'  # of launch/sweep_tiny.sh sweep_tiny
# Pages of configs/quickstart.py.
TRAINED = ('voco8', 'voco2', 'qformer8', 'pool8', 'pool16', 'atp')


def get_config(name: str = 'tiny') -> ConfigDict:
  """The config of a sweep: tiny or llava_7b."""
  return ConfigDict({**COMMON, **{
      'tiny': {
          # the base is shipped; the others are trained by launch/sweep_tiny.sh
          'checkpoints': {'base': 'vlm_compress/checkpoints/quickstart',
                          **{name: f'{MODELS}/{name}/seed{{seed}}/model' for name in TRAINED}},
          # FastV and PyramidDrop would have one token left behind their cuts at 16
          'methods': (('voco8', 'voco', (8,)), ('voco2', 'voco', (2,)),
                      ('qformer8', 'qformer', ()), ('pool8', 'avg_pool_linear', ()),
                      ('pool16', 'avg_pool_linear', ()), ('atp', 'atp', (12, 16, 24)),
                      *(('base', peer, (2, 8, 16, 24)) for peer in ('divprune', 'cdpruner')),
                      *(('base', peer, (24, 32)) for peer in ('fastv', 'pyramiddrop')),
                      ('base', 'sparsevlm', (16, 24, 32))),
          'benchmarks': {'openmoji_grid': MODELS},
          'seeds': (0, 1, 2), 'batch_size': 16, 'limit': 800,  # 100 pictures
          'time_repeats': 7, 'shards': 2,  # many shards have many shapes to compile
          # shifts are found on the training split
          'calibrations': {'atp': ''}, 'calibrate_with': 'configs/quickstart.py:atp',
          'calibrate_data_root': MODELS},
      'llava_7b': {
          'checkpoints': {'base': 'llava7b', 'voco': '', 'atp': ''},
          # PyramidDrop reads 144 tokens on average before its first cut
          'methods': (('voco', 'voco', ()), ('atp', 'atp', (88, 144, 192)),
                      *(('base', peer, (88, 144, 192)) for peer in (
                          'visionzip', 'divprune', 'cdpruner', 'sparsevlm', 'fastv')),
                      ('base', 'pyramiddrop', (192,))),
          # the seven of ATP-LLaVA's table 1; VQAv2's val, which is scored here
          'benchmarks': {'gqa': 'eval', 'mmbench': 'eval', 'mme': 'eval', 'pope': 'eval',
                         'seed': 'eval', 'scienceqa': 'eval', 'vqav2': 'eval'},
          'batch_size': 16, 'time_repeats': 0,  # would hold all checkpoints at once
          # of vlm-compress calibrate --target-tokens 88 144 192 --out: not on these
          # benchmarks
          'calibrations': {'atp': 'calibrations/atp.json'}},
  }[name]}, convert_dict=True)
