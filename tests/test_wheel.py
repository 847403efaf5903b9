"""The wheel: it holds the whole package, and runs in an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "whittle_nas")


@pytest.mark.slow
def test_the_wheel_has_everything_and_runs_anywhere(tmp_path):
    source, site, empty = (tmp_path / name for name in ("source", "site", "empty"))
    source.mkdir()
    empty.mkdir()
    for name in PARTS:  # a copy, since a build leaves its files in the tree
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", tmp_path / "dist"]
    subprocess.run([*pip, *offline, source], check=True, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("whittle_nas-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    package = ROOT / "whittle_nas"
    for path in package.rglob("*"):
        hidden = path.name.startswith(".") or "__pycache__" in path.parts
        if path.is_file() and not hidden:
            found = site / "whittle_nas" / path.relative_to(package)
            assert found.read_bytes() == path.read_bytes(), path
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for words in (
        ("-m", "whittle_nas", "finetune", "--config", "Llama-3.1-8B/finetune", "--print_config"),
        ("-m", "whittle_nas", "run", "pydoc-1m/recipe", "--dry_run"),
        ("-c", "import whittle_nas as nas; print(nas.__file__, nas.load('pydoc-1m'))"),
    ):
        shown = subprocess.run(
            [sys.executable, *words], env=environment, cwd=empty, capture_output=True, text=True
        )
        assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(str(site))
    assert not any(empty.iterdir())
