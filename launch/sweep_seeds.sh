#!/usr/bin/env bash
# Runs the study for several seeds on this machine, one after the other.
#
#   launch/sweep_seeds.sh [--dry-run] WORKDIR [CONFIG] [SEED...]
#
#   WORKDIR  gets one folder per seed (WORKDIR/seed0, ...) and the report
#   CONFIG   default configs/study.py
#   SEED     default 0 1 2
#
# A seed that is done, or was interrupted, resumes: run the same line again.
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
  exit "${1:-2}"
}

dry_run=false
while [[ ${1-} == -* ]]; do
  case $1 in
    --dry-run) dry_run=true ;;
    -h | --help) usage 0 ;;
    *) usage ;;
  esac
  shift
done
(($# >= 1)) || usage

workdir=$1
config=${2:-configs/study.py}
seeds=("${@:3}")
((${#seeds[@]})) || seeds=(0 1 2)

for seed in "${seeds[@]}"; do
  if ! [[ $seed =~ ^[0-9]+$ ]]; then
    echo "error: seed '$seed' is no number" >&2
    exit 2
  fi
done

run() {
  printf '%q ' "$@"
  echo
  $dry_run || "$@"
}

for seed in "${seeds[@]}"; do
  run vlm-compress study "--config=$config" "--seeds" "$seed" --allow-partial \
    "--workdir=$workdir"
done
