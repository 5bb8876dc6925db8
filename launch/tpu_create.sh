#!/usr/bin/env bash
# Creates a TPU of one slice, on demand.
#
#   launch/tpu_create.sh [--dry-run] NAME ZONE [TYPE] [RUNTIME]
#
#   NAME     of the TPU VM, chosen by you
#   ZONE     such as us-west4-a
#   TYPE     accelerator type (default v5litepod-8: 8 chips, one host;
#            v5litepod-256 is a pod of 64 hosts)
#   RUNTIME  software version of the TPU VM (that of v4, v5e, v5p or v6e)
#
# Several slices, or spot: tpu_queue.sh.
#
# Needs gcloud with a project set.  A TPU costs money until it is deleted:
#   gcloud compute tpus tpu-vm delete NAME --zone=ZONE
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit "${1:-2}"; }

dry_run=false
while [[ ${1-} == -* ]]; do
  case $1 in
    --dry-run) dry_run=true ;;
    -h | --help) usage 0 ;;
    *) usage ;;
  esac
  shift
done
(($# >= 2 && $# <= 4)) || usage

name=$1
zone=$2
type=${3:-v5litepod-8}
case $type in
  v6e-*) image=v2-alpha-tpuv6e ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v4-*) image=tpu-ubuntu2204-base ;;
  *) image='' ;;
esac
runtime=${4:-$image}
[[ -n $runtime ]] || { echo "error: TYPE $type: name its RUNTIME, too" >&2; exit 2; }

run() {
  printf '%q ' "$@"
  echo
  $dry_run || "$@"
}

run gcloud compute tpus tpu-vm create "$name" --zone="$zone" \
  --accelerator-type="$type" --version="$runtime"
