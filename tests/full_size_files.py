"""Invented official files of every benchmark at its full size.

Fields, their lengths, and how many questions share a picture are as in the releases; no
pictures are written, because scoring opens none.  Every function writes below `root` and
returns what random answers to the questions score, in the order of the files.
"""

from __future__ import annotations

import base64
import collections
import csv
import json
import math
import pathlib
import random

from full_size_words import YES_NO, Chance, agreed, common, one_right, sentence, word, write_list

LETTERS, DIGITS = 'ABCDE', tuple('0123456789')
PICTURE_BYTES = 18_000  # a small JPEG: 24 kB of base64


def gqa(root: pathlib.Path, rng: random.Random, rows: int) -> list[Chance]:
  """Yes/no, one of two, or open with a dozen answers that are likely."""
  pools = {kind: tuple(word(70 * i + j) for j in range(12))
           for i, kind in enumerate(('attr', 'cat', 'rel', 'obj', 'global'))}
  content, chances = {}, []
  for i in range(rows):
    semantic = rng.choice(tuple(pools))
    structural = rng.choices(('query', 'verify', 'choose', 'logical', 'compare'),
                             (54, 18, 9, 14, 5))[0]
    texts = pools[semantic] if structural == 'query' else (
        YES_NO if structural in ('verify', 'logical') else tuple(rng.sample(pools[semantic], 2)))
    answer = rng.choice(texts).lower()
    program = [{'operation': f'{name} {common(rng, 500)}', 'dependencies': [j],
                'argument': f'{common(rng, 2_000)} ({rng.randrange(10 ** 6)})'}
               for j, name in enumerate(('select', 'relate', 'filter', 'query'))]
    key = f'201{i:06}'
    content[key] = {
        'semantic': program, 'entailed': [], 'equivalent': [key],
        'question': sentence(rng, rng.randint(4, 14)), 'imageId': f'n{i % 398:06}',
        'isBalanced': True, 'groups': {'global': word(70 * rng.randrange(200)), 'local': key},
        'answer': answer, 'semanticStr': '->'.join(p['operation'] for p in program),
        'annotations': {'answer': {}, 'question': {'2': '12345'}, 'fullAnswer': {'1': '12345'}},
        'types': {'detailed': f'{semantic}Any', 'semantic': semantic, 'structural': structural},
        'fullAnswer': sentence(rng, 8)}
    chances.append(one_right(texts, answer))
  (root / 'testdev_balanced_questions.json').write_text(json.dumps(content))
  return chances


def ten_answers(rng: random.Random, kind: str) -> tuple[list[str], Chance]:
  """What ten people said, and a random answer: yes or no, a digit, or one of four words
  among which the commonest of theirs is.
  """
  if kind == 'yes/no':
    texts = ('yes', 'no')
    right = rng.choice(texts)
  elif kind == 'number':
    texts = DIGITS
    right = texts[min(9, int(10 ** rng.random()))]
  else:
    texts = tuple(dict.fromkeys(common(rng) for _ in range(4)))
    right = rng.choice(texts)
  other = {'yes/no': lambda: rng.choice(texts), 'number': lambda: rng.choice(texts)}.get(
      kind, lambda: common(rng))
  agree = rng.choice((0.95, 0.75, 0.5))
  humans = [right if rng.random() < agree else other() for _ in range(10)]
  said = collections.Counter(humans)
  return humans, Chance(texts, tuple(agreed(said[text]) for text in texts))


