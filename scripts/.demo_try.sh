#!/usr/bin/env bash
# The whole line on SmolLM2-135M-Instruct, as a user would run it: sort, train all sub-networks, search
# loss against latency, evaluate, export to litgpt and transformers, generate, and one table of it all.
# A rerun skips finished stages and goes on with the one that was interrupted.
#
#   scripts/demo_smollm2.sh [out_dir]        default: runs/smollm2-$BUDGET
#
# BUDGET=full (default) takes about three hours on two cores, BUDGET=small about 35 minutes.
# DEVICE=cuda takes minutes. Other knobs, all optional:
#   CHECKPOINT   a litgpt checkpoint instead of SmolLM2
#   SHARES       latencies of the networks that are chosen, in percent of the whole model's
#   IMPORTANCE, FINETUNE, SEARCH, EVALUATE, EXPORT   more options of these commands, as one string
# Text and tasks are those of ../shared/data where that is there, else what comes with this repository.
set -euo pipefail
here=$(pwd)
cd "$(dirname "$0")/.."

export PATH="$PWD/.venv/bin:$PATH" HF_DATASETS_OFFLINE=1
budget=${BUDGET:-full} device=${DEVICE:-cpu}
out=${1:-$PWD/runs/smollm2-$budget}
case "$out" in /*) ;; *) out=$here/$out ;; esac
checkpoint=${CHECKPOINT:-checkpoints/SmolLM2-135M-Instruct}
case "$checkpoint" in /* | checkpoints/*) ;; *) checkpoint=$here/$checkpoint ;; esac
[ -n "${CHECKPOINT:-}" ] || scripts/get_smollm2.sh "$PWD/$checkpoint"
export HF_HUB_OFFLINE=1
config=configs/SmolLM2-135M-Instruct
tool="python scripts/demo_smollm2.py"
mkdir -p "$out"

case "$budget" in # blocks of calibration, training steps, trials, questions per task, blocks of test text
  small) calibration=16 order_blocks=2 steps=40 trials=24 search_blocks=8 limit=40 test_blocks=16 ;;
  full) calibration=64 order_blocks=4 steps=240 trials=80 search_blocks=16 limit=200 test_blocks=64 ;;
  tiny) calibration=8 order_blocks=1 steps=4 trials=8 search_blocks=2 limit=4 test_blocks=2 ;; # tries the script
  *) echo "BUDGET=$budget must be full, small or tiny" >&2; exit 2 ;;
esac
shares=${SHARES:-"80 65 50"}
precision=32-true dtype=float32 loader=cpu batch=4
if [ "$device" != cpu ]; then precision=bf16-mixed dtype=bfloat16 loader=cuda batch=16; fi

data=../shared/data
if [ -d "$data/calib" ]; then
  text="--data $config/text.yaml" test="[$data/wikitext2/test_docs.jsonl]"
  tasks=local_hellaswag,local_piqa,local_arc_easy,local_lambada_openai,local_winogrande
  task_path=$data/lm_eval_tasks
else # prose that ships with Python, and questions of our own
  bundled=whittle_nas/assets/pydoc-1m
  text="--data.files [$bundled/train.jsonl] --data.valid_fraction 0.05"
  test="[$bundled/test.jsonl]"
  tasks=capitals task_path=$config/tasks
fi
text="$text --data.block_size 256"

stage() { # stage <directory of its result> <command ...>: run it timed, unless its result is there
  local name=$1
  shift
  if [ -e "$out/$name/run.yaml" ]; then echo "-- $name is there already"; return; fi
  echo "-- $*"
  $tool timed "$out/times.csv" "$name" "$@" --out_dir "$out/$name"
}

# shellcheck disable=SC2086  # options are split on purpose
{
stage sorted nas importance --checkpoint_dir "$checkpoint" --device "$device" \
  $text --data.num_blocks "$calibration" \
  --layer_order greedy --layer_blocks "$order_blocks" ${IMPORTANCE:-}
stage supernet nas finetune --checkpoint_dir "$out/sorted" --resume true \
  --search_space "$config/space.yaml" $text --batch_size "$batch" --trainer.max_steps "$steps" \
  --trainer.accelerator "$loader" --trainer.precision "$precision" --trainer.log_every_n_steps 5 \
  --loss.distillation forward_kl --sandwich.num_random 1 --optimizer.warmup_steps $((steps / 10)) \
  --validation.num_samples 16 --validation.num_networks 3 \
  --validation.every_n_steps $(((steps + 1) / 2)) ${FINETUNE:-}
stage search nas search --checkpoint_dir "$out/supernet" --resume true --device "$device" \
  --dtype "$dtype" --objectives val_loss,latency_ms --costs.batch 1 --costs.tokens 256 \
  $text --data.num_blocks "$search_blocks" --search_blocks "$search_blocks" \
  --num_trials "$trials" ${SEARCH:-}
chosen=$($tool choose "$out/search" $shares)
stage evaluated_dense nas evaluate --checkpoint_dir "$checkpoint" --include_full true \
  --device "$device" --dtype "$dtype" --tasks "$tasks" --include_path "$task_path" --limit "$limit" \
  --data.files "$test" --data.block_size 512 --data.num_blocks "$test_blocks" ${EVALUATE:-}
stage evaluated nas evaluate --checkpoint_dir "$out/supernet" --include_full true \
  --front "$out/search/front.json" --index "[${chosen// /,}]" \
  --device "$device" --dtype "$dtype" --tasks "$tasks" --include_path "$task_path" --limit "$limit" \
  --data.files "$test" --data.block_size 512 --data.num_blocks "$test_blocks" ${EVALUATE:-}
for index in $chosen; do
  from="--checkpoint_dir $out/supernet --front $out/search/front.json --index $index"
  stage "litgpt-$index" nas export $from ${EXPORT:-}
  stage "hf-$index" nas export $from --format hf --dtype bfloat16 ${EXPORT:-}
  stage "profile-$index" nas profile $from --batch 1 --tokens 256 --device "$device" --dtype "$dtype"
done
}
# shellcheck disable=SC2086
[ -e "$out/generation.md" ] || $tool generate "$out" "$checkpoint" $chosen
# shellcheck disable=SC2086
$tool table "$out" "$checkpoint" $chosen
