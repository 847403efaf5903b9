"""`nas generate`: the same text before and after an export."""

import json

import pytest

from tests.cli.test_main import nas

BLOCKS = json.dumps([[8, 4, 8, 72], None, [0, 0, 0, 30]])
GREEDY = ["--prompt", "def f(x):", "--temperature", 0, "--max_new_tokens", 12]


@pytest.mark.slow
def test_a_sub_network_writes_what_its_directory_writes(checkpoint_dir, tmp_path, capsys):
    source = ["--checkpoint_dir", checkpoint_dir, "--subnetwork.blocks", BLOCKS]
    out_dir = tmp_path / "small"
    assert nas("export", *source, "--out_dir", out_dir) == 0
    assert "nas generate" in capsys.readouterr().out
    assert nas("generate", *source, *GREEDY) == 0
    before = capsys.readouterr().out
    assert nas("generate", "--checkpoint_dir", out_dir, *GREEDY) == 0
    assert capsys.readouterr().out == before
    assert "def f(x):" in before
    # Exported once more: it was chosen before, so no choice means it, and so does the largest.
    again = ["export", "--checkpoint_dir", out_dir, "--pad", "true"]
    assert nas(*again, "--out_dir", tmp_path / "padded") == 0
    assert nas(*again, "--out_dir", tmp_path / "largest", "--extreme", "largest") == 0
    files = [(tmp_path / name / "lit_model.pth").read_bytes() for name in ("padded", "largest")]
    assert len(set(files)) == 1
    assert "nothing is saved" in capsys.readouterr().out
    assert nas("generate", "--checkpoint_dir", tmp_path / "padded", *GREEDY) == 0
    assert capsys.readouterr().out == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max_new_tokens", 500], ["--max_new_tokens 500", "context of 128"]),
        (["--temperature", -1], ["--temperature -1"]),
        (["--subnetwork.blocks", "[null]"], ["one per layer", "got 1"]),
    ],
)
def test_wrong_options_are_one_sentence(checkpoint_dir, capsys, options, words):
    where = ["--checkpoint_dir", checkpoint_dir, "--prompt", "a"]
    assert nas("generate", *where, *options) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert all(word in shown for word in words), shown


def test_what_only_runs_says_so_elsewhere(checkpoint_dir, tmp_path, bundled, capsys):
    out_dir = tmp_path / "small"
    source = ["--checkpoint_dir", checkpoint_dir, "--subnetwork.blocks", BLOCKS]
    assert nas("export", *source, "--out_dir", out_dir) == 0
    assert nas("export", *source, "--out_dir", tmp_path / "hf", "--format", "hf") == 0
    text = ["--data.files", bundled / "train.jsonl", "--out_dir", tmp_path / "out"]
    for path, said in ((out_dir, "layers of different sizes"), (tmp_path / "hf", "custom code")):
        capsys.readouterr()
        assert nas("importance", "--checkpoint_dir", path, *text) == 2
        assert said in capsys.readouterr().err
