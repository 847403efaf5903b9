"""A Hugging Face directory becomes a litgpt checkpoint of the same logits."""

import json
from pathlib import Path

import pytest
import torch

from tests.export.families import FAMILIES, part, tiny
from whittle_nas.errors import ConfigError
from whittle_nas.export.hf import write_hf
from whittle_nas.export.hf_in import litgpt_directory
from whittle_nas.weights.checkpoint import load_supernet


def written(model, directory: Path, **options) -> Path:
    directory.mkdir()
    write_hf(directory, model.config, model.state_dict(), **options)
    return directory


def check_converted(model, directory: Path):
    said = []
    assert litgpt_directory(directory, said.append) == directory
    assert len(said) == 1
    loaded = load_supernet(directory).model
    idx = torch.randint(90, (2, 24))
    torch.testing.assert_close(loaded(idx), model(idx), atol=1e-4, rtol=0)
    assert litgpt_directory(directory, said.append) == directory  # once
    assert len(said) == 1
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]
    return loaded.config


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay(family, tmp_path):
    model = tiny(family)
    check_converted(model, written(model, tmp_path / "some-model"))


def test_sizes_that_no_listed_model_has_and_weights_in_several_files(tmp_path):
    small = part(tiny("Llama-3.1-8B"), n_embd=60, head_size=8, intermediate_size=41)
    directory = written(small, tmp_path / "mine", shard_bytes=20_000)
    assert len(list(directory.glob("*.safetensors"))) > 2
    assert check_converted(small, directory).name == "mine"


def test_what_litgpt_has_not_is_refused_and_nothing_is_left(tmp_path):
    directory = written(tiny("Llama-2-7b-hf"), tmp_path / "model")
    before = sorted(directory.iterdir())
    config = json.loads((directory / "config.json").read_text())

    def refused(changes: dict) -> str:
        (directory / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ConfigError) as error:
            litgpt_directory(directory, lambda _: None)
        assert sorted(directory.iterdir()) == before
        return str(error.value)

    assert "'gpt2'" in refused({"model_type": "gpt2"})
    assert "yarn" in refused({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    assert "hidden_act='gelu'" in refused({"hidden_act": "gelu"})
    assert "shape" in refused({"intermediate_size": 97})
    (directory / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        litgpt_directory(directory, lambda _: None)
    (directory / "config.json").write_text(json.dumps(config))
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="can't convert"):
        litgpt_directory(directory, lambda _: None)
    assert sorted(directory.iterdir()) == before


def test_other_directories_are_left_alone(tmp_path, bundled):
    for given in (bundled, tmp_path, tmp_path / "missing", Path("a/b/c")):
        assert litgpt_directory(given, pytest.fail) == given
