#!/usr/bin/env bash
# Asks for TPU slices by a queued resource: several of them, or spot.
#
#   launch/tpu_queue.sh [--dry-run] [--spot] NAME ZONE TYPE [SLICES] [RUNTIME]
#
#   --spot   cheaper, and taken away at any time; see tpu_spot.sh
#   NAME     of the queued resource, chosen by you
#   ZONE     such as us-west4-a
#   TYPE     accelerator type of a slice, such as v5litepod-256
#   SLICES   how many of them train together (default 1)
#   RUNTIME  software version of the TPU VMs (that of v4, v5e, v5p or v6e)
#
# It is usable once its state is ACTIVE, and costs money until it is deleted:
#   gcloud compute tpus queued-resources describe NAME --zone=ZONE
#   gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit "${1:-2}"; }

dry_run=false spot=()
while [[ ${1-} == -* ]]; do
  case $1 in
    --dry-run) dry_run=true ;;
    --spot) spot=(--spot) ;;
    -h | --help) usage 0 ;;
    *) usage ;;
  esac
  shift
done
(($# >= 3 && $# <= 5)) || usage

name=$1 zone=$2 type=$3 slices=${4:-1}
case $type in
  v6e-*) image=v2-alpha-tpuv6e ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v4-*) image=tpu-ubuntu2204-base ;;
  *) image='' ;;
esac
runtime=${5:-$image}
[[ -n $runtime ]] || { echo "error: TYPE $type: name its RUNTIME, too" >&2; exit 2; }
if ! [[ $slices =~ ^[1-9][0-9]*$ ]]; then
  echo "error: SLICES $slices: a number, 1 or more" >&2
  exit 2
fi

nodes=("--node-id=$name")
((slices == 1)) || nodes=("--node-count=$slices" "--node-prefix=$name")

run() {
  printf '%q ' "$@"
  echo
  $dry_run || "$@"
}

run gcloud compute tpus queued-resources create "$name" --zone="$zone" \
  --accelerator-type="$type" --runtime-version="$runtime" \
  "${nodes[@]}" ${spot[@]+"${spot[@]}"}
