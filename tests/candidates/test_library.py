"""Libraries of candidates, against models that are assembled without them."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT

from tests.conftest import fill_random, tiny_config
from whittle_nas.calibration.steps import steps
from whittle_nas.candidates import build
from whittle_nas.candidates.build import Builder, BuildOptions
from whittle_nas.candidates.costs import analytic
from whittle_nas.candidates.fitting import Text, low_rank, run_equations, run_whole, slice_equations
from whittle_nas.candidates.library import (
    Library,
    layer_file,
    open_library,
    read_layer,
    write_library,
)
from whittle_nas.candidates.options import PartLoss, PartTraining
from whittle_nas.candidates.parts import ATTENTION, MLP, GridOptions, Part, grid, label
from whittle_nas.candidates.scoring import alone, block_of, losses_around
from whittle_nas.candidates.spread import Work, make_layers
from whittle_nas.candidates.training import square_head
from whittle_nas.errors import ConfigError
from whittle_nas.repair.options import RepairOptions
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.checkpoint import Checkpoint, load_supernet, open_checkpoint
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.patch import LowRank, Patch, flat
from whittle_nas.weights.supernet import SuperNetwork

TOKENS = torch.randint(0, 96, (16, 25), generator=torch.Generator().manual_seed(1))
GRID = GridOptions(heads="50%,0", neurons="50%,0")
OPTIONS = BuildOptions(GRID, rank=4, score_blocks=4, repair=RepairOptions(0.25, batch_size=2))
SCORED = TOKENS[12:]


@torch.no_grad()
def loss_of(model, tokens=SCORED):
    logits = model(tokens[:, :-1])
    return float(F.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten()))


@pytest.fixture
def made(monkeypatch, tmp_path):
    """A library of a random model of a family; no file of its weights is needed."""
    monkeypatch.setattr(build, "fingerprint", lambda _: "a checkpoint")

    def make(
        family: str, options: BuildOptions = OPTIONS, tokens=TOKENS, **changes
    ) -> tuple[SuperNetwork, Library]:
        out = Path(tempfile.mkdtemp(dir=tmp_path))
        net = SuperNetwork(fill_random(GPT(tiny_config(family, **changes))).eval())
        where = Checkpoint(Path("nowhere"), net.config, SupernetInfo.default(net.config))
        return net, Builder(net, where, tokens, options).run(out, about={})

    return make


def _slow(family: str):
    return pytest.param(family, marks=pytest.mark.slow)


@pytest.mark.parametrize("family", ["SmolLM2-135M", "pythia-160m", "Gemma-2-2b", "falcon-7b"])
def test_scores_are_those_of_models_with_one_part_replaced(family, made):
    net, library = made(family)
    base = loss_of(net.model)
    assert library.about["made"]["loss"] == pytest.approx(base, rel=1e-5)
    original = library.original
    for at, choices in enumerate(library.candidates):
        for j, one in enumerate(choices):
            sub = library.subnetwork((*original[:at], j, *original[at + 1 :]))
            found = loss_of(net.standalone(sub, library.patch(sub))) - base
            assert one.loss == pytest.approx(found, abs=2e-5), (library.parts[at], one.sizes)
    assert [choices[0].error for choices in library.candidates] == [0.0] * 6
    assert [choices[-1].error for choices in library.candidates] == [1.0] * 6


@pytest.mark.parametrize("family", ["Llama-3.1-8B", _slow("Gemma-3-1b-it"), _slow("pythia-160m")])
def test_smaller_heads_rotate_as_in_the_network_that_has_them(family, made):
    net, library = made(family, replace(OPTIONS, grid=replace(GRID, head_size="50%")))
    base = loss_of(net.model)
    part = library.parts.index(Part(1, ATTENTION))
    half = net.config.head_size // 2
    (j,) = [j for j, one in enumerate(library.candidates[part]) if one.sizes[2:3] == (half,)]
    sub = library.subnetwork((*library.original[:part], j, *library.original[part + 1 :]))
    assert sub.blocks[1].head_size == half
    found = loss_of(net.standalone(sub, library.patch(sub))) - base
    assert library.candidates[part][j].loss == pytest.approx(found, abs=2e-5)


def test_fitted_parts_are_nearer_to_the_whole_ones_than_slices(made):
    net, library = made("SmolLM2-135M")
    part = library.parts.index(Part(1, MLP))
    solution = tuple(int(at == part) for at in range(6))
    sub = library.subnetwork(solution)
    kept: dict[str, torch.Tensor] = {}

    def output(model) -> torch.Tensor:
        hooks = [
            model.transformer.h[1].mlp.register_forward_hook(
                lambda _m, _i, out: kept.update(out=out)
            ),
            model.transformer.h[2].norm_1.register_forward_pre_hook(
                lambda _m, given: kept.update(stream=given[0])
            ),
        ]
        with torch.no_grad():
            model(SCORED[:, :-1])
        for hook in hooks:
            hook.remove()
        return kept["out"].double()

    whole = output(net.model)
    root = kept["stream"].double().square().mean(-1, keepdim=True).sqrt()  # the next norm's
    whole, fitted = whole / root, output(net.standalone(sub, library.patch(sub))) / root
    sliced = output(net.standalone(sub)) / root
    assert (fitted - whole).square().sum() < (sliced - whole).square().sum()
    error = (fitted - whole).square().sum() / whole.square().sum()
    assert library.candidates[part][1].error == pytest.approx(float(error), rel=1e-3)


LINEAR_GRID = replace(OPTIONS, grid=replace(GRID, linear=True))


@pytest.mark.parametrize(
    "family", ["SmolLM2-135M", *(_slow(f) for f in ("pythia-160m", "Gemma-2-2b", "falcon-7b"))]
)
def test_linear_maps_are_least_squares_and_scored_as_models(family, made):
    options = replace(LINEAR_GRID, repair=RepairOptions(0.25, ridges=(1e-6,), batch_size=2))
    tokens = torch.randint(0, 96, (64, 25), generator=torch.Generator().manual_seed(2))
    net, library = made(family, options, tokens=tokens)
    seen: dict[str, torch.Tensor] = {}
    block = net.model.transformer.h[1]
    for name in ("attn", "mlp"):
        getattr(block, name).register_forward_pre_hook(lambda _m, i, n=name: seen.update({n: i[0]}))
        proj = getattr(block, name).proj
        proj.register_forward_hook(lambda _m, _i, out, n=name: seen.update({f"{n} gives": out}))
    if not net.config.parallel_residual:
        block.norm_2.register_forward_pre_hook(lambda _m, i: seen.update({"attn stream": i[0]}))
    block.register_forward_hook(lambda _m, _i, out: seen.update({"mlp stream": out}))
    with torch.no_grad():
        net.model(tokens[:48, :-1])
    if net.config.parallel_residual:
        seen["attn stream"] = seen["mlp stream"]
    original, scored = library.original, tokens[48:52]
    base = library.about["made"]["loss"]
    for name in ("attn", "mlp"):
        at = library.parts.index(Part(1, name))
        labels = [label(one.sizes) for one in library.candidates[at]]
        assert labels[-2:] == ["linear", "none"]
        j = len(labels) - 2
        sub = library.subnetwork((*original[:at], j, *original[at + 1 :]))
        patch = library.patch(sub)
        found = torch.cat(
            [
                patch.replaced[f"transformer.h.1.{name}.map.{kind}"].reshape(48, -1)
                for kind in ("weight", "bias")[: 1 + net.config.bias]
            ],
            1,
        )
        read, gives = seen[name].flatten(0, 1), seen[f"{name} gives"].flatten(0, 1)
        one = torch.ones(len(read), 1)
        read = torch.cat([read, one], 1) if net.config.bias else read
        normed = seen[f"{name} {'gives' if net.config.post_mlp_norm else 'stream'}"].flatten(0, 1)
        root = (normed.double().square().mean(-1, keepdim=True) + net.config.norm_eps).sqrt()
        read, gives = read.double() / root, gives.double() / root
        # A LayerNorm's outputs and a constant are not independent: what they give is compared.
        wanted = read @ torch.linalg.lstsq(read, gives, driver="gelsd").solution
        off = (read @ found.double().mT - wanted).square().sum() / wanted.square().sum()
        assert off < (1e-3 if net.config.bias else 1e-8)
        loss = loss_of(net.standalone(sub, patch), scored)
        assert library.candidates[at][j].loss == pytest.approx(loss - base, abs=2e-5)
        assert library.solution(sub)[at] == j


@pytest.mark.slow
def test_linear_maps_can_be_trained(made):
    options = replace(LINEAR_GRID, repair=RepairOptions(0.25, batch_size=2))
    trained = replace(options, train=PartTraining(steps=20, lr=1e-2))
    errors = []
    for given in (options, trained):
        _, library = made("SmolLM2-135M", given)
        at = library.parts.index(Part(1, MLP))
        errors.append(library.candidates[at][2].error)
        assert library.candidates[at][2].sizes == (0, "linear")
    assert errors[1] <= errors[0] < 1


@pytest.mark.slow
def test_compressed_parts_are_scored_counted_and_kept_dense(made):
    given = GridOptions(heads="", neurons="", compressed="2:4,8bit,4bit")
    sizes = {"n_embd": 64, "intermediate_size": 96}
    net, library = made("SmolLM2-135M", replace(OPTIONS, grid=given), **sizes)
    original, base = library.original, library.about["made"]["loss"]
    costs = analytic(library, net.config, batch=1, tokens=8, dtype=torch.bfloat16)
    saved_bytes = {"2:4": 1.0, "8bit": 1.0, "4bit": 1.5}
    for at, part in enumerate(library.parts):
        weights = net.model.transformer.h[part.layer].get_submodule(part.kind).parameters()
        count = sum(weight.numel() for weight in weights)
        assert [label(one.sizes).split()[-1] for one in library.candidates[at][1:]] == [
            "8bit", "4bit", "2:4",
        ]  # fmt: skip
        eight, four, half = (one.error for one in library.candidates[at][1:])
        assert eight < four < half
        for j, one in list(enumerate(library.candidates[at]))[1:]:
            sub = library.subnetwork((*original[:at], j, *original[at + 1 :]))
            patch = library.patch(sub)
            loss = loss_of(net.standalone(sub, patch)) - base
            assert one.loss == pytest.approx(loss, abs=2e-5)
            assert costs["memory_bytes"][at][j] == -saved_bytes[one.sizes[-1]] * count
            assert costs["num_params"][at][j] == costs["flops"][at][j] == 0
            assert sum(t.numel() for t in patch.replaced.values()) == count
            for weight in patch.replaced.values():
                kept = (weight.reshape(-1, 4) != 0).sum(1)
                assert one.sizes[-1] != "2:4" or bool((kept == 2).all())
    sub = library.subnetwork((1, 2, 3, 0, 0, 1))
    assert net.plan(sub).is_uniform
    assert library.solution(SubNetwork.from_dict(sub.to_dict(), range(3))) == (1, 2, 3, 0, 0, 1)
    with pytest.raises(ConfigError, match="layer 0 has a 8bit attn, which only a library"):
        net.standalone(sub)


@pytest.mark.parametrize(
    ("form", "width", "sentence"),
    [("8bit", 172, "8bit needs .* multiple of 32, .* some of 172"), ("2:4", 74, "2:4 .* of 4, ")],
)
def test_compressed_parts_that_no_engine_could_store_are_refused(form, width, sentence, made):
    given = replace(OPTIONS, grid=GridOptions(heads="", neurons="", compressed=form))
    with pytest.raises(ConfigError, match=f"--grid.compressed: {sentence}"):
        made("SmolLM2-135M", given, n_embd=64, intermediate_size=width)


@pytest.mark.parametrize("options", [GRID, GridOptions("50%", "", "50%", True, "8bit")])
def test_parts_that_give_nothing_have_candidates_without_errors(options, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "fingerprint", lambda _: "a checkpoint")
    config = tiny_config("SmolLM2-135M", n_embd=64, intermediate_size=96)
    model = fill_random(GPT(config)).eval()
    for name, weight in model.transformer.h[1].named_parameters():
        if name.startswith(("attn.", "mlp.")):
            weight.data.zero_()
    net = SuperNetwork(model)
    where = Checkpoint(Path("nowhere"), config, SupernetInfo.default(config))
    asked = replace(OPTIONS, grid=options, train=PartTraining(steps=1))
    library = Builder(net, where, TOKENS, asked).run(tmp_path, about={})
    for part, choices in zip(library.parts, library.candidates, strict=True):
        if part.layer == 1:
            assert {one.error for one in choices if label(one.sizes) != "none"} == {0.0}
            assert all(one.loss == pytest.approx(0, abs=1e-6) for one in choices)


@pytest.mark.slow
def test_losses_around_a_network_are_those_of_its_neighbours(made):
    net, library = made("SmolLM2-135M")
    centre = (1, 0, 2, 1, 0, 2)  # layer 1 without attention, layer 2 without MLP
    parts = {part: [one.sizes for one in library.candidates[at]]
             for at, part in enumerate(library.parts)}  # fmt: skip
    base, losses = losses_around(
        net, library.subnetwork(centre), parts, SCORED, patch_of=library.block_patch, batch_size=3
    )
    assert base == pytest.approx(loss_of(net.standalone(*_network(library, centre))), rel=1e-5)
    for at, part in enumerate(library.parts):
        for j, one in enumerate(library.candidates[at]):
            sub, patch = _network(library, (*centre[:at], j, *centre[at + 1 :]))
            expected = loss_of(net.standalone(sub, patch))
            assert losses[part, one.sizes] == pytest.approx(expected, rel=1e-5)


def _network(library, solution):
    sub = library.subnetwork(solution)
    assert library.solution(sub) == solution
    return sub, library.patch(sub)


def test_a_low_rank_change_is_the_best_of_its_rank_on_the_tokens():
    a = torch.randn(200, 12, dtype=torch.float64)
    step = torch.randn(7, 12, dtype=torch.float64)
    found = low_rank(step, a.mT @ a, 3)
    assert isinstance(found, LowRank)
    assert (found.up.shape, found.down.shape) == ((7, 3), (3, 12))
    wanted = a @ step.mT
    u, s, v = torch.linalg.svd(wanted, full_matrices=False)  # Eckart and Young, on the outputs
    torch.testing.assert_close(a @ (found.up @ found.down).mT, (u[:, :3] * s[:3]) @ v[:3])
    assert low_rank(step, a.mT @ a, 5) is step  # would save nothing


def test_a_killed_library_goes_on_without_doing_a_layer_twice(
    checkpoint_dir, tmp_path, monkeypatch
):
    checkpoint, net = open_checkpoint(checkpoint_dir), load_supernet(checkpoint_dir)
    done: list[int] = []
    fit = Builder._layer

    def stopping(self, layer):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(layer)
        return fit(self, layer)

    def make(name, step=fit):
        monkeypatch.setattr(Builder, "_layer", step)
        (tmp_path / name).mkdir(exist_ok=True)
        library = Builder(net, checkpoint, TOKENS, OPTIONS).run(tmp_path / name, about={})
        write_library(library, {})
        return library

    with pytest.raises(KeyboardInterrupt):
        make("killed", stopping)
    with pytest.raises(ConfigError, match="is not finished"):
        open_library(tmp_path / "killed", checkpoint)
    before = [layer_file(tmp_path / "killed", layer).read_bytes() for layer in done]
    done.pop()
    make("killed", stopping)
    assert done == [0, 2]
    assert before == [layer_file(tmp_path / "killed", layer).read_bytes() for layer in (0, 1)]
    killed, whole = make("killed"), make("whole")
    assert killed.candidates == whole.candidates
    sub = whole.subnetwork((1,) * 6)
    for name, change in whole.patch(sub).added.items():
        assert torch.equal(change.up, killed.patch(sub).added[name].up)
    other = replace(OPTIONS, rank=5)
    with pytest.raises(ConfigError, match="another rank"):
        Builder(net, checkpoint, TOKENS, other).run(tmp_path / "killed", about={})


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_layers_made_by_several_processes_are_those_of_one(checkpoint_dir, tmp_path):
    pytest.importorskip("ray")
    checkpoint, net = open_checkpoint(checkpoint_dir), load_supernet(checkpoint_dir)
    options = replace(OPTIONS, train=PartTraining(steps=2))
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    expected = Builder(net, checkpoint, TOKENS, options).run(one, about={})
    there = layer_file(two, 1)
    there.write_bytes(layer_file(one, 1).read_bytes())
    told: list[int] = []
    work = Work(checkpoint_dir, two, TOKENS, options, (torch.device("cpu"),))
    make_layers(work, checkpoint.config.n_layer, workers=2, on_resume=told.append)
    assert told == [1]
    found = Builder(net, checkpoint, TOKENS, options).run(two, about={})
    for made, known in zip(found.candidates, expected.candidates, strict=True):
        assert [one.sizes for one in made] == [one.sizes for one in known]
        assert [one.loss for one in made] == pytest.approx([one.loss for one in known], abs=1e-5)
    sub = expected.subnetwork((1,) * 6)
    for name, change in expected.patch(sub).added.items():
        other = found.patch(sub).added[name]
        assert torch.allclose(other.up @ other.down, change.up @ change.down, atol=1e-5), name
    there.unlink()
    with pytest.raises(ConfigError, match="another rank"):
        make_layers(replace(work, options=replace(options, rank=5)), 3, workers=1)


def test_a_layer_behind_the_text_is_made_as_in_order(checkpoint_dir, tmp_path):
    """As by a worker that takes over from one that died."""
    checkpoint, net = open_checkpoint(checkpoint_dir), load_supernet(checkpoint_dir)
    in_order, back = tmp_path / "in_order", tmp_path / "back"
    in_order.mkdir()
    back.mkdir()
    Builder(net, checkpoint, TOKENS, OPTIONS).run(in_order, about={})
    builder = Builder(net, checkpoint, TOKENS, OPTIONS)
    for layer in (2, 0, 1):
        builder.make(back, layer)
        known, found = read_layer(in_order, layer), read_layer(back, layer)
        assert found[:2] == known[:2]
        for part, patch in known[2].items():
            tensors, others = flat(patch), flat(found[2][part])
            assert tensors.keys() == others.keys()
            assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_sizes_are_whole_groups_and_aligned():
    config = tiny_config("SmolLM2-135M", intermediate_size=192, n_head=9, n_query_groups=3)
    found = grid(config, GridOptions())
    assert found == {
        ATTENTION: ((9, 3, 8), (6, 2, 8), (3, 1, 8), (0, 0, 0)),
        MLP: ((192,), (128,), (64,), (0,)),
    }
    one_group = tiny_config("falcon-7b")
    assert grid(one_group, GridOptions(head_size="4"))[ATTENTION] == (
        (6, 1, 8), (6, 1, 4), (5, 1, 8), (3, 1, 8), (2, 1, 8), (0, 0, 0),
    )  # fmt: skip
    for wrong in ("150%", "7.5", "some"):
        with pytest.raises(ConfigError, match=rf"--grid.neurons: '{wrong}'"):
            grid(config, GridOptions(neurons=wrong))
    with pytest.raises(ConfigError, match="head_size=6"):
        grid(config, GridOptions(head_size="6"))


def test_a_library_knows_its_checkpoint_and_its_candidates(checkpoint_dir, tmp_path):
    checkpoint, net = open_checkpoint(checkpoint_dir), load_supernet(checkpoint_dir)
    library = Builder(net, checkpoint, TOKENS, OPTIONS).run(tmp_path, about={})
    write_library(library, {})
    found = open_library(tmp_path, checkpoint)
    assert found.candidates == library.candidates
    whole = SubNetwork.from_config(checkpoint.config)
    assert not found.patch(whole)
    block = whole.blocks[0]
    assert block is not None
    odd = SubNetwork(whole.n_embd, (block._replace(intermediate_size=8), *whole.blocks[1:]))
    with pytest.raises(ConfigError, match="no candidate 8 for mlp of layer 0"):
        found.patch(odd)
    spec = json.loads((tmp_path / "library.json").read_text())
    (tmp_path / "library.json").write_text(json.dumps({**spec, "checkpoint": "another"}))
    with pytest.raises(ConfigError, match="belongs to another checkpoint"):
        open_library(tmp_path, checkpoint)
    (tmp_path / "library.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no library of nas candidates"):
        open_library(tmp_path, checkpoint)


@pytest.mark.parametrize("family", ["pythia-160m", "Llama-3.1-8B"])
def test_sums_of_the_whole_part_give_those_of_every_slice(family):
    net = SuperNetwork(fill_random(GPT(tiny_config(family))).eval())
    states = [net.model.transformer.wte(ids) for ids in TOKENS[:, :-1].split(4)]
    text = Text(states, fitted=3)
    whole = net.full.blocks[1]
    smaller = whole._replace(n_head=whole.n_head // 2, n_query_groups=2, intermediate_size=40)
    narrow = block_of(net, 1, smaller, Patch())
    with torch.no_grad():
        for step in steps(net.model.transformer.h[1]):
            goals, _ = run_whole(net.model, 1, step, text)
            for kind in step.names():
                plan = net.plan(alone(net, 1, smaller))
                kept = plan.indices(f"transformer.h.0.{kind}.proj.weight")[1]
                own = next(s for s in steps(narrow) if kind in s.names())
                found = slice_equations(step, kind, goals[kind], kept)
                run = run_equations(net.model, 1, own, kind, text=text, goal=goals[kind])
                for one, other in zip(found, run, strict=True):
                    for name in ("gram", "cross", "power"):
                        torch.testing.assert_close(
                            getattr(one, name), getattr(other, name), atol=1e-3, rtol=1e-4
                        )


def test_square_head_is_its_formula():
    a, b = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    wanted = F.mse_loss(b, a) / F.mse_loss(torch.zeros_like(a), a)
    torch.testing.assert_close(square_head(b, a), wanted)


@pytest.mark.parametrize(
    ("loss", "rank", "own"),
    [
        (PartLoss.square_head, 4, 2),
        (PartLoss.square_head, 4, None),
        (PartLoss.l1, 4, 2),
        (PartLoss.l2, None, 2),
        (PartLoss.l2, None, None),
    ],
)
def test_trained_parts_are_nearer_than_fitted_ones(loss, rank, own, made):
    training = PartTraining(steps=30, loss=loss, lr=1e-2 if own else 1e-3, rank=own)
    fitted, trained = (
        made("SmolLM2-135M", replace(OPTIONS, rank=rank, train=t), n_layer=1)[1].candidates
        for t in (PartTraining(), training)
    )
    errors = [(a[1].error, b[1].error) for a, b in zip(fitted, trained, strict=True)]
    assert all(after < before for before, after in errors), errors
    assert [[one.steps for one in choices] for choices in trained] == [[0, 30, 0]] * 2
