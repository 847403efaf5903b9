"""What `nas prune` writes, against slow references written from the papers' formulas.

The references know rows of whole models that hooks have seen, and nothing of the program's own
passes, statistics, masks or slices.
"""

import copy
from dataclasses import replace

import pytest
import torch
from litgpt import GPT, Config

from tests.cli.test_main import nas
from tests.cli.test_prune import TEXT, report
from tests.conftest import bundled_checkpoint, fill_random, first_of, tiny_config
from tests.prune.test_linears import brain_surgeon
from tests.prune.test_width import head_sets, silenced
from whittle_nas.data import Part, TextData, load_blocks
from whittle_nas.prune.structure import Structure
from whittle_nas.space.front import read_front
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint, write_checkpoint

_MHA = {"n_head": 4, "n_query_groups": 4, "head_size": 8}
KINDS = {
    "gqa": ("Llama-3.1-8B", {"n_head": 6, "n_query_groups": 3, "head_size": 8}),
    "mha": ("Llama-2-7b-hf", _MHA),
    "biases": ("phi-2", {**_MHA, "rotary_percentage": 1.0}),
}
BLOCKS = {"--data.num_blocks": 14, "--data.block_size": 24}
DATA = [word for pair in BLOCKS.items() for word in pair]


@pytest.fixture(scope="module", params=first_of(KINDS))
def case(request, tmp_path_factory):
    """A folder with a tiny checkpoint, its model, and the calibration text (N, T + 1)."""
    family, sizes = KINDS[request.param]
    folder, source = tmp_path_factory.mktemp(request.param), bundled_checkpoint()
    vocabulary = Config.from_file(source / "model_config.yaml").padded_vocab_size
    more = {"n_embd": 32, "intermediate_size": 40, "n_layer": 3, "block_size": 24}
    ends = {"vocab_size": vocabulary, "padded_vocab_size": vocabulary}
    model = fill_random(GPT(tiny_config(family, **sizes, **more, **ends))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # large means make Hessians that float32 hardly knows
                parameter *= 0.2
        for block in model.transformer.h:  # queries, keys and values are matrices of their own
            for rows, factor in zip(qkv_rows(model.config), (0.5, 2, 1), strict=True):
                block.attn.qkv.weight[rows] *= factor
    (folder / "in").mkdir()
    write_checkpoint(folder / "in", model.state_dict(), config=model.config, source=source)
    (folder / "text.txt").write_text(TEXT)
    options = {name.removeprefix("--data."): value for name, value in BLOCKS.items()}
    data = TextData(files=folder / "text.txt", **options)
    tokens = load_blocks(data, folder / "in", config=model.config, part=Part.TRAIN).tokens
    return folder, model.requires_grad_(False), tokens


def pruned(case, out, *options):
    """State dict of what the command writes."""
    there = ("--checkpoint_dir", case[0] / "in", "--out_dir", out, "--overwrite", "true")
    text = ("--data.files", case[0] / "text.txt", *DATA)
    assert nas("prune", *there, *text, *options) == 0
    return open_checkpoint(out).state_dict()


def qkv_rows(config):
    ends = [config.n_head * config.head_size]
    ends.append(ends[0] + config.n_query_groups * config.head_size)
    return [slice(0, ends[0]), slice(ends[0], ends[1]), slice(ends[1], None)]


def entering(model, ids):
    """What enters every linear layer of the blocks, as rows in float64, by its name."""
    seen, hooks = {}, []
    for name, module in model.transformer.h.named_modules():
        if isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_pre_hook(
                lambda _, x, name=name: seen.update({name: x[0].flatten(0, 1).double()})
            ))  # fmt: skip
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def by_matrix(case, change, *, sequential=True):
    """Every matrix changed on what enters it, layer by layer: (state dict, errors)."""
    _, model, tokens = case
    twin, errors = copy.deepcopy(model), {}
    whole = entering(model, tokens[:, :-1])
    for layer, block in enumerate(twin.transformer.h):
        seen = entering(twin, tokens[:, :-1]) if sequential else whole
        for module, linear in block.named_modules():
            if not isinstance(linear, torch.nn.Linear):
                continue
            fused = module == "attn.qkv"
            names = ("attn.q", "attn.k", "attn.v") if fused else (module,)
            parts = qkv_rows(model.config) if fused else [slice(None)]
            for name, part in zip(names, parts, strict=True):
                old, rows = linear.weight[part].double(), seen[f"{layer}.{module}"]
                new = change(old, rows, f"transformer.h.{layer}.{module}.weight").float()
                linear.weight[part] = new
                unit = rows / rows.norm(dim=1, keepdim=True)
                errors[f"transformer.h.{layer}.{name}"] = [
                    float(((old - new) @ x.T).square().sum() / (old @ x.T).square().sum())
                    for x in (rows, unit)
                ]
    return twin.state_dict(), errors


