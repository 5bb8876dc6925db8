#!/usr/bin/env bash
# Rehearses training on several hosts: N processes on this machine's CPU.
#
#   launch/local_processes.sh [--dry-run] N FLAG...
#
#   FLAG  of vlm-compress train, the same for all of them:
#         --config=configs/quickstart.py:instruct --workdir=runs/a
#   Environment: DEVICES of a process (default 2), PORT (default: one is drawn)
#
# Lines of process I begin with [I].  Ctrl-C and SIGTERM reach all as SIGTERM:
# they save and stop.  When one fails, the others are stopped, and its exit code
# is this one's.
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
(($# >= 2)) || usage
n=$1 port=${PORT:-$((20000 + RANDOM % 10000))} pids=() filters=()
[[ $n =~ ^[1-9][0-9]*$ ]] || { echo "error: N $n: a number, 1 or more" >&2; exit 2; }
scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT
stop() { kill "-$1" ${pids[@]+"${pids[@]}"} 2>/dev/null || true; }
trap 'stop TERM' INT TERM

for ((i = 0; i < n; i++)); do
  command=(env JAX_PLATFORMS=cpu "XLA_FLAGS=--xla_force_host_platform_device_count=${DEVICES:-2}"
    vlm-compress train "${@:2}" "--coordinator=localhost:$port" "--num-processes=$n" "--process-id=$i")
  printf '%q ' "${command[@]}"; echo
  $dry_run && continue
  mkfifo "$scratch/$i"
  sed -u "s/^/[$i] /" <"$scratch/$i" & filters+=($!)
  "${command[@]}" >"$scratch/$i" 2>&1 & pids+=($!)
done

code=0 latest=0
while ((${#pids[@]})); do
  sleep 0.2 || true  # Ctrl-C ends it, too
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    found=0; wait "${pids[i]}" || found=$?
    unset "pids[$i]"
    ((found && !code)) || continue
    code=$found latest=$((SECONDS + 10))
    echo "error: process $i ends with exit code $code; the others are stopped" >&2
    stop TERM
  done
  ((!latest || SECONDS < latest)) || stop KILL  # it waits for a dead one
done
$dry_run || wait "${filters[@]}"
exit "$code"
