#!/usr/bin/env bash
# Installs the committed state of this repository on all hosts of a TPU.
#
#   launch/tpu_setup.sh [--dry-run] [--queued] NAME ZONE [SERVER:/SHARE]
#
#   --queued       NAME is a queued resource (tpu_queue.sh), with all its slices
#   SERVER:/SHARE  NFS share (Filestore) to mount at ~/shared; several hosts
#                  need such a disk for workdirs that are not on gs://
#
# Run it again after a commit: it replaces the source and keeps the
# environment.  Python 3.11 or newer is taken from the image, or installed.
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
(($# == 2 || $# == 3)) || usage
name=$1 zone=$2 root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT

run() { printf '%q ' "$@"; echo; $dry_run || "$@"; }

# What a host runs.  A failure on any of them makes gcloud fail.
printf -v remote 'set -eu; share=%q\n' "${3-}"
remote+=$(cat <<'REMOTE'
wait="-o DPkg::Lock::Timeout=600"  # new VMs upgrade themselves first
rm -rf vlm_compress && mkdir -p vlm_compress shared
tar -xzf vlm_compress.tar.gz -C vlm_compress
python=$(command -v python3.13 || command -v python3.12 || command -v python3.11 || true)
if [ -z "$python" ]; then
  sudo add-apt-repository -y ppa:deadsnakes/ppa
  sudo apt-get $wait install -y python3.11 python3.11-venv && python=python3.11
fi
[ -x vlm_env/bin/pip ] || "$python" -m venv vlm_env
vlm_env/bin/pip install -q -e "vlm_compress[demo,gcs]" "jax[tpu]"
if [ -n "$share" ] && ! mountpoint -q shared; then
  sudo apt-get $wait install -y nfs-common
  sudo mount -t nfs "$share" shared
  [ -w shared ] || sudo chmod a+rwx shared
fi
REMOTE
)
run git -C "$root" archive -o "$scratch/vlm_compress.tar.gz" HEAD
at=("--zone=$zone" "${all[@]}")
run gcloud compute tpus "$kind" scp "$scratch/vlm_compress.tar.gz" "$name:" "${at[@]}"
run gcloud compute tpus "$kind" ssh "$name" "${at[@]}" --command="$remote"
