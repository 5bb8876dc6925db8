"""vlm-compress generate: several pictures, none, and several questions."""

from __future__ import annotations

import dataclasses
import io
import json

import core_helpers as helpers
import numpy as np
import pytest
from api_helpers import make
from PIL import Image

from vlm_compress import api
from vlm_compress.cli import __main__ as cli
from vlm_compress.config import ConfigError
from vlm_compress.decode.sampling import sample

QUESTIONS = ['what is this', 'a cat on the left side', 'is the dog red']


@pytest.fixture(scope='module')
def vlm(tmp_path_factory):
  """A VoCo model with its tower, in a directory."""
  made = make(helpers.voco_config())
  path = tmp_path_factory.mktemp('model')
  api.save(made, path)
  return api.load(path)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp('pictures')
  paths = [folder / f'{i}.png' for i in range(2)]
  for path in paths:
    Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(path)
  return paths


@pytest.fixture
def run(vlm, pictures, capsys):
  """Runs the command on both pictures; gives exit code, stdout, stderr."""
  def run(*argv, images=pictures, checkpoint=vlm.directory):
    code = cli.main([
        'generate', f'--checkpoint={checkpoint}', '--max-new-tokens=6',
        *[f'--image={p}' for p in images], *argv])
    return code, *capsys.readouterr()
  return run


def answers(vlm, images, questions=QUESTIONS, **options):
  return [api.generate(vlm, q, images, max_new_tokens=6, **options).text
          for q in questions]


@pytest.mark.parametrize('method', ['voco', 'full'])
def test_questions_about_the_same_pictures(run, vlm, pictures, method,
                                           monkeypatch):
  calls = {'vision': 0, 'compress': 0}
  encode, compress = api.Vlm._encode, api.compress_image

  def count(name, function):
    def counted(*args):
      calls[name] += 1
      return function(*args)
    return counted
  monkeypatch.setattr(api.Vlm, '_encode', count('vision', encode))
  monkeypatch.setattr(api, 'compress_image', count('compress', compress))
  monkeypatch.setattr('sys.stdin', io.StringIO(
      '\n'.join([*QUESTIONS, '', 'what is never asked'])))
  code, out, err = run('--interactive', f'--method={method}')
  assert calls == {'vision': 2, 'compress': 2 * (method == 'voco')}
  want = answers(vlm, pictures, method=method)
  assert (code, err) == (0, '') and len(set(want)) == 3
  assert out == ''.join(f'{text}\n' for text in want)


def test_a_question_that_cannot_be_answered_does_not_end_the_session(
    run, vlm, pictures, monkeypatch):
  monkeypatch.setattr('sys.stdin', io.StringIO('what elephant\nis the dog red'))
  code, out, err = run('--interactive', '--prompt=what is this')
  first, _, last = answers(vlm, pictures)
  assert code == 2 and out == f'{first}\n{last}\n'
  assert err.startswith('error: ') and "'elephant'" in err and (
      err.count('\n') == 1)


def test_order_number_and_places_of_pictures(run, vlm, pictures):
  said = {}
  for name, images, prompt in (
      ('both', pictures, 'a cat'), ('turned', pictures[::-1], 'a cat'),
      ('one', pictures[:1], 'a cat'), ('none', [], 'a cat'),
      ('marked', pictures, '<image> a cat <image>')):
    code, out, _ = run(f'--prompt={prompt}', images=images)
    assert code == 0
    said[name] = out
    assert out == answers(vlm, images, [prompt])[0] + '\n'
  # VoCo's template puts pictures in front, wherever the markers stand
  assert said['marked'] == said['both']
  assert len(set(said.values())) >= 3
  code, out, err = run('--prompt=<image> a cat')
  assert (code, out) == (2, '') and '1 <image> marker(s) for 2 image(s)' in err


def test_the_end_of_the_context_is_said(run, vlm, pictures, tmp_path):
  api.save(vlm, tmp_path)
  config = json.loads((tmp_path / 'config.json').read_text())
  used = len(api.logits(vlm, 'a cat', pictures, method='full').ids)
  config['text']['max_position_embeddings'] = used + 2
  (tmp_path / 'config.json').write_text(json.dumps(config))
  code, out, err = run('--prompt=a cat', '--method=full', checkpoint=tmp_path)
  assert code == 0 and answers(vlm, pictures, ['a cat'], method='full')[
      0].startswith(out.strip())
  assert err == (f'note: the answer ends here because the context of {used + 2} '
                 'tokens is full\n')


