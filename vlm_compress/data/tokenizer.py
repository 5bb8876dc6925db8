"""A thin wrapper around the `tokenizers` library.

It adds what conversations need and the library does not say in one word:
text that continues another text (no SentencePiece dummy prefix), special
tokens that cannot be smuggled in through a question, unknown words that fail
instead of becoming `<unk>`, and the ids of the special tokens by role.  Their
names stand in the `tokenizer_config.json` beside a `tokenizer.json`.

Two kinds of tokenizer are used: those of public models (from a
`tokenizer.json`; convert/vocabulary.py builds it from other files) and a
word-level one for small models trained from scratch, in which a word has the
same id in a question and in an answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from vlm_compress.atomic import write_text
from vlm_compress.config import ConfigError
from vlm_compress.convert.roles import ROLES, Roles, read_roles
from vlm_compress.data.errors import DataError

WORD_LEVEL_SPECIALS = ('<pad>', '<s>', '</s>', '<unk>')
_WORD = r'\n|\w+|[^\w\s]'


class Tokenizer:
  """Text to ids and back.

  Attributes:
    bos_id, eos_id, pad_id: ids of the tokens in these roles; bos_id is None
      if nothing is put in front, pad_id without a `<pad>` is `<unk>`'s, as
      LLaVA does, or EOS's.
    unk_id: id of `<unk>`, None if there is none.
    newline_ids: ids of a newline inside a text.
    vocab_size: ids are 0 .. vocab_size - 1.
  """

  def __init__(self, inner: tokenizers.Tokenizer, *, strict: bool = True,
               roles: Roles | None = None):
    """Wraps a tokenizer of the library.

    Args:
      inner: the tokenizer; it is copied.
      strict: encode() refuses text that is not in the vocabulary.
      roles: names of the special tokens, if not the usual ones.

    Raises:
      DataError: it lacks a token that has a role.
    """
    self._json = inner.to_str()
    self._strict, self._roles = strict, roles or Roles()
    self._build()

  def _build(self) -> None:
    spec = json.loads(self._json)
    self._first = tokenizers.Tokenizer.from_str(self._json)
    self._next = tokenizers.Tokenizer.from_str(
        json.dumps(_without_dummy_prefix(spec)))
    for inner in (self._first, self._next):
      inner.encode_special_tokens = True  # '</s>' in a question is just text
      inner.no_padding()
      inner.no_truncation()
    self.vocab_size = self._first.get_vocab_size(with_added_tokens=True)
    self.unk_id = self._first.token_to_id(
        spec['model'].get('unk_token') or '<unk>')
    self.bos_id = (None if self._roles.bos is None
                   else self._special(self._roles.bos))
    self.eos_id = self._special(self._roles.eos)
    if self._roles.pad is not None:
      self.pad_id = self._special(self._roles.pad)
    else:
      self.pad_id = next(i for i in (self._first.token_to_id('<pad>'),
                                     self.unk_id, self.eos_id) if i is not None)
    self._specials = {self.bos_id, self.eos_id, self.pad_id, self.unk_id}
    self.newline_ids = tuple(self.encode('\n', first=False))

  def __reduce__(self):
    return _unpack, (self._json, self._strict, self._roles)

  @property
  def fingerprint(self) -> str:
    """Hexadecimal digest of all that decides how text is encoded."""
    parts = (self._json, self._strict, dataclasses.astuple(self._roles))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

  def _special(self, token: str) -> int:
    token_id = self._first.token_to_id(token)
    if token_id is None:
      raise DataError(f'the tokenizer has no {token} token; add it to its '
                      f'vocabulary, or name its own in {ROLES} beside it '
                      '(bos_token, which may be null, eos_token, pad_token)')
    return token_id

  def encode(self, text: str, first: bool = True) -> list[int]:
    """Ids of a text, without BOS and EOS.

    Args:
      text: the text; special tokens in it are ordinary characters.
      first: the text begins a sequence or follows a special token (LLaMA
        then puts a dummy space in front); False if it continues a text.

    Returns:
      Its ids, [] for ''.

    Raises:
      DataError: a word is not in the vocabulary (when strict), or the text
        holds bytes that are none.
    """
    try:
      text.encode('utf-8')
    except UnicodeEncodeError as e:
      raise DataError(f'{text!r} holds bytes that are no UTF-8, at character '
                      f'{e.start + 1}; write it in UTF-8') from e
    inner = self._first if first else self._next
    encoding = inner.encode(text, add_special_tokens=False)
    if self._strict and self.unk_id is not None:
      for token_id, (start, end) in zip(encoding.ids, encoding.offsets,
                                        strict=True):
        if token_id == self.unk_id:
          raise DataError(
              f'{text[start:end]!r} in {text!r} is not in the vocabulary of '
              f'{self.vocab_size} tokens; build the tokenizer from all texts')
    return encoding.ids

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids.

    Special tokens and ids outside the vocabulary (image and VoCo
    placeholders) are left out.
    """
    kept = [int(i) for i in ids
            if 0 <= i < self.vocab_size and int(i) not in self._specials]
    return self._first.decode(kept, skip_special_tokens=False)

  def tokens(self, ids: Iterable[int]) -> list[str]:
    """The vocabulary entries of ids, for people and plots."""
    return [self._first.id_to_token(int(i)) if 0 <= i < self.vocab_size
            else f'<{int(i)}>' for i in ids]

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes a `tokenizer.json`, all or nothing.

    Tokens with other names than `<s>` and `</s>` are written to the
    `tokenizer_config.json` beside it, whose other fields stay.
    """
    write_text(path, self._json)
    beside = pathlib.Path(path).with_name(ROLES)
    if self._roles != Roles() or beside.exists():
      others = json.loads(beside.read_text()) if beside.exists() else {}
      write_text(beside, json.dumps({
          **others, 'bos_token': self._roles.bos, 'eos_token': self._roles.eos,
          'pad_token': self._roles.pad,
          'add_bos_token': self._roles.bos is not None}, indent=1))


def _unpack(spec: str, strict: bool, roles: Roles) -> Tokenizer:
  return Tokenizer(tokenizers.Tokenizer.from_str(spec), strict=strict,
                   roles=roles)


def load(path: str | os.PathLike[str], *, strict: bool = True) -> Tokenizer:
  """Reads a `tokenizer.json`, and the `tokenizer_config.json` beside it.

  Raises:
    FileNotFoundError: there is no such file.
    DataError: the file is no tokenizer, or lacks a token that has a role.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise FileNotFoundError(f'tokenizer file {path} does not exist')
  try:
    inner = tokenizers.Tokenizer.from_file(path)
  except Exception as e:  # the library raises plain Exception
    reason = str(e).splitlines()[0]
    raise DataError(f'{path} is no tokenizer.json: {reason}; download it again, '
                    'or write the model directory again') from e
  try:
    roles = read_roles(
        pathlib.Path(path).with_name(ROLES), lambda bos: bos in inner.encode(
            '', add_special_tokens=True).tokens)
  except ConfigError as e:
    raise DataError(str(e)) from e
  try:
    return Tokenizer(inner, strict=strict, roles=roles)
  except DataError as e:
    raise DataError(f'{path}: {e}') from e


