#!/usr/bin/env bash
# Every claim about quality, measured again: importance, the ablation, and the fronts.
#
#   scripts/reproduce.sh [out_dir]          default: runs/reproduce; at most an hour on two cores
#
# Needs the folder ../shared/data (or DATA=...) with the checkpoints stories260K and
# babyllama-char361 in litgpt's format and TinyStories as JSON lines; without it only the bundled
# model is studied. Ends with summary.md and its pictures in out_dir. Every stage can be interrupted:
# the same command goes on. Speed is measured elsewhere: scripts/bench/bench_*.py.
set -euo pipefail
here=$(pwd)
cd "$(dirname "$0")/.."
scripts/setup.sh
out=${1:-runs/reproduce}
[ $# -eq 0 ] || case "$1" in /*) ;; *) out=$here/$1 ;; esac
mkdir -p "$out"

part() { # name, command...: keep how long it took
  local name=$1 begun=$SECONDS
  shift
  [ -f "$out/$name.seconds" ] && { echo "-- $name is there already" >&2; return; }
  "$@" "$out/$name"
  echo $((SECONDS - begun)) > "$out/$name.seconds"
}

export SEEDS="${SEEDS:-1 2 3}" JOBS="${JOBS:-2}"
SUBNETWORKS=20 ROWS=short part importance scripts/studies/importance.sh
STEPS=40 MODELS=stories260K PARTS=cross part ablation scripts/studies/training.sh
part fronts scripts/studies/front.sh
.venv/bin/python scripts/studies/summary.py "$out"
