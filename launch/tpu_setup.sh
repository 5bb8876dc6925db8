#!/usr/bin/env bash
# Installs the committed state of this repository on a TPU VM, on all hosts.
#
#   launch/tpu_setup.sh [--dry-run] NAME ZONE
#
# Run it again after a commit: it replaces the source and keeps the
# environment.  Python 3.11 or newer is taken from the image, or installed.
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 2
}

dry_run=false
if [[ ${1-} == --dry-run ]]; then
  dry_run=true
  shift
fi
(($# == 2)) || usage

name=$1
zone=$2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT

run() {
  printf '%q ' "$@"
  echo
  $dry_run || "$@"
}

# What a worker runs.  A failure on any worker makes gcloud fail.
read -r -d '' remote <<'REMOTE' || true
set -eu
rm -rf vlm_compress && mkdir vlm_compress
tar -xzf vlm_compress.tar.gz -C vlm_compress
python=$(command -v python3.13 || command -v python3.12 || command -v python3.11 || true)
if [ -z "$python" ]; then
  sudo add-apt-repository -y ppa:deadsnakes/ppa
  sudo apt-get install -y python3.11 python3.11-venv
  python=python3.11
fi
[ -x vlm_env/bin/pip ] || "$python" -m venv vlm_env
vlm_env/bin/pip install -q -e "vlm_compress[demo]" "jax[tpu]"
REMOTE

run git -C "$root" archive --format=tar.gz \
  --output="$scratch/vlm_compress.tar.gz" HEAD
run gcloud compute tpus tpu-vm scp "$scratch/vlm_compress.tar.gz" \
  "$name:" --zone="$zone" --worker=all
run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="$remote"