def vqav2(root: pathlib.Path, rng: random.Random, rows: int) -> list[Chance]:
  """Questions and annotations of val: ten answers, 65 types of question."""
  types = [f'{word(i)} {word(70 * i)}' for i in range(65)]
  chances: list[Chance] = []

  def annotations():
    for i in range(rows):
      kind = rng.choices(('yes/no', 'number', 'other'), (38, 13, 49))[0]
      humans, chance = ten_answers(rng, kind)
      chances.append(chance)
      yield {'question_type': types[int(65 * rng.random() ** 2)],
             'multiple_choice_answer': collections.Counter(humans).most_common(1)[0][0],
             'answers': [{'answer': text, 'answer_confidence': 'yes', 'answer_id': n}
                         for n, text in enumerate(humans, 1)],
             'image_id': _coco(i), 'answer_type': kind, 'question_id': 1000 * _coco(i) + i % 5}
  write_list(root / 'v2_mscoco_val2014_annotations.json', annotations(), _head('val2014'),
             'annotations')
  _vqa_questions(root / 'v2_OpenEnded_mscoco_val2014_questions.json', rng, rows, 'val2014')
  return chances


def vqav2_test(root: pathlib.Path, rng: random.Random, rows: int) -> list[Chance]:
  """Questions of test2015, whose answers nobody has."""
  _vqa_questions(root / 'v2_OpenEnded_mscoco_test2015_questions.json', rng, rows, 'test2015')
  return [_unknown(rng) for _ in range(rows)]


def _vqa_questions(path: pathlib.Path, rng: random.Random, rows: int, subset: str) -> None:
  write_list(path, ({'image_id': _coco(i), 'question': sentence(rng, rng.randint(4, 9)),
                     'question_id': 1000 * _coco(i) + i % 5} for i in range(rows)),
             _head(subset), 'questions')


def _head(subset: str) -> dict:
  return {'info': {'description': 'invented', 'version': '2.0', 'year': 2017},
          'task_type': 'Open-Ended', 'data_type': 'mscoco', 'license': {'url': '', 'name': ''},
          'data_subtype': subset}


