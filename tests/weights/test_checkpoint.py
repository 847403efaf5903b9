"""Checkpoint directories: whole, atomic, and refused with one sentence when they are not."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from litgpt import GPT

from tests.conftest import fill_random, tiny_config, uniform
from whittle_nas.errors import ConfigError, disk_errors
from whittle_nas.space import HeadChannels
from whittle_nas.weights.checkpoint import (
    is_unfinished,
    load_supernet,
    load_torch,
    open_checkpoint,
    save_tensors,
    write_checkpoint,
)
from whittle_nas.weights.files import atomic_directory, atomic_write_text
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.pages import release


def test_a_written_checkpoint_reads_back_the_same(checkpoint_dir, tmp_path):
    first = load_supernet(checkpoint_dir)
    info = SupernetInfo(
        layer_order=(2, 0, 1), head_channels=HeadChannels.first, importance={"aggregation": "x"}
    )
    with atomic_directory(tmp_path / "copy") as partial:
        write_checkpoint(
            partial,
            first.model.state_dict(),
            config=first.config,
            source=checkpoint_dir,
            info=info,
        )
    second = load_supernet(tmp_path / "copy")
    assert second.info == info
    assert second.config == first.config
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name])
    assert {f.name for f in checkpoint_dir.iterdir()} <= {
        f.name for f in (tmp_path / "copy").iterdir()
    }
    assert not list(tmp_path.glob(".*")), "temporary directories remain"


def test_views_are_stored_compactly_and_ties_once(tmp_path):
    table = torch.randn(1000, 64)
    whole = tmp_path / "whole.pth"
    save_tensors(whole, {"transformer.wte.weight": table, "lm_head.weight": table})
    assert whole.stat().st_size < 1.1 * table.numel() * 4
    part = tmp_path / "part.pth"
    save_tensors(part, {"a": table[:10], "b": table.narrow(1, 0, 3)})
    assert part.stat().st_size < 30_000
    loaded = torch.load(part, weights_only=True, mmap=True)
    assert torch.equal(loaded["a"], table[:10])
    assert torch.equal(loaded["b"], table[:, :3])


def test_gathered_tensors_that_reuse_memory_stay_apart(tmp_path):
    """Each tensor exists only while it is written, so addresses repeat."""

    class Lazy(dict):
        def __getitem__(self, name):
            return torch.full((100,), float(name[1:]))

    save_tensors(tmp_path / "t.pth", Lazy.fromkeys(f"t{value}" for value in range(8)))
    loaded = torch.load(tmp_path / "t.pth", weights_only=True)
    assert [loaded[f"t{v}"][0].item() for v in range(8)] == list(range(8))


def test_a_folder_of_checkpoints_is_no_training(tmp_path, small_checkpoint):
    """As litgpt's downloads lie, and the stages of `nas run`."""
    for name in ("one", "two"):
        shutil.copytree(small_checkpoint, tmp_path / name)
    (tmp_path / "runs" / "deep" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "deep" / "checkpoints" / "step=1.ckpt").write_text("")
    assert not is_unfinished(tmp_path)
    with pytest.raises(ConfigError, match="is not a litgpt checkpoint"):
        open_checkpoint(tmp_path)
    assert is_unfinished(tmp_path / "runs")


def test_interrupted_write_leaves_nothing(tmp_path):
    out_dir = tmp_path / "out"

    def interrupted() -> None:
        with atomic_directory(out_dir) as partial:
            (partial / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_and_refuses(tmp_path):
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    (out_dir / "old").write_text("old")
    with pytest.raises(ConfigError, match="not empty"), atomic_directory(out_dir):
        pass
    with atomic_directory(out_dir, overwrite=True) as partial:
        (partial / "new").write_text("new")
    assert [f.name for f in out_dir.iterdir()] == ["new"]
    atomic_write_text(out_dir / "new", "newer")
    assert (out_dir / "new").read_text() == "newer"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small device needs root")
def test_full_device_is_one_sentence_and_leaves_nothing(checkpoint_dir, tmp_path):
    device = tmp_path / "small"
    device.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(device)])
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        supernet = load_supernet(checkpoint_dir)
        with (
            pytest.raises(ConfigError, match="can't write .*the disk is full"),
            disk_errors(device / "out"),
            atomic_directory(device / "out") as partial,
        ):
            write_checkpoint(
                partial,
                supernet.model.state_dict(),
                config=supernet.config,
                source=checkpoint_dir,
            )
        assert list(device.iterdir()) == []
    finally:
        # lazily: the failed writer's file may still be open inside the exception
        subprocess.run(["umount", "--lazy", str(device)], check=True)


class _Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/nas-was-executed",))


def _pickle(path: Path) -> None:
    torch.save({"lm_head.weight": _Evil()}, path)


