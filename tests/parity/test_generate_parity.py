"""A converted model from a picture to an answer, against transformers.

The same picture, prepared by both sides; the same tokens, decoded greedily
with a cache by both sides.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip(
    'torch', reason="parity needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip(
    'transformers',
    reason="parity needs transformers: pip install -e '.[parity]'")

from test_convert_parity import IMAGE, build, convert  # noqa: E402

from vlm_compress import api  # noqa: E402
from vlm_compress.cli import __main__ as cli  # noqa: E402
from vlm_compress.convert.files import load_config  # noqa: E402
from vlm_compress.convert.preprocessor import values_for  # noqa: E402
from vlm_compress.convert.processor import load_processor  # noqa: E402
from vlm_compress.data import images  # noqa: E402
from vlm_compress.data.tokenizer import word_level  # noqa: E402

pytestmark = pytest.mark.parity

WORDS = [f'w{i}' for i in range(IMAGE - 5)]  # and 5 special ids


def picture(width, height):
  rng = np.random.default_rng(width)
  noise = Image.fromarray(rng.integers(0, 255, (9, 7, 3), np.uint8))
  return noise.resize((width, height), Image.Resampling.BICUBIC)


def their_processor(directory):
  from transformers.models.llava import image_processing_pil_llava as module
  return module.LlavaImageProcessorPil.from_pretrained(directory)


@pytest.mark.parametrize('mode', images.ASPECT_MODES)
@pytest.mark.parametrize('size', [24, 56, 336])
def test_pictures(mode, size, tmp_path):
  """The exported preprocessor_config.json makes the pixels that ours are."""
  (tmp_path / 'preprocessor_config.json').write_text(
      json.dumps(values_for(mode, size)))
  processor = their_processor(tmp_path)
  for shape in ((400, 300), (31, 57), (size, size), (3, 2)):
    image = picture(*shape)
    theirs = processor(image, return_tensors='np')['pixel_values'][0]
    ours = images.clip_normalize(images.clip_pixels(image, size, mode))
    np.testing.assert_allclose(ours, theirs.transpose(1, 2, 0), atol=1e-6)


@pytest.mark.parametrize('name', [
    'llava 1.5', 'grouped queries, rope base 5e5, odd heads',
    'tied, class token, last layer', 'qwen2', '56 px'])
def test_greedy_answers(name, tmp_path):
  model = build(name)
  model.generation_config.eos_token_id = word_level(WORDS).eos_id
  model.save_pretrained(tmp_path / 'hf')
  word_level(WORDS).save(tmp_path / 'hf/tokenizer.json')
  convert('--from', tmp_path / 'hf', '--to', tmp_path / 'ours', '--template',
          'short')
  vlm = api.load(tmp_path / 'ours')
  image = picture(50, 31)
  assert cli.main(['export', '--from', str(tmp_path / 'ours'), '--to',
                   str(tmp_path / 'back')]) == 0
  pixels = their_processor(tmp_path / 'back')(
      image, return_tensors='pt')['pixel_values']
  eos, seen = vlm.tokenizer.eos_id, set()
  back = transformers.LlavaForConditionalGeneration.from_pretrained(
      tmp_path / 'back', attn_implementation='eager').eval()
  assert back.generation_config.eos_token_id == eos  # nobody has to say it
  for prompt in ('w3 w9 w27', 'w1', 'w80 w2 w5 w5 w70', 'w44 w4'):
    answer = api.generate(vlm, prompt, [image], max_new_tokens=24)
    ids = api.logits(vlm, prompt, [image]).ids
    assert (ids == IMAGE).sum() == model.config.image_seq_length
    with torch.no_grad():
      theirs = back.generate(
          input_ids=torch.tensor(ids[None]), pixel_values=pixels,
          do_sample=False, max_new_tokens=24, use_cache=True,
          pad_token_id=0)[0, len(ids):].tolist()
    assert answer.token_ids == [t for t in theirs if t != eos]
    seen |= set(theirs)
  assert len(seen) > 2


def test_the_original_code_names_its_mode(tmp_path):
  from test_convert_parity import write_original
  model = build('llava 1.5')
  clip = tmp_path / 'clip'
  model.config.vision_config.save_pretrained(clip)
  for said, mode in (('pad', 'pad'), ('square', 'crop'), (None, 'crop')):
    source = tmp_path / f'source-{said}'
    write_original(model, source)
    values = json.loads((source / 'config.json').read_text())
    (source / 'config.json').write_text(
        json.dumps({**values, 'image_aspect_ratio': said}))
    convert('--from', source, '--vision', clip, '--to', tmp_path / f'to-{said}')
    assert load_processor(tmp_path / f'to-{said}').image_aspect_ratio == mode
  assert load_config(tmp_path / 'to-pad').vision_feature_layer == -2
