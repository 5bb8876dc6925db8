#!/usr/bin/env bash
# Trains to the end on spot slices: asks for new ones when they are taken away.
#
#   launch/tpu_spot.sh [--dry-run] NAME ZONE TYPE SLICES SERVER:/SHARE CONFIG WORKDIR BUCKET [FLAG...]
#
#   as in tpu_queue.sh, tpu_setup.sh and tpu_run.sh; WORKDIR is shared/..., or
#   gs://bucket/folder ('' for SERVER:/SHARE then mounts no disk).
#   TRIES (environment, default 5): it gives up after so many failures without
#   a newer checkpoint.  Waiting for slices is no failure.
#   The slices are deleted when training is done; otherwise run it again.
set -euo pipefail
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit "${1:-2}"; }

dry='' list='ls' complete=''
while [[ ${1-} == -* ]]; do
  case $1 in
    --dry-run) dry=$1 ;;
    -h | --help) usage 0 ;;
    *) usage ;;
  esac
  shift
done
(($# >= 8)) || usage
name=$1 zone=$2 workdir=$7 tries=${TRIES:-5} here=$(dirname "$0")
[[ $workdir =~ ^(shared/|gs://[^/]+/). ]] || { echo "error: WORKDIR $workdir: shared/... or gs://bucket/folder" >&2; exit 2; }
[[ $workdir != gs://* ]] || list='gcloud storage ls' complete='/*/commit_success.txt' # torn ones have none

queue=("$here/tpu_queue.sh" ${dry:+"$dry"} --spot "$name" "$zone" "$3" "$4")
setup=("$here/tpu_setup.sh" ${dry:+"$dry"} --queued "$name" "$zone" "$5")
train=("$here/tpu_run.sh" ${dry:+"$dry"} --queued "$name" "$zone" "${@:6}")
on() { gcloud compute tpus queued-resources "$1" "$name" --zone="$zone" "${@:2}"; }
say() { echo "$(date '+%F %T') $name: $*" >&2; }
newest() { on ssh --worker=0 --command="$list $(printf %q "${workdir%/}")/checkpoints${complete:+"'$complete'"} | sed 's:/commit_success.txt$::;s:.*/::' | grep -x '[0-9]*' | sort -n | tail -n 1"; }

if [[ -n $dry ]]; then
  "${queue[@]}" && "${setup[@]}" && "${train[@]}"
  printf '%q ' gcloud compute tpus queued-resources delete "$name" "--zone=$zone" --force --quiet
  exit
fi
failures=0 step='' ready=false
while ((failures < tries)); do
  state=$(on describe --format='value(state.state)' 2>/dev/null) || state=NONE
  case $state in
    ACTIVE)
      if $ready || "${setup[@]}"; then
        ready=true found=$(newest 2>/dev/null) || found=''
        [[ -z $found || $found == "$step" ]] || step=$found failures=0
        if "${train[@]}"; then say 'training is done'; on delete --force --quiet; exit; fi
      fi ;;
    SUSPENDED | FAILED | PREEMPTED) ready=false; on delete --force --quiet || true ;;
    NONE) ready=false; if "${queue[@]}"; then sleep 30; continue; fi ;;
    *) say "$state"; sleep 30; continue ;;
  esac
  failures=$((failures + 1))
  say "$state, training is not done; failure $failures of $tries behind checkpoint ${step:-0}"
  ((failures == tries)) || sleep $((30 * 2 ** (failures < 6 ? failures - 1 : 5)))
done
say "given up; the slices cost money until: gcloud compute tpus queued-resources delete $name --zone=$zone --force"
exit 1
