#!/usr/bin/env bash
# Fetches what tests need and git must not hold: the npm package with LLaMA's
# vocabulary (the vocabulary is Meta's).  Tests that need it skip without it.
#
# Usage: tests/fetch_assets.sh [DIRECTORY]
#   DIRECTORY defaults to $VLM_COMPRESS_TEST_ASSETS, else tests/.assets.
#   Needs npm and sha256sum; a file that is there and right is not fetched.
set -euo pipefail

name=llama-tokenizer-js
version=1.2.2
sha256=ee83014ac8b379b16cf8d81e99ffcdb23dfade8c0d2e751bd06e7dc0b8476e72

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
directory=${1:-${VLM_COMPRESS_TEST_ASSETS:-$here/.assets}}
mkdir -p "$directory"
directory=$(cd "$directory" && pwd)
file=$name-$version.tgz

right() {
  [ -f "$1" ] && echo "$sha256  $1" | sha256sum --check --status
}

if right "$directory/$file"; then
  echo "$directory/$file is there"
  exit 0
fi
temporary=$(mktemp -d "$directory/.fetch.XXXXXX")
trap 'rm -rf "$temporary"' EXIT
(cd "$temporary" && npm pack --silent "$name@$version" >/dev/null)
if ! right "$temporary/$file"; then
  echo "$file of npm has another sha256 than $sha256; not used" >&2
  exit 1
fi
mv "$temporary/$file" "$directory/$file"
echo "$directory/$file fetched"
