#!/usr/bin/env bash
# GPU figures in one command: training step, importance, evaluation, latency table, latency.
#
#   scripts/bench/gpu.sh [--model Llama-3.1-8B] [--parts step importance evaluation table latency]
#
# About eight minutes on one large GPU, random weights, bf16. Writes runs/bench_gpu/gpu.json.
# On a machine with CUDA, TORCH=torch scripts/setup.sh first installs a build for it.
set -euo pipefail
cd "$(dirname "$0")/../.."
scripts/setup.sh
.venv/bin/python scripts/bench/bench_gpu.py --out runs/bench_gpu/gpu.json "$@"
