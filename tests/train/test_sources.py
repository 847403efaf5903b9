"""Samples from litgpt's data modules and from text."""

import json

import pytest
from litgpt import Config

from whittle_nas.data import MixSource, Part, TextData, load_tokenizer
from whittle_nas.errors import ConfigError
from whittle_nas.train.batches import IGNORE
from whittle_nas.train.sources import load_both, load_samples


@pytest.fixture
def config(bundled) -> Config:
    return Config.from_file(bundled / "model_config.yaml")


def instructions(tmp_path, rows=10, **arguments) -> TextData:
    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps([{"instruction": f"Add {i}.", "output": f"Sum {i}"} for i in range(rows)])
    )
    arguments = {"mask_prompt": True, "val_split_fraction": 0.2, **arguments}
    return TextData(module="JSON", module_args={"json_path": str(path), **arguments})


def test_only_answers_have_labels(tmp_path, bundled, config):
    found = load_samples(instructions(tmp_path), bundled, config=config, part=Part.TRAIN)
    tokenizer = load_tokenizer(bundled, config)
    assert len(found.samples) == 8
    for sample in found.samples:
        answer = sample.labels[sample.labels != IGNORE]
        assert tokenizer.decode(answer[:-1]).strip().startswith("Sum ")
        assert answer[-1] == tokenizer.eos_id


def test_without_masking_every_position_has_a_label(tmp_path, bundled, config):
    data = instructions(tmp_path, mask_prompt=False)
    for sample in load_samples(data, bundled, config=config).samples:
        assert sample.num_labels == len(sample.input_ids)


def test_parts_of_a_module_are_its_own_split(tmp_path, bundled, config):
    data = instructions(tmp_path)
    train, held_out = load_both(data, None, bundled, config=config)
    assert (len(train.samples), len(held_out.samples)) == (8, 2)
    assert "training split" in train.about
    assert "validation split" in held_out.about
    text = TextData(files=bundled / "train.jsonl", num_blocks=4)
    train, held_out = load_both(text, data, bundled, config=config)
    assert len(held_out.samples) == 2  # and not the training split as well


def test_packing_fills_rows(tmp_path, bundled, config):
    data = instructions(tmp_path, rows=30)
    plain = load_samples(data, bundled, config=config, part=Part.TRAIN).samples
    packed = load_samples(data, bundled, config=config, part=Part.TRAIN, packing=True).samples
    assert len(packed) < len(plain)
    assert sum(s.num_labels for s in packed) == sum(s.num_labels for s in plain)


def test_long_samples_are_cut_and_counted(tmp_path, bundled, config):
    from dataclasses import replace

    data = instructions(tmp_path)
    longest = max(len(s.input_ids) for s in load_samples(data, bundled, config=config).samples)
    cut = load_samples(replace(data, block_size=longest - 2), bundled, config=config)
    assert cut.num_cut > 0
    assert max(len(s.input_ids) for s in cut.samples) <= longest - 2


def test_a_tokenizer_without_an_end_is_refused(tmp_path, bundled, config):
    (tmp_path / "tokenizer.json").write_bytes((bundled / "tokenizer.json").read_bytes())
    with pytest.raises(ConfigError, match="EOS"):
        load_samples(instructions(tmp_path), tmp_path, config=config)


def test_wrong_combinations(tmp_path, bundled, config):
    data = instructions(tmp_path)
    text = MixSource(files=[bundled / "train.jsonl"])
    module = MixSource(module=data.module, module_args=data.module_args)
    with pytest.raises(ConfigError, match="not both"):
        load_samples(TextData(sources=[text, module]), bundled, config=config)
    with pytest.raises(ConfigError, match="valid_fraction=0"):
        load_both(TextData(files=bundled / "train.jsonl"), None, bundled, config=config)
    slides = Config.from_file(bundled / "model_config.yaml", sliding_window_size=8)
    with pytest.raises(ConfigError, match="sliding window"):
        load_samples(data, bundled, config=slides, packing=True)
    with pytest.raises(ConfigError, match="Alpaka"):
        load_samples(TextData(module="Alpaka"), bundled, config=config)


@pytest.mark.parametrize(
    "name", ["commonsense/boolq/train.json", "commonsense/ARC-Easy/train.json"]
)
def test_real_instruction_files(shared_data, bundled, config, name):
    path = shared_data / name
    data = TextData(
        module="JSON",
        module_args={"json_path": str(path), "mask_prompt": True, "val_split_fraction": 0.1},
        num_documents=20,
        block_size=config.block_size,
    )
    found = load_samples(data, bundled, config=config, part=Part.TRAIN)
    assert 0 < len(found.samples) <= 20
