#!/usr/bin/env bash
# Table 1: every method of `nas prune` and our own networks on one model, in one harness: perplexity,
# tasks, latency and bytes, as they come out and after the same short recovery.
#
#   scripts/studies/table1.sh [out_dir]
#
# CHECKPOINT is a litgpt checkpoint of SmolLM2-135M (scripts/get_smollm2.sh makes it). Other knobs:
#   PASSES       of: model text tasks latency recovered recovered_text recovered_tasks (default all)
#   ROWS         names of `table1.py rows` (default all)
#   LIMIT        questions per task (500)       CALIBRATION, BLOCKS  blocks of 512 tokens (64, 16)
#   STEPS        of the recovery (100)          REPEATS  of a timing (10)
#   DTYPE        of the tasks and of the recovery's products: stored, or bfloat16, faster where a CPU has it
#   SORTED       the checkpoint as `nas importance` sorted it, if there is one
#   WRAP         a command in front of every row, such as "flock some.lock"
# Every pass of every row is kept: after an interruption, or with other PASSES, the same command goes on.
set -euo pipefail
source "$(dirname "$0")/common.sh"
out=$(out_dir runs/table1 "${1:-}")
checkpoint=${CHECKPOINT:-checkpoints/SmolLM2-135M-Instruct} sorted=${SORTED:-$out/sorted}
export OMP_NUM_THREADS=${THREADS:-$(nproc)}
calibration="--data.files $shared/calib/c4_demo.jsonl"
mkdir -p "$out"
# shellcheck disable=SC2086  # words are split on purpose
{
rows=${ROWS:-$(python scripts/studies/table1.py rows)}
if [[ "$rows" == *ours* ]]; then
  stage "$sorted" ${WRAP:-} nas importance --checkpoint_dir "$checkpoint" $calibration --data.num_blocks 64 --data.block_size 256
  stage "$out/search" ${WRAP:-} nas search --checkpoint_dir "$sorted" $calibration --data.block_size 256 \
    --data.num_blocks 8 --search_blocks 8 --objectives val_loss,num_params --num_trials "${TRIALS:-60}" \
    --budgets "num_params <= 80%, num_params <= 90%, num_params <= 70%"
fi
for row in $rows; do
  ${WRAP:-} python scripts/studies/table1.py row "$row" "$out" --checkpoint "$checkpoint" --sorted "$sorted" \
    --picks "$out/search/picks.yaml" --data "$shared" --calibration "${CALIBRATION:-64}" --blocks "${BLOCKS:-16}" \
    --limit "${LIMIT:-500}" --repeats "${REPEATS:-10}" --steps "${STEPS:-100}" --dtype "${DTYPE:-stored}" \
    ${PASSES:+--passes $PASSES} || echo "$row failed; the others go on" >&2
done
}
python scripts/studies/table1.py table "$out"
