#!/usr/bin/env bash
# What a better start is worth after a super-network's training: losses of sub-networks, sorted by
# permutation or by rotation, before and after the same sandwich steps.
#
#   scripts/studies/starts.sh [out_dir]       SEEDS="1 2 3"; about 25 minutes on two cores
#
# Sizes and columns are those of repair.py: plain slices, and the same repaired. Finished runs are
# kept: after an interruption, the same command goes on.
set -euo pipefail
source "$(dirname "$0")/common.sh"
out=$(out_dir runs/starts_study "${1:-}")
seeds=${SEEDS:-1 2 3}
stories=$shared/tinystories

losses() { # checkpoint, where its table goes
  python scripts/studies/repair.py "$1" "$2.jsonl" --calibration "$stories/train.jsonl" \
    --held_out "$stories/valid.jsonl" --sizes 90% 80% 70% 60% 50% --num_blocks 64 > "$2.md"
}

study() { # model, steps, learning rate
  local model=$1
  for basis in permutation rotation; do
    local to=$out/$model/$basis
    stage "$to/sorted" nas importance --checkpoint_dir "$shared/checkpoints/$model" --basis "$basis" \
      --data.files "$stories/train.jsonl" --data.num_blocks 128
    [ -f "$to/before.md" ] || losses "$to/sorted" "$to/before"
    for seed in $seeds; do
      stage "$to/trained-$seed" nas finetune --checkpoint_dir "$to/sorted" --seed "$seed" \
        --data.files "$stories/train.jsonl" --data.block_size 128 --valid.files "$stories/valid.jsonl" \
        --valid.block_size 128 --validation.num_samples 16 --validation.every_n_steps "$2" \
        --search_space aligned --weights all --optimizer.lr "$3" --batch_size 8 \
        --trainer.max_steps "$2" --trainer.accelerator cpu --trainer.logger "[]" \
        --trainer.enable_progress_bar false
      [ -f "$to/after-$seed.md" ] || losses "$to/trained-$seed" "$to/after-$seed"
    done
  done
}

study stories260K 150 2e-3
study babyllama-char361 80 5e-4

for model in stories260K babyllama-char361; do
  for basis in permutation rotation; do
    for table in "$out/$model/$basis"/{before,after-*}.md; do
      echo
      echo "$model, $basis, $(basename "$table" .md)"
      echo
      sed -n '/^|/p' "$table"
    done
  done
done | tee "$out/table.md"
