#!/usr/bin/env bash
# The whole line on a small real model, on a CPU: sort, train all sub-networks, search, evaluate,
# export, generate. The first run installs into .venv; a rerun skips finished stages and goes on
# with the one that was interrupted.
#
#   scripts/quickstart.sh [out_dir]        default: quickstart/
#
# Another model and text, for instance:
#   CHECKPOINT=checkpoints/x TRAIN=a.jsonl VALID=b.jsonl scripts/quickstart.sh runs/x
set -euo pipefail
here=$(pwd)
cd "$(dirname "$0")/.."
scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # a model this small gains nothing from a second thread
bundled=whittle_nas/assets/pydoc-1m
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }
out=$(absolute "${1:-quickstart}")
[ $# -gt 0 ] || out=$PWD/quickstart
checkpoint=$bundled calibration=$bundled/calibration.jsonl
train=$bundled/train.jsonl valid=$bundled/valid.jsonl test=$bundled/test.jsonl
prompt=${PROMPT:-"The function returns"}
if [ -n "${CHECKPOINT:-}" ]; then
  checkpoint=$(absolute "$CHECKPOINT") train=$(absolute "$TRAIN") valid=$(absolute "$VALID")
  calibration=$train test=$valid
fi

stage() { # stage <name of its directory> <command ...>: run a command unless its result is there
  local result=$out/$1
  shift
  if [ -e "$result/run.yaml" ]; then echo "-- $result is there already"; return; fi
  echo "-- $*"
  "$@" --out_dir "$result"
}

mkdir -p "$out"
stage sorted nas importance --checkpoint_dir "$checkpoint" \
  --data.files "[$calibration]" --data.num_blocks 64 \
  --report.num_subnetworks 20 --report.data.files "[$valid]" --report.num_blocks 8
stage supernet nas finetune --config configs/pydoc-1m/finetune.yaml --resume true \
  --checkpoint_dir "$out/sorted" --data.files "[$train]" --valid.files "[$valid]"
stage search nas search --checkpoint_dir "$out/supernet" --resume true \
  --data.files "[$valid]" --data.block_size 128 --data.num_blocks 32 --num_trials 60
stage evaluated nas evaluate --checkpoint_dir "$out/supernet" --front "$out/search/front.json" \
  --data.files "[$test]" --data.num_blocks 64
if [ -z "${CHECKPOINT:-}" ]; then
  stage harness nas evaluate --checkpoint_dir "$out/supernet" --front "$out/search/front.json" \
    --index 0 --include_full true --tasks pydoc --include_path configs/pydoc-1m/tasks --limit 8
fi
half=$(python - "$checkpoint" <<'PY'
import sys
from litgpt import Config
from whittle_nas.weights.axes import num_params
print(num_params(Config.from_file(f"{sys.argv[1]}/model_config.yaml")) * 0.6)
PY
)
budget="num_params <= $half"
stage exported nas export --checkpoint_dir "$out/supernet" --front "$out/search/front.json" \
  --pick "$budget"
stage exported_hf nas export --checkpoint_dir "$out/supernet" --front "$out/search/front.json" \
  --pick "$budget" --format hf
stage profiled nas profile --checkpoint_dir "$out/supernet" --front "$out/search/front.json" \
  --pick "$budget" --tokens 128
echo "-- litgpt generate $out/exported --prompt \"$prompt\""
litgpt generate "$out/exported" --prompt "$prompt" --max_new_tokens 60 --temperature 0.5
echo
echo "Pictures: $out/sorted/rpd.png  $out/supernet/curves.png  $out/search/front.png"
echo "Exported: $out/exported (litgpt)  $out/exported_hf (transformers)"
