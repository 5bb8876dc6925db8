#!/usr/bin/env bash
# Trains on the GPUs of a Slurm cluster, one process per GPU.
#
#   sbatch [OPTION...] launch/slurm_train.sh [--dry-run] CONFIG WORKDIR [FLAG...]
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00 \
#     launch/slurm_train.sh configs/quickstart.py:instruct runs/a
#
#   OPTION   of sbatch; as many tasks as GPUs on a node (jax gives task i of a
#            node its GPU i), and what your cluster wants to know
#   WORKDIR  on a disk that all nodes share
#   FLAG     more flags of train, such as --config.train.seed=1
#
# Call it in the root of the repository, in the environment that has
# vlm-compress and jax[cuda12].  Two minutes before the time limit, and when the
# job is preempted, training saves and stops; the job is queued again, at most
# RESTARTS times (environment, default 100), until WORKDIR/model is there.
#SBATCH --job-name=vlm-compress
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;/^#SBATCH/d;s/^# \{0,1\}//;p}' "$0" >&2
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
(($# >= 2)) || usage
config=$1 workdir=$2
shift 2
[[ $workdir != *:* ]] || { echo "error: WORKDIR $workdir: name a folder on a shared disk" >&2; exit 2; }

run() { printf '%q ' "$@"; echo; $dry_run || "$@"; }

run srun --label --kill-on-bad-exit=1 vlm-compress train --distributed \
  "--config=$config" "--workdir=$workdir" "$@"
if $dry_run || [[ -e $workdir/model/config.json ]]; then exit 0; fi

# Training that is told to stop exits with 0, too.
if ((${SLURM_RESTART_COUNT:-0} >= ${RESTARTS:-100})); then
  echo "error: $workdir has no model after ${RESTARTS:-100} restarts" >&2
  exit 1
fi
# A job that is being cancelled or preempted is not for us to queue.
[[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) != RUNNING ]] ||
  run scontrol requeue "$SLURM_JOB_ID"
