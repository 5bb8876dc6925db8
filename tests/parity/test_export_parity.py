"""An exported model with transformers' processor and generate, as users call them.

Text and picture go in, tokens come out, and nobody says an id: both sides must
read the same row and answer the same, whatever the model was made from.
"""

from __future__ import annotations

import json

import llama_vocab
import numpy as np
import pytest
import wheel_files

torch = pytest.importorskip(
    'torch', reason="parity needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip(
    'transformers',
    reason="parity needs transformers: pip install -e '.[parity]'")

import safetensors.torch  # noqa: E402
from test_convert_parity import (  # noqa: E402
    MODEL,
    TEXT,
    VISION,
    compare,
    convert,
    spread,
    write_original,
)
from test_generate_parity import picture  # noqa: E402

from vlm_compress import api  # noqa: E402
from vlm_compress.cli import __main__ as cli  # noqa: E402
from vlm_compress.data.templates import TEMPLATES  # noqa: E402

pytestmark = pytest.mark.parity

WORDS = 32000  # of LLaMA's vocabulary, and of Mistral's


def build(rows, kind='llama', index=WORDS - 1):
  """transformers' LLaVA with so many rows."""
  make = transformers.Qwen2Config if kind == 'qwen2' else transformers.LlamaConfig
  return spread(transformers.LlavaForConditionalGeneration(
      transformers.LlavaConfig(
          vision_config=transformers.CLIPVisionConfig(
              hidden_act='quick_gelu', **VISION),
          text_config=make(**{**TEXT, 'vocab_size': rows, 'num_hidden_layers': 2}),
          image_token_index=index, image_seq_length=16,
          attn_implementation='eager')))


def clip_of(model, directory):
  """A directory with the sizes of the tower, and its weights."""
  model.config.vision_config.save_pretrained(directory)
  safetensors.torch.save_file(
      {k.removeprefix('model.vision_tower.'): v.contiguous()
       for k, v in model.state_dict().items() if 'vision_tower' in k},
      directory / 'model.safetensors')
  return directory


def original(tmp_path, rows, files):
  """The original layout, beside it some tokenizer files; converted."""
  model, source = build(rows), tmp_path / 'source'
  write_original(model, source)
  for name, data in files.items():
    (source / name).write_bytes(data)
  convert('--from', source, '--vision', clip_of(model, tmp_path / 'clip'), '--to',
          tmp_path / 'ours')


def parts(tmp_path, files):
  """A Qwen2 with rows that no word has, and a fresh projector; converted."""
  model, source = build(WORDS + 64, 'qwen2'), tmp_path / 'source'
  source.mkdir()
  model.config.text_config.save_pretrained(source)
  state = {k.replace('model.language_model.', 'model.'): v.contiguous()
           for k, v in model.state_dict().items()
           if k.startswith(('lm_head', 'model.language_model'))}
  safetensors.torch.save_file(state, source / 'model.safetensors')
  for name, data in files.items():
    (source / name).write_bytes(data)
  convert('--llm', source, '--vision', clip_of(model, tmp_path / 'clip'), '--to',
          tmp_path / 'ours')


def llama_json(tmp_path):
  llama_vocab.load().save(tmp_path / 'tokenizer.json')
  return {'tokenizer.json': (tmp_path / 'tokenizer.json').read_bytes()}


def sentencepiece(more=None):
  path = wheel_files.extracted(wheel_files.MISTRAL)
  return {'tokenizer.model': path.read_bytes(), **(more or {})}


LLAMA_ROLES = {'tokenizer_config.json': json.dumps({
    'tokenizer_class': 'LlamaTokenizer', 'add_bos_token': True, 'legacy': False,
    'bos_token': {'content': '<s>'}, 'eos_token': {'content': '</s>'},
    'unk_token': {'content': '<unk>'}, 'pad_token': '<unk>'}).encode()}
SOURCES = {
    'original, named roles': lambda p: original(p, WORDS, {
        **llama_json(p), **LLAMA_ROLES}),
    'original, padded': lambda p: original(p, WORDS + 64, llama_json(p)),
    'sentencepiece': lambda p: original(p, WORDS, sentencepiece()),
    'voco': lambda p: original(p, WORDS + 1, sentencepiece(
        {'added_tokens.json': b'{"<voco>": 32000}', **LLAMA_ROLES})),
    'parts, padded': lambda p: parts(p, llama_json(p)),
}


