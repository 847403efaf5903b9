#!/usr/bin/env bash
# The whole line on SmolLM2-135M-Instruct, as a user would run it: sort, train all sub-networks, search
# loss against latency, train three of the front alone, evaluate, export to litgpt and transformers,
# generate, and one table of it all.
# A rerun skips finished stages and goes on with the one that was interrupted.
#
#   scripts/demo_smollm2.sh [out_dir]        default: runs/smollm2-$BUDGET
#
# BUDGET=full (default) takes about three hours on two cores, BUDGET=small about 35 minutes.
# DEVICE=cuda takes minutes. Other knobs, all optional:
#   CHECKPOINT   a litgpt checkpoint instead of SmolLM2
#   BUDGETS      of the networks that are chosen, as `nas search --budgets` takes them
#   IMPORTANCE, FINETUNE, SEARCH, ALONE, EVALUATE, EXPORT   more options of these commands, each one
#                string: FINETUNE trains all sub-networks, ALONE the chosen ones
# Text and tasks are those of ../shared/data where that is there, else what comes with this repository.
set -euo pipefail
here=$(pwd)
cd "$(dirname "$0")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH" HF_DATASETS_OFFLINE=1
budget=${BUDGET:-full} device=${DEVICE:-cpu}
out=${1:-$PWD/runs/smollm2-$budget}
case "$out" in /*) ;; *) out=$here/$out ;; esac
checkpoint=${CHECKPOINT:-checkpoints/SmolLM2-135M-Instruct}
case "$checkpoint" in /* | checkpoints/*) ;; *) checkpoint=$here/$checkpoint ;; esac
[ -n "${CHECKPOINT:-}" ] || scripts/get_smollm2.sh "$PWD/$checkpoint"
export HF_HUB_OFFLINE=1
config=whittle_nas/configs/SmolLM2-135M-Instruct
tool="python scripts/demo_smollm2.py"
mkdir -p "$out"

case "$budget" in # blocks of calibration, steps of all and alone, trials, questions, blocks of test text
  small) calibration=24 order_blocks=2 steps=24 alone=16 trials=20 search_blocks=8 limit=25 test_blocks=8 ;;
  full) calibration=64 order_blocks=4 steps=160 alone=100 trials=60 search_blocks=16 limit=200 test_blocks=32 ;;
  tiny) calibration=8 order_blocks=1 steps=4 alone=4 trials=8 search_blocks=2 limit=4 test_blocks=2 ;; # tries the script
  *) echo "BUDGET=$budget must be full, small or tiny" >&2; exit 2 ;;
esac
budgets=${BUDGETS:-"latency_ms <= 80%, latency_ms <= 65%, latency_ms <= 50%"}
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
train="$text --batch_size $batch --trainer.accelerator $loader --trainer.precision $precision
  --trainer.log_every_n_steps 5 --validation.num_samples 16"
stage supernet nas finetune --checkpoint_dir "$out/sorted" --resume true $train \
  --search_space "$config/space.yaml" --trainer.max_steps "$steps" --sandwich.num_random 1 \
  --optimizer.warmup_steps $((steps / 10)) --validation.num_networks 3 \
  --validation.every_n_steps $(((steps + 1) / 2)) ${FINETUNE:-}
stage search nas search --checkpoint_dir "$out/supernet" --resume true --device "$device" \
  --dtype "$dtype" --objectives val_loss,latency_ms --costs.batch 1 --costs.tokens 256 \
  $text --data.num_blocks "$search_blocks" --search_blocks "$search_blocks" \
  --num_trials "$trials" --budgets "$budgets" ${SEARCH:-}
picks=$out/search/picks.yaml chosen=$($tool names "$out/search/picks.yaml")
stage alone nas finetune --checkpoint_dir "$out/supernet" --resume true $train \
  --subnetworks "$picks" --repair true --trainer.max_steps "$alone" \
  --optimizer.warmup_steps $((alone / 10)) --validation.every_n_steps "$alone" ${ALONE:-}
score="--device $device --dtype $dtype --tasks $tasks --include_path $task_path --limit $limit
  --data.files $test --data.block_size 512 --data.num_blocks $test_blocks"
stage evaluated nas evaluate --checkpoint_dir "$checkpoint" $score ${EVALUATE:-}
stage evaluated-shared nas evaluate --checkpoint_dir "$out/supernet" --include_full true \
  --subnetworks "$picks" $score ${EVALUATE:-}
stage profiled nas profile --checkpoint_dir "$out/supernet" --subnetworks "$picks" \
  --batch 1 --tokens 256 --device "$device" --dtype "$dtype"
for name in $chosen; do
  stage "evaluated-$name" nas evaluate --checkpoint_dir "$out/alone/$name" $score ${EVALUATE:-}
  stage "litgpt-$name" nas export --checkpoint_dir "$out/alone/$name" --extreme largest ${EXPORT:-}
  stage "hf-$name" nas export --checkpoint_dir "$out/alone/$name" --extreme largest --format hf \
    --dtype bfloat16 ${EXPORT:-}
done
}
# shellcheck disable=SC2086
[ -e "$out/generation.md" ] || $tool generate "$out" "$checkpoint" $chosen
# shellcheck disable=SC2086
$tool table "$out" "$checkpoint" $chosen
