"""A `tokenizer.json` from sentencepiece's file or from a GGUF's vocabulary.

All pieces keep their ids.  Control pieces become special tokens, which a text
never spells; `<image>` and `<voco>` stay placeholders outside of it.  What
cannot be said in a tokenizer.json with the same ids is refused by name.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlm_compress.config import ConfigError, check
from vlm_compress.convert.roles import ROLES

if TYPE_CHECKING:
  import tokenizers

TOKENIZER = 'tokenizer.json'
SENTENCEPIECE, ADDED = 'tokenizer.model', 'added_tokens.json'
# Kinds of pieces, the same numbers in sentencepiece's files and in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = '\u2581'  # sentencepiece's visible space
_INSTALL = "pip install -e '.[convert]', or put a tokenizer.json beside it"
# Where words end, by tokenizer.ggml.pre: digits one by one, and then GPT-2's
# rule; or a rule of its own.
_GPT2_WORDS = {'gpt-2': False, 'smollm': True}
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')


def build(source: pathlib.Path, gguf: Mapping[str, Any] | None, rows: int
          ) -> dict[str, str]:
  """The tokenizer files that a checkpoint does not have in our form.

  Args:
    source: directory of the checkpoint, or its GGUF file.
    gguf: metadata of that file; None for other checkpoints.
    rows: of the embedding; a tokenizer may have fewer tokens, not more.

  Returns:
    File name -> text; {} if there is a tokenizer.json, or nothing to build
    one from.

  Raises:
    ConfigError: a vocabulary that is damaged, not supported, or too large.
  """
  ready, model = source / TOKENIZER, source / SENTENCEPIECE
  if ready.is_file():
    _check_size(_size_of_json(ready), rows, ready)
    return {}
  if gguf is not None:
    inner, roles = from_gguf(gguf, source)
  elif model.is_file():
    inner, roles = from_sentencepiece(model)
    _add(inner, source / ADDED)
  else:
    return {}
  _check_size(inner.get_vocab_size(with_added_tokens=True), rows, source)
  out = {TOKENIZER: inner.to_str()}
  if not (source / ROLES).is_file():
    out[ROLES] = json.dumps(roles, indent=1)
  return out


def from_sentencepiece(path: pathlib.Path
                       ) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
  """A tokenizer.model of LLaMA's kind, and the roles of its tokens.

  Args:
    path: of the file.

  Returns:
    The tokenizer and what its tokenizer_config.json says.

  Raises:
    ConfigError: no such file, or settings that are not implemented.
  """
  try:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2
  except ModuleNotFoundError as e:
    raise ConfigError(f'{path}: reading it needs the packages sentencepiece '
                      f'and protobuf; {_INSTALL}') from e
  model = sentencepiece_model_pb2.ModelProto()
  try:
    model.ParseFromString(path.read_bytes())
  except DecodeError:
    model.Clear()
  check(len(model.pieces) > 0, f'{path} is truncated or no sentencepiece model; '
        'download it again')
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  kind = trainer.ModelType.Name(trainer.model_type)
  check(kind == 'BPE', f'{path}: model_type={kind} is not supported; only BPE, '
        'which LLaMA has')
  check(not normalizer.precompiled_charsmap, f'{path}: the normalisation '
        f'{normalizer.name!r} is not supported; only identity')
  for name, wrong in (
      ('remove_extra_whitespaces', normalizer.remove_extra_whitespaces),
      ('escape_whitespaces=False', not normalizer.escape_whitespaces),
      ('treat_whitespace_as_suffix', trainer.treat_whitespace_as_suffix)):
    check(not wrong, f'{path}: {name} is not supported')
  kinds = [p.type for p in model.pieces]
  check(USER_DEFINED not in kinds, f'{path}: user-defined pieces are not '
        'supported')
  texts = [p.piece for p in model.pieces]
  inner = scored_bpe(texts, [p.score for p in model.pieces], kinds, path,
                     dummy_prefix=normalizer.add_dummy_prefix)
  name = lambda i: texts[i] if 0 <= i < len(texts) and kinds[i] == CONTROL else None
  check(name(trainer.eos_id) is not None, f'{path} has no end-of-sequence '
        'piece')
  return inner, _roles(name(trainer.bos_id), name(trainer.eos_id),
                       name(trainer.pad_id), name(trainer.bos_id) is not None,
                       unk_token=texts[kinds.index(UNKNOWN)])


def from_gguf(metadata: Mapping[str, Any], where: pathlib.Path
              ) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
  """A GGUF's vocabulary, and the roles of its tokens.

  Args:
    metadata: of the file.
    where: the file, for messages.

  Returns:
    The tokenizer and what its tokenizer_config.json says.

  Raises:
    ConfigError: a kind of tokenizer, or a field, that is not implemented.
  """
  field = lambda name, default=None: metadata.get(f'tokenizer.ggml.{name}', default)
  texts, model = field('tokens'), field('model')
  check(bool(texts), f'{where} has no vocabulary (tokenizer.ggml.tokens); put '
        "the model's tokenizer.json beside it and give the directory")
  kinds = field('token_type') or [NORMAL] * len(texts)
  check(model in ('llama', 'gpt2'), f'{where}: tokenizer.ggml.model={model!r} '
        'is not supported; only llama and gpt2')
  for name in ('remove_extra_whitespaces', 'precompiled_charsmap'):
    check(not field(name), f'{where}: tokenizer.ggml.{name} is not supported')
  if model == 'llama':
    scores = field('scores')
    check(scores is not None and len(scores) == len(texts) == len(kinds),
          f'{where}: tokenizer.ggml.scores and token_type must have one value '
          'per token')
    inner = scored_bpe(texts, scores, kinds, where,
                       dummy_prefix=field('add_space_prefix', True))
  else:
    inner = byte_bpe(texts, field('merges') or [], kinds, field('pre'), where,
                     unknown=field('unknown_token_id'))
  ids = {role: field(f'{role}_token_id', default) for role, default in zip(
      ('bos', 'eos', 'unknown', 'padding'),
      (1, 2, 0, None) if model == 'llama' else (None,) * 4, strict=True)}
  for role, token_id in ids.items():
    check(token_id is None or 0 <= token_id < len(texts), f'{where}: tokenizer.'
          f'ggml.{role}_token_id={token_id}, but there are {len(texts)} tokens')
  check(ids['eos'] is not None, f'{where} has no tokenizer.ggml.eos_token_id')
  bos, eos, unk, pad = (None if i is None else texts[i] for i in ids.values())
  inner.add_special_tokens([t for t in (bos, eos, unk, pad) if t is not None])
  extra = {'unk_token': unk}
  if 'tokenizer.chat_template' in metadata:
    extra['chat_template'] = metadata['tokenizer.chat_template']
  return inner, _roles(bos, eos, pad, bool(
      bos is not None and field('add_bos_token', model == 'llama')), **extra)


def _roles(bos: str | None, eos: str, pad: str | None, add_bos: bool,
           **extra: Any) -> dict[str, Any]:
  """A tokenizer_config.json."""
  return {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': bos,
          'eos_token': eos, 'pad_token': pad, 'add_bos_token': add_bos, **extra}


def llama_bpe(texts: Sequence[str], merges: Sequence[tuple[str, str]], *,
              kinds: Sequence[int] | None = None, dummy_prefix: bool = True
              ) -> tokenizers.Tokenizer:
  """LLaMA's SentencePiece BPE as the `tokenizers` library writes it.

  Args:
    texts: pieces by id.
    merges: pairs of pieces, most urgent first.
    kinds: of the pieces; by default 0 is unknown, 1 and 2 are `<s>` and
      `</s>`, and `<0x00>` to `<0xFF>` are bytes. Unknown, control and
      user-defined ones become special tokens, which no text spells.
    dummy_prefix: a text begins with a space that is not written.
  """
  tokenizers = _library()
  from tokenizers import decoders, models, normalizers
  if kinds is None:
    kinds = [UNKNOWN, CONTROL, CONTROL, *(BYTE if len(t) == 6 and t.startswith(
        '<0x') else NORMAL for t in texts[3:])]
  unknown = next((t for t, kind in zip(texts, kinds) if kind == UNKNOWN), None)
  inner = tokenizers.Tokenizer(models.BPE(
      {piece: i for i, piece in enumerate(texts)}, list(merges),
      unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in kinds))
  inner.normalizer = normalizers.Sequence(
      [normalizers.Prepend(SPACE)] * dummy_prefix
      + [normalizers.Replace(' ', SPACE)])
  inner.decoder = decoders.Sequence(
      [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
      + [decoders.Strip(' ', 1, 0)] * dummy_prefix)
  inner.add_special_tokens([t for t, kind in zip(texts, kinds)
                            if kind in (UNKNOWN, CONTROL, USER_DEFINED)])
  return inner


def scored_bpe(texts: Sequence[str], scores: Sequence[float],
               kinds: Sequence[int], where: pathlib.Path, *,
               dummy_prefix: bool) -> tokenizers.Tokenizer:
  """SentencePiece's BPE: of all neighbours that make a piece, those that make
  the one with the highest score are joined first.

  Args:
    texts, scores, kinds: of the pieces, by id.
    where: for messages.
    dummy_prefix: a text begins with a space that is not written.
  """
  _check_unique(texts, where)
  check(UNKNOWN in kinds, f'{where}: no piece is the unknown one')
  bytes_, names = kinds.count(BYTE), set(texts)
  check(bytes_ in (0, 256) and (not bytes_ or all(
      f'<0x{i:02X}>' in names for i in range(256))),
        f'{where}: {bytes_} byte pieces; none, or <0x00> to <0xFF>')
  ranks = {t: i for i, (t, kind) in enumerate(zip(texts, kinds))
           if kind == NORMAL}
  merges = []
  for text, score, kind in zip(texts, scores, kinds):
    if kind not in (NORMAL, UNUSED):
      continue
    pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))
             if text[:cut] in ranks and text[cut:] in ranks]
    check(not pairs or kind == NORMAL, f'{where}: the unused piece {text!r} '
          'can be reached; this is not supported')
    merges += [(-score, ranks[text], ranks[a], a, b) for a, b in pairs]
  return llama_bpe(texts, [pair[3:] for pair in sorted(merges)], kinds=kinds,
                   dummy_prefix=dummy_prefix)


def byte_bpe(texts: Sequence[str], merges: Sequence[str],
             kinds: Sequence[int], words: str | None, where: pathlib.Path, *,
             unknown: int | None = None) -> tokenizers.Tokenizer:
  """GPT-2's BPE on bytes.

  Args:
    texts, kinds: of the tokens, by id.
    merges: two tokens with a blank between, most urgent first.
    words: tokenizer.ggml.pre, how text is cut into words.
    where: for messages.
    unknown: id of the token that stands for bytes without a token.
  """
  tokenizers = _library()
  from tokenizers import decoders, models, normalizers, pre_tokenizers
  _check_unique(texts, where)
  check(len(kinds) == len(texts), f'{where}: tokenizer.ggml.token_type must '
        'have one value per token')
  check(words in (*_GPT2_WORDS, 'qwen2'), f'{where}: tokenizer.ggml.pre='
        f'{words!r} is not supported; only {", ".join(_GPT2_WORDS)} and qwen2: '
        "put the model's tokenizer.json beside it and give the directory")
  pairs = [tuple(merge.split(' ')) for merge in merges]
  lost = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(texts))
  check(not lost or unknown is not None, f'{where}: {len(lost)} of the 256 '
        f'byte tokens are missing, the first is {lost[:1]}, and there is no '
        'tokenizer.ggml.unknown_token_id; their text would vanish')
  try:
    inner = tokenizers.Tokenizer(models.BPE(
        {text: i for i, text in enumerate(texts)}, pairs,
        unk_token=texts[unknown] if lost else None))
  except Exception as e:  # the library raises plain Exception
    raise ConfigError(f'{where}: tokenizer.ggml.merges do not fit the tokens '
                      f'({e})') from e
  if words == 'qwen2':
    inner.normalizer = normalizers.NFC()
    first = [pre_tokenizers.Split(tokenizers.Regex(_QWEN2_WORDS), 'isolated')]
  else:
    first = [pre_tokenizers.Digits(individual_digits=True)] * _GPT2_WORDS[words]
  inner.pre_tokenizer = pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=words != 'qwen2')])
  inner.decoder = decoders.ByteLevel()
  inner.add_special_tokens([t for t, kind in zip(texts, kinds)
                            if kind in (UNKNOWN, CONTROL)])
  inner.add_tokens([tokenizers.AddedToken(t, normalized=False) for t, kind
                    in zip(texts, kinds) if kind == USER_DEFINED])
  return inner


def _library() -> Any:
  try:
    import tokenizers
  except ModuleNotFoundError as e:
    raise ConfigError('building a tokenizer.json needs the package tokenizers; '
                      f'{_INSTALL}') from e
  return tokenizers


def _check_unique(texts: Sequence[str], where: pathlib.Path) -> None:
  if len(set(texts)) < len(texts):
    seen: set[str] = set()
    twice = next(t for t in texts if t in seen or seen.add(t))
    raise ConfigError(f'{where}: the piece {twice!r} stands twice')


def _add(inner: tokenizers.Tokenizer, path: pathlib.Path) -> None:
  """Adds the tokens of an added_tokens.json, but for the VoCo placeholder.

  Raises:
    ConfigError: unreadable, or ids that do not follow the vocabulary.
  """
  if not path.is_file():
    return
  try:
    added = json.loads(path.read_text(encoding='utf-8'))
    added = sorted((int(i), str(t)) for t, i in added.items() if t != '<voco>')
  except (ValueError, TypeError, AttributeError) as e:
    raise ConfigError(f'{path} is no readable tokenizer file ({e!r})') from e
  for token_id, token in added:
    inner.add_special_tokens([token])
    got = inner.token_to_id(token)
    check(got == token_id, f'{path}: {token!r} has id {token_id}, but the next '
          f'free one, or its own in {SENTENCEPIECE}, is {got}')


def _size_of_json(path: pathlib.Path) -> int:
  """One more than the largest id of a tokenizer.json."""
  try:
    spec = json.loads(path.read_text(encoding='utf-8'))
    vocab = spec.get('model', {}).get('vocab', {})
    ids = (list(vocab.values()) if isinstance(vocab, dict)
           else list(range(len(vocab))))
    return 1 + max(ids + [t['id'] for t in spec.get('added_tokens', ())],
                   default=-1)
  except (ValueError, TypeError, KeyError, AttributeError) as e:
    raise ConfigError(f'{path} is no readable tokenizer file ({e!r})') from e


def _check_size(tokens: int, rows: int, where: pathlib.Path) -> None:
  check(tokens <= rows, f'{where}: the tokenizer has {tokens} tokens, but the '
        f'embedding has {rows} rows; they are not of the same model')
