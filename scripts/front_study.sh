#!/usr/bin/env bash
# Is the super-network worth it? Fronts of real models against the simple alternatives, on held-out
# text and a multiple-choice task, with three seeds.
#
#   scripts/front_study.sh [out_dir]          STEPS=600 SEEDS="1 2 3" are what the tables quote
#
# For every model and seed: sort, train the super-network for STEPS sandwich steps, search, and take
# the best sub-network under 40, 50, ... 90 % of the parameters. Its rivals, at the same sizes:
#   sorted      the same without training           magnitude   sorted by |w|, without training
#   alone       the super-network's own choice, cut from the sorted model and fine-tuned alone; all
#               six together see as many sequences as all networks of the super-network's steps
#   scratch     the same shapes from random weights, on as many tokens as the super-network has seen
#   depth       whole layers only, by block importance; depth_tuned: fine-tuned like `alone`
#   refined     half of the steps for a super-network, the rest for its six choices alone
# Finished stages are kept: after an interruption, the same command goes on. JOBS seeds run at once.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
out=${1:-runs/front_study}
steps=${STEPS:-600} seeds=${SEEDS:-1 2 3} jobs=${JOBS:-2}
models=${MODELS:-stories260K babyllama-char361 pydoc-1m}
shared=${DATA:-../shared/data}
bundled=whittle_nas/assets/pydoc-1m
budgets=(40 50 60 70 80 90)

stage() { # directory, command...: run a command that writes `directory`, unless it is there
  local result=$1
  shift
  [ -f "$result/run.yaml" ] && return
  echo "-- $result" >&2
  mkdir -p "$(dirname "$result")"
  "$@" --out_dir "$result" --overwrite true > "$result.log" 2>&1 || { cat "$result.log" >&2; exit 1; }
}

tune() { # directory, checkpoint, steps, learning rate, options...: fine-tune; keeps the weights only
  local result=$1 checkpoint=$2 count=$3 lr=$4
  shift 4
  stage "$result" nas finetune --checkpoint_dir "$checkpoint" "${text[@]}" "${recipe[@]}" \
    --optimizer.lr "$lr" --trainer.max_steps "$count" --seed "$seed" "$@"
  rm -rf "$result/checkpoints" "$result"/lit_model.pth.lora
}

score() { # directory, checkpoint, options...: held-out text and the model's task
  local result=$1 checkpoint=$2
  shift 2
  stage "$result" nas evaluate --checkpoint_dir "$checkpoint" "${test[@]}" "$@"
}

curve() { # name, checkpoint: search, choose, evaluate
  stage "$dir/$1/search" nas search --checkpoint_dir "$2" --num_trials 150 --seed "$seed" \
    --data.files "$valid" --data.block_size 256 --data.num_blocks 64 --search_space aligned
  [ -f "$dir/$1/picks.yaml" ] ||
    python scripts/front_study.py pick "$dir/$1/search/front.json" "$plain" "${budgets[@]}" \
      > "$dir/$1/picks.tmp"
  [ -f "$dir/$1/picks.yaml" ] || mv "$dir/$1/picks.tmp" "$dir/$1/picks.yaml"
  score "$dir/$1/scores" "$2" --subnetworks "$dir/$1/picks.yaml" --include_full true --latency true
}

each_alone() { # name, checkpoint to cut from, picks, steps, learning rate: the choices, one by one
  local name=$1 checkpoint=$2 picks=$3 count=$4 lr=$5 budget sizes
  for budget in "${budgets[@]}"; do
    local one=$dir/$name/$budget
    [ -f "$one/scores/run.yaml" ] && continue
    read -ra sizes <<< "$(python scripts/front_study.py sizes "$picks" "$budget")"
    stage "$one/start" nas export --checkpoint_dir "$checkpoint" "${sizes[@]}"
    [ "$name" != scratch ] || python scripts/front_study.py randomise "$one/start" "$seed"
    tune "$one/tuned" "$one/start" "$count" "$lr" "${standard[@]}"
    score "$one/scores" "$one/tuned"
    rm -rf "$one/start" "$one/tuned"
  done
}

