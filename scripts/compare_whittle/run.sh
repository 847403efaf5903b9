#!/usr/bin/env bash
# Compare with the peer, whittle 0.6.0: training step, forward pass, switching, evaluation, search.
#
#   scripts/compare_whittle/run.sh [OUT_DIR] [option ...]       default: runs/compare_whittle
#
# Makes the peer's own virtual environment in OUT_DIR/venv (Python 3.10 to 3.12: set PEER_PYTHON if
# python3 is another one), then takes about a quarter of an hour on two cores. Writes results.json
# and table.md there and prints the table; a rerun skips finished parts. The options are those of
# compare.py, for instance `--parts step forward`.
set -euo pipefail
here=$(pwd)
cd "$(dirname "$0")/../.."
out=runs/compare_whittle
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  case "$1" in /*) out=$1 ;; *) out=$here/$1 ;; esac
  shift
fi
venv=${PEER_VENV:-$out/venv}
mkdir -p "$out"
if [ ! -f "$venv/.installed" ]; then
  echo "Installing whittle 0.6.0 into $venv (the first time this takes some minutes) ..." >&2
  "${PEER_PYTHON:-python3}" -m venv "$venv"
  # torch goes first, so that both sides have the same; without the bound on pyarrow the peer's
  # command line does not start.
  "$venv/bin/python" -m pip install --quiet "${TORCH:-torch==2.13.0}"
  "$venv/bin/python" -m pip install --quiet "whittle==0.6.0" "pyarrow<22"
  touch "$venv/.installed"
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
exec "${PYTHON:-.venv/bin/python}" scripts/compare_whittle/compare.py --out "$out" \
  --peer "$venv/bin/python" "$@"
