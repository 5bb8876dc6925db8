#!/usr/bin/env bash
# Trains the small VoCo and ATP models and the trained baselines with three seeds, and
# evaluates them beside all floors and peers: the sweep of the README, on any machine.
#
#   launch/sweep_tiny.sh [--dry-run] OUT
#
#   OUT  folder of the sweep: report.html, report.md and tables; models go to
#        OUT/models.  Stopped, it goes on where it was.
#   SEEDS in the environment (default '0 1 2')
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
(($# == 1)) || usage
out=${1%/} && read -ra seeds <<<"${SEEDS:-0 1 2}"
pages=(voco8 voco2 qformer8 pool8 pool16 atp)

run() { printf '%q ' "$@"; echo; $dry_run || "$@"; }

for seed in "${seeds[@]}"; do
  for page in "${pages[@]}"; do
    start=vlm_compress/checkpoints/quickstart
    [[ $page != voco2 ]] || start=$out/models/voco8/seed$seed/model
    run vlm-compress train "--config=configs/quickstart.py:$page" --no-tensorboard \
      "--config.init_from=$start" "--config.train.seed=$seed" \
      "--data-root=$out/models" "--workdir=$out/models/$page/seed$seed"
  done
done
list=$(IFS=,; echo "${seeds[*]}")
models=()
for page in "${pages[@]}"; do
  models+=("--config.checkpoints.$page=$out/models/$page/seed{seed}/model")
done
run vlm-compress sweep --config=configs/sweeps.py:tiny "--out=$out" "--config.seeds=($list,)" \
  "${models[@]}" \
  "--config.benchmarks.openmoji_grid=$out/models" "--config.calibrate_data_root=$out/models"