def smallest(scores, count):
    """Indices of so many of the smallest of a list."""
    return sorted(range(len(scores)), key=scores.__getitem__)[:count]


def loop_mask(scores, sparsity, *, per_row):
    """Where the scores (R, C) are too low, by loops."""
    gone = torch.zeros_like(scores, dtype=torch.bool)
    if sparsity == "2:4":
        for row in range(len(scores)):
            for first in range(0, scores.shape[1], 4):
                for at in smallest(scores[row, first : first + 4].tolist(), 2):
                    gone[row, first + at] = True
    elif per_row:
        for row in range(len(scores)):
            gone[row, smallest(scores[row].tolist(), int(0.6 * scores.shape[1]))] = True
    else:
        flat = smallest(scores.flatten().tolist(), int(0.6 * scores.numel()))
        gone.view(-1)[flat] = True
    return gone


def by_magnitude(sparsity):
    return lambda old, _x, _n: old.masked_fill(loop_mask(old.abs(), sparsity, per_row=False), 0)


def by_wanda(sparsity):
    def change(old, rows, _name):
        scores = old.abs() * rows.square().sum(0).sqrt()
        return old.masked_fill(loop_mask(scores, sparsity, per_row=True), 0)

    return change


def by_sparsegpt(sparsity):
    def change(old, rows, _name):
        width, gone = 4 if sparsity == "2:4" else old.shape[1], torch.zeros(old.shape).bool()

        def decide(weight, diagonal, j):
            if j % width == 0:
                ahead = slice(j, j + width)
                saliency = weight[:, ahead] ** 2 / diagonal[ahead]
                gone[:, ahead] = loop_mask(saliency, sparsity, per_row=False)
            return weight[:, j].masked_fill(gone[:, j], 0)

        return brain_surgeon(old, rows, decide)

    return change


MASKS = {"magnitude": by_magnitude, "wanda": by_wanda, "sparsegpt": by_sparsegpt}


def close(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("method", MASKS)
@pytest.mark.parametrize("sparsity", first_of(["0.6", "2:4"]))
def test_masks_are_those_of_the_papers(method, sparsity, case, tmp_path):
    found = pruned(case, tmp_path / "out", "--method", method, "--sparsity", sparsity)
    expected, errors = by_matrix(case, MASKS[method](sparsity))
    close(found, expected)
    for name, tensor in expected.items():
        if tensor.dim() == 2 and ".h." in name:
            assert torch.equal(found[name] == 0, tensor == 0), name
    reported = report(tmp_path / "out")["errors"]
    assert set(reported) == (set(errors) if method == "sparsegpt" else set())
    for name, error in reported.items():
        assert error["output_error"] == pytest.approx(errors[name][0], rel=1e-3)


@pytest.mark.slow
def test_the_whole_model_calibrates_blocks_where_that_is_asked_for(case, tmp_path):
    options = ("--method", "wanda", "--sparsity", "0.6", "--sequential", "false")
    found = pruned(case, tmp_path / "out", *options)
    close(found, by_matrix(case, by_wanda("0.6"), sequential=False)[0])


def group_grid(weights, bits, *, symmetric):
    """Scale and zero point of one group of a row, a number each."""
    top, low = max(0.0, *weights), min(0.0, *weights)
    if symmetric:
        top = max(top, -low)
        low = -top
    scale = (top - low) / (2**bits - 1) * (1 + 1e-6)
    scale = torch.tensor(scale, dtype=torch.float32).item()  # as it is stored
    return scale, 0 if symmetric else round(-(2 ** (bits - 1)) - low / scale)


def on_grid(weight, scale, zero, bits):
    level = round(weight / scale + zero)
    return scale * (max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, level)) - zero)


def by_rounding(bits, grids, *, symmetric):
    def change(old, _rows, name):
        new = old.clone()
        for row, weights in enumerate(old.tolist()):
            own = []
            for first in range(0, len(weights), 8):
                group = weights[first : first + 8]
                scale, zero = group_grid(group, bits, symmetric=symmetric)
                own.append((scale, zero))
                values = [on_grid(weight, scale, zero, bits) for weight in group]
                new[row, first : first + 8] = torch.tensor(values)
            grids.setdefault(name, []).append(own)
        return new

    return change