def _coco(question: int) -> int:
  """Number of the picture; five questions are about each."""
  return 3 * (question // 5) + 42


def _unknown(rng: random.Random) -> Chance:
  """A word; its points are not known."""
  return Chance((common(rng),), (math.nan,))


def textvqa(root: pathlib.Path, rng: random.Random, rows: int) -> list[Chance]:
  """Questions about 3,166 pictures, ten answers each."""
  chances: list[Chance] = []

  def questions():
    for i in range(rows):
      humans, chance = ten_answers(rng, 'other')
      chances.append(chance)
      text = sentence(rng, rng.randint(4, 10)).lower()
      yield {'question': text, 'image_id': f'{i * 3_166 // rows:016x}',
             'image_classes': ['Sign', 'Person'], 'flickr_original_url': 'https://example.com/a',
             'flickr_300k_url': 'https://example.com/b', 'image_width': 1024,
             'image_height': 768, 'answers': humans, 'question_tokens': text[:-1].split(),
             'question_id': 34_602 + i, 'set_name': 'val'}
  write_list(root / 'TextVQA_0.5.1_val.json', questions(),
             {'dataset_type': 'val', 'dataset_name': 'textvqa', 'dataset_version': '0.5.1'},
             'data')
  return chances


def textvqa_ocr(root: pathlib.Path, rng: random.Random, rows: int) -> list[Chance]:
  """The same, and Rosetta's tokens with their boxes, a row a picture."""
  chances = textvqa(root, rng, rows)

  def pictures():
    for number in range(3_166):
      tokens = [common(rng) for _ in range(rng.randint(0, 40))]
      yield {'image_id': f'{number:016x}', 'ocr_tokens': tokens, 'ocr_info': [
          {'word': token, 'bounding_box': {'width': 0.1, 'height': 0.05, 'rotation': 0.5,
                                           'top_left_x': 0.25, 'top_left_y': 0.125}}
          for token in tokens]}
  write_list(root / 'TextVQA_Rosetta_OCR_v0.2_val.json', pictures(),
             {'dataset_type': 'val', 'dataset_name': 'textvqa'}, 'data')
  return chances


def vizwiz(root: pathlib.Path, rng: random.Random, rows: int) -> list[Chance]:
  """Questions of val, a picture each."""
  chances: list[Chance] = []

  def questions():
    for i in range(rows):
      kind = rng.choices(('other', 'unanswerable', 'yes/no', 'number'), (60, 30, 6, 4))[0]
      humans, chance = ten_answers(rng, kind)
      chances.append(chance)
      yield {'image': f'VizWiz_val_{i:08}.jpg', 'question': sentence(rng, 7),
             'answers': [{'answer': text, 'answer_confidence': 'yes'} for text in humans],
             'answer_type': kind, 'answerable': int(kind != 'unanswerable')}
  write_list(root / 'val.json', questions())
  return chances


def vizwiz_test(root: pathlib.Path, rng: random.Random, rows: int) -> list[Chance]:
  """Questions of test, whose answers nobody has."""
  write_list(root / 'test.json', ({'image': f'VizWiz_test_{i:08}.jpg',
                                   'question': sentence(rng, 7)} for i in range(rows)))
  return [_unknown(rng) for _ in range(rows)]


def pope(root: pathlib.Path, rng: random.Random, rows: int) -> list[Chance]:
  """Three categories of 500 pictures with six questions, yes and no in turn."""
  chances = []
  (root / 'coco').mkdir(parents=True)
  for category in ('adversarial', 'random', 'popular'):
    lines = []
    for i in range(rows // 3):
      label = YES_NO[i % 2].lower()
      chances.append(one_right(YES_NO, label))
      lines.append(json.dumps({
          'question_id': i + 1, 'image': f'COCO_val2014_{_coco(i):012}.jpg',
          'text': f'Is there a {common(rng, 80)} in the image?', 'label': label}))
    (root / f'coco/coco_pope_{category}.json').write_text('\n'.join(lines) + '\n')
  return chances


def mme(root: pathlib.Path, rng: random.Random, tasks: dict[str, int]) -> list[Chance]:
  """A file of two questions for each picture of the fourteen tasks."""
  chances = []
  for task, count in tasks.items():
    folder = root / 'MME_Benchmark_release_version' / task
    folder.mkdir(parents=True)
    for i in range(count // 2):
      labels = rng.sample(YES_NO, 2)
      (folder / f'{i:04}.txt').write_text(''.join(
          f'{sentence(rng, 9)} Please answer yes or no.\t{label}\n' for label in labels))
      chances += [one_right(YES_NO, label) for label in labels]
  return chances


def scienceqa(root: pathlib.Path, rng: random.Random, rows: int, pictured: int
              ) -> list[Chance]:
  """All 21,208 problems with their lectures; `rows` are test, of which every other one
  has a picture until there are `pictured` of them.
  """
  content, chances = {}, []
  for i in range(21_208):
    options = rng.choices((2, 3, 4, 5), (45, 20, 33, 2))[0]
    right = rng.randrange(options)
    if i < rows:
      chances.append(one_right(tuple(LETTERS[:options]), LETTERS[right]))
    content[str(i + 1)] = {
        'question': sentence(rng, 11), 'choices': [sentence(rng, 4) for _ in range(options)],
        'answer': right, 'hint': sentence(rng, 25) if i % 2 else '',
        'image': 'image.png' if i % 2 == 0 and i // 2 < pictured else None,
        'task': 'closed choice', 'grade': f'grade{i % 12 + 1}',
        'subject': ('natural science', 'social science', 'language science')[i % 3],
        'topic': common(rng, 30), 'category': common(rng, 100), 'skill': sentence(rng, 5),
        'lecture': sentence(rng, 120), 'solution': sentence(rng, 60),
        'split': 'test' if i < rows else 'train'}
  (root / 'problems.json').write_text(json.dumps(content))
  keys = list(content)
  (root / 'pid_splits.json').write_text(json.dumps(
      {'train': keys[rows:], 'val': [], 'test': keys[:rows]}))
  return chances


def mmbench(root: pathlib.Path, rng: random.Random, rows: int, questions: int
            ) -> list[Chance]:
  """As many passes of a question as it has options, two to four; each pass has the
  picture again, and options moved on by one.
  """
  lacking = 4 * questions - rows  # passes that questions with fewer options leave out
  sizes = [2] * (lacking // 4)
  sizes += [3] * (lacking - 2 * len(sizes))
  sizes += [4] * (questions - len(sizes))
  rng.shuffle(sizes)
  asked = []
  for size in sizes:
    picture = base64.b64encode(rng.randbytes(PICTURE_BYTES)).decode()
    hint = sentence(rng, 20) if rng.random() < 0.3 else ''
    asked.append((sentence(rng, 10), hint, [sentence(rng, 4) for _ in range(size)],
                  rng.randrange(size), word(rng.randrange(20)), picture))
  chances = []
  with open(root / 'mmbench_dev.tsv', 'w', newline='', encoding='utf-8') as stream:
    table = csv.writer(stream, delimiter='\t', lineterminator='\n')
    table.writerow(('index', 'question', 'hint', *'ABCD', 'answer', 'category', 'image',
                    'source', 'l2-category', 'comment', 'split'))
    for number in range(4):
      for i, (text, hint, options, right, category, picture) in enumerate(asked):
        if number < len(options):
          moved = options[number:] + options[:number]
          letter = LETTERS[(right - number) % len(options)]
          table.writerow((1_000_000 * number + i, text, hint, *(moved + ['', ''])[:4], letter,
                          category, picture, 'invented', category[:4], '', 'dev'))
          chances.append(one_right(tuple(LETTERS[:len(options)]), letter))
  return chances


def seed(root: pathlib.Path, rng: random.Random, kinds: dict[str, int]) -> list[Chance]:
  """Four choices; nine types of question on images, three on videos.  One id occurs
  twice, as in the release.
  """
  chances: list[Chance] = []

  def questions():
    for kind, count in kinds.items():
      for i in range(count):
        number = i % 9 + 1 if kind == 'image' else i % 3 + 10
        key = 500_000 + i if kind == 'video' else 100_000 + i - (i == 1)
        letter = rng.choice('ABCD')
        chances.append(one_right(tuple('ABCD'), letter))
        yield {'answer': letter, **{f'choice_{x}': sentence(rng, 3) for x in 'abcd'},
               'data_id': f'{key}_{rng.randrange(10 ** 9)}', 'data_type': kind,
               'question': sentence(rng, 9), 'question_id': str(key),
               'question_type_id': number}
  write_list(root / 'SEED-Bench.json', questions(), {
      'question_type': {f'{word(i)} {word(i + 70)}': i for i in range(1, 13)}}, 'questions')
  return chances


def video_qa(root: pathlib.Path, rng: random.Random, rows: int, category: bool
             ) -> list[Chance]:
  """One word is right; MSRVTT's files (`category`) have the kind of video, too."""
  def questions():
    for i in range(rows):
      texts = tuple(dict.fromkeys(common(rng, 4_000) for _ in range(4)))
      answer = rng.choice(texts)
      chances.append(one_right(texts, answer))
      yield {'answer': answer, 'id': i, 'question': sentence(rng, 7).lower(),
             'video_id': i // 25, **({'category_id': i % 20} if category else {})}
  chances: list[Chance] = []
  write_list(root / 'test_qa.json', questions())
  return chances


def activitynet_qa(root: pathlib.Path, rng: random.Random, rows: int) -> list[Chance]:
  """Ten questions a video of nine types; answers are in a file of their own."""
  questions, labels, chances = [], [], []
  for i in range(rows):
    kind = rng.randrange(9)
    texts = ('yes', 'no') if kind == 3 else tuple(
        dict.fromkeys(common(rng, 2_000) for _ in range(4)))
    answer, name = rng.choice(texts), f'{word(i // 10)}_{i // 10:04}'
    key = f'v_{name}_{i % 10 + 1}'
    questions.append({'video_name': name, 'question': sentence(rng, 8).lower()[:-1],
                      'question_id': key})
    labels.append({'answer': answer, 'type': kind, 'question_id': key})
    chances.append(one_right(texts, answer))
  write_list(root / 'test_q.json', questions)
  write_list(root / 'test_a.json', rng.sample(labels, rows))
  return chances
