#!/usr/bin/env bash
# Which way of sorting helps most? RPD on random sub-networks of three real models, as one table.
#
#   scripts/importance_study.sh [out_dir]        SUBNETWORKS=100 is the number that the table quotes
#
# Every row changes options of the default. Sub-networks lie between half and full size in every
# dimension (layers: from floor(L / 2)); perplexity is measured on text held out from calibration.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
out=${1:-runs/importance_study}
count=${SUBNETWORKS:-100}
shared=../shared/data
bundled=whittle_nas/assets/pydoc-1m
mkdir -p "$out"

# Options and values in turn; the last rows are what the paper's published code does, and the
# default in the space that `nas search` uses unless told otherwise.
variants=(
  default
  "scope global"
  "neuron_activation fc"
  "head_activation proj_input"
  "layer_width 1"
  "layer_order block_drop"
  "layer_order block_importance"
  "aggregation mean_norm"
  "aggregation mean_variance"
  "aggregation norm_mean"
  "aggregation norm_norm"
  "aggregation norm_variance"
  "aggregation variance_mean"
  "aggregation variance_norm"
  "aggregation variance_variance"
  "scope global neuron_activation fc head_activation proj_input layer_order block_importance"
  "report.space aligned"
)

study() { # name, checkpoint, calibration text, held-out text, fewest layers
  local name=$1 checkpoint=$2 calibration=$3 heldout=$4 layers=$5
  [ -d "$checkpoint" ] || { echo "skipped: no $checkpoint" >&2; return; }
  cat > "$out/$name.space.yaml" <<SPACE
n_embd: {min: half, max: full}
n_head: {min: half, max: full}
intermediate_size: {min: half, max: full}
n_layer: {min: $layers, max: full}
SPACE
  for variant in "${variants[@]}"; do
    local run="$out/$name/${variant// /,}"
    [ -f "$run/rpd.json" ] && continue
    local options=() words=()
    read -ra words <<< "$variant"
    for ((i = 0; i + 1 < ${#words[@]}; i += 2)); do
      options+=("--${words[i]}" "${words[i + 1]}")
    done
    echo "$name: $variant" >&2
    nas importance --checkpoint_dir "$checkpoint" --out_dir "$run" --overwrite true \
      --data.files "$calibration" --data.valid_fraction 0 \
      --report.num_subnetworks "$count" --report.space "$out/$name.space.yaml" \
      --report.data.files "$heldout" --report.data.block_size 256 --report.num_blocks 16 \
      "${options[@]}" > "$run.log" 2>&1 || { cat "$run.log" >&2; exit 1; }
  done
}

mkdir -p "$out"/{stories260K,babyllama-char361,pydoc-1m}
study stories260K $shared/checkpoints/stories260K \
  $shared/tinystories/train.jsonl $shared/tinystories/valid.jsonl 2
study babyllama-char361 $shared/checkpoints/babyllama-char361 \
  $shared/tinystories/train.jsonl $shared/tinystories/valid.jsonl 2
study pydoc-1m $bundled $bundled/calibration.jsonl $bundled/valid.jsonl 3

python - "$out" "${variants[@]}" <<'TABLE' | tee "$out/table.md"
"""One row per variant, one column per model: RPD mean / median / share of sub-networks improved."""
import json
import sys
from pathlib import Path

out, variants = Path(sys.argv[1]), sys.argv[2:]
models = [m for m in ("stories260K", "babyllama-char361", "pydoc-1m") if any((out / m).glob("*/rpd.json"))]
print("| changed |", " | ".join(models), "|")
print("|---|" + "---|" * len(models))
for variant in variants:
    cells = []
    for model in models:
        found = json.loads((out / model / variant.replace(" ", ",") / "rpd.json").read_text())["rpd"]
        cells.append(f"{found['mean']:.3f} / {found['median']:.3f} / {found['share_improved']:.0%}")
    print(f"| {variant} |", " | ".join(cells), "|")
TABLE
