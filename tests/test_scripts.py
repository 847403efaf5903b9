"""Scripts parse, and what texts say of them is true."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"\bscripts/[\w/.-]*\w\.(?:sh|py)\b")


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/**/*.sh")), ids=lambda path: path.stem)
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_every_script_that_a_text_names_is_there():
    texts = [
        path
        for pattern in ("*.md", "docs/**/*.md", "scripts/**/*", "whittle_nas/**/*.py")
        for path in ROOT.glob(pattern)
        if path.is_file() and path.suffix in (".md", ".sh", ".py")
    ]
    named = {(name, path) for path in texts for name in NAMED.findall(path.read_text("utf-8"))}
    assert named
    assert not {(name, str(path)) for name, path in named if not (ROOT / name).is_file()}