@pytest.mark.parametrize('flags, words', [
    (['--method=atp'], ['ATP modules']),
    (['--template=nice'], ['nice', 'vicuna_v1']),
    (['--template=vicuna_v1'], ["'vicuna_v1'", 'before the image']),
    (['--num-voco-tokens=3'], ['1 to 2']),
    (['--image=none.png'], ['none.png']),
    ([f'--image={__file__}'], ['test_generate.py', 'not a picture'])])
def test_mistakes_are_one_line_also_when_interactive(run, flags, words,
                                                     monkeypatch):
  monkeypatch.setattr('sys.stdin', io.StringIO('what is this\n'))
  code, out, err = run('--interactive', *flags)
  assert code == 2 and out == ''
  assert err.count('\n') == 1 and all(word in err for word in words), err


def test_without_a_processor_the_template_has_to_be_said(run, vlm, tmp_path):
  api.save(vlm, tmp_path)
  (tmp_path / 'processor.json').unlink()
  code, out, err = run('--prompt=what is this', checkpoint=tmp_path)
  assert (code, out) == (2, '') and err.count('\n') == 1
  assert 'processor.json does not exist' in err and '--template' in err
  want = run('--prompt=what is this')
  assert want == run('--prompt=what is this', '--template=short',
                     checkpoint=tmp_path)


def test_sampling_is_as_the_flags_say(run, vlm, pictures):
  """Each flag alone changes the answer, and all reach the function."""
  hot = {'temperature': 3.0, 'top_p': 0.7, 'seed': 5}
  cases = [hot, {**hot, 'seed': 6}, {**hot, 'top_p': 0.2},
           {**hot, 'temperature': 1.0}, {'temperature': 0.0, 'seed': 5}]
  said = []
  for options in cases:
    flags = [f'--{name.replace("_", "-")}={value}' for name, value in options.items()]
    code, out, err = run('--prompt=a cat', '--method=full', *flags)
    assert (code, err) == (0, '')
    assert out == answers(vlm, pictures, ['a cat'], method='full', **options)[0] + '\n'
    assert out == run('--prompt=a cat', '--method=full', *flags)[1]  # again
    said.append(out)
  assert said[0] not in said[1:], said
  greedy, = answers(vlm, pictures, ['a cat'], method='full')
  assert said[-1] == greedy + '\n'


@pytest.mark.parametrize('more', [[], ['--interactive']])
def test_fewer_voco_tokens(run, vlm, pictures, more, monkeypatch):
  monkeypatch.setattr('sys.stdin', io.StringIO(''))
  one, = answers(vlm, pictures, ['a cat'], num_voco_tokens=1)
  two, = answers(vlm, pictures, ['a cat'])
  assert one != two
  code, out, err = run('--prompt=a cat', '--num-voco-tokens=1', *more)
  assert (code, out, err) == (0, one + '\n', '')


def test_the_nucleus_is_the_smallest_that_reaches_top_p():
  """Probabilities 1/2, 1/4, 1/4: the first alone is half of it."""
  import jax
  logits = jax.numpy.log(jax.numpy.array([[0.5, 0.25, 0.25]]))
  draw = lambda top_p: {int(sample(logits, jax.random.key(seed), 1.0, top_p)[0])
                        for seed in range(40)}
  assert draw(0.5) == {0} and draw(0.51) == draw(1.0) == {0, 1, 2}


def test_bytes_that_are_no_text_are_one_line(run, monkeypatch):
  code, out, err = run('--prompt=caf\udce9 cat')
  assert (code, out) == (2, '') and err.count('\n') == 1
  assert "caf\\udce9 cat\\n' holds bytes that are no UTF-8" in err
  monkeypatch.setattr('sys.stdin', io.StringIO('caf\udce9\na cat\n'))
  code, out, err = run('--interactive')
  assert code == 2 and err.count('\n') == out.count('\n') == 1
  monkeypatch.setattr('sys.stdin', io.TextIOWrapper(
      io.BytesIO(b'caf\xe9\na cat\n'), encoding='utf-8', errors='strict'))
  code, out, err = run('--interactive')
  assert code == 2 and err.count('\n') == out.count('\n') == 1


def test_a_compressed_image_has_seen_what_the_prompt_says(vlm, pictures):
  image = api.compress_image(vlm, pictures[0])
  other = dataclasses.replace(image, segment_ids=image.segment_ids[::-1])
  api.generate(vlm, 'a cat', [image], max_new_tokens=1)
  with pytest.raises(ConfigError, match='other tokens between image and VoCo'):
    api.generate(vlm, 'a cat', [other], max_new_tokens=1)
