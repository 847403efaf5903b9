#!/usr/bin/env bash
# Compare the search methods on 2,860 sub-networks of which every one was evaluated.
#
#   scripts/studies/search.sh [OUT_DIR]
#
# Twice: on the super-network as pretrained, and after sorting and fine-tuning it. Prints a table of
# hypervolume in percent of the true front's after 50, 100 and 200 trials, and writes
# search_study.json with all curves. About half an hour on one core, most of it for the two tables of
# losses; what is there from an earlier run is kept.
set -euo pipefail
source "$(dirname "$0")/common.sh"
out=$(out_dir runs/search_study "${1:-}")
[[ -d $shared ]] || { echo "no $shared here; set DATA to the folder with checkpoints and tinystories" >&2; exit 2; }
mkdir -p "$out"

pretrained=$shared/checkpoints/stories260K
python scripts/studies/search.py space > "$out/space.yaml"
if [[ ! -d $out/trained ]]; then
  rm -rf "$out/sorted"
  nas importance --checkpoint_dir "$pretrained" --out_dir "$out/sorted" \
    --data.files "$shared/tinystories/train.jsonl" --data.num_blocks 64 --data.block_size 256
  nas finetune --checkpoint_dir "$out/sorted" --out_dir "$out/trained" \
    --data.files "$shared/tinystories/train.jsonl" --data.block_size 256 --data.valid_fraction 0.02 \
    --search_space "$out/space.yaml" --lora null --optimizer.lr 1e-3 --loss.distillation cosine \
    --trainer.max_steps 600 --trainer.max_epochs 10 --batch_size 8
fi
for name in pretrained trained; do
  checkpoint=$pretrained
  [[ $name == trained ]] && checkpoint=$out/trained
  if [[ ! -f $out/$name.csv ]]; then
    python scripts/studies/search.py table --checkpoint_dir "$checkpoint" \
      --text "$shared/tinystories/valid.jsonl" --out "$out/$name.partial"
    mv "$out/$name.partial" "$out/$name.csv"
  fi
  echo "== $name"
  python scripts/studies/search.py compare --table "$out/$name.csv" \
    --checkpoint_dir "$checkpoint" --out_dir "$out/$name.methods"
done
