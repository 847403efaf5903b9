#!/usr/bin/env bash
# Which sub-networks to train, and from what should they learn? Validation losses of real models
# over samplers x sorting x losses, three seeds each, as one table and one picture.
#
#   scripts/training_study.sh [out_dir]         STEPS=200 SEEDS="1 2 3" are what the table quotes
#
# A second, longer part compares the super-network with one that trained the full network only, at
# the same number of full forward and backward passes (LONG_STEPS sandwich steps). Finished runs
# are kept: after an interruption, the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
out=${1:-runs/training_study}
steps=${STEPS:-200} long=${LONG_STEPS:-1000} seeds=${SEEDS:-1 2 3}
shared=../shared/data
bundled=whittle_nas/assets/pydoc-1m

run() { # model, directory, checkpoint, options...
  local dir=$out/$1/$2 checkpoint=$3
  shift 3
  [ -f "$dir/losses.yaml" ] && return
  echo "-- $dir"
  nas finetune --checkpoint_dir "$checkpoint" --out_dir "$dir" --overwrite true \
    "${data[@]}" "${recipe[@]}" "$@" > /dev/null
  rm -rf "$dir"/lit_model.pth* "$dir/checkpoints" "$dir"/tokenizer*
}

study() { # model, checkpoint; uses the arrays `data`, `recipe` and `cross`
  local model=$1 plain=$2 sorted=$out/$1/sorted
  [ -d "$plain" ] || { echo "skipped: no $plain" >&2; return; }
  [ -f "$sorted/run.yaml" ] || nas importance --checkpoint_dir "$plain" --out_dir "$sorted" \
    --overwrite true --data.files "$calibration" --data.num_blocks 64
  for seed in $seeds; do
    for variant in "${cross[@]}"; do
      read -r sorting sampler loss <<< "$variant"
      local checkpoint=$sorted
      [ "$sorting" = sorted ] || checkpoint=$plain
      run "$model" "$sorting-$sampler-$loss/$seed" "$checkpoint" --sampler.kind "$sampler" \
        --loss.distillation "$loss" --trainer.max_steps "$steps" --seed "$seed"
    done
    # A sandwich step is the full network, two of the grid and the smallest: 2.5 full passes.
    run "$model" "sorted-standard-none/$seed" "$sorted" --sandwich.strategy standard \
      --trainer.max_steps $((steps * 5 / 2)) --seed "$seed"
    run "$model" "long-supernet/$seed" "$sorted" --trainer.max_steps "$long" --seed "$seed" \
      --loss.distillation forward_kl --sandwich.full_weight 4
    run "$model" "long-standard/$seed" "$sorted" --trainer.max_steps $((long * 5 / 2)) \
      --sandwich.strategy standard --seed "$seed"
  done
}

some=()
cross=()
for loss in none forward_kl cosine; do
  for sampler in random grid_params calibrate_mag; do
    for sorting in sorted plain; do
      cross+=("$sorting $sampler $loss")
      if [ $loss = none ] || [ "$sorting $sampler" = "sorted grid_params" ]; then
        some+=("$sorting $sampler $loss")
      fi
    done
  done
done

recipe=(
  --lora null --optimizer.lr 1e-3 --optimizer.warmup_steps 20 --trainer.gradient_clip_val 1
  --batch_size 8 --validation.num_networks 8 --validation.every_n_steps 100000
  --trainer.enable_progress_bar false --trainer.accelerator cpu --trainer.logger "[]"
)
calibration=$shared/tinystories/train.jsonl
data=(
  --data.files "$shared/tinystories/train.jsonl" --data.block_size 128
  --valid.files "$shared/tinystories/valid.jsonl" --valid.block_size 256 --validation.num_samples 64
)
study stories260K "$shared/checkpoints/stories260K"

cross=("${some[@]}")
calibration=$bundled/calibration.jsonl
data=(
  --data.files "$bundled/train.jsonl" --data.block_size 128
  --valid.files "$bundled/valid.jsonl" --valid.block_size 128 --validation.num_samples 96
)
study pydoc-1m "$bundled"

python scripts/training_study.py "$out"
