#!/usr/bin/env bash
# The whole line on SmolLM2-135M-Instruct, as a user would run it, three ways to the same cost:
#   width      every layer gets the same smaller number of neurons
#   depth      fewer layers
#   per-layer  every layer gets its own number of heads and neurons, by an integer program
# Sort, search loss against that cost, repair and train the choices, evaluate, export to litgpt and
# transformers, generate, and one table of it all.
# A rerun skips finished stages and goes on with the one that was interrupted.
#
#   scripts/demo_smollm2.sh [out_dir]        default: runs/smollm2-$BUDGET
#
# BUDGET=small took about two hours on two cores for two choices per route; BUDGET=full (default) was
# not run to its end here and takes several times that.
# DEVICE=cuda takes minutes. Other knobs, all optional:
#   CHECKPOINT   a litgpt checkpoint instead of SmolLM2
#   ROUTES       which of the three ways, "width depth per-layer"
#   COST         what is searched beside loss: latency_ms, or flops where other work on the machine
#                spoils its times
#   BUDGETS      of the networks that are chosen, as `nas search --budgets` takes them
#   IMPORTANCE, CANDIDATES, SEARCH, FINETUNE, EVALUATE, EXPORT   more options of these commands, each
#                one string
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
cost=${COST:-latency_ms}
mkdir -p "$out"

case "$budget" in # blocks of calibration; trials, their text; steps; questions, blocks of test text
  small) calibration=32 order_blocks=2 score_blocks=4 trials=24 search_blocks=8 steps=30 limit=50 test_blocks=16
    budgets="$cost <= 80%" repaired=false ;; # a repair takes minutes
  full) calibration=64 order_blocks=4 score_blocks=4 trials=40 search_blocks=16 steps=80 limit=200 test_blocks=32
    budgets="$cost <= 90%, $cost <= 80%, $cost <= 70%" repaired=true ;;
  tiny) calibration=8 order_blocks=1 score_blocks=1 trials=8 search_blocks=2 steps=4 limit=4 test_blocks=2
    budgets="$cost <= 80%" repaired=true ;; # tries the script
  *) echo "BUDGET=$budget must be full, small or tiny" >&2; exit 2 ;;
esac
budgets=${BUDGETS:-$budgets} routes=${ROUTES:-width depth per-layer}
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
sorted="--checkpoint_dir $out/sorted --device $device --dtype $dtype"
load="--costs.batch 1 --costs.tokens 256"
for route in $routes; do # all timing first, one after the other
  search="$sorted --objectives val_loss,$cost $load --resume true
    $text --data.num_blocks $search_blocks --search_blocks $search_blocks"
  case "$route" in
    width) ways="--search_space $config/width.yaml --repair $repaired --num_trials $trials" ;;
    depth) ways="--search_space $config/depth.yaml --num_trials $trials" ;; # the order is given
    per-layer)
      stage library nas candidates $sorted $load $text --data.num_blocks "$calibration" \
        --score_blocks "$score_blocks" --rank null ${CANDIDATES:-}
      ways="--method ilp --candidates $out/library --num_solutions 1" ;;
    *) echo "ROUTES: $route must be width, depth or per-layer" >&2; exit 2 ;;
  esac
  stage "searched-$route" nas search $search $ways --budgets "$budgets" ${SEARCH:-}
done
$tool collect "$out" $routes # all choices in one file, for one measurement
stage profiled nas profile --checkpoint_dir "$out/sorted" --subnetworks "$out/picks.yaml" \
  --batch 1 --tokens 256 --device "$device" --dtype "$dtype"
for route in $routes; do
  repair=--repair\ true # the parts of a library are repaired already
  [ "$route" != per-layer ] || repair=
  stage "trained-$route" nas finetune --checkpoint_dir "$out/sorted" --resume true $text \
    --subnetworks "$out/searched-$route/picks.yaml" $repair --weights all --optimizer.lr 1e-4 --batch_size $batch \
    --trainer.max_steps "$steps" --optimizer.warmup_steps $((steps / 10)) --trainer.log_every_n_steps 5 \
    --trainer.accelerator "$loader" --trainer.precision "$precision" \
    --validation.num_samples 16 --validation.every_n_steps "$steps" ${FINETUNE:-}
done
score="--device $device --dtype $dtype --tasks $tasks --include_path $task_path --limit $limit
  --data.files $test --data.block_size 512 --data.num_blocks $test_blocks"
stage evaluated nas evaluate --checkpoint_dir "$checkpoint" $score ${EVALUATE:-}
for name in $($tool names "$out"); do
  trained=$out/trained-${name/+//} # route+pick
  stage "evaluated-$name" nas evaluate --checkpoint_dir "$trained" $score ${EVALUATE:-}
  pad= # litgpt has no layers of different sizes, and DeciLM one number of query heads
  case "$name" in per-layer*) pad="--pad true" ;; esac
  stage "hf-$name" nas export --checkpoint_dir "$trained" --extreme largest --format hf $pad \
    --dtype bfloat16 ${EXPORT:-}
  stage "litgpt-$name" nas export --checkpoint_dir "$trained" --extreme largest $pad ${EXPORT:-}
done
}
[ -e "$out/generation.md" ] || $tool generate "$out" "$checkpoint"
$tool table "$out" "$checkpoint"
