#!/usr/bin/env bash
# What a sub-network loses before any training, in one basis and another: channels permuted or
# rotated, norms as they are or with factors, as plain slices or repaired.
#
#   scripts/studies/bases.sh [out_dir]
#
# MODELS="stories260K babyllama-char361 pydoc-1m" by default; SMOLLM2=<litgpt checkpoint> adds
# SmolLM2-135M at a few sizes, with some 12,000 calibration and 4,000 held-out tokens. Sorted
# checkpoints are kept: after an interruption, the same command goes on.
set -euo pipefail
source "$(dirname "$0")/common.sh"
out=$(out_dir runs/bases_study "${1:-}")
mkdir -p "$out"

study() { # name, checkpoint, calibration text, held-out text, calibration blocks, options of bases.py
  local name=$1 checkpoint=$2 calibration=$3 heldout=$4 blocks=$5 sorted=()
  shift 5
  [ -d "$checkpoint" ] || { echo "skipped: no $checkpoint" >&2; return; }
  for basis in permutation rotation; do
    stage "$out/$name/$basis" nas importance --checkpoint_dir "$checkpoint" \
      --data.files "$calibration" --data.column "${column:-text}" --data.valid_fraction 0 --data.num_blocks "$blocks" \
      --layer_order block_importance --basis "$basis" --norm_factors on
    sorted+=("$basis=$out/$name/$basis")
  done
  python scripts/studies/bases.py "$heldout" "${sorted[@]}" "$@" > "$out/$name/table.txt"
  sed -n '/^|/p' "$out/$name/table.txt" | tee "$out/$name/table.md"
}

for name in ${MODELS:-stories260K babyllama-char361 pydoc-1m}; do
  case "$name" in
    pydoc-1m) study "$name" $bundled $bundled/calibration.jsonl $bundled/valid.jsonl 128 \
      --repair $bundled/calibration.jsonl ;;
    *) study "$name" "$shared/checkpoints/$name" "$shared/tinystories/train.jsonl" \
      "$shared/tinystories/valid.jsonl" 128 --repair "$shared/tinystories/train.jsonl" ;;
  esac
done
[ -z "${SMOLLM2:-}" ] || column=prefix study SmolLM2-135M "$SMOLLM2" "$shared/calib/c4_pf.jsonl" \
  "$shared/calib/c4_demo.jsonl" 24 --blocks 8 --block_size 512 --sizes quick \
  --repair "$shared/calib/c4_pf.jsonl" --repair_column prefix --repair_blocks 24
