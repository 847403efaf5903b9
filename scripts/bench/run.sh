#!/usr/bin/env bash
# All speed figures of docs/results.md that need no GPU, one JSON file each; the machine must be quiet.
#
#   scripts/bench/run.sh [out_dir]          default: runs/bench; a finished benchmark is kept
set -euo pipefail
here=$(pwd)
cd "$(dirname "$0")/../.."
out=${1:-runs/bench}
[ $# -eq 0 ] || case "$1" in /*) ;; *) out=$here/$1 ;; esac
mkdir -p "$out"

bench() { # name, script, options...
  local name=$1
  shift
  [ -s "$out/$name.json" ] && return
  echo "-- $*" >&2
  .venv/bin/python "$@" --out "$out/$name.partial"
  mv "$out/$name.partial" "$out/$name.json"
}

bench slicing scripts/bench/bench_slicing.py
bench importance scripts/bench/bench_importance.py
bench training scripts/bench/bench_training.py
bench training_distilled scripts/bench/bench_training.py --distillation forward_kl
bench training_distilled_all scripts/bench/bench_training.py --distillation forward_kl --full
bench training_unseen scripts/bench/bench_training.py --unseen 32
bench search scripts/bench/bench_search.py
bench ilp scripts/bench/bench_ilp.py
bench evaluate scripts/bench/bench_evaluate.py
bench export scripts/bench/bench_export.py
bench pruning scripts/bench/bench_pruning.py
