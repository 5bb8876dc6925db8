"""The benchmark's outside reference computes what our model computes."""

from __future__ import annotations

import core_helpers as helpers
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch', reason='needs the extra [parity]')
pytest.importorskip('transformers', reason='needs the extra [parity]')

from vlm_compress.config import AtpConfig
from vlm_compress.decode.segmented import SegmentedModel
from vlm_compress.eval.benchmark import subjects, torch_reference


def test_same_logits_prefilled_and_decoded():
  config = helpers.tiny(atp=AtpConfig(prune_after=(1,), target_tokens=16.0))
  rng = np.random.default_rng(0)
  subject = subjects.Subject(
      'tiny', config, SegmentedModel(config, subjects.random_params(config, rng)),
      rng.standard_normal((2, 16, 32), np.float32))
  assert torch_reference.available() is None
  reference = torch_reference.Reference(
      torch_reference.build(subject), subject, 2, 16)
  state = subject.model.prefill(subjects.prompt_batch(subject, 2), None, 10)
  helpers.close(reference.prefill().numpy(), state.logits, 1e-4)
  for _ in range(10):
    ours = subject.model.extend(np.zeros(2, np.int32), state)
  helpers.close(reference.decode(10).numpy(), ours, 1e-4)
  fewer = torch_reference.Reference(reference.model, subject, 2, 4)
  assert fewer.embeds.shape[1] == 4 + subjects.NUM_TEXT
