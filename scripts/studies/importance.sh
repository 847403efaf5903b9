#!/usr/bin/env bash
# Which way of sorting helps most? RPD on random sub-networks of three real models, as one table, and
# perplexity against size before and after, as one picture.
#
#   scripts/studies/importance.sh [out_dir]
#
# Every row changes options of the default; that of `report.repair` is the default with every
# sub-network repaired, which takes seconds each. Sub-networks lie between half and full size in every
# dimension (layers: from floor(L / 2)); perplexity is measured on text held out from calibration.
# SUBNETWORKS=100 for each of SEEDS="1337"; ROWS=short leaves out the other aggregations; ROWS=bases
# has permutation, rotation and repair only; JOBS runs go at once. Finished runs are kept: after an
# interruption, the same command goes on.
set -euo pipefail
source "$(dirname "$0")/common.sh"
out=$(out_dir runs/importance_study "${1:-}")
count=${SUBNETWORKS:-100} seeds=${SEEDS:-1337} rows=${ROWS:-all}
mkdir -p "$out"

# Options and values in turn; `all of the published code's choices` is the last of the short list.
variants=(
  default
  "report.repair true"
  "basis permutation norm_factors off"
  "basis rotation norm_factors off"
  "basis rotation norm_factors on"
  "scope global"
  "neuron_activation fc"
  "head_activation proj_input"
  "layer_order block_drop"
  "layer_order block_importance"
  "criterion magnitude"
  "scope global neuron_activation fc head_activation proj_input layer_order block_importance"
)
[ "$rows" = all ] && variants+=(
  "layer_width 1"
  "aggregation mean_norm"
  "aggregation mean_variance"
  "aggregation norm_mean"
  "aggregation norm_norm"
  "aggregation norm_variance"
  "aggregation variance_mean"
  "aggregation variance_norm"
  "aggregation variance_variance"
  "report.search_space aligned"
)
[ "$rows" = bases ] && variants=("${variants[@]:0:5}")

run() { # model, variant, seed; uses the model's variables
  local dir="$out/$1/${2// /,}/$3" options=() words=()
  [ -f "$dir/rpd.json" ] && return
  free_slot
  read -ra words <<< "$2"
  for ((i = 0; i + 1 < ${#words[@]}; i += 2)); do
    options+=("--${words[i]}" "${words[i + 1]}")
  done
  echo "-- $dir" >&2
  mkdir -p "$dir"
  {
    nas importance --checkpoint_dir "$checkpoint" --out_dir "$dir" --overwrite true \
      --data.files "$calibration" --data.valid_fraction 0 --seed "$3" --data.seed "$3" \
      --report.num_subnetworks "$count" --report.search_space "$out/$1.space.yaml" \
      --report.data.files "$heldout" --report.data.block_size 256 --report.num_blocks 16 \
      "${options[@]}" > "$dir.log" 2>&1 || { cat "$dir.log" >&2; exit 1; }
    rm -f "$dir"/lit_model.pth
  } &
}

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
    for seed in $seeds; do run "$name" "$variant" "$seed"; done
  done
}

study stories260K "$shared/checkpoints/stories260K" \
  "$shared/tinystories/train.jsonl" "$shared/tinystories/valid.jsonl" 2
study babyllama-char361 "$shared/checkpoints/babyllama-char361" \
  "$shared/tinystories/train.jsonl" "$shared/tinystories/valid.jsonl" 2
study pydoc-1m $bundled $bundled/calibration.jsonl $bundled/valid.jsonl 3
all_done

python scripts/studies/importance.py "$out" "${variants[@]}"
