#!/usr/bin/env bash
# GPU figures in one command: training step, latency, evaluation, unseen shapes, importance, the
# latency table, and the whole line on SmolLM2-135M where its checkpoint is given.
#
#   [SMOLLM2=<checkpoint>] [PYTHON=<python>] scripts/bench/gpu.sh [--model Llama-3.1-8B]
#       [--parts step latency ...] [--minutes 8]
#
# At most about eight minutes on one large GPU, random weights, bf16. Writes runs/bench_gpu/gpu.json,
# where parts of earlier runs on the same device stay. PYTHON is an interpreter that has the package;
# without it scripts/setup.sh makes .venv: on a machine with CUDA, TORCH=torch scripts/setup.sh first
# installs a build for it. `--small` tries everything on a machine without CUDA.
set -euo pipefail
[ -z "${SMOLLM2:-}" ] || SMOLLM2=$(cd "$SMOLLM2" && pwd)
export SMOLLM2=${SMOLLM2:-}
case "${PYTHON:-}" in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; esac
cd "$(dirname "$0")/../.."
if [ -z "${PYTHON:-}" ]; then
  scripts/setup.sh
  PYTHON=.venv/bin/python
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" scripts/bench/bench_gpu.py --out runs/bench_gpu/gpu.json "$@"
