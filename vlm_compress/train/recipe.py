"""What a training run is: its stage, its data and its optimiser settings."""

from __future__ import annotations

import dataclasses

from vlm_compress.config import check

STAGES = ('align', 'instruct', 'voco', 'atp')


@dataclasses.dataclass(frozen=True)
class Recipe:
  """One training stage.

  Attributes:
    stage: 'align' and 'instruct' train the plain model by next-token loss,
      'voco' under the VoCo mask in two passes, 'atp' with pruning modules.
    steps: optimiser steps.
    batch_size: pictures per step.
    learning_rate: peak; warmup_steps linear, then cosine to
      final_learning_rate.
    b2, weight_decay, clip_norm: AdamW and global-norm clipping.
    trainable: the parameters that learn, each named by the start of its path
      ('atp/') or by a pattern with * for the whole path ('*/lora_*' are the
      adapters of LoRA; * also stands for slashes); () is all.
    seed: of initialisation, data order and selection.
    accumulate_steps: parts that a batch is computed in, one after the other;
      gradients are those of the whole batch.
    log_steps, checkpoint_steps: intervals.
    keep_checkpoints: newest ones that are kept; keep_best: besides, so many
      with the lowest loss.
    spike_factor: training stops where the loss is that many times the mean of
      the steps before, as it does where it is no number; 0 is never.
    teacher: 'none', 'self' (same parameters, causal mask, no gradient) or
      'frozen' (the parameters that training started from); used when
      voco.distill_weight > 0.
  """
  stage: str = 'instruct'
  steps: int = 1000
  batch_size: int = 16
  learning_rate: float = 2e-3
  warmup_steps: int = 50
  final_learning_rate: float = 1e-5
  b2: float = 0.98
  weight_decay: float = 0.05
  clip_norm: float = 1.0
  trainable: tuple[str, ...] = ()
  seed: int = 0
  accumulate_steps: int = 1
  log_steps: int = 25
  checkpoint_steps: int = 200
  keep_checkpoints: int = 2
  keep_best: int = 0
  spike_factor: float = 0.0
  teacher: str = 'none'

  def __post_init__(self):
    check(self.stage in STAGES, f'train.stage={self.stage!r}: use one of '
          f'{STAGES}')
    check(self.teacher in ('none', 'self', 'frozen'),
          f'train.teacher={self.teacher!r}: use none, self or frozen')
    for name in ('steps', 'batch_size', 'accumulate_steps', 'log_steps',
                 'checkpoint_steps', 'keep_checkpoints'):
      check(getattr(self, name) >= 1, f'train.{name}: at least 1')
    check(0 <= self.seed < 2 ** 31,
          f'train.seed={self.seed}: from 0 to 2147483647')
    for name in ('learning_rate', 'clip_norm'):
      check(getattr(self, name) > 0.0, f'train.{name}: must be positive')
    check(self.batch_size % self.accumulate_steps == 0,
          f'train.batch_size={self.batch_size} is no multiple of '
          f'train.accumulate_steps={self.accumulate_steps}')
    check(self.spike_factor == 0.0 or self.spike_factor > 1.0,
          f'train.spike_factor={self.spike_factor}: more than 1, or 0')
    for name in ('final_learning_rate', 'weight_decay', 'keep_best'):
      check(getattr(self, name) >= 0.0, f'train.{name}: not negative')
    check(0.0 < self.b2 < 1.0, f'train.b2={self.b2}: between 0 and 1')
    check(0 <= self.warmup_steps < self.steps,
          f'train.warmup_steps={self.warmup_steps}: at least 0 and '
          f'less than train.steps={self.steps}')
