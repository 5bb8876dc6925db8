"""easy-VQA with its official split: the full model, VoCo and ATP.

Command:   vlm-compress train --config=configs/easy_vqa.py:full \
             --workdir=easy_vqa/full
           vlm-compress evaluate --config=configs/easy_vqa.py:full \
             --checkpoint=easy_vqa/full/model --data-root=easy_vqa
           voco1 and atp start from it: --config.init_from=easy_vqa/full/model
Hardware:  2 CPU cores.
Hours:     none was computed or measured.
Expected:  not run to the end yet; the literature has no scores of VoCo or ATP here.

One shape per picture makes compression nearly trivial here; the numbers of
interest are those of openmoji_grid.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from vlm_compress.cli import quickstart_config


def get_config(stage: str = 'full') -> ConfigDict:
  """The config of a stage: full, voco1 or atp."""
  base = {'full': 'instruct', 'voco1': 'voco1', 'atp': 'atp'}[stage]
  config = quickstart_config.get_config(base)
  config.data.update(name='easy_vqa')
  config.data.options = ConfigDict()
  config.rows.kinds = ConfigDict({'yesno': 6, 'open': 3})
  config.eval.headline = ('yesno', 'open')
  config.eval.per_kind = ConfigDict({'yesno': 99, 'open': 99})
  config.eval.num_test = 1000
  return config