def word_level(texts: Iterable[str]) -> Tokenizer:
  """A tokenizer with one id per word, punctuation mark and newline.

  Ids: `<pad>` 0, `<s>` 1, `</s>` 2, `<unk>` 3, newline 4, then the words in
  sorted order, so that the same texts give the same ids in any order.

  Args:
    texts: all texts (or words) it has to know.
  """
  split = pre_tokenizers.Split(tokenizers.Regex(_WORD), 'removed', invert=True)
  words = {w for t in texts for w, _ in split.pre_tokenize_str(t)} - {'\n'}
  vocab = {w: i for i, w in enumerate(
      (*WORD_LEVEL_SPECIALS, '\n', *sorted(words)))}
  inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
  inner.pre_tokenizer = split
  # Words are joined by a space, but not before a mark or around a newline.
  inner.decoder = decoders.Sequence([
      decoders.WordPiece(prefix='##', cleanup=False), decoders.Fuse(),
      decoders.Replace(tokenizers.Regex(' ?\n ?'), '\n'),
      *(decoders.Replace(f' {mark}', mark) for mark in ',.?!:;')])
  inner.add_special_tokens(list(WORD_LEVEL_SPECIALS))
  return Tokenizer(inner)


def _without_dummy_prefix(spec: dict) -> dict:
  """A copy of a tokenizer's JSON that puts no space in front of a text."""
  spec = json.loads(json.dumps(spec))

  def strip(step):
    if step is None:
      return None
    kind = step['type']
    if kind == 'Sequence':
      for key in ('normalizers', 'pretokenizers'):
        if key in step:
          step[key] = [s for s in map(strip, step[key]) if s is not None]
    elif kind == 'Prepend':
      return None
    elif kind == 'Metaspace':
      step['prepend_scheme'] = 'never'
      step.pop('add_prefix_space', None)
    elif kind == 'ByteLevel':
      step['add_prefix_space'] = False
    return step

  spec['normalizer'] = strip(spec['normalizer'])
  spec['pre_tokenizer'] = strip(spec['pre_tokenizer'])
  return spec
