"""Two runs in one `out_dir`: the second is refused, and nothing is left behind."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.test_main import nas
from whittle_nas.cli.common import is_first_process
from whittle_nas.errors import ConfigError
from whittle_nas.weights.files import hold_directory

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from whittle_nas.weights.files import hold_directory
with hold_directory(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
# Takes the directory 100 times; a second holder inside would find the folder that the first made.
# Every turn ends with the last run's parents being removed, which is when another one may come.
RACE = """
import sys
from pathlib import Path
from whittle_nas.errors import ConfigError
from whittle_nas.weights.files import hold_directory
out_dir, witness, turns = Path(sys.argv[1]), Path(sys.argv[2]), 0
while turns < 100:
    try:
        with hold_directory(out_dir):
            witness.mkdir()
            turns += 1
            witness.rmdir()
    except ConfigError as error:
        assert "in use by another run" in str(error), error
"""
WRITERS = {
    "importance": ["--data.files", "text.jsonl"],
    "finetune": ["--data.files", "text.jsonl"],
    "search": ["--data.files", "text.jsonl"],
    "evaluate": ["--data.files", "text.jsonl"],
    "export": ["--extreme", "smallest"],
    "profile": [],
}


def start(script: str, *arguments: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


@contextmanager
def held_by_another(out_dir: Path) -> Iterator[subprocess.Popen]:
    with start(HOLD, out_dir) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield other
        other.kill()


@pytest.mark.parametrize("command", WRITERS)
def test_the_second_run_is_refused(command, checkpoint_dir, tmp_path, capsys):
    out_dir, text = tmp_path / "out", tmp_path / "text.jsonl"
    text.write_text('{"text": "once upon a time"}\n')
    options = [text if option == "text.jsonl" else option for option in WRITERS[command]]
    with held_by_another(out_dir):
        arguments = ["--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, *options]
        assert nas(command, *arguments) == 2
    error = capsys.readouterr().err
    assert error == (
        f"nas: --out_dir {out_dir} is in use by another run; wait for it or give another one\n"
    )
    assert not out_dir.exists()


def test_another_spelling_is_the_same_directory(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with (
        held_by_another(tmp_path / "out"),
        pytest.raises(ConfigError, match="in use"),
        hold_directory(tmp_path / "link" / "x" / ".." / "out"),
    ):
        pass


def test_a_killed_run_holds_nothing(tmp_path):
    with held_by_another(tmp_path / "out") as other:
        other.kill()
        other.wait()
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
        with hold_directory(tmp_path / "out"):
            pass
    assert not list(tmp_path.iterdir())


def test_the_next_run_clears_up_after_a_killed_one(tmp_path):
    out_dir = tmp_path / "out"
    (tmp_path / ".out.1a2b.partial").mkdir()
    (tmp_path / ".out.1a2b.partial" / "lit_model.pth").write_text("half")
    (tmp_path / ".other.1a2b.partial").mkdir()
    # Killed between moving the old directory aside and putting the new one in its place.
    (tmp_path / ".out.3c4d.old" / "replaced").mkdir(parents=True)
    (tmp_path / ".out.3c4d.old" / "replaced" / "earlier").write_text("whole")
    (tmp_path / ".out.3c4d.old" / "replaced" / ".front.json.77.partial").write_text("half")
    with hold_directory(out_dir):
        assert [path.name for path in out_dir.iterdir()] == ["earlier"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.1a2b.partial", "out"]


def test_a_run_that_failed_leaves_nothing(tmp_path):
    def fail() -> None:
        with hold_directory(tmp_path / "not" / "there" / "out"):
            assert (tmp_path / "not" / "there").is_dir()
            raise ConfigError("wrong")

    with pytest.raises(ConfigError, match="wrong"):
        fail()
    assert not list(tmp_path.iterdir())


def test_parents_stay_with_what_was_written(tmp_path):
    with hold_directory(tmp_path / "not" / "there" / "out"):
        (tmp_path / "not" / "there" / "out").mkdir()
    assert [path.name for path in (tmp_path / "not" / "there").iterdir()] == ["out"]


def test_three_runs_take_a_directory_one_at_a_time(tmp_path):
    out_dir, witness = tmp_path / "not" / "there" / "out", tmp_path / "witness"
    runs = [start(RACE, out_dir, witness) for _ in range(3)]
    for run in runs:
        run.communicate()
    assert [run.returncode for run in runs] == [0, 0, 0]
    # of runs that met, each may take the empty parents for the other's
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),  # Lightning's second process of a machine
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),  # the first one of the second machine
        ({"RANK": "3", "LOCAL_RANK": "0"}, False),  # the same under torchrun
        ({"SLURM_PROCID": "2"}, False),
    ],
)
def test_one_process_of_all_machines_holds_the_directory(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], first: bool
) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() is first