depth_only() { # drop whole layers
  local layers one
  for layers in $(python scripts/front_study.py layers "$plain"); do
    one=$dir/depth/$layers
    [ -f "$one/tuned_scores/run.yaml" ] && continue
    stage "$one/start" nas export --checkpoint_dir "$dir/blocks" --subnetwork.n_layer "$layers"
    score "$one/scores" "$one/start" --latency true
    tune "$one/tuned" "$one/start" $((steps * 4 / 6)) "$lr" "${standard[@]}"
    score "$one/tuned_scores" "$one/tuned"
    rm -rf "$one/start" "$one/tuned"
  done
}

one_seed() { # everything of one model and seed; uses the model's variables
  local seed=$1 dir=$out/$model/$1
  stage "$dir/by_importance" nas importance --checkpoint_dir "$plain" "${calibration[@]}" --data.seed "$seed"
  curve sorted "$dir/by_importance"
  tune "$dir/supernet/trained" "$dir/by_importance" "$steps" "$lr" "${sandwich[@]}"
  curve supernet "$dir/supernet/trained"
  [ "$rivals" = all ] || return 0
  stage "$dir/by_magnitude" nas importance --checkpoint_dir "$plain" "${calibration[@]}" \
    --data.seed "$seed" --criterion magnitude
  curve magnitude "$dir/by_magnitude"
  each_alone alone "$dir/by_importance" "$dir/supernet/picks.yaml" $((steps * 4 / 6)) "$lr"
  each_alone scratch "$dir/by_importance" "$dir/supernet/picks.yaml" "$steps" "$scratch_lr"
  tune "$dir/refined/trained" "$dir/by_importance" $((steps / 2)) "$lr" "${sandwich[@]}"
  each_alone refined "$dir/refined/trained" "$dir/supernet/picks.yaml" $((steps * 2 / 6)) "$lr"
  stage "$dir/blocks" nas importance --checkpoint_dir "$plain" "${calibration[@]}" \
    --data.seed "$seed" --layer_order block_importance
  depth_only
}

study() { # model: its seeds, JOBS at a time
  model=$1
  [[ " $models " == *" $model "* ]] || return 0
  [ -d "$plain" ] || { echo "skipped: no $plain" >&2; return; }
  for seed in $seeds; do
    while (($(jobs -rp | wc -l) >= jobs)); do wait -n; done
    one_seed "$seed" &
  done
}

recipe=(
  --lora null --optimizer.warmup_steps 20 --trainer.gradient_clip_val 1 --batch_size 8
  --validation.every_n_steps 100000 --validation.num_networks 2 --validation.num_samples 16
  --trainer.max_epochs 1000 --trainer.enable_progress_bar false --trainer.accelerator cpu
  --trainer.logger "[]"
)
sandwich=(--sampler.kind random --sandwich.full_weight 1 --loss.distillation forward_kl)
standard=(--sandwich.strategy standard)
lr=1e-3 scratch_lr=4e-3

calibration=(--data.files "$shared/tinystories/train.jsonl" --data.num_blocks 64)
valid=$shared/tinystories/valid.jsonl
text=(--data.files "$shared/tinystories/train.jsonl" --data.block_size 256 --valid.files "$valid")
test=(
  --data.files "$shared/tinystories/test.jsonl" --data.num_blocks 256 --data.block_size 256
  --tasks local_story_next --limit 600 --include_path "$shared/lm_eval_tasks"
)
plain=$shared/checkpoints/stories260K rivals=all
study stories260K
plain=$shared/checkpoints/babyllama-char361 rivals=none
study babyllama-char361

calibration=(--data.files "$bundled/calibration.jsonl" --data.num_blocks 64)
valid=$bundled/valid.jsonl
text=(--data.files "$bundled/train.jsonl" --data.block_size 256 --valid.files "$valid")
test=(--data.files "$bundled/test.jsonl" --data.num_blocks 128 --data.block_size 256)
plain=$bundled rivals=none
study pydoc-1m
while (($(jobs -rp | wc -l))); do wait -n; done

python scripts/front_study.py report "$out" | tee "$out/table.md.tmp"
mv "$out/table.md.tmp" "$out/table.md"
