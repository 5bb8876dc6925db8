#!/usr/bin/env bash
# Runs `vlm-compress train` on a TPU VM of one host, and copies the result.
#
#   launch/tpu_run.sh [--dry-run] NAME ZONE CONFIG WORKDIR BUCKET [FLAG...]
#
#   CONFIG   a config of the repository, such as configs/quickstart.py:instruct
#   WORKDIR  folder on the VM's disk, below the home directory, such as runs/a;
#            training resumes from what is there when this is run again
#   BUCKET   gs://bucket/folder; WORKDIR's last folder is copied into it
#   FLAG     more flags of train, such as --config.train.seed=1
#
# All chips of the host are used.  A slice of several hosts is not supported.
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
(($# >= 5)) || usage

name=$1 zone=$2 config=$3 workdir=$4 bucket=$5
shift 5

if [[ $workdir == *:* || $workdir == /* ]]; then
  echo "error: WORKDIR $workdir: name a folder below the VM's home" >&2
  exit 2
fi
if [[ $bucket != gs://* ]]; then
  echo "error: BUCKET $bucket: name it gs://bucket/folder" >&2
  exit 2
fi

run() {
  printf '%q ' "$@"
  echo
  $dry_run || "$@"
}

# Quoted once for the shell of the VM; run from the repository's root there.
printf -v train '%q ' ../vlm_env/bin/vlm-compress train \
  "--config=$config" "--workdir=../$workdir" "$@"
printf -v copy '%q ' gcloud storage cp -r "../$workdir" "${bucket%/}/"

run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=0 \
  --command="cd vlm_compress && $train && $copy"