def by_gptq(bits, grids, *, symmetric):
    def change(old, rows, name):
        own = [[] for _ in old]

        def decide(weight, _diagonal, j):
            if j % 8 == 0:
                for row, group in enumerate(weight[:, j : j + 8].tolist()):
                    own[row].append(group_grid(group, bits, symmetric=symmetric))
            column = weight[:, j].tolist()
            pairs = zip(column, own, strict=True)
            return torch.tensor([on_grid(w, *g[-1], bits) for w, g in pairs]).double()

        unit = rows / rows.norm(dim=1, keepdim=True)  # every token counts alike
        new = brain_surgeon(old, unit, decide)
        grids.setdefault(name, []).extend(own)
        return new

    return change


@pytest.mark.parametrize("symmetric", first_of([False, True]), ids=["zero points", "symmetric"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_integers_are_those_of_the_papers(method, symmetric, case, tmp_path):
    from safetensors.torch import load_file

    options = ("--bits", 4, "--group_size", 8, "--symmetric", str(symmetric).lower())
    found = pruned(case, tmp_path / "out", "--method", method, *options)
    grids, by = {}, {"rtn": by_rounding, "gptq": by_gptq}[method]
    expected, errors = by_matrix(case, by(4, grids, symmetric=symmetric))
    close(found, expected)
    stored = load_file(tmp_path / "out" / "quantization.safetensors")
    for name, rows in grids.items():
        scales, zeros = torch.tensor(rows).unbind(-1)  # (R, N) each
        torch.testing.assert_close(stored[f"{name}.scales"], scales, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stored[f"{name}.zeros"], zeros)
    assert len(stored) == 2 * len(grids)
    reported = report(tmp_path / "out")["errors"]
    assert set(reported) == (set(errors) if method == "gptq" else set())
    for name, error in reported.items():  # of tokens of unit length, as they were calibrated
        assert error["output_error"] == pytest.approx(errors[name][1], rel=1e-3)


def flap_keeps(model, seen, share):
    """Groups and neurons that stay, by a list of all of them."""
    gated, units = hasattr(model.transformer.h[0].mlp, "fc_1"), []
    for layer, block in enumerate(model.transformer.h):
        for kind, linear in (("attn", block.attn.proj), ("mlp", block.mlp.proj)):
            x, weight = seen[f"{layer}.{kind}.proj"], linear.weight.double()
            raw = ((x - x.mean(0)) ** 2).mean(0) * (weight**2).sum(0)
            scores = ((raw - raw.mean()) / raw.std()).tolist()
            sets = [(cut, len(rows) + len(cut)) for rows, cut in head_sets(model.config)]
            if kind == "mlp":
                sets = [([neuron], 3 if gated else 2) for neuron in range(len(scores))]
            for unit, (columns, cost) in enumerate(sets):
                score = sum(scores[column] for column in columns) / len(columns)
                units.append((score, cost, layer, kind, unit))
    best = {(u[2], u[3]): u for u in sorted(units)}  # the highest of each stays, whatever it scores
    first = list(best.values())
    order = first + sorted((u for u in units if u not in first), reverse=True)
    target, spent, counts = (1 - share) * sum(u[1] for u in units), 0, []
    for count, unit in enumerate(order, start=1):
        spent += unit[1]
        counts.append((abs(spent - target), count))
    stay = order[: min(c for c in counts if c[1] >= len(first))[1]]
    return Structure(*(
        tuple(tuple(sorted(u[4] for u in stay if u[2:4] == (layer, kind)))
              for layer in range(len(model.transformer.h)))
        for kind in ("attn", "mlp")
    ))  # fmt: skip


def test_flap_writes_what_stays_and_biases_that_make_up_for_the_rest(case, tmp_path):
    _, model, tokens = case
    found = pruned(case, tmp_path / "out", "--method", "flap", "--sparsity", "0.4")
    seen = entering(model, tokens[:, :-1])
    kept = flap_keeps(model, seen, 0.4)
    assert len(set(map(len, kept.neurons))) > 1
    sets, biases = list(head_sets(model.config)), []
    for layer, block in enumerate(model.transformer.h):
        heads = [c for group, (_, columns) in enumerate(sets) for c in columns
                 if group in kept.groups[layer]]  # fmt: skip
        own = {}
        for name, stays in (("attn.proj", heads), ("mlp.proj", list(kept.neurons[layer]))):
            linear, means = block.get_submodule(name), seen[f"{layer}.{name}"].mean(0)
            gone = sorted({*range(len(means))} - {*stays})
            own[name] = (linear.weight.double()[:, gone] @ means[gone]).float()
            before = 0 if linear.bias is None else linear.bias
            stored = found[f"transformer.h.{layer}.{name}.bias"]
            torch.testing.assert_close(stored, own[name] + before, atol=1e-5, rtol=1e-5)
            weight = found[f"transformer.h.{layer}.{name}.weight"]
            torch.testing.assert_close(weight[:, : len(stays)], linear.weight[:, stays])
            assert not weight[:, len(stays) :].any()
        biases.append(own)
    with torch.no_grad():
        expected = silenced(model, kept, biases)(tokens[:, :-1])
    supernet = load_supernet(tmp_path / "out")
    torch.testing.assert_close(supernet.model(tokens[:, :-1]), expected, atol=1e-4, rtol=1e-4)
    (entry,) = read_front(tmp_path / "out" / "front.json", supernet.info.layer_order).entries
    alone = supernet.standalone(entry.subnetwork)
    torch.testing.assert_close(alone(tokens[:, :-1]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", first_of(["laco", "laco_notebook"]))
def test_laco_writes_the_merged_weights(method, case, tmp_path):
    options = ("--laco.threshold", -1, "--laco.merge_layers", 3, "--laco.lowest", 0)
    found = pruned(case, tmp_path / "out", "--method", method, "--sparsity", "0.7", *options)
    stored = case[1].state_dict()
    expected = {name: tensor for name, tensor in stored.items() if ".h." not in name}
    for name in stored:
        if name.startswith("transformer.h.0."):
            rest = name.removeprefix("transformer.h.0.")
            a, b, c = (stored[f"transformer.h.{layer}.{rest}"] for layer in range(3))
            expected[name] = c if method == "laco_notebook" else a + (b - a) + (c - a)
    close(found, expected)
    assert report(tmp_path / "out")["layers"] == [0]


def norm_means(parts):
    """(N, T, C) per batch: mean of |x| over tokens, norm over the batch, mean over batches."""
    scores = [(len(x), x.abs().mean(1).square().sum(0).sqrt()) for x in parts]
    return sum(count * score for count, score in scores) / sum(count for count, _ in scores)


def in_batches(model, tokens):
    """What leaves norms and what enters `mlp.proj`, (B, T, C) of every batch of 4, by name."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if name.endswith(("norm_1", "norm_2", "ln_f")):
            hooks.append(module.register_forward_hook(
                lambda _, _x, y, name=name: seen.setdefault(name, []).append(y.double())
            ))  # fmt: skip
        elif name.endswith("mlp.proj"):
            hooks.append(module.register_forward_pre_hook(
                lambda _, x, name=name: seen.setdefault(name, []).append(x[0].double())
            ))  # fmt: skip
    with torch.no_grad():
        for batch in tokens.split(4):
            model(batch)
    for hook in hooks:
        hook.remove()
    return seen


def narrowed(name, tensor, channels, neurons):
    """A parameter with so many channels, and neurons by layer; heads stay."""
    *_, layer, part, module, kind = ["", "", *name.split(".")]
    if part == "mlp":
        own = neurons[layer]
        tensor = tensor[own] if module != "proj" else tensor[:, own] if kind == "weight" else tensor
    if module not in ("proj", "norm_1", "norm_2", "ln_f"):  # what reads the channels
        return tensor[:, channels] if kind == "weight" else tensor
    return tensor[channels]


def test_minitron_keeps_what_has_the_largest_norms_in_one_shape(case, tmp_path):
    _, model, tokens = case
    sizes = ("--subnetwork.n_embd", 16, "--subnetwork.intermediate_size", 24)
    found = pruned(case, tmp_path / "out", "--method", "minitron", *sizes)
    seen = in_batches(model, tokens[:, :-1])
    scores = {name: norm_means(parts) for name, parts in seen.items()}
    norms = sum(score for name, score in scores.items() if not name.endswith("mlp.proj"))
    channels = norms.argsort(descending=True)[:16]
    neurons = {
        name.split(".")[2]: score.argsort(descending=True)[:24]
        for name, score in scores.items()
        if name.endswith("mlp.proj")
    }
    expected = {n: narrowed(n, t, channels, neurons) for n, t in model.state_dict().items()}
    inside = {name for name in expected if ".attn." in name}  # heads may have another order
    close(
        {name: tensor for name, tensor in found.items() if name not in inside},
        {name: tensor for name, tensor in expected.items() if name not in inside},
    )
    small = GPT(replace(model.config, n_embd=16, intermediate_size=24)).eval()
    small.load_state_dict(expected)
    after = load_supernet(tmp_path / "out").model
    with torch.no_grad():
        torch.testing.assert_close(
            after(tokens[:, :-1]), small(tokens[:, :-1]), atol=1e-4, rtol=1e-4
        )
