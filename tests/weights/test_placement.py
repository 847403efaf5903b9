"""Blocks on several devices: what is where, and that everything gives what one device gives."""

import copy
import gc
import pickle
import weakref
from dataclasses import replace
from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from litgpt import GPT

from tests.candidates.test_library import OPTIONS, TOKENS
from tests.conftest import first_of, resized, tiny_config
from tests.elsewhere import ELSEWHERE, MixedDevices, second_device
from tests.weights.test_linear_maps import with_maps
from tests.weights.test_per_layer import members
from whittle_nas.candidates.build import Builder
from whittle_nas.candidates.scoring import losses_around
from whittle_nas.evaluate.generation import Decoding, generate
from whittle_nas.evaluate.perplexity import nats_per_block
from whittle_nas.importance.options import Basis, NormFactors
from whittle_nas.importance.pipeline import MeasureOptions, measure, settle
from whittle_nas.metrics.measured import decode_latency, prefill_latency
from whittle_nas.repair.engine import repair
from whittle_nas.space import Block, SubNetwork
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint
from whittle_nas.weights.config import extended
from whittle_nas.weights.placement import devices_of, home_of, place, share_out
from whittle_nas.weights.supernet import SuperNetwork
from whittle_nas.weights.tying import tie_head

CPU = torch.device("cpu")
BOTH = (CPU, CPU, ELSEWHERE)  # the tables of a small model are more than half of it
IDS = torch.randint(0, 90, (2, 14), generator=torch.Generator().manual_seed(0))


def spread(model, devices=(CPU, ELSEWHERE)) -> SuperNetwork:
    """The same model with its blocks on two devices; to be called inside of `second_device`."""
    found = SuperNetwork(place(copy.deepcopy(model), devices))
    assert {home_of(block) for block in found.model.transformer.h} == {CPU, ELSEWHERE}
    return found


def loaded(checkpoint_dir) -> SuperNetwork:
    """The same of a checkpoint whose tables are more than half of it."""
    found = load_supernet(checkpoint_dir, device=BOTH)
    assert {home_of(block) for block in found.model.transformer.h} == {CPU, ELSEWHERE}
    return found


def largest_load(outside, blocks, places, count):
    loads = [outside, *[0] * (count - 1)]
    for size, at in zip(blocks, places, strict=True):
        loads[at] += size
    return max(loads)


@given(st.integers(0, 40), st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 4))
def test_shares_are_near_the_best_of_all(outside, blocks, count):
    places = share_out(outside, blocks, count)
    assert places == sorted(places)
    assert set(places) <= set(range(count))
    best = min(
        largest_load(outside, blocks, tried, count)
        for tried in combinations_with_replacement(range(count), len(blocks))
    )
    assert largest_load(outside, blocks, places, count) <= best + max(blocks)


def test_equal_blocks_are_shared_evenly_and_tables_count():
    assert share_out(1, [4] * 8, 4) == [0, 0, 1, 1, 2, 2, 3, 3]
    # Llama-3.1-70B in bfloat16: two tables of 2.1 GB, 80 blocks of 1.7 GB
    places = share_out(4_202_692_608, [1_711_308_800] * 80, 8)
    assert [places.count(at) for at in range(8)] == [8, 10, 10, 10, 11, 10, 11, 10]
    assert share_out(100, [1] * 6, 3) == [1, 1, 1, 2, 2, 2]


def test_parameters_are_where_they_belong():
    model = place(GPT(tiny_config("Llama-3.1-8B")), "cpu,meta")
    blocks = [{p.device for p in block.parameters()} for block in model.transformer.h]
    assert blocks == [{CPU}, {ELSEWHERE}, {ELSEWHERE}]
    outside = {name: t.device for name, t in model.state_dict().items() if ".h." not in name}
    assert set(outside.values()) == {CPU}
    assert model.cos.device == CPU
    model.set_kv_cache(1, device=CPU)
    caches = [block.attn.kv_cache.k.device for block in model.transformer.h]
    assert caches == [CPU, ELSEWHERE, ELSEWHERE]
    seen = []
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda _, args: seen.append({x.device for x in args[:5]}))
    with pytest.raises(NotImplementedError, match="meta"):  # the states can't come back
        model(IDS[:1], torch.arange(14), input_pos_maxp1=14)
    assert seen == [{CPU}, {ELSEWHERE}, {ELSEWHERE}]


@torch.inference_mode()
def test_networks_give_the_same_on_two_devices(tiny_gpt):
    one = SuperNetwork(tiny_gpt)
    with second_device():
        two = spread(tiny_gpt)
        for sub in (one.full, *members(tiny_gpt.config, 3)):
            expected = one.standalone(sub)(IDS)
            for model in (two.standalone(sub), two.subnet(sub)):
                logits = model(IDS)
                assert logits.device == CPU
                torch.testing.assert_close(logits, expected)
            hidden = two.subnet(sub, hidden=True)(IDS)
            torch.testing.assert_close(two.head(sub)(hidden), expected)


