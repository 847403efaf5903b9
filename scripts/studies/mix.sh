#!/usr/bin/env bash
# What should a chosen network learn from? Cross entropy, forward KL to the whole model, or both, in
# a short training of two sizes of two small models. SUPERNET=true: and what a super-network, on one.
#
#   scripts/studies/mix.sh [out_dir]        SEEDS="1 2 3"; about half an hour on one core
#
# Held-out nats per token, mean +- standard deviation over the seeds; every run has the same steps.
# Finished runs are kept: after an interruption, the same command goes on.
set -euo pipefail
source "$(dirname "$0")/common.sh"
out=$(out_dir runs/mix_study "${1:-}")
stories=$shared/tinystories
mixes=("0 0" "1 0" "1 .3" "1 1" "1 3") # weights of KL and of cross entropy; without KL cross entropy

together() { # model, steps, learning rate: all sub-networks at once
  for mix in "${mixes[@]}"; do
    read -r kl ce <<< "$mix"
    local loss="--loss.kd_weight $kl --loss.ce_weight $ce"
    [ "$kl" != 0 ] || loss="--loss.distillation none"
    for seed in ${SEEDS:-1 2 3}; do
      # shellcheck disable=SC2086
      stage "$out/together/$1/$kl,$ce/$seed" nas finetune --checkpoint_dir "$out/$1/sorted" --seed "$seed" \
        $loss --search_space aligned --weights all --optimizer.lr "$3" --data.files "$stories/train.jsonl" \
        --data.block_size 128 --batch_size 8 --valid.files "$stories/valid.jsonl" --valid.block_size 128 \
        --validation.num_samples 64 --validation.every_n_steps "$2" --trainer.max_steps "$2" \
        --trainer.accelerator cpu --trainer.logger "[]" --trainer.enable_progress_bar false
      rm -f "$out/together/$1/$kl,$ce/$seed/lit_model.pth"
    done
  done
}

study() { # model, steps, learning rate
  local sorted=$out/$1/sorted
  stage "$sorted" nas importance --checkpoint_dir "$shared/checkpoints/$1" \
    --data.files "$stories/train.jsonl" --data.num_blocks 128
  python scripts/studies/mix.py picks "$sorted" "$out/$1/picks.yaml"
  for mix in "${mixes[@]}"; do
    read -r kl ce <<< "$mix"
    local loss="--loss.kd_weight $kl --loss.ce_weight $ce"
    [ "$kl" != 0 ] || loss="--loss.distillation none"
    for seed in ${SEEDS:-1 2 3}; do
      # shellcheck disable=SC2086  # options are split on purpose
      stage "$out/$1/$kl,$ce/$seed" nas finetune --checkpoint_dir "$sorted" --seed "$seed" $loss \
        --subnetworks "$out/$1/picks.yaml" --share none --weights all --optimizer.lr "$3" \
        --data.files "$stories/train.jsonl" --data.block_size 128 --batch_size 8 \
        --valid.files "$stories/valid.jsonl" --valid.block_size 128 --validation.num_samples 64 \
        --validation.every_n_steps "$2" --trainer.max_steps "$2" --trainer.accelerator cpu \
        --trainer.logger "[]" --trainer.enable_progress_bar false
      rm -f "$out/$1/$kl,$ce/$seed"/*/lit_model.pth
    done
  done
}

study stories260K 150 2e-3
study babyllama-char361 80 5e-4
[ "${SUPERNET:-false}" != true ] || together stories260K 150 2e-3
python scripts/studies/mix.py table "$out" | tee "$out/table.md"
