"""A thin wrapper around the `tokenizers` library.

It adds what conversations need and the library does not say in one word:
text that continues another text (no SentencePiece dummy prefix), special
tokens that cannot be smuggled in through a question, unknown words that fail
instead of becoming `<unk>`, and the ids of the special tokens by role.

Two kinds of tokenizer are used: LLaMA's (byte-fallback BPE, from a
`tokenizer.json`) and a word-level one for small models trained from scratch,
in which a word has the same id in a question and in an answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from vlm_compress.atomic import write_text
from vlm_compress.data.errors import DataError

WORD_LEVEL_SPECIALS = ('<pad>', '<s>', '</s>', '<unk>')
_WORD = r'\n|\w+|[^\w\s]'
_SPACE = '\u2581'  # SentencePiece's visible space


class Tokenizer:
  """Text to ids and back.

  Attributes:
    bos_id, eos_id, pad_id: ids of `<s>`, `</s>` and `<pad>` (without a
      `<pad>`: `<unk>`, as LLaVA does).
    unk_id: id of `<unk>`, None if there is none.
    newline_ids: ids of a newline inside a text.
    vocab_size: ids are 0 .. vocab_size - 1.
  """

  def __init__(self, inner: tokenizers.Tokenizer, *, strict: bool = True):
    """Wraps a tokenizer of the library.

    Args:
      inner: the tokenizer; it is copied.
      strict: encode() refuses text that is not in the vocabulary.

    Raises:
      DataError: it has no `<s>` or no `</s>`.
    """
    self._json = inner.to_str()
    self._strict = strict
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
    self.unk_id = self._first.token_to_id('<unk>')
    self.bos_id = self._special('<s>')
    self.eos_id = self._special('</s>')
    pad_id = self._first.token_to_id('<pad>')
    if pad_id is None:
      pad_id = self.eos_id if self.unk_id is None else self.unk_id
    self.pad_id = pad_id
    self._specials = {self.bos_id, self.eos_id, self.pad_id, self.unk_id}
    self.newline_ids = tuple(self.encode('\n', first=False))

  def __reduce__(self):
    return _unpack, (self._json, self._strict)

  def _special(self, token: str) -> int:
    token_id = self._first.token_to_id(token)
    if token_id is None:
      raise DataError(f'the tokenizer has no {token} token; add it to its '
                      'vocabulary')
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
      DataError: a word is not in the vocabulary (when strict).
    """
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
    """Writes a `tokenizer.json`, all or nothing."""
    write_text(path, self._json)


def _unpack(spec: str, strict: bool) -> Tokenizer:
  return Tokenizer(tokenizers.Tokenizer.from_str(spec), strict=strict)


def load(path: str | os.PathLike[str], *, strict: bool = True) -> Tokenizer:
  """Reads a `tokenizer.json`.

  Raises:
    FileNotFoundError: there is no such file.
    DataError: the file is no tokenizer, or lacks `<s>` or `</s>`.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise FileNotFoundError(f'tokenizer file {path} does not exist')
  try:
    inner = tokenizers.Tokenizer.from_file(path)
  except Exception as e:  # the library raises plain Exception
    reason = str(e).splitlines()[0]
    raise DataError(f'{path} is no tokenizer.json: {reason}') from e
  try:
    return Tokenizer(inner, strict=strict)
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


def llama_bpe(vocab: Sequence[str], merges: Sequence[tuple[str, str]]
              ) -> Tokenizer:
  """LLaMA's SentencePiece BPE as the `tokenizers` library writes it.

  Args:
    vocab: pieces by id; 0 `<unk>`, 1 `<s>`, 2 `</s>`, then `<0x00>` ...
    merges: pairs of pieces, most urgent first.
  """
  inner = tokenizers.Tokenizer(models.BPE(
      {piece: i for i, piece in enumerate(vocab)}, list(merges),
      unk_token='<unk>', fuse_unk=True, byte_fallback=True))
  inner.normalizer = normalizers.Sequence(
      [normalizers.Prepend(_SPACE), normalizers.Replace(' ', _SPACE)])
  inner.decoder = decoders.Sequence([
      decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse(),
      decoders.Strip(' ', 1, 0)])
  inner.add_special_tokens(['<unk>', '<s>', '</s>'])
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
