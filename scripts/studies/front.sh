#!/usr/bin/env bash
# Is the super-network worth it? Fronts of real models against the simple alternatives, on held-out
# text and a multiple-choice task, with three seeds.
#
#   scripts/studies/front.sh [out_dir]     STEPS=300 SEEDS="1 2 3" are what the tables quote;
#                                        MODELS=pydoc-1m,stories260K chooses
#
# For every model and seed: sort, train the super-network for STEPS sandwich steps, search, and take
# the best sub-network under 40, 50, ... 90 % of the parameters. Its rivals, at the same sizes:
#   sorted      the same without training           magnitude   sorted by |w|, without training
#   focused     half of the steps on the whole space; a search; the other half on its six choices
#   alone       the super-network's own choices, cut from the sorted model and fine-tuned one by one,
#               each with a sixth of the super-network's forward and backward passes
#   shared_N    the choice at 60 % alone, with the share it would have if N networks were wanted
#   scratch     the same shapes from random weights, on as many tokens as the super-network has seen
#   depth       whole layers only, by block importance, as they are and fine-tuned like `alone`
# The smaller study of the other models has the first two alone. Finished stages are kept: after an
# interruption, the same command goes on. JOBS seeds run at once.
set -euo pipefail
source "$(dirname "$0")/common.sh"
out=$(out_dir runs/front_study "${1:-}")
steps=${STEPS:-300} seeds=${SEEDS:-1 2 3}
models=stories260K,babyllama-char361
[ -d "$shared" ] || models=pydoc-1m
models=,${MODELS:-$models},
budgets=(40 50 60 70 80 90)

tune() { # directory, checkpoint, steps, learning rate, options...: fine-tune; keeps the weights only
  local result=$1 checkpoint=$2 count=$3 lr=$4
  shift 4
  stage "$result" nas finetune --checkpoint_dir "$checkpoint" "${text[@]}" "${recipe[@]}" \
    --optimizer.lr "$lr" --trainer.max_steps "$count" --search_space "$space" --seed "$seed" "$@"
  rm -rf "$result/checkpoints" "$result"/lit_model.pth.lora
}

score() { # directory, checkpoint, options...: held-out text and the model's task
  local result=$1 checkpoint=$2
  shift 2
  stage "$result" nas evaluate --checkpoint_dir "$checkpoint" "${test[@]}" "$@"
}

search() { # name, checkpoint: the best under every budget, on validation text
  stage "$dir/$1/search" nas search --checkpoint_dir "$2" --num_trials 80 --seed "$seed" \
    --data.files "$valid" --data.block_size 256 --data.num_blocks 64 --search_space "$space"
  [ -f "$dir/$1/picks.yaml" ] && return
  python scripts/studies/front.py pick "$dir/$1/search/front.json" "$plain" "${budgets[@]}" \
    > "$dir/$1/picks.tmp"
  mv "$dir/$1/picks.tmp" "$dir/$1/picks.yaml"
}

curve() { # name, checkpoint: search, and evaluate the choices
  search "$1" "$2"
  score "$dir/$1/scores" "$2" --subnetworks "$dir/$1/picks.yaml" --include_full true
}

