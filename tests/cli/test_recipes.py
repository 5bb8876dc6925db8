"""The stages of configs/llava_7b.py, tiny, from a JSON file to an answer:
the same commands and page as 7B.
"""

from __future__ import annotations

import fnmatch
import json
import pathlib

import core_helpers as helpers
import jax
import llava_rows
import numpy as np
import pytest

from vlm_compress import presets
from vlm_compress.cli import __main__ as cli
from vlm_compress.cli.workspace import model_config
from vlm_compress.config_values import to_dict
from vlm_compress.convert import files
from vlm_compress.data import tokenizer as tokenizer_lib
from vlm_compress.models.llava import Llava, init_params
from vlm_compress.sharding import unbox

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
LEARNS = {'align': ('multi_modal_projector/',),
          'instruct': ('multi_modal_projector/', 'language_model/'),
          'voco': ('multi_modal_projector/', 'language_model/', 'voco_embedding'),
          'voco_kl': ('multi_modal_projector/', 'language_model/', 'voco_embedding'),
          'atp': ('multi_modal_projector/', 'language_model/', 'atp/'),
          'atp_frozen': ('atp/',),
          'atp_lora': ('multi_modal_projector/', '*/lora_*', 'atp/')}


def test_stages_from_json_to_answers(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  rows = [row for row in json.loads(llava_rows.write(tmp_path, 40).read_text())
          if not str(row['id']).startswith('two-')]
  captions = [row | {'conversations': row['conversations'][:2]}
              for row in rows if 'image' in row]
  for name, some in (('llava_v1_5_mix665k', rows),
                     ('blip_laion_cc_sbu_558k', captions)):
    pathlib.Path(f'{name}.json').write_text(json.dumps(some))
    assert cli.main(['prepare-data', f'--json={name}.json', '--images=images',
                     f'--out=data/{name}']) == 0
  tokenizer = tokenizer_lib.word_level(llava_rows.WORDS)
  config = model_config(to_dict(presets.preset('tiny')), tokenizer)
  params = unbox(jax.jit(lambda key: init_params(Llava(config), key, True))(
      jax.random.key(0)))
  files.save_model('runs/llava_tiny/start', params, config, tokenizer)
  before = {'align': helpers.flat(params)}
  for stage, learns in LEARNS.items():
    assert cli.main(['train', f'--config={ROOT}/configs/llava_7b.py:tiny_{stage}',
                     f'--workdir=runs/llava_tiny/{stage}', '--no-tensorboard']) == 0
    where = pathlib.Path('runs/llava_tiny', stage)
    after = helpers.flat(files.load_params(where / 'model'))
    start = before.get(stage, before.get('instruct'))
    moved = {p for p, x in after.items()
             if p not in start or not np.array_equal(x, start[p])}
    patterns = [name if '*' in name else f'{name}*' for name in learns]
    found = [fnmatch.filter(moved, pattern) for pattern in patterns]
    assert all(found) and set().union(*found) == moved, stage
    lines = [json.loads(line) for line in
             (where / 'metrics.jsonl').read_text().splitlines()]
    assert lines[-1]['step'] == 12 and all(x['loss'] > 0 for x in lines)
    if stage == 'align':
      before['instruct'] = after
    elif stage == 'instruct':
      before |= dict.fromkeys(set(LEARNS) - {'align', 'instruct'}, after)
    capsys.readouterr()
    if stage != 'align':  # its template has no questions
      assert cli.main(['generate', f'--checkpoint={where}/model',
                       '--image=images/0.jpg', '--prompt=what is it',
                       '--max-new-tokens=3']) == 0
      assert capsys.readouterr().out.endswith('\n')
