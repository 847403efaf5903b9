#!/usr/bin/env bash
# Super-network, specialised networks, a cascade, networks alone or fewer layers? Fronts at equal
# total cost, for 1, 3, 6 and 12 wanted networks, with and without the new start and teacher; see
# front.py.
#
#   scripts/studies/front.sh [out_dir]     MODELS="stories260K babyllama-char361" SEEDS="1 2 3"
#                                          RECIPES="new plain taught" METHODS="cascade alone ..."
#                                          WANTED="6 3 1 12"
#
# A cost is 480 forward and backward passes of the whole model (stories260K), or 160
# (babyllama-char361), as many again for 12 networks; COST is another one for all. Every finished
# line is kept: after an interruption, the same command goes on.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
out=$(out_dir runs/front_study "${1:-}")
# shellcheck disable=SC2086  # words are split on purpose
for model in ${MODELS:-stories260K babyllama-char361}; do
  for wanted in ${WANTED:-6 3 1 12}; do
    cost=480
    if [[ $model == babyllama-char361 ]]; then cost=160; fi
    if [[ $wanted == 12 ]]; then cost=$((2 * cost)); fi
    # twelve budgets have a search of their own
    folder=$out/six; [[ $wanted != 12 ]] || folder=$out/twelve
    python scripts/studies/front.py run "$folder" --models "$model" --wanted "$wanted" --cost "${COST:-$cost}" \
      --seeds ${SEEDS:-1 2 3} --recipes ${RECIPES:-new plain taught} ${METHODS:+--methods $METHODS}
  done
done
cat "$out"/*/front.jsonl > "$out/front.jsonl"
python scripts/studies/front.py report "$out" | tee "$out/table.md.tmp"
mv "$out/table.md.tmp" "$out/table.md"
