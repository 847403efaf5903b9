#!/usr/bin/env bash
# How often should the whole and the smallest network be in a sandwich step? Trainings of all
# sub-networks of small models at equal cost: passes of the whole model, of which a sub-network
# costs its share of the parameters.
#
#   scripts/studies/shares.sh [out_dir]     SEEDS="1 2"  MODELS  PASSES (400)  SHARES (whole,smallest)
#
# Held-out nats per token, mean +- standard deviation over the seeds. Finished runs are kept.
set -euo pipefail
source "$(dirname "$0")/common.sh"
out=$(out_dir runs/shares_study "${1:-}")
stories=$shared/tinystories
declare -A rates=([stories260K]=2e-3 [babyllama-char361]=5e-4)

for model in ${MODELS:-stories260K babyllama-char361}; do
  sorted=$out/$model/sorted
  stage "$sorted" nas importance --checkpoint_dir "$shared/checkpoints/$model" \
    --data.files "$stories/train.jsonl" --data.num_blocks 128
  for shares in ${SHARES:-1,1 .5,.5 .25,.25 .1,.1 1,0 0,1}; do
    steps=$(python scripts/studies/shares.py steps "$sorted" "$shares" "${PASSES:-400}")
    for seed in ${SEEDS:-1 2}; do
      run=$out/$model/$shares/$seed
      stage "$run" nas finetune --checkpoint_dir "$sorted" --seed "$seed" --search_space aligned --weights all \
        --sandwich.full_share "${shares%,*}" --sandwich.smallest_share "${shares#*,}" --optimizer.lr "${rates[$model]}" \
        --data.files "$stories/train.jsonl" --data.block_size 128 --batch_size 8 --valid.files "$stories/valid.jsonl" \
        --valid.block_size 128 --validation.num_samples 64 --validation.every_n_steps "$steps" --trainer.max_steps "$steps" \
        --trainer.accelerator cpu --trainer.logger "[]" --trainer.enable_progress_bar false
      rm -f "$run/lit_model.pth"
    done
  done
done
python scripts/studies/shares.py table "$out" | tee "$out/table.md"