def _plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Evil()))


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def _wrong_key(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["lm_head.wait"] = state.pop("lm_head.weight")
    torch.save(state, path)


def _extra_key(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save({**state, "transformer.h.9.norm_1.weight": torch.ones(48)}, path)


def _wrong_shape(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save({**state, "transformer.ln_f.weight": torch.ones(47)}, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"no weights"), "corrupt"),
        (lambda path: path.write_bytes(b""), "corrupt"),
        (_truncated, "corrupt"),
        (_pickle, "more than tensors"),
        (_plain_pickle, "more than tensors|corrupt"),
        (lambda path: torch.save([1, 2], path), "dictionary of tensors"),
        (_wrong_key, "lacks parameter 'lm_head.weight'"),
        (_extra_key, "unknown parameter 'transformer.h.9.norm_1.weight'"),
        (_wrong_shape, r"transformer.ln_f.weight has shape \(47,\)"),
    ],
)
def test_corrupt_or_hostile_weights_are_refused(checkpoint_dir, spoil, message):
    spoil(checkpoint_dir / "lit_model.pth")
    with pytest.raises(ConfigError, match=message):
        load_supernet(checkpoint_dir)
    assert not Path("/tmp/nas-was-executed").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layer: [", "not valid YAML"),
        ("!!python/object/apply:os.system ['touch /tmp/nas-was-executed']", "not valid YAML"),
        ("n_layers: 3", "does not describe a litgpt model"),
        ("- 1", "does not describe"),
        ("", "does not describe"),
        ("{n_embd: 7, n_head: 3}", "does not describe"),
        ("{n_embd: 64, n_head: 0}", "does not describe"),
        ("{n_embd: 4000000000, n_head: 1, n_layer: 1}", "n_embd=4000000000"),
        ("{n_embd: -64, n_head: 4}", "n_embd=-64"),
        ("{n_embd: 64, n_head: 4, n_layer: x}", "does not describe|n_layer='x'"),
    ],
)
def test_bad_model_config(checkpoint_dir, text, message):
    (checkpoint_dir / "model_config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(checkpoint_dir)
    assert not Path("/tmp/nas-was-executed").exists()


@pytest.mark.parametrize(
    "spec",
    [
        {"layer_order": [0, 1], "head_channels": "rope"},
        {"layer_order": [0, 1, 1], "head_channels": "rope"},
        {"layer_order": [0, 1, 2], "head_channels": "all"},
        {"layer_order": 3, "head_channels": "rope"},
        {"head_channels": "rope"},
        {"layer_order": [0, 1, 2], "head_channels": "rope", "more": 1},
        ["layer_order"],
    ],
)
def test_bad_supernet_yaml(checkpoint_dir, spec):
    (checkpoint_dir / "supernet.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(ConfigError, match="supernet.yaml"):
        open_checkpoint(checkpoint_dir)


def test_missing_files_are_named(checkpoint_dir, tmp_path):
    with pytest.raises(ConfigError, match="is not a directory"):
        open_checkpoint(tmp_path / "nowhere")
    (checkpoint_dir / "model_config.yaml").unlink()
    with pytest.raises(ConfigError, match="model_config.yaml missing"):
        open_checkpoint(checkpoint_dir)


def test_stored_number_format_is_kept(checkpoint_dir):
    assert load_supernet(checkpoint_dir).model.lm_head.weight.dtype == torch.float32
    half = load_supernet(checkpoint_dir, dtype=torch.bfloat16)
    sub = uniform(24, 4, 4, 8, 36, 2)
    assert half.standalone(sub)(torch.zeros(1, 4, dtype=torch.long)).dtype == torch.bfloat16


def test_subnetworks_have_cache_and_generate(checkpoint_dir):
    from litgpt.generate.base import generate

    supernet = load_supernet(checkpoint_dir)
    model = supernet.standalone(uniform(24, 4, 4, 8, 36, 2))
    prompt = torch.arange(5)
    model.set_kv_cache(batch_size=1)
    cached = generate(model, prompt, 12, temperature=0.0)
    model.clear_kv_cache()
    ids = prompt
    for _ in range(7):
        ids = torch.cat([ids, model(ids[None])[0, -1:].argmax(-1)])
    assert torch.equal(cached, ids)


def test_training_mode_and_device_follow_the_model():
    config = tiny_config("Llama-3.1-8B")
    from whittle_nas.weights.supernet import SuperNetwork

    supernet = SuperNetwork(fill_random(GPT(config)))
    sub = uniform(24, 4, 4, 8, 36, 2)
    ids = torch.zeros(1, 4, dtype=torch.long)
    for training in (False, True):
        supernet.model.train(training)
        skeleton = supernet.subnet(sub)
        skeleton(ids)
        assert skeleton.transformer.h[0].skeleton.training is training
    supernet.model.to(torch.float64)
    assert supernet.subnet(sub)(ids).dtype == torch.float64


def test_views_kept_between_calls_follow_the_weights():
    """Inference first, an in-place update, new data, training, a new parameter."""
    from whittle_nas.weights.supernet import SuperNetwork

    config = tiny_config("Llama-3.1-8B")
    model = fill_random(GPT(config)).requires_grad_(False)
    supernet, ids = SuperNetwork(model), torch.arange(6)[None]
    sub = uniform(24, 4, 4, 8, 36, 2)

    def agree() -> None:
        expected = GPT(supernet.plan(sub).config)
        expected.load_state_dict({name: t.clone() for name, t in supernet.slices(sub).items()})
        torch.testing.assert_close(supernet.subnet(sub)(ids), expected(ids))

    with torch.inference_mode():
        supernet.subnet(sub)(ids)
    agree()
    model.transformer.ln_f.weight.add_(1.0)
    agree()
    model.transformer.ln_f.weight.data = torch.randn(48)
    agree()
    fill_random(model, seed=1).requires_grad_(True)
    supernet.subnet(sub)(ids).sum().backward()
    assert model.transformer.wte.weight.grad is not None
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        agree()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_a_mapped_file_are_given_back_and_read_again(tmp_path):
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    torch.save({"w": torch.arange(2**22)}, tmp_path / "w.pth")  # 32 MB
    mapped, own = load_torch(tmp_path / "w.pth")["w"], torch.arange(2**22)
    before = resident()
    total = mapped.sum()
    assert resident() > before + 25e6
    release(mapped[5:])  # a view is of the same storage
    release(own)
    assert resident() < before + 5e6
    assert torch.equal(mapped.sum(), total)
    assert torch.equal(own, mapped)