one_alone() { # directory, choices, name of one, checkpoint, steps, learning rate
  local one=$1 sizes
  [ -f "$one/scores/run.yaml" ] && return
  read -ra sizes <<< "$(python scripts/studies/front.py sizes "$2" "$3")"
  stage "$one/start" nas export --checkpoint_dir "$4" "${sizes[@]}"
  [[ $one != */scratch/* ]] || python scripts/studies/front.py randomise "$one/start" "$seed"
  tune "$one/tuned" "$one/start" "$5" "$6" --sandwich.strategy standard
  score "$one/scores" "$one/tuned"
  rm -rf "$one/start" "$one/tuned"
}

one_seed() { # everything of one model and seed; uses the model's variables
  local seed=$1 dir=$out/$model/$1 passes=$((steps * 4)) choices at number
  stage "$dir/by_importance" nas importance --checkpoint_dir "$plain" "${calibration[@]}" \
    --data.seed "$seed"
  curve sorted "$dir/by_importance"
  tune "$dir/supernet/trained" "$dir/by_importance" "$steps" "$lr" "${sandwich[@]}"
  curve supernet "$dir/supernet/trained"
  [ "$rivals" = all ] || return 0
  stage "$dir/by_magnitude" nas importance --checkpoint_dir "$plain" "${calibration[@]}" \
    --data.seed "$seed" --criterion magnitude
  curve magnitude "$dir/by_magnitude"
  tune "$dir/half/trained" "$dir/by_importance" $((steps / 2)) "$lr" "${sandwich[@]}"
  search half "$dir/half/trained"
  tune "$dir/focused/trained" "$dir/half/trained" $((steps / 2)) "$lr" "${focus[@]}" \
    --sampler.file "$dir/half/picks.yaml"
  score "$dir/focused/scores" "$dir/focused/trained" --subnetworks "$dir/half/picks.yaml" \
    --include_full true
  choices=$dir/supernet/picks.yaml
  for at in 40 60 80 90; do
    one_alone "$dir/alone/$at" "$choices" "p$at" "$dir/by_importance" $((passes / 6)) "$lr"
  done
  for number in 12 48; do
    one_alone "$dir/shared_$number/60" "$choices" p60 "$dir/by_importance" \
      $((passes / number)) "$lr"
  done
  for at in 40 80; do
    one_alone "$dir/scratch/$at" "$choices" "p$at" "$dir/by_importance" "$steps" "$scratch_lr"
  done
  choices=$dir/depth/picks.yaml
  stage "$dir/depth/by_blocks" nas importance --checkpoint_dir "$plain" "${calibration[@]}" \
    --data.seed "$seed" --layer_order block_importance
  python scripts/studies/front.py depths "$plain" > "$choices"
  score "$dir/depth/scores" "$dir/depth/by_blocks" --subnetworks "$choices" --include_full true
  for at in $(sed -n 's/.*name: p//p' "$choices"); do
    one_alone "$dir/depth_tuned/$at" "$choices" "p$at" "$dir/depth/by_blocks" $((passes / 6)) "$lr"
  done
}

time_networks() { # latencies, one directory after the other, with nothing beside them
  local run
  for run in "$out"/*/*/*/scores/run.yaml; do
    grep -q '^latency: true' "$run" && continue
    echo "-- latency: ${run%/run.yaml}" >&2
    nas evaluate --config "$run" --latency true --overwrite false > /dev/null 2>&1
  done
}

study() { # model: its seeds, JOBS at a time
  model=$1
  [[ $models == *",$model,"* ]] || return 0
  [ -d "$plain" ] || { echo "skipped: no $plain" >&2; return; }
  for seed in $seeds; do
    free_slot
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
focus=(
  --sampler.kind fixed --sandwich.num_random 3 --sandwich.train_smallest false
  --sandwich.full_weight 1 --loss.distillation forward_kl
)
lr=2e-3 scratch_lr=4e-3 space=aligned

calibration=(--data.files "$shared/tinystories/train.jsonl" --data.num_blocks 64)
valid=$shared/tinystories/valid.jsonl
text=(--data.files "$shared/tinystories/train.jsonl" --data.block_size 256 --valid.files "$valid")
test=(
  --data.files "$shared/tinystories/test.jsonl" --data.num_blocks 128 --data.block_size 256
  --tasks local_story_next --limit 400 --include_path "$shared/lm_eval_tasks"
)
plain=$shared/checkpoints/stories260K rivals=all
study stories260K
# A better pretrained model: at the rate above its whole loses more in a short training than the parts
# win. The sorted model's own front never narrows the embedding, so that is not trained either.
mkdir -p "$out"
space=$out/full-width.yaml
sed 's/^n_embd: .*/n_embd: full/' whittle_nas/space/presets/aligned.yaml > "$space"
steps=$((steps * 4 / 5)) lr=2e-4
sandwich=(--sampler.kind random --sandwich.full_weight 8 --loss.distillation forward_kl)
plain=$shared/checkpoints/babyllama-char361 rivals=none
study babyllama-char361

calibration=(--data.files "$bundled/calibration.jsonl" --data.num_blocks 64)
valid=$bundled/valid.jsonl
text=(--data.files "$bundled/train.jsonl" --data.block_size 256 --valid.files "$valid")
test=(--data.files "$bundled/test.jsonl" --data.num_blocks 128 --data.block_size 256)
space=aligned lr=5e-4
plain=$bundled rivals=none
study pydoc-1m
all_done

time_networks
python scripts/studies/front.py report "$out" | tee "$out/table.md.tmp"
mv "$out/table.md.tmp" "$out/table.md"
