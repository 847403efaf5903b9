#!/usr/bin/env bash
# Per-layer networks by integer programs against uniform ones and fewer layers, without training.
#   scripts/studies/unast.sh [output folder] [model...]     models: stories260K babyllama-char361 smollm2
# smollm2 needs SMOLLM2=<litgpt checkpoint, sorted by `nas importance --basis permutation`>.
# ABLATIONS=true measures UNAST's own ablations in place of this: losses of trained parts, pools of
# candidates, and methods that drop layers; SEEDS of the calibration text ("42 43").
# TARGETS=true: programs under shares of the time against programs under shares of the parameters; the
# machine must be quiet.
# RERANK=true: a program's ten solutions before and after a short training of each.
set -euo pipefail
source "$(dirname "$0")/common.sh"
out=$(out_dir runs/studies/unast "${1:-}")
shift || true
models=${*:-stories260K babyllama-char361}
mkdir -p "$out"

study() { # model, sorted checkpoint, calibration, searched, held out, grid options, more options
  local library=$out/$1/library
  mkdir -p "$out/$1"
  # No `stage`: an interrupted library goes on where it was.
  [ -f "$library/library.json" ] ||
    nas candidates --checkpoint_dir "$2" --out_dir "$library" --data.files "$3" --data.block_size 256 $6
  python scripts/studies/unast.py "$2" "$library" "$out/$1/rows.jsonl" --search "$4" --held_out "$5" ${7:-} |
    tee "$out/$1/table.txt"
}

ablations() { # model, sorted checkpoint, calibration, grid options, searched and held-out text, budgets
  local seed loss base library rows text train
  text=$5
  for seed in ${SEEDS:-42 43}; do
    base=$out/$1/rows-none-$seed.jsonl
    for loss in none square_head l2 l1; do
      library=$out/$1/$loss-$seed
      rows=$out/$1/rows-$loss-$seed.jsonl
      train="--train.steps ${STEPS:-40} --train.loss $loss"
      [ "$loss" = none ] && train=
      [ -f "$library/library.json" ] ||
        nas candidates --checkpoint_dir "$2" --out_dir "$library" --data.files "$3" --data.block_size 256 \
          --data.seed "$seed" --rank null --grid.linear true $4 $train
      python scripts/studies/unast.py "$2" "$library" "$rows" $text --budgets 100 --routes half_attention half_mlp
      python scripts/studies/unast.py "$2" "$library" "$rows" $text --budgets $6 --routes everything \
        --beside "$base" | tee "$out/$1/losses-$loss-$seed.txt"
      [ "$loss" = none ] || continue
      python scripts/studies/unast.py "$2" "$library" "$base" $text --budgets $6 \
        --routes depth shortgpt shortened_llama shortened_llama_taylor skips attention mlp linear widths \
        --beside_route everything | tee "$out/$1/pools-$seed.txt"
    done
  done
}

targets() { # model, sorted checkpoint, folder of texts, widths
  local at=$out/$1/targets load="--costs.batch 2 --costs.tokens 256" share budgets=
  for share in 80 70 60 50; do
    budgets+="${budgets:+, }params_$share: num_params <= $share%, latency_$share: latency_ms <= $share%"
  done
  stage "$at/library" nas candidates --checkpoint_dir "$2" --data.files "$3/train.jsonl" --data.block_size 256 \
    --data.num_blocks 64 --rank null --grid.neurons "$4" --grid.linear true $load
  stage "$at/search" nas search --method ilp --checkpoint_dir "$2" --candidates "$at/library" --num_solutions 1 $load \
    --data.files "$3/valid.jsonl" --data.block_size 256 --data.num_blocks 32 --budgets "{$budgets}" \
    --objectives val_loss,num_params,latency_ms
  stage "$at/scores" nas evaluate --checkpoint_dir "$2" --subnetworks "$at/search/picks.yaml" --include_full true \
    --data.files "$3/test.jsonl" --data.block_size 256 --data.num_blocks 48 --latency true
}

rerank() { # model, sorted checkpoint, folder of texts, widths
  local at=$out/$1/rerank
  stage "$at/library" nas candidates --checkpoint_dir "$2" --data.files "$3/train.jsonl" --data.block_size 256 \
    --data.num_blocks 64 --rank null --grid.neurons "$4"
  for share in 80 60; do
    stage "$at/search-$share" nas search --method ilp --checkpoint_dir "$2" --candidates "$at/library" --num_solutions 10 \
      --data.files "$3/valid.jsonl" --data.block_size 256 --data.num_blocks 32 --budgets "{b: num_params <= $share%}" \
      --recovery.budget "num_params <= $share%" --recovery.candidates 10 --recovery.steps 60 --recovery.lr 2e-3 \
      --recovery.data.files "$3/train.jsonl" --recovery.data.block_size 256
  done
}

for model in $models; do
  stories=$shared/tinystories
  case $model in
    smollm2)
      if [ "${ABLATIONS:-false}" = true ]; then
        ablations smollm2 "${SMOLLM2:?the sorted checkpoint}" "$shared/calib/c4_demo.jsonl" \
          "--data.num_blocks 40 --score_blocks 4 --grid.heads 2,1,0 --grid.neurons 1152,768,384,0" \
          "--search $shared/calib/c4_demo.jsonl --search_skip 40 --search_blocks 6 --held_out $shared/calib/c4_pf.jsonl
           --held_out_column prefix --rounds 1 --batch_size 2" 80.1
        continue
      fi
      study smollm2 "${SMOLLM2:?the sorted checkpoint}" "$shared/calib/c4_demo.jsonl" "$shared/calib/c4_demo.jsonl" \
        "$shared/calib/c4_pf.jsonl" \
        "--data.num_blocks 36 --batch_size 2 --score_blocks 4 --rank null --grid.heads 2,0 --grid.neurons 1408,1280,1120,960,832,0" \
        "--search_skip 36 --search_blocks 8 --held_out_blocks 16 --held_out_column prefix --budgets 80 --routes depth uniform everything --rounds 2 --batch_size 2"
      ;;
    *)
      stage "$out/$model/sorted" nas importance --checkpoint_dir "$shared/checkpoints/$model" \
        --data.files "$stories/train.jsonl" --data.num_blocks 128 --basis permutation
      case $model in
        stories260K) widths=160,144,128,112,96,80,64,48,32,0 ;;
        *) widths=336,320,304,288,272,256,240,224,208,192,176,160,144,128,96,64,0 ;;
      esac
      if [ "${ABLATIONS:-false}" = true ]; then
        case $model in
          stories260K) widths=144,112,80,48,0 ;;
          *) widths=288,224,160,96,0 ;;
        esac
        # So much above 80 and 60 % that four and three whole layers of five fit, with the last norm.
        ablations "$model" "$out/$model/sorted" "$stories/train.jsonl" "--data.num_blocks 64 --grid.neurons $widths" \
          "--search $stories/valid.jsonl --held_out $stories/test.jsonl --held_out_blocks 48" "80.1 60.1"
        continue
      fi
      if [ "${TARGETS:-false}" = true ]; then
        targets "$model" "$out/$model/sorted" "$stories" "$widths"
        continue
      fi
      if [ "${RERANK:-false}" = true ]; then
        rerank "$model" "$out/$model/sorted" "$stories" "$widths"
        continue
      fi
      study "$model" "$out/$model/sorted" "$stories/train.jsonl" "$stories/valid.jsonl" "$stories/test.jsonl" \
        "--data.num_blocks 96 --rank null --grid.neurons $widths"
      ;;
  esac
done
