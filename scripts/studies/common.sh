# Sourced by every study after it has read its first argument: the root, the environment, the data
# and the queue. A study takes one argument, its output folder; `out_dir` makes it absolute first.
here=$(pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
shared=${DATA:-../shared/data}
bundled=whittle_nas/assets/pydoc-1m
jobs=${JOBS:-2}

out_dir() { # default, argument of the user: where to write
  case "${2:-}" in
    "") echo "$1" ;;
    /*) echo "$2" ;;
    *) echo "$here/$2" ;;
  esac
}

free_slot() { # wait until fewer than JOBS runs are going on
  while (($(jobs -rp | wc -l) >= jobs)); do wait -n; done
}

all_done() { # wait for the last runs
  while (($(jobs -rp | wc -l))); do wait -n; done
}

stage() { # directory, command...: run a command that writes `directory`, unless it is there
  local result=$1
  shift
  [ -f "$result/run.yaml" ] && return
  echo "-- $result" >&2
  mkdir -p "$(dirname "$result")"
  "$@" --out_dir "$result" --overwrite true > "$result.log" 2>&1 || { cat "$result.log" >&2; exit 1; }
}
