"""A step's gradients against stand-alone models, chunking, packing, and which networks run."""

import litgpt
import litgpt.lora
import pytest
import torch
from torch.nn import functional as F

from tests.conftest import first_of, uniform
from tests.train.conftest import CONFIG, MIDDLE, SMALL, Waits
from whittle_nas.space.samplers import GridSampler
from whittle_nas.train import losses
from whittle_nas.train.batches import IGNORE, Sample, collate, from_blocks, pack
from whittle_nas.train.choices import SandwichOptions, Strategy
from whittle_nas.train.forward import labels_of
from whittle_nas.train.options import Distillation, HiddenLoss, LossOptions, Weighting
from whittle_nas.train.step import (
    Network,
    Role,
    accumulate,
    finish_gradients,
    loss_sums,
    networks_of_step,
)
from whittle_nas.train.teacher import Teacher
from whittle_nas.weights.slicing import take
from whittle_nas.weights.supernet import SuperNetwork

CHUNK = 5 * 32  # five tokens of a vocabulary of 32


HIDDEN = {
    HiddenLoss.square_head: lambda b, a: ((b - a) ** 2).mean(-1) / (a**2).mean(-1),
    HiddenLoss.cosine: lambda b, a: 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)),
}


def taught(logits, teacher, options):
    """The loss of logits; with top-k a plain KL over the k most likely tokens and the rest."""
    if options.teacher_top_k is None:
        return losses.distillation(logits, teacher, options)
    order = teacher.argsort(-1, descending=True)
    p, q = (each.softmax(-1).gather(-1, order) for each in (teacher, logits))
    k = options.teacher_top_k
    p, q = (torch.cat([x[:, :k], x[:, k:].sum(-1, keepdim=True)], -1) for x in (p, q))
    return (p * (p / q).log()).sum(-1)


def gradients(supernet):
    named = supernet.model.named_parameters()
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    supernet.model.zero_grad(set_to_none=True)
    return found


def reference(supernet, batch, networks, options, frozen=None):
    """Plain stand-alone litgpt models, plain losses over whole tables of logits.

    `frozen` are the logits (B, T, V) of a teacher that teaches the full network too, and the
    outputs of its blocks.
    """
    total = {
        n: torch.zeros_like(p) for n, p in supernet.model.named_parameters() if p.requires_grad
    }
    keep = batch.labels != IGNORE
    sums, teacher = [], None if frozen is None else frozen[0][keep]
    for network in networks:
        face = supernet.at_rank(network.rank)
        plan = face.plan(network.sub)
        alone = type(supernet.model)(plan.config).train()
        alone.load_state_dict({n: t.clone() for n, t in face.slices(network.sub).items()})
        blocks = []
        for block in alone.transformer.h:
            block.register_forward_hook(lambda *found, into=blocks: into.append(found[-1]))
        logits = alone(batch.input_ids)[keep]
        ce = F.cross_entropy(logits, batch.labels[keep], reduction="sum")
        kd, loss = torch.zeros(()), ce
        if network.sub == supernet.full and frozen is None:
            teacher = logits.detach()
        elif options.distillation is not Distillation.none:
            kd = taught(logits, teacher, options).sum()
            balanced = options.weighting is Weighting.balanced and network.sub != supernet.full
            scale = (ce / kd).detach() if balanced else 1.0
            ce_weight = 0.3 if frozen and options.weighting is Weighting.fixed else 1.0
            loss = ce_weight * ce + options.kd_weight * scale * kd
        if frozen and options.hidden is not HiddenLoss.none:
            pairs = [
                (out[keep], frozen[1][layer][keep][:, : network.sub.n_embd])
                for out, layer in zip(blocks, plan.layers, strict=True)
            ]
            errors = [HIDDEN[options.hidden](b, a) for b, a in pairs]
            loss = loss + options.hidden_weight * sum(e.sum() for e in errors) / len(errors)
        (network.weight * loss).backward()
        sums.append([float(ce.detach()), float(kd.detach())])
        for name, parameter in alone.named_parameters():
            source = plan.source_name(name)
            if source in total:
                full = supernet.model.get_parameter(source)
                (back,) = torch.autograd.grad(
                    take(full, plan.cut(name)), full, grad_outputs=parameter.grad
                )
                total[source] += back
    return total, torch.tensor(sums)


