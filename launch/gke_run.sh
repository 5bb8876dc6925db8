#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that has JobSet installed.
#
#   launch/gke_run.sh [--dry-run] [--spot] NAME IMAGE ACCELERATOR TOPOLOGY SLICES CLAIM CONFIG WORKDIR [FLAG...]
#
#   IMAGE        its working directory is this repository, installed with jax[tpu]
#   ACCELERATOR  and TOPOLOGY of the node pools: tpu-v5-lite-podslice 16x16
#   CLAIM        persistent volume claim, ReadWriteMany (Filestore), for /shared
#   WORKDIR      folder below /shared, such as runs/a
#   FLAG         more flags of train, such as --data-root=/shared/data.  Paths in
#                CONFIG are below the image's working directory; name others,
#                such as data.options.directory and init_from, by flags
#   CHIPS_PER_HOST (default 4), RESTARTS (20, preemptions count): environment
#
# kubectl delete jobset NAME; then the same line again resumes.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit "${1:-2}"; }
fail() { echo "error: $*" >&2; exit 2; }

dry_run=false spot='# on demand'
while [[ ${1-} == -* ]]; do
  case $1 in
    --dry-run) dry_run=true ;;
    --spot) spot='cloud.google.com/gke-spot: "true"' ;;
    -h | --help) usage 0 ;;
    *) usage ;;
  esac
  shift
done
(($# >= 8)) || usage
[[ $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "NAME $1: small letters, digits and -, 40 at most"
[[ $4 =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "TOPOLOGY $4: such as 4x8 or 2x2x4"
[[ $5 =~ ^[1-9][0-9]*$ ]] || fail "SLICES $5: a number, 1 or more"
[[ $8 != *:* && $8 != /* ]] || fail "WORKDIR $8: name a folder below /shared"
[[ "$*" != *[[:cntrl:]]* ]] || fail 'line breaks cannot be passed on'

chips=$((${4//x/*})) per_host=${CHIPS_PER_HOST:-4}
((per_host <= chips)) || per_host=$chips
((chips % per_host == 0)) || fail "TOPOLOGY $4: not a multiple of $per_host chips, CHIPS_PER_HOST"

# A YAML string: what JSON would write.
quoted() { local text=${1//\\/\\\\}; printf '"%s"' "${text//\"/\\\"}"; }
args='' workdir=/shared/${8%/}
for flag in "--config=$7" "--workdir=$workdir" "${@:9}"; do
  args+=${args:+, }$(quoted "$flag")
done

manifest=$(cat "$(dirname "$0")/gke_jobset.yaml")
fill() { manifest=${manifest//"\${$1}"/"$2"}; }
fill NAME "$1"; fill IMAGE "$(quoted "$2")"; fill ACCELERATOR "$(quoted "$3")"; fill TOPOLOGY "$4"
fill SLICES "$5"; fill CLAIM "$(quoted "$6")"; fill WORKDIR "$(quoted "$workdir")"
fill HOSTS "$((chips / per_host))"; fill CHIPS "$per_host"; fill SPOT "$spot"
fill RESTARTS "${RESTARTS:-20}"; fill ARGS "$args"

printf 'kubectl apply -f - <<'\''EOF'\''\n%s\nEOF\n' "$manifest"
$dry_run || kubectl apply -f - <<<"$manifest"
