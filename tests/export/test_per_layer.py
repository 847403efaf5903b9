"""Networks whose layers differ: what is written computes what the stand-alone network does."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import fill_random, tiny_config
from tests.weights.test_per_layer import members
from whittle_nas.errors import ConfigError
from whittle_nas.export.checkpoint import plan_export, write_export
from whittle_nas.export.deci import Engine
from whittle_nas.space import Block, SubNetwork
from whittle_nas.weights.axes import num_params
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint, write_checkpoint
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.patch import Patch
from whittle_nas.weights.supernet import SuperNetwork

IDS = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(0))


def checkpoint(model, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_checkpoint(source, model.state_dict(), config=model.config, source=source)
    return open_checkpoint(source)


def exported(source, sub, tmp_path, **options):
    """The directory of an export."""
    patch = options.pop("patch", Patch())
    out_dir = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    out_dir.mkdir()
    planned = plan_export(source, sub, **options)
    write_export(out_dir, planned.__class__(**{**vars(planned), "patch": patch}))
    return out_dir, planned


@torch.inference_mode()
def test_directories_of_their_own_and_padded_ones(tiny_gpt, tmp_path):
    source, supernet = checkpoint(tiny_gpt, tmp_path), SuperNetwork(tiny_gpt)
    config = tiny_gpt.config
    for sub in members(config, 1):
        alone = supernet.standalone(sub)
        expected = alone(IDS)
        own, _ = exported(source, sub, tmp_path)
        read = load_supernet(own)
        kept = SubNetwork(sub.n_embd, tuple(block for block in sub.blocks if block is not None))
        assert read.full == kept
        for model in (read.model, read.standalone(kept), read.subnet(kept)):
            torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)
        assert parameter_counter(read.config)(kept) == num_params(read.config)
        assert num_params(read.config) == sum(p.numel() for p in alone.parameters())
        smaller = SubNetwork(sub.n_embd - 8, (None, *kept.blocks[1:]))
        if smaller.n_layer:
            of_super = SubNetwork(smaller.n_embd, _inside(sub, smaller))
            there = read.standalone(smaller)(IDS)
            torch.testing.assert_close(there, supernet.standalone(of_super)(IDS))
        normed = slice(2, 3) if config.norm_qk_type == "default" else slice(3)
        if config.norm_qk and len({b[normed] for b in kept.blocks if b.n_head}) > 1:
            with pytest.raises(ConfigError, match="norms of queries"):
                exported(source, sub, tmp_path, pad=True)
            continue
        padded, _ = exported(source, sub, tmp_path, pad=True)
        whole = load_supernet(padded)
        assert whole.full.sizes() is not None
        torch.testing.assert_close(whole.model(IDS), expected, rtol=1e-5, atol=1e-5)


def _inside(sub, smaller):
    """The blocks of the layers that are kept, in the layers of the whole model."""
    kept = iter(smaller.blocks)
    return tuple(next(kept) if block is not None else None for block in sub.blocks)


LLAMA = [
    SubNetwork(48, (Block(4, 4, 8, 72), Block(4, 2, 8, 9), Block(4, 2, 8, 0))),
    SubNetwork(40, (Block(0, 0, 0, 50), Block(4, 2, 8, 0), Block(4, 4, 8, 31))),
    SubNetwork(33, (None, Block(8, 4, 4, 72), Block(8, 4, 4, 71))),
]


@pytest.mark.parametrize("sub", LLAMA, ids=str)
@torch.inference_mode()
def test_transformers_runs_them_with_their_own_cache(sub, tmp_path):
    model = fill_random(tiny_gpt_of("Llama-3.1-8B")).eval()
    if tied := sub is LLAMA[1]:
        model.lm_head.weight = model.transformer.wte.weight
    expected = SuperNetwork(model).standalone(sub)(IDS)
    out_dir, _ = exported(checkpoint(model, tmp_path), sub, tmp_path, to_hf=True)
    load = AutoModelForCausalLM.from_pretrained
    theirs, info = load(out_dir, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    table, head = theirs.get_input_embeddings(), theirs.get_output_embeddings()
    assert (table.weight is head.weight) == tied
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 95}
    cached = theirs.generate(IDS[:1, :5], **options)
    assert torch.equal(cached, theirs.generate(IDS[:1, :5], use_cache=False, **options))
    start = theirs(IDS[:, :7], use_cache=True)
    kept = [layer.keys.shape[1] for layer in start.past_key_values.layers if layer.is_initialized]
    assert kept == [block.n_query_groups for block in sub.blocks if block and block.n_head]
    rest = theirs(IDS[:, 7:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(rest, expected[:, 7:], rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", trust_remote_code=True)
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def tiny_gpt_of(name, **changes):
    from litgpt import GPT

    return GPT(tiny_config(name, **changes))


@torch.inference_mode()
def test_a_patch_changes_every_format(tmp_path):
    model = fill_random(tiny_gpt_of("Llama-3.1-8B")).eval()
    source, sub = checkpoint(model, tmp_path), LLAMA[1]
    supernet = SuperNetwork(model)
    slices = supernet.slices(sub)
    patch = Patch({name: slices[name] * 2 for name in slices if name.endswith("proj.weight")})
    expected = supernet.standalone(sub, patch)(IDS)
    own, _ = exported(source, sub, tmp_path, patch=patch)
    padded, _ = exported(source, sub, tmp_path, patch=patch, pad=True)
    hf, _ = exported(source, sub, tmp_path, patch=patch, to_hf=True)
    theirs = AutoModelForCausalLM.from_pretrained(hf, trust_remote_code=True)
    for logits in (load_supernet(own).model(IDS), load_supernet(padded).model(IDS), theirs(IDS)[0]):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_what_vllm_and_llama_cpp_read(tmp_path):
    model = tiny_gpt_of("Llama-3.1-8B", n_embd=64, head_size=16, intermediate_size=512)
    source = checkpoint(fill_random(model), tmp_path)
    sub = SubNetwork(64, (Block(4, 4, 16, 512), Block(4, 2, 16, 256), Block(0, 0, 0, 300)))
    out_dir, planned = exported(source, sub, tmp_path, to_hf=True)
    said = json.loads((out_dir / "config.json").read_text())
    assert (said["num_attention_heads"], said["head_dim"]) == (4, 16)
    groups = [block["attention"]["n_heads_in_group"] for block in said["block_configs"]]
    assert groups == [1, 2, None]
    ffn = [block["ffn"] for block in said["block_configs"]]
    # The formula of both engines: 2/3 of mult * n_embd, up to a multiple of 256.
    widths = [-(-int(2 * f["ffn_mult"] * 64 / 3) // 256) * 256 for f in ffn if "ffn_mult" in f]
    assert widths == [512, 256]
    assert ffn[2]["intermediate_size"] == 300
    assert any("llama.cpp" in note and "256" in note for note in planned.notes)
    assert not any("vLLM" in note for note in planned.notes)


@pytest.mark.parametrize(
    ("family", "blocks", "message"),
    [
        ("Llama-3.1-8B", [(8, 4, 8, 72), (4, 4, 8, 72), None], "one n_head .* 4, 8; nearest: n_h"),
        ("Llama-3.1-8B", [(8, 4, 8, 72), (8, 4, 4, 72), None], "one head_size .* 4, 8; nearest"),
        ("Llama-3.1-8B", [(0, 0, 0, 72), (0, 0, 0, 7), None], "needs a layer with attention"),
        ("pythia-160m", [(4, 4, 16, 80), (4, 4, 16, 8), None], "nearest: --pad true"),
    ],
)
def test_what_the_format_can_not_hold_is_refused(family, blocks, message, tmp_path):
    source = checkpoint(fill_random(tiny_gpt_of(family, n_embd=64)), tmp_path)
    sub = SubNetwork(64, tuple(block and Block(*block) for block in blocks))
    with pytest.raises(ConfigError, match=message):
        plan_export(source, sub, to_hf=True)
    out_dir, planned = exported(source, sub, tmp_path, to_hf=True, pad=True)
    assert any("filled up with zeros" in note for note in planned.notes)
    with torch.inference_mode():
        expected = load_supernet(source.path).standalone(sub)(IDS)
        theirs = AutoModelForCausalLM.from_pretrained(out_dir, trust_remote_code=True)
        torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_an_engine_needs_is_filled_up(tmp_path):
    model = fill_random(tiny_gpt_of("Llama-3.1-8B", n_embd=64)).eval()
    source = checkpoint(model, tmp_path)
    sub = SubNetwork(64, (Block(0, 0, 0, 72), Block(6, 3, 8, 0), Block(4, 4, 8, 31)))
    both = {"to_hf": True, "targets": set(Engine)}
    with pytest.raises(ConfigError, match="one n_head"):
        plan_export(source, sub, **both)
    even = SubNetwork(64, (Block(0, 0, 0, 72), *(Block(4, 4, 8, n) for n in (9, 10))))
    with pytest.raises(ConfigError, match=r"--targets vllm: .*first layer.*--pad true"):
        plan_export(source, even, **both)
    out_dir, planned = exported(source, sub, tmp_path, pad=True, **both)
    # 6 heads would do but for llama.cpp, and 3 groups of 2 heads are 4 groups there.
    assert planned.padding.outer.blocks == (
        Block(8, 1, 8, 256), Block(8, 4, 8, 256), Block(8, 4, 8, 256)
    )  # fmt: skip
    _, for_vllm = exported(source, sub, tmp_path, pad=True, to_hf=True, targets={Engine.vllm})
    assert for_vllm.padding.outer.blocks == (
        Block(6, 1, 8, 72), Block(6, 3, 8, 0), Block(6, 6, 8, 31)
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(out_dir, trust_remote_code=True)
    with torch.inference_mode():
        expected = SuperNetwork(model).standalone(sub)(IDS)
        torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([[8, 4, 8, 72]] * 2, "one per layer of the model, 3; got 2"),
        ([[8, 4, 8, 73], [8, 4, 8, 72], [8, 4, 8, 72]], "intermediate_size=73"),
        ([None, [8, 4, 8, 72], [8, 4, 8, 72]], "block 0 has neither"),
    ],
)
def test_wrong_blocks_in_a_file_are_one_sentence(blocks, message, tmp_path):
    import yaml

    source = checkpoint(tiny_gpt_of("Llama-3.1-8B"), tmp_path).path
    said = yaml.safe_load((source / "model_config.yaml").read_text())
    (source / "model_config.yaml").write_text(yaml.safe_dump({**said, "blocks": blocks}))
    with pytest.raises(ConfigError, match=rf"model_config.yaml: .*{message}"):
        open_checkpoint(source, per_layer=True)
