"""Texts on which two tokenizers are compared: hard ones by hand, and random."""

from __future__ import annotations

import random

WORDS = ('the lighthouse keeper counted ships for thirty years; every evening '
         'he climbed 142 steps to the lamp, and cleaned its glass. ¿Qué? '
         'naïve café Übergröße 漢字 かな слово "quoted" (in brackets) a-b_c '
         'https://example.com/x?y=1&z=2 x==y !!! ... 3.14159 12:30').split()
BY_HAND = [
    '', ' ', '  ', 'a', ' a', '  a', 'a ', 'a  b', 'a   b    c', '\n', '\n\n',
    ' \n ', 'a\nb', 'a\r\nb\tc', 'x' * 50, '=' * 33, '- ' * 9, '0123456789',
    '1 000 000', '12ab34', 'naïve café', 'cafe\u0301', '漢字かな交じり',
    '\N{GRINNING FACE}', '\N{WOMAN}\u200d\N{MICROSCOPE} ok', '\u2581', 'a\u2581b',
    '\u2581\u2581 x', '\u3000wide', 'no\u00a0break', '\ufeffmark', '\x00\x01',
    'I\'m sure they\'ll "see".', 'USER: <image>\nwhat?', '</s> <s> <unk>', '<0x41>']


def many_texts(seed=0, count=600):
  """Texts by hand and at random, runs of spaces of every length among them."""
  rng = random.Random(seed)
  out = [*BY_HAND, *(' ' * n + 'x' + ' ' * n for n in range(40))]
  for _ in range(count):
    joint = rng.choice(['', ' ', '  ', '\n'])
    out.append(joint.join(rng.choice(WORDS) for _ in range(rng.randint(1, 12))))
    out.append(''.join(rng.choice('  \n\taeiths019.,é漢<>/s🙂\u2581')
                       for _ in range(rng.randint(1, 30))))
  return out
