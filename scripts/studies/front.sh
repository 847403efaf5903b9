#!/usr/bin/env bash
# Super-network, specialised networks or networks alone? Fronts at equal total cost, for 1, 3, 6 and
# 12 wanted networks, with and without the new start and teacher; see front.py.
#
#   scripts/studies/front.sh [out_dir]     MODELS="stories260K babyllama-char361" SEEDS="1 2 3"
#                                          COST=600: forward and backward passes of the whole model
#
# Finished stages are kept: after an interruption, the same command goes on. JOBS runs go at once.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
out=$(out_dir runs/front_study "${1:-}")
for model in ${MODELS:-stories260K babyllama-char361}; do
  for seed in ${SEEDS:-1 2 3}; do
    for variant in new plain; do
      free_slot
      python scripts/studies/front.py run "$out" "$model" "$seed" "$variant" "${COST:-600}" &
    done
  done
done
all_done
python scripts/studies/front.py report "$out" | tee "$out/table.md.tmp"
mv "$out/table.md.tmp" "$out/table.md"
