#!/usr/bin/env bash
# Turns a data set in LLaVA's format into shards to train on, on this machine.
#
#   launch/prepare_data.sh [--dry-run] JSON IMAGES OUT [FLAG...]
#
#   JSON    file in LLaVA's format
#   IMAGES  folder that the paths of its pictures are relative to
#   OUT     folder of the shards, local or gs://bucket/folder; train with --config.data.name=prepared and
#           data.options.directory=OUT
#   FLAG    more flags of prepare-data: --workers 16 --skip-broken
#
# LLaVA-1.5 trains on two sets; for where to get the files, see the LLaVA
# repository:
#   alignment    blip_laion_cc_sbu_558k.json; its pictures, unpacked
#   instruction  llava_v1_5_mix665k.json; in one folder: coco/train2017,
#                gqa/images, ocr_vqa/images, textvqa/train_images, vg/VG_100K
#                and vg/VG_100K_2
#
# A VM with many cores and a large disk is enough; no TPU.  Run it again after
# an interruption: it goes on.
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
(($# >= 3)) || usage
json=$1 images=$2 out=$3
shift 3

run() {
  printf '%q ' "$@"
  echo
  $dry_run || "$@"
}

run vlm-compress prepare-data --json "$json" --images "$images" --out "$out" "$@"
