#!/usr/bin/env bash
# Which sub-networks to train, and from what should they learn? Validation losses of real models
# over samplers x sorting x losses, three seeds each, as one table and one picture.
#
#   scripts/studies/training.sh [out_dir]         STEPS=100 SEEDS="1 2 3" are what the table quotes
#
# The first part crosses samplers, sorting and losses in short runs of stories260K. The second, longer
# one compares the super-network with one that trained the full network only, at the same number of
# full forward and backward passes (LONG_STEPS sandwich steps), on both models. Finished runs are
# kept: after an interruption, the same command goes on. JOBS runs go at once; about 40 minutes on
# two cores.
set -euo pipefail
source "$(dirname "$0")/common.sh"
out=$(out_dir runs/training_study "${1:-}")
steps=${STEPS:-100} seeds=${SEEDS:-1 2 3}
parts=${PARTS:-cross long} models=${MODELS:-stories260K pydoc-1m}

run() { # model, directory, checkpoint, options...
  local dir=$out/$1/$2 checkpoint=$3
  shift 3
  free_slot
  [ -f "$dir/done" ] && return
  echo "-- $dir"
  {
    nas finetune --checkpoint_dir "$checkpoint" --out_dir "$dir" --overwrite true \
      "${data[@]}" "${recipe[@]}" "$@" > "$dir.log" 2>&1 || { cat "$dir.log" >&2; exit 1; }
    rm -rf "$dir"/lit_model.pth* "$dir/checkpoints" "$dir"/tokenizer*
    touch "$dir/done"
  } &
}

study() { # model, checkpoint; uses the arrays `data`, `recipe` and `cross`
  local model=$1 plain=$2 sorted=$out/$1/sorted
  [[ $models == *$model* ]] || return 0
  [ -d "$plain" ] || { echo "skipped: no $plain" >&2; return; }
  [ -f "$sorted/run.yaml" ] || nas importance --checkpoint_dir "$plain" --out_dir "$sorted" \
    --overwrite true --data.files "$calibration" --data.num_blocks 64
  for variant in "${cross[@]}"; do
    [[ $parts == *cross* ]] || break
    read -r sorting sampler loss <<< "$variant"
    local checkpoint=$sorted
    [ "$sorting" = sorted ] || checkpoint=$plain
    mkdir -p "$out/$model/$sorting-$sampler-$loss"
    for seed in $seeds; do
      run "$model" "$sorting-$sampler-$loss/$seed" "$checkpoint" --sampler.kind "$sampler" \
        --loss.distillation "$loss" --trainer.max_steps "$steps" --seed "$seed"
    done
  done
  mkdir -p "$out/$model"/{sorted-standard-none,long-supernet,long-standard}
  for seed in $seeds; do
    # A sandwich step is the full network, two of the grid and the smallest: 2.5 full passes.
    [[ $parts != *cross* || ${#cross[@]} = 0 ]] || run "$model" "sorted-standard-none/$seed" "$sorted" \
      --sandwich.strategy standard --trainer.max_steps $((steps * 5 / 2)) --seed "$seed"
    [[ $parts == *long* ]] || continue
    run "$model" "long-supernet/$seed" "$sorted" "${longer[@]}" --trainer.max_steps "$long" \
      --loss.distillation forward_kl --seed "$seed"
    run "$model" "long-standard/$seed" "$sorted" "${longer[@]}" \
      --trainer.max_steps $((long * 5 / 2)) --sandwich.strategy standard --seed "$seed"
  done
  all_done
}

cross=()
for sampler in random grid_params calibrate_mag; do
  cross+=("sorted $sampler none" "plain $sampler none")
  cross+=("sorted $sampler forward_kl" "sorted $sampler cosine")
done

recipe=(
  --loss.teacher in_place --sandwich.full_weight 1
  --lora null --optimizer.lr 1e-3 --optimizer.warmup_steps 20 --trainer.gradient_clip_val 1
  --batch_size 8 --validation.num_networks 8 --validation.every_n_steps 100000
  --trainer.enable_progress_bar false --trainer.accelerator cpu --trainer.logger "[]"
)
longer=(--optimizer.lr 5e-4 --data.block_size 256 --trainer.max_epochs 50 --sandwich.full_weight 32)
calibration=$shared/tinystories/train.jsonl
data=(
  --data.files "$shared/tinystories/train.jsonl" --data.block_size 128
  --valid.files "$shared/tinystories/valid.jsonl" --valid.block_size 256 --validation.num_samples 64
)
long=${LONG_STEPS:-600}
study stories260K "$shared/checkpoints/stories260K"

cross=()
calibration=$bundled/calibration.jsonl
data=(
  --data.files "$bundled/train.jsonl" --data.block_size 128
  --valid.files "$bundled/valid.jsonl" --valid.block_size 128 --validation.num_samples 96
)
longer=(--optimizer.lr 5e-4 --trainer.max_epochs 50 --sandwich.full_weight 16)
long=${LONG_STEPS:-250}
study pydoc-1m "$bundled"

python scripts/studies/training.py "$out"
