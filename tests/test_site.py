"""The documentation is true: what it says to type runs, and what is generated is up to date."""

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_main import nas
from whittle_nas.cli.commands import COMMANDS, function_of
from whittle_nas.cli.parser import make_parser, parse
from whittle_nas.cli.spelling import spelled_out

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *(p for p in sorted(ROOT.glob("docs/**/*.md")) if p.parent.name != "reference"),
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MARK = "# needs "  # first line of a block that can't run here: a GPU, the hub, another program
MINUTES = "# needs minutes"  # runs here with these options behind its own
SHORTER = {
    "finetune": ("--trainer.max_steps", 3), "search": ("--num_trials", 12),
    "run": ("--until", "sorted"),
}  # fmt: skip
# Pages that a reader follows one after the other, in one folder.
LINES = (
    ("README", "getting-started"), ("choosing", "after-export", "pruning", "search-spaces"),
    ("scale",), ("llama-3.1-8b",), ("smollm2",),
)  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for name, text in found if name == language]


def nas_lines(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["nas"]]


def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date():
    wanted = reference().pages()
    folder = ROOT / "docs" / "reference"
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert there == wanted, "run: python scripts/reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_has_the_options_that_a_page_gives_it(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "bash"):
        for name, *words in nas_lines(block):
            if name.startswith("--"):
                continue
            assert name in COMMANDS
            for word in words:
                if word.endswith((".txt", ".jsonl")):
                    Path(word).parent.mkdir(parents=True, exist_ok=True)
                    Path(word).touch()
            with contextlib.suppress(SystemExit):  # --help
                parse(make_parser(name, function_of(name)), spelled_out(name, words))


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.fixture
def sandbox(tmp_path, checkpoint_dir, bundled, monkeypatch):
    """A user's folder: a Hugging Face model, texts, exports, and `nas` on the PATH."""
    folder = tmp_path / "user"
    folder.mkdir()
    export = ("export", "--extreme", "largest", "--checkpoint_dir", checkpoint_dir)
    assert nas(*export, "--format", "hf", "--out_dir", folder / "my-model") == 0
    shutil.copytree(folder / "my-model", folder / "exported_hf")
    shutil.copytree(checkpoint_dir, folder / "exported")
    for name in ("train.jsonl", "valid.jsonl"):
        shutil.copyfile(bundled / name, folder / name)
    text = (bundled / "train.jsonl").read_text(encoding="utf-8")
    (folder / "my-text.txt").write_text(text[:60_000], encoding="utf-8")
    shim = tmp_path / "bin" / "nas"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m whittle_nas "$@"\n')
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    path = [str(shim.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(folder)
    return folder


def run(block: str, folder: Path, done: set[str]) -> None:
    """Run a block as a shell does; commands of `nas` alone in this process, which is warm.

    What ran in this folder before is left out, and what needs minutes gets fewer steps.
    """
    short, block = block.startswith(MINUTES), block.replace("\\\n", " ")
    lines = [line for line in block.splitlines() if not line.startswith("#") and line not in done]
    done.update(lines)
    if short or (nas_lines(block) and not set("$|>*;&") & set(block) and "litgpt" not in block):
        for name, *words in nas_lines("\n".join(lines)):
            assert nas(name, *words, *(SHORTER.get(name, ()) if short else ())) == 0, words
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", "\n".join(lines)], cwd=folder, check=True)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_every_block_runs_in_the_order_of_its_page(line, sandbox):
    pages = {page.stem: page for page in PAGES}
    done: set[str] = set()
    for block in (block for name in line for block in blocks(pages[name], "bash")):
        if not block.startswith(MARK) or block.startswith(MINUTES):
            run(block, sandbox, done)


def test_every_page_with_commands_is_run():
    pages = {page.stem for page in PAGES if blocks(page, "bash") and page.parent.name != "data"}
    assert {name for line in LINES for name in line} == pages


@pytest.mark.slow
@pytest.mark.parametrize("name", ["python", "after-export"])
def test_python_of_a_page_runs(name, sandbox):
    code = "\n".join(blocks(ROOT / "docs" / f"{name}.md", "python"))
    subprocess.run([sys.executable, "-c", code], cwd=sandbox, check=True)
