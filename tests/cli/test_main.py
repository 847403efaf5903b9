"""The command line as a user meets it: help, exit codes, one sentence on stderr."""

import subprocess
import sys

import pytest
import yaml

from tests.conftest import first_of
from whittle_nas.__main__ import COMMANDS, main


def nas(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_help_lists_every_command(capsys):
    assert nas("--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_every_option_is_explained_and_nothing_heavy_is_imported():
    script = (
        "import sys; from whittle_nas.__main__ import main\n"
        f"for command in {list(COMMANDS)!r}:\n"
        "    print('== ' + command)\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit: pass\n"
        "    heavy = {'torch', 'litgpt', 'lightning', 'transformers', 'lm_eval', 'syne_tune', "
        "'datasets', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "    if heavy: sys.exit(f'{command} imported {heavy}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split("\n== ")
    assert len(shown) == len(COMMANDS)
    for text in shown:
        _, *blocks = text.split("\n  --")
        assert blocks, text
        for block in blocks:
            words = block.split("(type:")[0].split("(required")[0].split()
            assert len(words) > 2 or "CONFIG" in block, f"no help for --{block}"


@pytest.mark.parametrize("command", first_of(name for name in COMMANDS if name != "run"))
def test_print_config_is_a_commented_file_that_means_the_same(command, capsys, tmp_path):
    given = ["--checkpoint_dir", "a", *([] if command == "generate" else ["--out_dir", "b"])]
    with pytest.raises(SystemExit):
        nas(command, *given, "--print_config")
    first = capsys.readouterr().out
    (tmp_path / "start.yaml").write_text(first)
    with pytest.raises(SystemExit):
        nas(command, "--config", tmp_path / "start.yaml", "--print_config")
    assert capsys.readouterr().out == first
    assert yaml.safe_load(first)["checkpoint_dir"] == "a"
    lines = [line.strip() for line in first.splitlines() if line.strip()]
    for above, line in zip(["", *lines], lines, strict=False):
        if line.startswith(("overwrite:", "out_dir:", "block_size:")):
            assert above.startswith("#"), f"no comment above {line}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["shrink"], ["unknown command 'shrink'", "importance"]),
        (["export"], ["_dir is required"]),
        (["export", "--chekpoint_dir", "x"], ["chekpoint_dir"]),
        (["export", "--config", "missing.yaml"], ["missing.yaml"]),
        (["profile", "--tokens", "many"], ["tokens", "many"]),
        (["profile", "--tokens", "0", "--model_name", "pythia-14m"], ["--tokens 0"]),
        (["profile", "--tokens", "99999", "--model_name", "pythia-14m"], ["99999", "512"]),
        (["profile", "--model_name", "GPT-9"], ["GPT-9"]),
        (["profile"], ["--checkpoint_dir or --model_name"]),
        (["profile", "--device", "cuda:9", "--model_name", "pythia-14m"], ["cuda:9"]),
        (["profile", "--dtype", "int3", "--model_name", "pythia-14m"], ["dtype", "bfloat16"]),
        (["profile", "--model_name", "Mixtral-8x7B-v0.1"], ["mixture of experts"]),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(arguments, words, capsys):
    assert nas(*arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("nas: ")
    assert shown.count("\n") == 1
    for word in words:
        assert word in shown


def test_unknown_yaml_key(tmp_path, capsys):
    config = tmp_path / "export.yaml"
    config.write_text("checkpoint_dir: a\nout_dir: b\noutdir: c\n")
    assert nas("export", "--config", config) == 2
    assert "outdir" in capsys.readouterr().err
    config.write_text("checkpoint_dir: !!python/object/apply:os.system ['true']\nout_dir: b\n")
    assert nas("export", "--config", config) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_profile_writes_a_run_that_can_be_repeated(checkpoint_dir, tmp_path, capsys):
    out_dir = tmp_path / "profile"
    sizes = ["--subnetwork.n_embd", 24, "--tokens", 16, "--repeats", 2]
    assert nas("profile", "--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, *sizes) == 0
    assert "latency_ms" in capsys.readouterr().out
    assert nas("profile", "--config", out_dir / "run.yaml") == 2
    assert "not empty" in capsys.readouterr().err
    assert nas("profile", "--config", out_dir / "run.yaml", "--overwrite", "true") == 0
    rows = yaml.safe_load((out_dir / "profile.json").read_text())["subnetworks"]
    assert [row["subnetwork"]["n_embd"] for row in rows] == [48, 24]
    assert rows[1]["num_params"] < rows[0]["num_params"]
