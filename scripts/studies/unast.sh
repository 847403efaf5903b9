#!/usr/bin/env bash
# Per-layer networks by integer programs against uniform ones and fewer layers, without training.
#   scripts/studies/unast.sh [output folder] [model...]     models: stories260K babyllama-char361 smollm2
# smollm2 needs SMOLLM2=<litgpt checkpoint, sorted by `nas importance --basis permutation`>.
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

for model in $models; do
  stories=$shared/tinystories
  case $model in
    smollm2)
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
      study "$model" "$out/$model/sorted" "$stories/train.jsonl" "$stories/valid.jsonl" "$stories/test.jsonl" \
        "--data.num_blocks 96 --rank null --grid.neurons $widths"
      ;;
  esac
done
