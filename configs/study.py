r"""A longer study: every method trained, floors trained too, three seeds.

Command:   vlm-compress study --config=configs/study.py --workdir=study
One stage: vlm-compress train --config=configs/study.py:voco8 --workdir=... \
             --config.init_from=vlm_compress/checkpoints/quickstart
Hardware:  2 CPU cores, 6 GB; it may be interrupted and goes on.
Hours:     measured: sixteen runs of 1.5 to 11 minutes for one seed (README), and
           evaluation.
Expected:  the table in the README; the literature has no scores on these pictures.

Models and floors start from the base model that ships with the package (--base
takes another) and train for STEPS steps on the kinds of question that it has
learned; seeds differ in order, drawing and fresh parameters.  Floors are trained
at 25 %; at 35 and 18 % they are training-free.

Exceptions: VoCo with fewer than 8 tokens starts from VoCo with 8, as in the
quickstart, so that 2 and 4 tokens have had 2 x STEPS in all; and everything with
one token has ONE_TOKEN_STEPS in all, VoCo's steps with 8 tokens included.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from vlm_compress.cli import quickstart_config

STEPS, ONE_TOKEN_STEPS = 300, 1000
# In the order they run: what the main comparisons need comes first; floors that
# take their counts from an ATP run follow it.
PLAN = ('ub', 'atp25', 'random25', 'uniform25', 'fixed25', 'pool25',
        'voco8', 'voco1', 'pool1', 'qformer1',
        'atp18', 'atp35', 'voco2', 'voco4', 'voco8_kl', 'atp25_frozen')
ATP_PERCENT = {'atp35': 35, 'atp25': 25, 'atp18': 18}
ROWS = {'kinds': {'what': 9, 'caption': 1, 'count': 2, 'category': 3},
        'length': 216, 'text_length': 144}
NUM_TEST = 250
# Trained floor -> the ATP run whose kept counts it takes.
COUNTS_FROM = {'random25': 'atp25', 'uniform25': 'atp25', 'fixed25': 'atp25'}
# Run -> the run whose weights it starts from; the others start from the base.
START_FROM = {'voco4': 'voco8', 'voco2': 'voco8', 'voco1': 'voco8'}
STEPS_OF = {'voco1': ONE_TOKEN_STEPS - STEPS, 'pool1': ONE_TOKEN_STEPS,
            'qformer1': ONE_TOKEN_STEPS}


def _voco(num_voco_tokens: int) -> dict:
  return {'model': {'voco': {'num_voco_tokens': num_voco_tokens}},
          'rows': {'num_voco_tokens': (num_voco_tokens,)},
          'train': {'stage': 'voco'}}


def _distilled(num_voco_tokens: int) -> dict:
  """VoCo with the explicit teacher: the model that training starts from."""
  config = _voco(num_voco_tokens)
  config['model']['voco']['distill_weight'] = 1.0
  config['train']['teacher'] = 'frozen'
  return config


def _frozen(config: dict) -> dict:
  """Only the ATP modules learn."""
  config['train']['trainable'] = ('atp/',)
  return config


def _one_turn(config: dict) -> dict:
  """Trained on as many rows, of one turn, as the pruned models are."""
  config['rows'].update(one_turn=True, length=34,
                        kinds=quickstart_config.ATP_KINDS)
  config['train'].update(batch_size=32)
  return config


def _resampler(kind: str, num_tokens: int) -> dict:
  return {'model': {'resampler': kind, 'num_query_tokens': num_tokens,
                    'voco': None},
          'rows': {'num_voco_tokens': (0,), 'length': 153},
          'train': {'stage': 'instruct'}}


def _pruned(selector: str, percent: float) -> dict:
  tokens = quickstart_config.NUM_VISUAL * percent / 100
  atp = {'selector': selector, 'target_tokens': tokens,
         **quickstart_config.ATP_TRAINING}
  if selector != 'adaptive':
    atp['fixed_counts'] = ()  # the study sets them from the ATP run
  return {'model': {'voco': None, 'atp': atp},
          'rows': {'num_voco_tokens': (0,), 'one_turn': True, 'length': 82,
                   'kinds': quickstart_config.ATP_KINDS},
          'train': {'stage': 'atp', 'batch_size': 32}}


def get_config(stage: str = 'ub') -> ConfigDict:
  """The config of one of PLAN."""
  changes = {
      'ub': {'rows': {'num_voco_tokens': (0, 1, 2, 4, 8)}},
      'pool1': _resampler('avg_pool_linear', 1),
      'qformer1': _resampler('qformer', 1),
      'pool25': _one_turn(_resampler('avg_pool', 16)),
      'voco8_kl': _distilled(8),
      'atp25_frozen': _frozen(_pruned('adaptive', 25)),
      **{f'voco{c}': _voco(c) for c in (1, 2, 4, 8)},
      **{name: _pruned('adaptive', p) for name, p in ATP_PERCENT.items()},
      **{f'{s}25': _pruned(s, 25) for s in ('random', 'uniform', 'fixed')},
  }[stage]
  values = quickstart_config.get_config('instruct').to_dict()
  values['rows'].update(ROWS)
  for section, fields in changes.items():
    values[section].update(fields)
  values['eval']['num_test'] = NUM_TEST
  values['train'].update(steps=STEPS_OF.get(stage, STEPS), learning_rate=1.5e-3, warmup_steps=20)
  return ConfigDict(values, convert_dict=True)
