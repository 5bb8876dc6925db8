#!/usr/bin/env bash
# Trains on all hosts of a TPU, of one slice or several; copies result and logs.
#
#   launch/tpu_run.sh [--dry-run] [--queued] NAME ZONE CONFIG WORKDIR BUCKET [FLAG...]
#
#   --queued  NAME is a queued resource (tpu_queue.sh), with all its slices
#   CONFIG    a config of the repository: configs/quickstart.py:instruct
#   WORKDIR   gs://bucket/folder, or a folder below the home directory: with
#             several hosts on a disk they share (shared/runs/a, tpu_setup.sh)
#   BUCKET    gs://bucket/folder gets WORKDIR's last folder, if it is on a disk,
#             when training is done, without checkpoints, and all logs at any end
#   FLAG      more flags of train: --data-root=data --config.train.seed=1
#             Paths in flags and in CONFIG are below shared/ if WORKDIR is,
#             else below the home directory
#
# Run it again and training resumes.  What still runs there saves and ends first.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit "${1:-2}"; }
dry_run=false kind=tpu-vm all=(--worker=all --batch-size=all)
while [[ ${1-} == -* ]]; do
  case $1 in
    --dry-run) dry_run=true ;;
    --queued) kind=queued-resources all+=(--node=all) ;;
    -h | --help) usage 0 ;;
    *) usage ;;
  esac
  shift
done
(($# >= 5)) || usage
name=$1 zone=$2 config=$3 workdir=${4%/} bucket=${5%/} && shift 5
[[ $workdir == gs://?*/?* || ($workdir != *:* && $workdir != /*) ]] || {
  echo "error: WORKDIR $workdir: gs://bucket/folder, or a folder below the VM's home" >&2; exit 2; }
[[ $bucket == gs://* ]] || {
  echo "error: BUCKET $bucket: name it gs://bucket/folder" >&2; exit 2; }

run() { printf '%q ' "$@"; echo; $dry_run || "$@"; }
on() { run gcloud compute tpus "$kind" ssh "$name" --zone="$zone" "$@"; }

# Quoted once for the shells of the hosts, which start in the home directory.
below=. up='' there='test -e' && [[ $workdir != shared/* ]] || below=shared up=../
printf -v train '%q ' "${up}vlm_env/bin/vlm-compress" train --distributed \
  "--config=${up}vlm_compress/$config" "--workdir=${workdir#shared/}" "$@"
printf -v to '%q' "$bucket/${workdir##*/}"
# shellcheck disable=SC2016  # the hosts expand it
remote='set -o pipefail; mkdir -p vlm_logs; old=$(cat vlm_train.pid 2>/dev/null || echo 0)
for i in {1..90}; do grep -qs vlm-compress "/proc/$old/cmdline" || break
  if ((i == 90)); then kill -KILL "$old"; elif ((i == 1)); then kill "$old"; fi; sleep 2; done
(echo "$BASHPID" >vlm_train.pid; cd '$below' && exec '$train') 2>&1 \
  | tee -a "vlm_logs/$HOSTNAME.log" | sed -u "s/^/$HOSTNAME: /"'
code=0
on "${all[@]}" --command="$remote" || code=$?
on "${all[@]}" --command="gcloud storage cp vlm_logs/*.log $to/logs/" ||
  echo "warning: logs of hosts are not in $bucket" >&2
((code == 0)) || { echo "error: training failed ($code); run it again to resume" >&2; exit "$code"; }
printf -v copy '%q ' gcloud storage rsync -r '--exclude=^(damaged_)?checkpoints/.*' "$workdir"
[[ $workdir != gs://* ]] || there='gcloud storage ls' copy=': '
on --worker=0 --command="$there $(printf %q "$workdir")/model/config.json || {
  echo 'stopped before the last step; run it again to resume' >&2; exit 3; }; $copy $to"