def test_two_shares_of_one_device_change_no_bit(checkpoint_dir):
    one, two = load_supernet(checkpoint_dir), load_supernet(checkpoint_dir, device="cpu,cpu")
    assert len(two.model.transformer.h[1]._forward_pre_hooks) == 1
    sub = resized(one.full, n_embd=32, n_head=4)
    for model in (two.model, two.standalone(one.full), two.subnet(one.full)):
        assert torch.equal(model(IDS), one.model(IDS))
    assert torch.equal(two.standalone(sub)(IDS), one.standalone(sub)(IDS))


@torch.inference_mode()
def test_cached_tokens_and_windows_give_the_same_on_two_devices(tiny_gpt):
    one = SuperNetwork(tiny_gpt)
    prompts, how = [[5, 6, 7, 8], [9], [3, 1]], Decoding(4, ())
    tokens = torch.randint(0, 90, (3, 21))
    with second_device():
        two = spread(tiny_gpt)
        for sub in (one.full, members(tiny_gpt.config, 0)[0]):
            alone, placed = one.standalone(sub), two.standalone(sub)
            found = nats_per_block(placed, tokens, batch_size=2)
            torch.testing.assert_close(found, nats_per_block(alone, tokens, batch_size=2))
            assert generate(placed, prompts, how) == generate(alone, prompts, how)
            timing = {"warmup": 0, "repeats": 2}
            assert prefill_latency(placed, batch=1, tokens=4, **timing).median_ms > 0
            if tiny_gpt.config.attention_logit_softcapping is None:
                assert decode_latency(placed, batch=1, context=3, **timing).median_ms > 0


def smaller_heads(model) -> SubNetwork:
    """Heads of half the size in the second layer alone, which so has rotary tables of its own."""
    whole = SubNetwork.from_config(model.config)
    first, second, *others = whole.blocks
    smaller = Block(second.n_head, second.n_query_groups, 8, second.intermediate_size)
    return SubNetwork(whole.n_embd, (first, smaller, *others))


@pytest.mark.parametrize("device", ["cpu", "cpu,cpu"])
@pytest.mark.parametrize("kind", ["whole", "subnet", "standalone", "other heads"])
def test_weights_are_free_as_soon_as_nobody_has_them(device, kind):
    one = SuperNetwork(place(GPT(tiny_config("Llama-3.1-8B", head_size=16)), device))
    sub = smaller_heads(one.model) if kind == "other heads" else resized(one.full, n_embd=32)
    model = one.model if kind in ("whole", "subnet") else one.standalone(sub)
    model.set_kv_cache(1)
    if kind == "subnet":
        one.subnet(sub)
    weights = [weakref.ref(weight) for weight in model.parameters()]
    gc.disable()
    try:
        del one, model
        assert {weight() for weight in weights} == {None}
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_make_their_caches_where_they_are(copied):
    whole = SuperNetwork(place(GPT(tiny_config("Llama-3.1-8B", head_size=16)), "cpu,meta"))
    model = copied(whole.standalone(smaller_heads(whole.model)))
    for place_of_last, expected in ((ELSEWHERE, ELSEWHERE), (CPU, CPU)):
        model.transformer.h[2].to_empty(device=place_of_last)
        model.set_kv_cache(2, device=CPU)
        keys = [block.attn.kv_cache.k for block in model.transformer.h]
        assert [k.device for k in keys] == [CPU, ELSEWHERE, expected]
        assert [k.shape[-1] for k in keys] == [16, 8, 16]


@torch.inference_mode()
def test_a_tied_head_stays_the_table_on_the_first_device(checkpoint_dir):
    model = load_supernet(checkpoint_dir).model
    model.config = extended(model.config, tie_word_embeddings=True)
    tie_head(model)
    with second_device():
        two = spread(model, BOTH)
        assert two.tied
        torch.testing.assert_close(two.model(IDS), model(IDS))


@torch.inference_mode()
def test_matrices_in_place_of_parts_are_with_their_blocks():
    one = with_maps("Llama-3.1-8B")
    with second_device():
        two = spread(one.model)
        torch.testing.assert_close(two.standalone(one.full)(IDS), one.standalone(one.full)(IDS))


def test_what_is_not_brought_along_fails(tiny_gpt):
    """The second device of these tests is one: without the hooks nothing runs."""
    with second_device():
        model = spread(tiny_gpt).model
        for block in model.transformer.h:
            block._forward_pre_hooks.clear()
        with pytest.raises(MixedDevices):
            model(IDS)


