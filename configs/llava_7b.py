"""LLaVA-1.5 and its compression at 7B and 13B: alignment, instruction, VoCo, ATP.

Arguments: align, instruct, voco, voco_kl (with an explicit teacher), atp (144
  tokens), atp88, atp_frozen (144 tokens, ATP's modules learn alone); for a small
  slice instruct_lora, voco_lora, atp_lora; 13b_align ... for 13B, tiny_align ...
  for a model of 40 thousand parameters on any machine.
Data:      vlm-compress prepare-data --json=blip_laion_cc_sbu_558k.json \
             --images=pretrain --out=data/blip_laion_cc_sbu_558k
           vlm-compress prepare-data --json=llava_v1_5_mix665k.json \
             --images=images --out=data/llava_v1_5_mix665k
Weights:   vlm-compress convert --llm=vicuna-7b-v1.5 \
             --vision=clip-vit-large-patch14-336 --to=runs/llava_7b/start
Command:   vlm-compress train --config=configs/llava_7b.py:align \
             --workdir=runs/llava_7b/align
           then instruct, then voco or one of atp's, which start from it; another
           start: --config.init_from=DIR
Hardware:  v5e-256, or v5p with 64 chips: --config.mesh.fsdp=64
           --config.mesh.tensor=1 there; the lora pages v5e-16.  Before
           renting one: vlm-compress compile --config=configs/llava_7b.py:voco \
             --topology=v5e:16x16
           says whether it fits and gives hours; results/compile has some.
Hours:     compiler bound, not measured: the bound of a step (results/compile) times
           the steps, which a real run exceeds; on v5p with the mesh above:
           align          0.13 on v5e-256
           instruct       0.41 on v5e-256
           voco           0.76 on v5e-256, 1.30 on v5p with 64 chips
           voco_kl        0.95 on v5e-256
           atp            0.41 on v5e-256, 0.71 on v5p with 64 chips
           atp88          as atp: the same program with another target
           atp_frozen     0.31 on v5e-256
           instruct_lora  9.99 on v5e-16
           voco_lora      13.01 on v5e-16
           atp_lora       8.83 on v5e-16
           13b_align      0.25 on v5e-256
           13b_instruct   0.80 on v5e-256
           13b_voco       1.47 on v5e-256
           13b_atp        0.80 on v5e-256
           others of 13B  none was computed
Expected:  nothing here was trained by us.  The literature's, 7B:
           align     no scores: it is where instruct starts
           instruct  VQAv2 78.5, GQA 62.0, POPE 85.9, MMBench 64.3, MME 1510.7,
                     SQA-I 66.8 (LLaVA-1.5, arXiv 2310.03744); 13B: VQAv2 80.0,
                     GQA 63.3, POPE 85.9, MMBench 67.7, MME 1531.3, SQA-I 71.6
           voco      83.7 % of the gap between its bounds with one token
                     (arXiv 2406.12275)
           atp       GQA 59.5, MMBench 66.0, POPE 84.2, VQAv2 76.4; 98.1 % of
                     the full model with 144 tokens
           atp88     GQA 56.8, MMBench 64.7, POPE 82.6, VQAv2 73.3; 94.6 % with
                     88 (arXiv 2412.00447)
           atp_frozen, voco_kl, voco_lora, atp_lora, and 13B of voco and atp: no
           scores that we know of
           instruct_lora  VQAv2 79.1, GQA 63.0, POPE 86.4, MMBench 66.1, MME 1476.9,
                     SQA-I 68.4 (LLaVA-1.5's model zoo)

LLaVA-1.5's recipe: a projector that learns alone from captions, then projector
and decoder from conversations, the tower always frozen; cosine with 3 % warm-up,
no weight decay, bfloat16 with float32 masters.  VoCo leaves out the 40,688 rows
without a picture: its two epochs are of the other 624,610.  atp_frozen is atp in
all but what learns; its rate is atp's, too.  voco_kl adds the KL to the model that
it starts from, with weight 1 (ours).  The lora pages are LLaVA-1.5's LoRA recipe
(rank 128, alpha 256, 2e-4; dropout left out) for each stage; all that learns has
that one rate, where LLaVA's projector has 2e-5.  A loss of five times the last
ones' mean stops a run (ours).
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from vlm_compress.config import LoraConfig
from vlm_compress.data.rows import RowSpec
from vlm_compress.presets import preset, prune_after_for
from vlm_compress.train.recipe import Recipe

NUM_CAPTIONS, NUM_CONVERSATIONS = 558_128, 665_298  # rows of the two files
NUM_TEXT_ONLY = 40_688  # conversations without a picture, which teach VoCo nothing
WARMUP = 0.03
PROJECTOR, DECODER = 'multi_modal_projector/', 'language_model/'
SIZES = {'13b': 'llava_1_5_13b', 'tiny': 'tiny'}
STAGES = ('align', 'instruct', 'voco', 'voco_kl', 'atp', 'atp88', 'atp_frozen',
          'instruct_lora', 'voco_lora', 'atp_lora')
LORA = '_lora'


def _size(name: str) -> dict:
  """A preset as a page's section."""
  config = preset(name)
  return {'vision': dataclasses.asdict(config.vision),
          'text': dataclasses.asdict(config.text), 'dtype': config.dtype,
          'param_dtype': config.param_dtype, 'remat': config.remat,
          'remat_policy': config.remat_policy}


