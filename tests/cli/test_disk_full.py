"""A disk that fills up in the middle of every command, and one that can't be written at all.

Each command runs undisturbed once, to know how much it writes. Then it runs on disks of less than
that: it must say so in one sentence and leave nothing half done, and with more space the same
command line must end in the same result.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.test_main import nas
from whittle_nas.errors import ConfigError, disk_errors
from whittle_nas.weights.files import RUN_FILE, atomic_file, hold_directory

PAGE = 4096
LARGE = "size=1g,nr_inodes=100000"
FULL = "the disk is full (no space left on device); free some space and run the same command again"
TEXT = ["--data.files", "{text}", "--data.block_size", 32]
COMMANDS = {
    "importance": [*TEXT, "--data.num_blocks", 8, "--layer_blocks", 2],
    "finetune": [
        *TEXT, "--data.valid_fraction", 0.2, "--data.num_blocks", 40, "--batch_size", 2,
        "--trainer.max_steps", 6, "--trainer.checkpoint_every_n_steps", 2, "--lora.r", 4,
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--validation.num_networks", 2, "--validation.num_samples", 4,
    ],
    "search": [  # times are never the same twice
        *TEXT, "--data.num_blocks", 4, "--num_trials", 6, "--method", "random",
        "--time_front", "false",
    ],
    "evaluate": [*TEXT, "--data.num_blocks", 4, "--include_full", "true"],
    "export": ["--extreme", "smallest"],
    "export_hf": ["--extreme", "smallest", "--format", "hf"],
    "profile": ["--tokens", 8, "--repeats", 2],
}  # fmt: skip
RESUMABLE = ("finetune", "search")


class Disk:
    """A file system in memory, of a size that can be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", LARGE, "tmpfs", path], stderr=-3
        ).returncode:
            pytest.skip("mounting is not allowed here")

    def set(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)

    def shrink(self, pages: int, *, inodes: int = 10**5) -> None:
        gc.collect()  # mapped files of the last run, deleted by now, still take space
        self.set(f"size={max(1, pages) * PAGE},nr_inodes={inodes}")

    def grow(self) -> None:
        self.set(LARGE)

    def pages(self) -> int:
        found = os.statvfs(self.path)
        return found.f_blocks - found.f_bfree


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    made = Disk(tmp_path / "disk")
    yield made
    # lazily: the failed writer's file may still be open inside the exception
    subprocess.run(["umount", "--lazy", made.path], check=True)


def run(name: str, checkpoint_dir: Path, text: Path, out_dir: Path, *options: object) -> int:
    given = [str(option).format(text=text) for option in COMMANDS[name]]
    command = name.partition("_")[0]
    where = ["--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir]
    return nas(command, *where, *given, *options)


def results(out_dir: Path) -> dict[str, object]:
    """What a directory holds: names, and the content of what two equal runs have in common."""
    found: dict[str, object] = {}
    for path in sorted(path for path in out_dir.rglob("*") if path.is_file()):
        name = path.relative_to(out_dir).as_posix()
        if path.suffix == ".png":
            found[name] = path.read_bytes()[-8:-4]  # the mark of a picture's end
        elif path.suffix in (".pth", ".safetensors"):
            read = load_file if path.suffix == ".safetensors" else torch.load
            found[name] = {key: tensor.tolist() for key, tensor in read(path).items()}
        elif path.name == "front.json":
            found[name] = json.loads(path.read_text())["front"]
        elif path.suffix == ".yaml" and path.name != RUN_FILE:
            found[name] = path.read_text()
        elif not name.startswith(("logs/", "checkpoints/")):
            found[name] = None
    return {name: found[name] for name in found if not name.startswith(("logs/", "checkpoints/"))}


def bytes_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_sentence(error: str, words: str = FULL) -> None:
    *progress, sentence = error.splitlines()
    assert all(" (0." in line for line in progress), error  # the finished pairs of an evaluation
    assert sentence.startswith("nas: can't write "), error
    assert words in sentence, error


def needed(disk: Disk, folder: Path) -> int:
    """Pages that a result takes."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return disk.pages() + sum(-(-size // PAGE) for size in sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_fills_up(name, disk, checkpoint_dir, text, tmp_path, capfd):
    whole, out_dir = tmp_path / "whole", disk.path / "out"
    assert run(name, checkpoint_dir, text, whole) == 0
    expected, total = results(whole), needed(disk, whole)
    resume = ["--resume", "true"] if name in RESUMABLE else []
    for share in (0.0, 0.02, 0.3, 0.6, 0.9):
        disk.shrink(min(round(share * total), total - 1))
        capfd.readouterr()
        assert run(name, checkpoint_dir, text, out_dir) == 2, share
        check_sentence(capfd.readouterr().err)
        assert not list(disk.path.rglob(".*")), share
        disk.grow()
        assert run(name, checkpoint_dir, text, out_dir, *resume) == 0, capfd.readouterr().err
        assert results(out_dir) == expected, share
        subprocess.run(["rm", "-r", out_dir], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_last_small_file(name, disk, checkpoint_dir, text, tmp_path, capfd):
    """Every file in turn is the one that can't be made any more."""
    whole, out_dir = tmp_path / "whole", disk.path / "out"
    assert run(name, checkpoint_dir, text, whole) == 0
    expected, code, inodes = results(whole), 2, 1
    resume = ["--resume", "true"] if name in RESUMABLE else []
    while code:
        inodes += 5 if name == "finetune" else 1  # it makes many files
        disk.shrink(10**5, inodes=inodes)
        capfd.readouterr()
        code = run(name, checkpoint_dir, text, out_dir)
        if code:
            check_sentence(capfd.readouterr().err)
            assert not list(disk.path.rglob(".*")), inodes
        disk.grow()
        if code and inodes % 3 == 0:
            assert run(name, checkpoint_dir, text, out_dir, *resume) == 0, capfd.readouterr().err
        if out_dir.is_dir() and (not code or inodes % 3 == 0):
            assert results(out_dir) == expected, inodes
        subprocess.run(["rm", "-rf", out_dir], check=True)
    assert inodes >= min(5, len(expected))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["importance", "export", "export_hf", "profile"])