def another_model(batch):
    """A frozen teacher, and what plain litgpt makes of it: logits and outputs of the blocks."""
    torch.manual_seed(5)
    model = litgpt.GPT(litgpt.Config(**CONFIG)).requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    blocks = []
    handles = [
        block.register_forward_hook(lambda *found: blocks.append(found[-1]))
        for block in model.transformer.h
    ]
    logits = model(batch.input_ids)
    for handle in handles:
        handle.remove()
    return Teacher(SuperNetwork(model.eval()), layers=(0, 1, 2)), (logits, blocks)


@pytest.mark.parametrize(
    "options",
    [
        LossOptions(Distillation.none, teacher="in_place", chunk_elements=CHUNK),
        LossOptions(teacher="in_place", kd_weight=0.5, temperature=1.3, chunk_elements=CHUNK),
        LossOptions(
            Distillation.cosine, Weighting.balanced, teacher="in_place", chunk_elements=CHUNK
        ),
        LossOptions(chunk_elements=CHUNK),
        LossOptions(Distillation.cosine, Weighting.balanced, chunk_elements=CHUNK),
        LossOptions(hidden=HiddenLoss.square_head, hidden_weight=0.3, chunk_elements=CHUNK),
        LossOptions(hidden=HiddenLoss.cosine, hidden_weight=0.3, chunk_elements=CHUNK),
        LossOptions(teacher_top_k=5, chunk_elements=CHUNK),
    ],
    ids=[
        "labels",
        "in_place",
        "in_place_balanced",
        "frozen",
        "frozen_balanced",
        "square_head",
        "hidden_cosine",
        "top_k",
    ],  # fmt: skip
)
@pytest.mark.parametrize("checkpoint_blocks", first_of([False, True]))
def test_gradients_are_the_sum_over_stand_alone_models(supernet, batch, options, checkpoint_blocks):
    elastic = isinstance(supernet.model, litgpt.lora.GPT)  # of rank 4
    networks = [
        Network(supernet.full, Role.full, 0.5),
        Network(MIDDLE, Role.sampled, rank=3 if elastic else None),
        Network(SMALL, Role.smallest, rank=1 if elastic else None),
    ]
    frozen, teacher = None, None
    if options.teacher == "original":
        teacher, frozen = another_model(batch)
    expected, expected_sums = reference(supernet, batch, networks, options, frozen)
    sums = accumulate(
        supernet, batch, networks, options, teacher=teacher, checkpoint_blocks=checkpoint_blocks
    )
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-5)
    count = len(labels_of(batch))
    norm = finish_gradients([p for p in supernet.model.parameters() if p.requires_grad], count)
    found = gradients(supernet)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient / count, rtol=1e-5, atol=1e-5)
    squares = sum((gradient / count).pow(2).sum() for gradient in expected.values())
    torch.testing.assert_close(norm, squares.sqrt(), rtol=1e-5, atol=0)


def test_teacher_without_its_own_turn(supernet, batch):
    """Strategy `random`: the full network only teaches."""
    options = LossOptions(teacher="in_place", chunk_elements=CHUNK)
    accumulate(supernet, batch, [Network(supernet.full, Role.full, 0.0),
                                 Network(SMALL, Role.sampled)], options)  # fmt: skip
    expected = gradients(supernet)
    accumulate(supernet, batch, [Network(SMALL, Role.sampled)], options)
    for name, gradient in gradients(supernet).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)