def rendered(question):
  """LLaVA-1.5's prompt, as a user of transformers writes it."""
  system = TEMPLATES['vicuna_v1'].system
  return f'{system} USER: <image>\n{question} ASSISTANT:'


@pytest.mark.parametrize('name', SOURCES)
def test_text_and_picture_in_answer_out(name, tmp_path):
  SOURCES[name](tmp_path)
  assert cli.main(['export', '--from', str(tmp_path / 'ours'), '--to',
                   str(tmp_path / 'hf')]) == 0
  vlm = api.load(tmp_path / 'ours', template='vicuna_v1')
  processor = transformers.AutoProcessor.from_pretrained(tmp_path / 'hf')
  model = transformers.LlavaForConditionalGeneration.from_pretrained(
      tmp_path / 'hf', attn_implementation='eager').eval()
  assert type(processor).__name__ == 'LlavaProcessor'
  image, eos = picture(50, 31), vlm.tokenizer.eos_id
  assert model.generation_config.eos_token_id == eos
  for question in ('What is this?', 'Hello  world\nand 12'):
    inputs = processor(images=image, text=rendered(question), return_tensors='pt')
    row = api.logits(vlm, question, [image], method='full')
    theirs = inputs['input_ids'][0].tolist()
    ours = np.where(row.ids == vlm.config.image_token_index,
                    model.config.image_token_index, row.ids)
    assert ours.tolist() == theirs
    with torch.no_grad():
      logits = model(**inputs).logits[0].numpy()
      answer = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    compare(f'export, {name}', row.logits, logits[:, :row.logits.shape[1]], MODEL)
    want = api.generate(vlm, question, [image], method='full', max_new_tokens=8)
    assert [t for t in answer[0, len(theirs):].tolist() if t != eos] == want.token_ids


def test_a_processor_of_transformers_5(tmp_path):
  """It is saved in processor_config.json alone, and cropping counts."""
  from transformers.models.llava import image_processing_pil_llava as module
  model = build(WORDS + 64, index=WORDS)
  model.save_pretrained(tmp_path / 'hf')
  llama_vocab.load().save(tmp_path / 'tokenizer.json')
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(tmp_path / 'tokenizer.json'), bos_token='<s>',
      eos_token='</s>', unk_token='<unk>')
  tokenizer.add_tokens(['<image>'], special_tokens=True)
  transformers.LlavaProcessor(
      image_processor=module.LlavaImageProcessorPil(
          size={'shortest_edge': 24}, crop_size={'height': 24, 'width': 24},
          do_pad=False), tokenizer=tokenizer, patch_size=6,
      vision_feature_select_strategy='default', num_additional_image_tokens=1,
  ).save_pretrained(tmp_path / 'hf')
  assert not (tmp_path / 'hf/preprocessor_config.json').exists()
  processor = transformers.AutoProcessor.from_pretrained(tmp_path / 'hf')
  convert('--from', tmp_path / 'hf', '--to', tmp_path / 'ours')
  vlm = api.load(tmp_path / 'ours')
  inputs = processor(images=picture(50, 31), text=rendered('What is this?'),
                     return_tensors='pt')
  row = api.logits(vlm, 'What is this?', [picture(50, 31)])
  assert row.ids.tolist() == inputs['input_ids'][0].tolist()
  with torch.no_grad():
    compare('cropped picture', row.logits, model(**inputs).logits[0].numpy(), MODEL)
  # what is said on the way back is said once, whichever file is read
  convert('--from', tmp_path / 'hf', '--to', tmp_path / 'turned',
          '--image-aspect-ratio', 'pad')
  for name, want in (('ours', False), ('turned', True)):
    back = tmp_path / f'{name}-back'
    assert cli.main(['export', '--from', str(tmp_path / name), '--to', str(back)]) == 0
    assert transformers.AutoProcessor.from_pretrained(
        back).image_processor.do_pad == want
    (back / 'processor_config.json').unlink()
    assert module.LlavaImageProcessorPil.from_pretrained(back).do_pad == want