def test_what_is_replaced_stays_until_the_new_one_is_whole(name, disk, checkpoint_dir, text, capfd):
    out_dir = disk.path / "out"
    assert run(name, checkpoint_dir, text, out_dir) == 0
    before, used = bytes_of(out_dir), disk.pages()
    for share in (0.0, 0.3, 0.9):
        disk.shrink(used + min(round(share * used), used - 1))
        capfd.readouterr()
        assert run(name, checkpoint_dir, text, out_dir, "--overwrite", "true") == 2
        check_sentence(capfd.readouterr().err)
        assert bytes_of(disk.path) == before
    disk.grow()
    assert run(name, checkpoint_dir, text, out_dir, "--overwrite", "true") == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "search", "evaluate"])
def test_a_finished_run_that_goes_on_keeps_its_results(name, disk, checkpoint_dir, text, capfd):
    out_dir = disk.path / "out"
    assert run(name, checkpoint_dir, text, out_dir) == 0
    before, used = results(out_dir), disk.pages()
    more = {
        "finetune": ["--resume", "true"],
        "search": ["--resume", "true", "--num_trials", 9],
        "evaluate": ["--data.num_blocks", 6],
    }[name]
    for pages in (0, 1, 3):
        disk.shrink(used + pages)
        capfd.readouterr()
        assert run(name, checkpoint_dir, text, out_dir, *more) == 2
        check_sentence(capfd.readouterr().err)
        found = results(out_dir)
        assert {name: found.get(name, "gone") for name in before} == before
    disk.grow()
    assert run(name, checkpoint_dir, text, out_dir, *more) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_read_only(name, disk, checkpoint_dir, text, capfd):
    disk.set("ro")
    for out_dir in (disk.path / "out", disk.path / "not" / "there" / "out"):
        assert run(name, checkpoint_dir, text, out_dir) == 2
        check_sentence(capfd.readouterr().err, ": the file system is read-only; allow it")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_mounted_volume_is_a_directory_like_others(
    name, disk, checkpoint_dir, text, tmp_path, capfd
):
    whole = tmp_path / "whole"
    assert run(name, checkpoint_dir, text, whole) == 0
    for options in ([], ["--overwrite", "true"]):
        assert run(name, checkpoint_dir, text, disk.path, *options) == 0, capfd.readouterr().err
        assert results(disk.path) == results(whole)
    assert not list(disk.path.glob(".*"))


@pytest.mark.slow
def test_the_temporary_directory_is_not_needed(disk, checkpoint_dir, text, tmp_path, monkeypatch):
    disk.shrink(1)
    (disk.path / "fill").write_bytes(b"x" * PAGE)
    monkeypatch.setenv("TMPDIR", str(disk.path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for name in COMMANDS:
        assert run(name, checkpoint_dir, text, tmp_path / name) == 0, name


@pytest.mark.slow
def test_a_full_device_as_stdout_is_one_sentence():
    command = ["profile", "--model_name", "pythia-14m", "--tokens", "8", "--repeats", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "whittle_nas", *command], stdout=full, stderr=-1, text=True
        )
    assert done.returncode == 2
    assert done.stderr == f"nas: can't write the output: {FULL}\n"


def write_to_full_device() -> None:
    with open("/dev/full", "w") as file:
        file.write("x")


def test_an_error_within_an_error_is_found(tmp_path):
    def wrapped() -> None:
        with disk_errors(tmp_path / "out"):
            try:
                write_to_full_device()
            except OSError as error:
                raise RuntimeError("the library failed") from error

    with pytest.raises(ConfigError, match="out: the disk is full"):
        wrapped()


def test_what_is_no_error_of_a_disk_stays_what_it_is(tmp_path):
    for mistake in (FileNotFoundError(2, "No such file", str(tmp_path / "x")), RuntimeError("x")):
        with pytest.raises(type(mistake)), disk_errors(tmp_path / "out"):
            raise mistake


def test_a_directory_that_was_removed_meanwhile(tmp_path):
    out_dir = tmp_path / "out"
    out_dir.mkdir()

    def removed() -> None:
        with disk_errors(out_dir), hold_directory(out_dir, note="x: 1"):
            out_dir.rmdir()
            with atomic_file(out_dir / "front.json") as partial:
                partial.write_text("{}")

    with pytest.raises(ConfigError, match=r"front\.json: its directory was removed meanwhile"):
        removed()
    assert not list(tmp_path.iterdir())
