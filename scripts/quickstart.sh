#!/usr/bin/env bash
# The whole line on a small real model, on a CPU: sort, search, repair and train the chosen network,
# evaluate, export, generate. The first run installs into .venv; a rerun skips finished stages and
# goes on with the one that was interrupted.
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
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }
out=$PWD/quickstart
[ $# -eq 0 ] || out=$(absolute "$1")
recipe=$out/recipe.yaml
mkdir -p "$out"
if [ -n "${CHECKPOINT:-}" ]; then
  [ -f "$recipe" ] || nas init "$recipe" --checkpoint_dir "$(absolute "$CHECKPOINT")" \
    --train "$(absolute "$TRAIN")" --valid "$(absolute "$VALID")" --out_dir "$out"
else
  sed "s#^out_dir: .*#out_dir: $out#" whittle_nas/configs/pydoc-1m/recipe.yaml > "$recipe"
fi
nas run "$recipe"
prompt=${PROMPT:-The function returns}
echo "-- litgpt generate $out/exported --prompt \"$prompt\""
litgpt generate "$out/exported" --prompt "$prompt" --max_new_tokens 60 --temperature 0.5
echo
shopt -s nullglob
echo "Pictures:" "$out"/*/importance.png "$out"/*/curves.png "$out"/*/*/curves.png "$out"/*/front.html
echo "Exported: $out/exported (litgpt)  $out/exported_hf (transformers)"
echo "To type nas yourself:  source $PWD/.venv/bin/activate"