def test_packing_changes_neither_loss_nor_gradients(supernet):
    torch.manual_seed(2)
    samples = []
    for length, prompt in [(9, 3), (4, 1), (6, 0), (3, 2), (7, 4)]:
        labels = torch.randint(31, (length,))
        labels[:prompt] = IGNORE
        samples.append(Sample(torch.randint(31, (length,)), labels))
    rows = pack(samples, 16)
    assert len(rows) < len(samples)
    networks = [Network(supernet.full, Role.full), Network(SMALL, Role.smallest)]
    padded_sums = accumulate(supernet, collate(samples), networks, LossOptions())
    padded = gradients(supernet)
    packed_sums = accumulate(supernet, collate(rows), networks, LossOptions())
    torch.testing.assert_close(packed_sums, padded_sums, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(supernet).items():
        torch.testing.assert_close(gradient, padded[name], rtol=1e-5, atol=1e-5)


def test_batch_without_labels_gives_zero_gradients(supernet, batch):
    empty = Sample(batch.input_ids, torch.full_like(batch.labels, IGNORE))
    sums = accumulate(supernet, empty, [Network(SMALL, Role.sampled)], LossOptions())
    assert sums.tolist() == [[0.0, 0.0]]
    parameters = [p for p in supernet.model.parameters() if p.requires_grad]
    assert float(finish_gradients(parameters, 0)) == 0.0


def test_a_process_without_labels_takes_part_in_every_collective(supernet, batch):
    """Else the others of a distributed run wait for it for ever."""
    options = LossOptions(Distillation.cosine, Weighting.balanced, teacher="in_place")
    networks = [Network(supernet.full, Role.full), Network(SMALL, Role.smallest)]
    empty = Sample(batch.input_ids, torch.full_like(batch.labels, IGNORE))
    calls = []

    def total(sums):
        calls.append(len(sums))
        return sums

    accumulate(supernet, batch, networks, options, total=total)
    with_labels = list(calls)
    calls.clear()
    accumulate(supernet, empty, networks, options, total=total)
    assert calls == with_labels != []


def test_loss_sums_are_litgpts_losses(supernet, batch):
    keep = batch.labels != IGNORE
    expected = [
        F.cross_entropy(
            supernet.standalone(sub)(batch.input_ids)[keep], batch.labels[keep], reduction="sum"
        )
        for sub in (SMALL, supernet.full)
    ]
    found = loss_sums(supernet, batch, [SMALL, supernet.full], chunk_elements=CHUNK)
    torch.testing.assert_close(found, torch.stack(expected).detach(), rtol=1e-5, atol=1e-5)


FULL = uniform(24, 4, 2, 8, 40, 3)
MEMBERS = tuple(uniform(24, 4, 2, 8, width, 3) for width in range(20, 40))


def drawn(step, ranks=(), **options):
    return networks_of_step(
        step,
        ranks=ranks,
        full=FULL,
        smallest=SMALL,
        sampler=GridSampler(MEMBERS),
        options=SandwichOptions(**options),
        total_steps=1000,
        seed=3,
    )


class TestNetworksOfStep:
    def test_sandwich(self):
        networks = drawn(0, num_random=2, full_share=1.0, smallest_share=1.0)
        roles = [network.role for network in networks]
        assert roles == [Role.full, Role.sampled, Role.sampled, Role.smallest]
        assert networks[-1].sub == SMALL

    def test_extremes_take_part_in_their_share_of_the_steps(self):
        steps = [drawn(step, full_share=0.25, smallest_share=0.5) for step in range(400)]
        assert {len(networks) for networks in steps} == {4}
        roles = [network.role for networks in steps for network in networks]
        assert 70 < roles.count(Role.full) < 130  # the mean is 100, the standard deviation 9
        assert 160 < roles.count(Role.smallest) < 240
        assert all(networks[0].role is Role.full for networks in steps if FULL in
                   [n.sub for n in networks if n.role is Role.full])  # fmt: skip

    def test_published_code(self):
        published = {"num_random": 3, "train_smallest": False, "mean": True}
        networks = drawn(0, **published, full_weight=1.0, full_share=1.0)
        assert [network.weight for network in networks] == [0.25] * 4
        assert [network.role for network in networks][1:] == [Role.sampled] * 3

    def test_every_step_draws_anew_and_again_the_same(self):
        steps = [tuple(n.sub for n in drawn(step)) for step in range(40)]
        assert steps == [tuple(n.sub for n in drawn(step)) for step in range(40)]
        assert len(set(steps)) > 30

    def test_random_and_standard(self):
        for step in range(10):
            assert [n.role for n in drawn(step, strategy=Strategy.random)] == [Role.sampled]
            assert [n.sub for n in drawn(step, strategy=Strategy.standard)] == [FULL]

    def test_random_linear_rises(self):
        networks = [drawn(step, strategy=Strategy.random_linear)[0] for step in range(1000)]
        sampled = [network.role is Role.sampled for network in networks]
        early, late = sum(sampled[:200]), sum(sampled[800:])
        assert early < 40  # the mean is 20, the standard deviation 4
        assert late > 160


class TestRanksOfStep:
    def test_a_sandwich_has_both_ends_of_the_ranks(self):
        both = {"full_share": 1.0, "smallest_share": 1.0}
        steps = [drawn(step, ranks=(2, 3, 4), **both) for step in range(40)]
        for networks in steps:
            assert (networks[0].rank, networks[-1].rank) == (4, 2)
        assert {n.rank for networks in steps for n in networks[1:-1]} == {2, 3, 4}
        subs = [[n.sub for n in networks] for networks in steps]
        assert subs == [[n.sub for n in drawn(step, **both)] for step in range(40)]

    def test_one_network_alone_meets_every_rank(self):
        steps = [drawn(s, ranks=(2, 3), strategy=Strategy.standard) for s in range(20)]
        assert {network.rank for (network,) in steps} == {2, 3}


def test_weights_of_the_step_reach_the_gradient(supernet, batch):
    single = [Network(MIDDLE, Role.sampled)]
    accumulate(supernet, batch, single, LossOptions())
    once = gradients(supernet)
    accumulate(supernet, batch, [Network(MIDDLE, Role.sampled, 0.25)], LossOptions())
    for name, gradient in gradients(supernet).items():
        torch.testing.assert_close(gradient, 0.25 * once[name])


def test_a_long_random_training_does_not_keep_every_shape(supernet, monkeypatch):
    monkeypatch.setattr("whittle_nas.weights.supernet.MAX_SKELETONS", 5)
    for width in range(1, 8):
        supernet.subnet(uniform(24, 4, 2, 8, width, 1), hidden=True)
        assert len(supernet._skeletons) == min(2 * width, 5)  # with and without a head


MIXES = {
    **{kind.value: LossOptions(kind) for kind in Distillation},
    **{
        f"balanced_{kind.value}": LossOptions(kind, Weighting.balanced)
        for kind in Distillation
        if kind is not Distillation.none
    },
    "in_place": LossOptions(teacher="in_place"),
    "in_place_balanced": LossOptions(weighting=Weighting.balanced, teacher="in_place"),
    "warm": LossOptions(temperature=1.3),
    "warm_balanced": LossOptions(weighting=Weighting.balanced, temperature=1.3),
    "top_k": LossOptions(teacher_top_k=5),
    "top_k_balanced": LossOptions(weighting=Weighting.balanced, teacher_top_k=5),
    "square_head": LossOptions(hidden=HiddenLoss.square_head),
    "hidden_cosine": LossOptions(hidden=HiddenLoss.cosine),
}
every_mix = pytest.mark.parametrize("options", MIXES.values(), ids=MIXES)


def seen_step(options, device, *, packed=False):
    """A step of networks that ran before, as a function to call, on batches as training has them.

    The step before it was of another batch, since what a batch needs must not be remembered.
    """
    torch.manual_seed(6)
    student, model = (SuperNetwork(litgpt.GPT(litgpt.Config(**CONFIG)).to(device)) for _ in "12")
    frozen = Teacher(SuperNetwork(model.model.requires_grad_(False).eval()), layers=(0, 1, 2))
    teacher = frozen if options.has_frozen_teacher else None
    tokens = torch.randint(31, (2, 3, 9))
    batches = [from_blocks(each) for each in tokens]
    batches = [collate(pack(rows, 16) if packed else rows).to(device) for rows in batches]
    roles = {student.full: Role.full, MIDDLE: Role.sampled, SMALL: Role.smallest}
    networks = [Network(sub, role) for sub, role in roles.items()]
    accumulate(student, batches[0], networks, options, teacher=teacher)
    return lambda: accumulate(student, batches[1], networks, options, teacher=teacher)


@every_mix
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_networks_that_were_seen_ask_for_no_value(options, packed):
    step = seen_step(options, torch.device("cpu"), packed=packed)
    with Waits() as waits:
        step()
    assert waits.found == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_mix
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_networks_that_were_seen_make_no_gpu_wait(options, packed):
    """A step only queues its work: CUDA refuses whatever would wait for a result."""
    step = seen_step(options, torch.device("cuda"), packed=packed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