@pytest.mark.slow
def test_repair_is_the_same_on_two_devices(checkpoint_dir):
    one = load_supernet(checkpoint_dir)
    tokens = torch.randint(0, 90, (24, 33))
    with second_device():
        two = loaded(checkpoint_dir)
        for sub in (resized(one.full, n_embd=32), resized(one.full, intermediate_size=40)):
            expected, found = repair(one, sub, tokens), repair(two, sub, tokens)
            assert found.after == pytest.approx(expected.after, rel=1e-4)
            assert found.patch.names() == expected.patch.names()
            alone = one.standalone(sub, expected.patch)(IDS)
            torch.testing.assert_close(
                two.standalone(sub, found.patch)(IDS), alone, rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("basis", first_of([Basis.auto, Basis.permutation]))
def test_scores_and_orders_are_the_same_on_two_devices(checkpoint_dir, basis):
    one = load_supernet(checkpoint_dir)
    tokens = torch.randint(0, 90, (32, 33))
    options = MeasureOptions(basis=basis, norm_factors=NormFactors.auto, layer_blocks=4)
    expected = measure(one.model, tokens, options)
    with second_device():
        two = loaded(checkpoint_dir)
        found = measure(two.model, tokens, options)
        for name, score in expected.scores.to_dict().items():
            torch.testing.assert_close(found.scores.to_dict()[name], score, rtol=1e-3, atol=1e-5)
        settled = settle(two, tokens, found.scores, options)
    wanted = settle(one, tokens, expected.scores, options)
    assert settled.layer_order == wanted.layer_order
    assert settled.layer_losses == pytest.approx(wanted.layer_losses, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"linear": True}, {"head_size": "50%"}], ids=str)
def test_candidates_are_the_same_on_two_devices(checkpoint_dir, tmp_path, more):
    options = replace(OPTIONS, grid=replace(OPTIONS.grid, **more))
    checkpoint, one = open_checkpoint(checkpoint_dir), load_supernet(checkpoint_dir)
    expected = Builder(one, checkpoint, TOKENS, options).run(tmp_path, about={})
    other = tmp_path / "two"
    other.mkdir()
    with second_device():
        two = loaded(checkpoint_dir)
        found = Builder(two, checkpoint, TOKENS, options).run(other, about={})
        for ours, theirs in zip(found.candidates, expected.candidates, strict=True):
            assert [c.loss for c in ours] == pytest.approx([c.loss for c in theirs], abs=1e-4)
        sub = found.subnetwork((1,) * 6)
        around = {
            part: [ones[-1].sizes] for part, ones in zip(found.parts, found.candidates, strict=True)
        }
        base, losses = losses_around(two, sub, around, TOKENS[:4], patch_of=found.block_patch)
    wanted, others = losses_around(one, sub, around, TOKENS[:4], patch_of=expected.block_patch)
    assert base == pytest.approx(wanted, rel=1e-3)
    assert losses == pytest.approx(others, rel=1e-3)


def test_names_of_devices():
    assert devices_of("cuda:0,cpu") == devices_of(" cuda:0, cpu") == (torch.device("cuda", 0), CPU)
    assert devices_of(CPU) == devices_of("cpu") == (CPU,)
    assert devices_of(1) == (torch.device("cuda", 1),)


def test_without_a_device_a_model_stays_where_it_is(checkpoint_dir):
    supernet = load_supernet(checkpoint_dir, device=None, dtype=torch.bfloat16)
    assert {(p.device, p.dtype) for p in supernet.model.parameters()} == {(CPU, torch.bfloat16)}
    with torch.device("meta"):
        model = GPT(tiny_config("Llama-3.1-8B"))
    assert place(model, None).lm_head.weight.device == torch.device("meta")
    assert home_of(model.transformer.h[0]) is None


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.inference_mode()
def test_two_gpus_give_what_one_gives(checkpoint_dir):
    one = load_supernet(checkpoint_dir, device="cuda:0")
    two = load_supernet(checkpoint_dir, device="cuda:0,cuda:1")
    used = {p.device.index for p in two.model.parameters()}
    assert used == {0, 1}
    ids = IDS.to("cuda:0")
    for sub in (one.full, resized(one.full, n_embd=32, n_head=4)):
        for make in (SuperNetwork.standalone, SuperNetwork.subnet):
            torch.testing.assert_close(make(two, sub)(ids), make(one, sub)(ids))
        assert decode_latency(two.standalone(sub), batch=2, context=8).median_ms > 0
    assert repair(two, sub, torch.randint(0, 90, (24, 33))).after < 10
