#!/usr/bin/env bash
# Sets up if needed, then runs every check: format, lint, types, imports, site, tests.
#   scripts/test.sh          all fast checks (what CI runs, with --all)
#   scripts/test.sh --all    the slow tests too
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
bin=.venv/bin
# One thread per worker: two workers with two threads each would fight over two cores.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
run() { echo "== $*"; "$@"; }
run $bin/ruff format --check .
run $bin/ruff check .
run $bin/pyright
run $bin/lint-imports
run env NO_MKDOCS_2_WARNING=1 $bin/mkdocs build --strict --quiet --site-dir .site
run $bin/python -m pytest -n 2 --dist worksteal
if [ "${1:-}" = "--all" ]; then
  run $bin/python -m pytest -n 2 --dist worksteal -m "slow and not gpu"
  run $bin/python -m pytest --nbmake docs/notebooks # the notebook runs from top to bottom
fi
