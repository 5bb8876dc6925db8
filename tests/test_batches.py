"""Many questions at once are the same questions one by one."""

from __future__ import annotations

import core_helpers as helpers
import numpy as np
import pytest
from api_helpers import NO_PROMPTS, TOKENIZER, make

from vlm_compress import api
from vlm_compress.batches import Request, answer_all
from vlm_compress.config import ConfigError
from vlm_compress.decode.regroup import SlotCount

QUESTIONS = ('what is this on the left side', 'a red cat', 'what is a dog .',
             'this is blue', 'what')


@pytest.fixture(scope='module')
def pictures() -> list[np.ndarray]:
  rng = np.random.default_rng(1)
  return [rng.integers(0, 255, (24, 24, 3), np.uint8) for _ in range(3)]


def one_by_one(vlm, requests, **options):
  return [api.generate(vlm, r.prompt, r.images, **options) for r in requests]


def same(got, want):
  assert [g[:3] for g in got] == [w[:3] for w in want]
  for g, w in zip(got, want):
    np.testing.assert_array_equal(g.visual_tokens, w.visual_tokens)


@pytest.mark.slow
@pytest.mark.parametrize('regroup', [False, True])
def test_atp(pictures, regroup):
  vlm = make(helpers.atp_config(sap_lambda=16.0))
  requests = [Request(q, [pictures[i % 3]]) for i, q in enumerate(QUESTIONS)]
  requests.insert(2, Request(QUESTIONS[1]))  # without a picture
  kept = api.keep_image(vlm, pictures[0], QUESTIONS[0])
  requests.append(Request(QUESTIONS[3], [kept]))
  slots = SlotCount()
  got = answer_all(vlm, requests, batch_size=2, regroup=regroup,
                   max_new_tokens=4, slots=slots)
  same(got, one_by_one(vlm, requests, max_new_tokens=4))
  programs = len(vlm.segmented.programs)
  again = answer_all(vlm, requests, batch_size=2, regroup=regroup, max_new_tokens=4)
  assert [a[:3] for a in again] == [g[:3] for g in got]
  assert len(vlm.segmented.programs) == programs  # nothing new was compiled
  assert len({g.text for g in got}) > 2 and slots.waste > 1.0
  assert got[2].visual_tokens is None and got[0].visual_tokens[0] == 16


def test_voco_mixes_compressed_and_fresh_pictures(pictures, monkeypatch):
  vlm = make(helpers.voco_config())
  packed = api.compress_image(vlm, pictures[0])
  requests = [Request(QUESTIONS[0], [packed]), Request(QUESTIONS[1], [pictures[1]]),
              Request(QUESTIONS[2], [pictures[2], packed]), Request(QUESTIONS[3]),
              Request(QUESTIONS[4], [packed]), Request(QUESTIONS[0], [pictures[0]])]
  requests.append(Request(QUESTIONS[2], [pictures[1]]))
  calls, compress = [], vlm.segmented.compress
  monkeypatch.setattr(vlm.segmented, 'compress',
                      lambda *args: calls.append(args) or compress(*args))
  got = answer_all(vlm, requests, batch_size=3, max_new_tokens=4)
  assert len(calls) == 3  # each picture once
  same(got, one_by_one(vlm, requests, max_new_tokens=4))
  assert got[0][:3] == got[5][:3]


def test_rows_end_where_they_would_alone(pictures):
  """End of sequence, the number of new tokens, or a context that is full."""
  vlm = make(helpers.tiny(), max_position_embeddings=28)
  requests = [Request(q, [pictures[0]]) for q in QUESTIONS]
  requests += [Request(q, [pictures[i % 3]]) for i, q in enumerate(QUESTIONS)]
  got = answer_all(vlm, requests, batch_size=4, max_new_tokens=8)
  same(got, one_by_one(vlm, requests, max_new_tokens=8))
  first = got[0].token_ids[1]
  vlm = api.Vlm(vlm.config, vlm.params, TOKENIZER, vlm.processor, 'dir', {first})
  got = answer_all(vlm, requests, batch_size=4, max_new_tokens=8)
  same(got, one_by_one(vlm, requests, max_new_tokens=8))
  assert {'eos', 'context'} <= {g.ended for g in got}


