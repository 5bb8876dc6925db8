#!/usr/bin/env bash
# Runs `vlm-compress train` on all workers of a TPU VM.
#
#   launch/tpu_run.sh [--dry-run] NAME ZONE CONFIG WORKDIR [FLAG...]
#
#   CONFIG   a config of the repository, such as configs/study.py:atp
#   WORKDIR  gs://bucket/folder, which all workers share; training resumes
#            from what is there, so after a preemption run this again
#   FLAG     more flags of train, such as --config.seed=1
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
(($# >= 4)) || usage

name=$1
zone=$2
config=$3
workdir=$4
shift 4

if [[ $workdir != gs://* ]]; then
  echo "error: WORKDIR $workdir is on one disk; the workers need gs://..." >&2
  exit 2
fi

run() {
  printf '%q ' "$@"
  echo
  $dry_run || "$@"
}

# Quoted once for the shell of the workers.
printf -v train '%q ' ../vlm_env/bin/vlm-compress train \
  "--config=$config" "--workdir=$workdir" "$@"

run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd vlm_compress && $train"
