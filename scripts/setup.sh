#!/usr/bin/env bash
# Makes .venv with the tested set of packages; quick when that is done already.
# PYTHON chooses the interpreter, TORCH the torch requirement (a CPU build here if the registry has one).
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/.installed
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
echo "Installing into .venv (the first time this takes some minutes) ..."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
# torch goes first: with it in place no other package pulls another build of it.
.venv/bin/python -m pip install --quiet "${TORCH:-torch==2.13.0}"
.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]"
echo "$wanted" > "$stamp"