def _recipe(stage: str, rows: int, batch_size: int, epochs: int, rate: float,
            *trainable: str) -> dict:
  steps = rows * epochs // batch_size
  return dataclasses.asdict(Recipe(
      stage=stage, steps=steps, batch_size=batch_size, learning_rate=rate,
      warmup_steps=int(WARMUP * steps), final_learning_rate=0.0, b2=0.999,
      weight_decay=0.0, trainable=trainable, checkpoint_steps=500,
      spike_factor=5.0))


def _stage(name: str, num_layers: int) -> tuple[dict, dict, dict]:
  """What a stage adds to the model, to the rows and to the recipe."""
  with_picture = NUM_CONVERSATIONS - NUM_TEXT_ONLY
  tuned = lambda stage, *learn, rows=NUM_CONVERSATIONS, epochs=1: _recipe(
      stage, rows, 128, epochs, 2e-5, *learn)
  voco = tuned('voco', PROJECTOR, DECODER, 'voco_embedding', rows=with_picture,
               epochs=2)
  compressed = {'template': 'voco', 'num_voco_tokens': (1,)}
  one_turn = {'template': 'vicuna_v1', 'one_turn': True}
  atp = lambda tokens: {'atp': {'target_tokens': tokens,
                                'prune_after': prune_after_for(num_layers)}}
  return {
      # Captions are short; their pictures are cropped, as in LLaVA.
      'align': ({}, {'template': 'plain', 'image_aspect_ratio': 'crop',
                     'length': 1024, 'bucket_lengths': (640, 768, 1024)},
                _recipe('align', NUM_CAPTIONS, 256, 1, 1e-3, PROJECTOR)),
      'instruct': ({}, {'template': 'vicuna_v1'},
                   tuned('instruct', PROJECTOR, DECODER)),
      'voco': ({'voco': {'num_voco_tokens': 1}}, compressed, voco),
      'voco_kl': ({'voco': {'num_voco_tokens': 1, 'distill_weight': 1.0}},
                  compressed, {**voco, 'teacher': 'frozen'}),
      'atp': (atp(144.0), one_turn, tuned('atp', PROJECTOR, DECODER, 'atp/')),
      'atp88': (atp(88.0), one_turn, tuned('atp', PROJECTOR, DECODER, 'atp/')),
      'atp_frozen': (atp(144.0), one_turn, tuned('atp', 'atp/')),
  }[name]


def get_config(arg: str = 'instruct') -> ConfigDict:
  """A stage of 7B, or of another size: '13b_voco', 'tiny_voco'."""
  prefix, _, rest = arg.partition('_')
  size, page = (prefix, rest) if prefix in SIZES else ('7b', arg)
  name = page.removesuffix(LORA)
  model = _size(SIZES.get(size, 'llava_1_5_7b'))
  method, rows, train = _stage(name, model['text']['num_hidden_layers'])
  runs, start = f'runs/llava_{size}', {'align': 'start', 'instruct': 'align'}
  data = 'blip_laion_cc_sbu_558k' if name == 'align' else 'llava_v1_5_mix665k'
  config = ConfigDict({
      'model': {**model, **method},
      'data': {'name': 'prepared', 'options': {'directory': f'data/{data}'},
               'image_size': model['vision']['image_size'],
               'train_split': 'train', 'test_split': 'train',
               'tokenizer': f'{runs}/start/tokenizer.json'},
      # 2,048 slots with the picture, where LLaVA truncates, or fewer; what VoCo
      # compresses is not in the text part.
      'rows': {**dataclasses.asdict(RowSpec()), 'kinds': {}, 'length': 2048,
               'bucket_lengths': (768, 1024, 1536, 2048), 'text_length': 2048,
               'independent_turns': False, **rows},
      'train': train,
      'eval': {'num_test': 1, 'headline': ('answer',), 'per_kind': {'answer': 1}},
      'init_from': f'{runs}/{start.get(name, "instruct")}'
                   f'{"" if name == "align" else "/model"}',
      'mesh': {'data': -1, 'fsdp': 32, 'tensor': 2},
  }, convert_dict=True)
  if page != name:
    _adapt(config, page)
  if size == 'tiny':
    _shrink(config)
  return config


def _adapt(config: ConfigDict, page: str) -> None:
  """LoRA instead of the decoder's kernels, on a slice of 16 chips."""
  if page not in STAGES:
    raise KeyError(page)
  config.model.lora = ConfigDict(dataclasses.asdict(LoraConfig()))
  config.train.learning_rate = 2e-4
  config.train.trainable = tuple('*/lora_*' if name == DECODER else name
                                 for name in config.train.trainable)
  config.mesh.update(fsdp=16, tensor=1)
  if 'atp' in config.model:  # soft masks take more memory: whole batches do not fit
    config.train.accumulate_steps = 2


def _shrink(config: ConfigDict) -> None:
  """A few steps of a model that any machine trains."""
  config.rows.update(length=256, text_length=192, bucket_lengths=())
  config.train.update(steps=12, batch_size=8, warmup_steps=1, log_steps=4,
                      checkpoint_steps=4, accumulate_steps=1)
  config.mesh.update(fsdp=1, tensor=1)
  if config.model.get('lora') is not None:
    config.model.lora.update(rank=4, alpha=8.0)
  if 'atp' in config.model:
    config.model.atp.target_tokens = 8.0 if config.model.atp.target_tokens > 100 else 6.0
