"""The stages of the quickstart, each a config of its own.

Command:   vlm-compress quickstart [--workdir DIR] [--seed N]
One stage: vlm-compress train --config=configs/quickstart.py:voco8 \\
             --workdir=quickstart/voco8 --config.init_from=vlm_compress/checkpoints/quickstart
Hardware:  2 CPU cores, 6 GB.
Expected:  the table in the README.

The pictures are real OpenMoji artwork on a 3 x 3 grid, the vision encoder is
a pretrained EfficientNet-Lite0 (frozen), layouts and questions are generated,
and the decoder is small and trained from scratch.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from vlm_compress.data.rows import RowSpec
from vlm_compress.presets import prune_after_for
from vlm_compress.train.recipe import Recipe

STAGES = ('align', 'instruct', 'voco8', 'voco1', 'atp')
NUM_LAYERS, NUM_VISUAL = 8, 64
ATP_TARGET = NUM_VISUAL / 4


def _model(**method) -> dict:
  return {
      'vision': {'model_type': 'efficientnet_lite0', 'image_size': 128,
                 'patch_size': 16, 'hidden_size': 112},
      'text': {'hidden_size': 128, 'intermediate_size': 256,
               'num_hidden_layers': NUM_LAYERS, 'num_attention_heads': 4,
               'num_key_value_heads': 4, 'max_position_embeddings': 1024,
               # wider than usual: the decoder is narrow and starts afresh
               'initializer_range': 0.1},
      **method}


def _voco(num_voco_tokens: int) -> dict:
  return {'voco': {'num_voco_tokens': num_voco_tokens}}


# Turns drawn per picture and step.
KINDS = {'what': 9, 'caption': 1, 'where': 2, 'exists': 2, 'count': 2,
         'category': 3}

# Compression trains on the kinds that the base model has learned.
VOCO_ROWS = {'kinds': {'what': 7, 'caption': 1, 'count': 1, 'category': 2},
             'length': 180, 'text_length': 108}
# Trained as VoCo with as many tokens is: as long, on the same rows.
BASELINE_ROWS = {**VOCO_ROWS, 'num_voco_tokens': (0,), 'length': 116}
BASELINE_TRAIN = {'stage': 'instruct', 'steps': 450, 'learning_rate': 2e-3,
                  'warmup_steps': 20}
# With one turn per row these are weights.  Captions and counts need more
# tokens than `what`: drawn too rarely here, they would lift the average of the
# evaluation's mix above the target.
ATP_KINDS = {'what': 9, 'caption': 3, 'count': 3, 'category': 3}

ATP_TRAIN = {'steps': 350, 'batch_size': 32, 'learning_rate': 1.5e-3,
             'warmup_steps': 20}
ATP_TRAINING = {
    'prune_after': prune_after_for(NUM_LAYERS),
    # Departures from AtpConfig's defaults that a short training needs: the
    # budget is to be reached within the first hundred steps;
    'lambda_target': 2.0,
    # only the last prompt token of so small a decoder knows what is asked
    'cross_queries': 'last',
    # below 30, training learns to read tokens that are almost gone; at the
    # end soft masks must be as good as hard ones
    'temperature_start': 30.0, 'temperature_end': 300.0,
    # near enough to the scores for later modules to feel a steep sigmoid
    'init_theta_r': 0.3}


def _resampler(kind: str, num_tokens: int) -> dict:
  return _model(resampler=kind, num_query_tokens=num_tokens)


def get_config(stage: str = 'instruct') -> ConfigDict:
  """The config of one of STAGES or, for the sweep of configs/sweeps.py, of voco2,
  qformer8, pool8 and pool16.
  """
  model, rows, train = {
      'align': (_model(**_voco(8)),
                # captions only, as LLaVA's first stage; the decoder is still
                # random, so it teaches the projector little here
                {'num_voco_tokens': (0,), 'length': 82,
                 'kinds': {'caption': 1}},
                {'stage': 'align', 'steps': 50, 'learning_rate': 1e-3,
                 'trainable': ('multi_modal_projector/',),
                 'warmup_steps': 10}),
      # Two thirds of the rows carry VoCo tokens under the causal mask, so that the
      # model is VoCo's upper bound as well.
      'instruct': (_model(**_voco(8)),
                   {'num_voco_tokens': (0, 0, 1, 2, 4, 8), 'length': 272},
                   {'stage': 'instruct', 'steps': 1000,
                    'learning_rate': 2e-3}),
      'voco8': (_model(**_voco(8)),
                {'num_voco_tokens': (8,), **VOCO_ROWS},
                {'stage': 'voco', 'steps': 450, 'learning_rate': 2e-3,
                 'warmup_steps': 20}),
      'voco1': (_model(**_voco(1)),
                {'num_voco_tokens': (1,), **VOCO_ROWS},
                {'stage': 'voco', 'steps': 200, 'learning_rate': 2e-3,
                 'warmup_steps': 20}),
      # from voco8: 450 steps from the base model leave it at 8 % of its questions
      'voco2': (_model(**_voco(2)),
                {'num_voco_tokens': (2,), **VOCO_ROWS},
                {'stage': 'voco', 'steps': 200, 'learning_rate': 2e-3,
                 'warmup_steps': 20}),
      'qformer8': (_resampler('qformer', 8), BASELINE_ROWS, BASELINE_TRAIN),
      'pool8': (_resampler('avg_pool_linear', 8), BASELINE_ROWS, BASELINE_TRAIN),
      'atp': (_model(atp={'target_tokens': ATP_TARGET, **ATP_TRAINING}),
              {'one_turn': True, 'length': 82, 'kinds': ATP_KINDS},
              {'stage': 'atp', **ATP_TRAIN}),
      # trained as ATP is
      'pool16': (_resampler('avg_pool_linear', 16),
                 {'num_voco_tokens': (0,), 'one_turn': True, 'length': 34,
                  'kinds': ATP_KINDS},
                 {'stage': 'instruct', **ATP_TRAIN}),
  }[stage]
  return ConfigDict({
      'model': model,
      'data': {'name': 'openmoji_grid', 'image_size': 128,
               'options': {'num_train': 4000, 'num_validation': 250,
                           'num_test': 500},
               'train_split': 'train', 'test_split': 'test',
               'tokenizer': ''},
      'rows': {**dataclasses.asdict(RowSpec()), 'kinds': KINDS, **rows},
      'train': {**dataclasses.asdict(Recipe()), 'checkpoint_steps': 100,
                **train},
      'eval': {'num_test': 200, 'headline': ('what',),
               'per_kind': {'what': 3, 'caption': 1, 'where': 1, 'exists': 1,
                            'count': 1, 'category': 1}},
      'init_from': '',
  }, convert_dict=True)
