#!/usr/bin/env bash
# Compare the search methods on 2,860 sub-networks of which every one was evaluated.
#
#   scripts/search_study.sh [OUT_DIR]
#
# Twice: on the super-network as pretrained, and after sorting and fine-tuning it. Prints a table of
# hypervolume in percent of the true front's after 50, 100 and 200 trials, and writes
# search_study.json with all curves. About half an hour on one core, most of it for the two tables of
# losses; what is there from an earlier run is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/search_study}
data=${DATA:-../shared/data}
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1
[[ -d $data ]] || { echo "no $data here; set DATA to the folder with checkpoints and tinystories" >&2; exit 2; }
mkdir -p "$out"

pretrained=$data/checkpoints/stories260K
"$python" scripts/search_study.py space > "$out/space.yaml"
if [[ ! -d $out/trained ]]; then
  rm -rf "$out/sorted"
  "$python" -m whittle_nas importance --checkpoint_dir "$pretrained" --out_dir "$out/sorted" \
    --data.files "$data/tinystories/train.jsonl" --data.num_blocks 64 --data.block_size 256
  "$python" -m whittle_nas finetune --checkpoint_dir "$out/sorted" --out_dir "$out/trained" \
    --data.files "$data/tinystories/train.jsonl" --data.block_size 256 --data.valid_fraction 0.02 \
    --search_space "$out/space.yaml" --lora null --optimizer.lr 1e-3 --loss.distillation cosine \
    --trainer.max_steps 600 --trainer.max_epochs 10 --batch_size 8
fi
for name in pretrained trained; do
  checkpoint=$pretrained
  [[ $name == trained ]] && checkpoint=$out/trained
  if [[ ! -f $out/$name.csv ]]; then
    "$python" scripts/search_study.py table --checkpoint_dir "$checkpoint" \
      --text "$data/tinystories/valid.jsonl" --out "$out/$name.partial"
    mv "$out/$name.partial" "$out/$name.csv"
  fi
  echo "== $name"
  "$python" scripts/search_study.py compare --table "$out/$name.csv" \
    --checkpoint_dir "$checkpoint" --out_dir "$out/$name.methods"
done