def test_after_compiling_ahead_nothing_is_compiled(pictures):
  vlm = make(helpers.atp_config(prune_after=(1,), target_tokens=10.0,
                                capacities=(8,)), num_hidden_layers=2)
  count = api.compile_ahead(vlm, text_tokens=8, max_new_tokens=3)
  assert count == len(vlm.segmented.programs)
  with helpers.Compilations() as compilations:
    for prompt, picture in zip(('what', QUESTIONS[1], QUESTIONS[2]), pictures):
      answer = api.generate(vlm, prompt, [picture], max_new_tokens=3)
      assert answer.visual_tokens is not None
  assert compilations.count == 0 and len(vlm.segmented.programs) == count
  # in batches, and without the modules
  count = api.compile_ahead(vlm, text_tokens=8, max_new_tokens=3, batch_size=2,
                            method='full')
  requests = [Request(q, [p]) for q, p in zip(QUESTIONS[1:4], pictures)]
  answer_all(vlm, requests, batch_size=2, max_new_tokens=3, method='full')
  assert len(vlm.segmented.programs) == count


def test_compiling_ahead_pads_as_prompts_are_padded(monkeypatch):
  vlm, calls = make(helpers.atp_config()), []
  monkeypatch.setattr(vlm.segmented, 'compile_ahead', lambda *args: calls.append(args))
  api.compile_ahead(vlm, text_tokens=60, max_new_tokens=66, batch_size=3)
  # 16 visual tokens: up to 48 of text in 64 slots
  assert calls == [(3, 64, 48, 128, 1, True, 1), (3, 128, 60, 128, 1, True, 49)]
  calls.clear()
  api.compile_ahead(vlm, text_tokens=64, num_images=0, max_new_tokens=1)
  api.compile_ahead(vlm, text_tokens=9, num_images=2, method='full')
  assert calls == [(1, 64, 64, 0, 0, False, 1), (1, 64, 9, 64, 2, False, 1)]
  for options, words in (
      ({'text_tokens': 0}, 'text_tokens=0: at least 1'),
      ({'text_tokens': 8.5}, 'text_tokens=8.5: must be'),
      ({'num_images': -1}, 'num_images=-1: at least 0'),
      ({'batch_size': '1'}, "batch_size='1': must be"),
      ({'max_new_tokens': 0}, 'max_new_tokens=0: at least 1'),
      ({'method': 'voco'}, 'no VoCo tokens'),
      ({'text_tokens': vlm.config.text.max_position_embeddings - 16},
       'text_tokens=.* leaves no room')):
    with pytest.raises(ConfigError, match=words):
      api.compile_ahead(vlm, **{'text_tokens': 8, **options})
  with pytest.raises(ConfigError, match='ask one question instead'):
    api.compile_ahead(make(helpers.voco_config()), text_tokens=8)


def test_bad_requests_are_refused(pictures):
  vlm = make(helpers.tiny(), max_position_embeddings=20)
  with pytest.raises(ConfigError, match='batch_size=0'):
    answer_all(vlm, [], batch_size=0)
  with pytest.raises(ConfigError, match='max_new_tokens=0'):
    answer_all(vlm, [], max_new_tokens=0)
  assert answer_all(vlm, []) == []
  for options, words in (
      ({'batch_size': '2'}, "batch_size='2': must be a number"),
      ({'batch_size': 2.5}, 'batch_size=2.5: must be'),
      ({'batch_size': True}, 'batch_size=True: must be'),
      ({'max_new_tokens': 2.5}, 'max_new_tokens=2.5: must be'),
      ({'requests': 5}, 'requests is a int; give a list of batches.Request'),
      ({'requests': [Request('what'), 'what']}, r'requests\[1\] is a str; give'),
      ({'requests': Request('what')}, r'requests\[0\] is a str; give'),
      *(({'requests': [Request('a cat'), Request(prompt, [pictures[0]])]}, words)
        for prompt, words in NO_PROMPTS)):
    with pytest.raises(ConfigError, match=words):
      answer_all(vlm, **{'requests': [], **options})
  with pytest.raises(ConfigError, match='takes all 20 positions'):
    answer_all(vlm, [Request('what', [pictures[0]])])
