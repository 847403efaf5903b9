#!/usr/bin/env bash
# Sets up if needed, then runs every check: format, lint, types, imports, site, tests.
#   scripts/test.sh          all fast checks (what CI runs, with --all)
#   scripts/test.sh --all    the slow tests too
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
bin=.venv/bin
# One worker per core, four at most, each with one thread: two with two would fight over two cores.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
run() { echo "== $*"; "$@"; }
run $bin/ruff format --check .
run $bin/ruff check .
run $bin/pyright
run $bin/lint-imports
run env NO_MKDOCS_2_WARNING=1 $bin/mkdocs build --strict --quiet --site-dir .site
workers=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # which would obey them
pytest=($bin/python -m pytest -n $((workers < 4 ? workers : 4)) --dist worksteal)
if [ "${1:-}" != "--all" ]; then
  run "${pytest[@]}"
else
  run "${pytest[@]}" -m "not gpu" --nbmake tests docs/notebooks # the notebook from top to bottom
fi
