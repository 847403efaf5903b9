"""The frozen teacher: the checkpoint as it came in, in memory once."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import lightning as L
import litgpt
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn import functional as F

from tests.conftest import resized, uniform
from tests.train.conftest import CONFIG
from whittle_nas.cli.training_report import Memory
from whittle_nas.data import TextData
from whittle_nas.errors import ConfigError
from whittle_nas.space import SubNetwork
from whittle_nas.train import lora
from whittle_nas.train.batches import collate, from_blocks, from_labelled
from whittle_nas.train.choices import SandwichOptions, Strategy, ValidationOptions
from whittle_nas.train.fit import num_steps
from whittle_nas.train.forward import labelled_hidden
from whittle_nas.train.memory import choose_adapters, estimate_memory
from whittle_nas.train.options import (
    Distillation,
    HiddenLoss,
    LoraOptions,
    LossOptions,
    OptimizerOptions,
    TrainerOptions,
    Weights,
)
from whittle_nas.train.prepare import TrainedTensors, load_trainable
from whittle_nas.train.run import Networks, TrainingOptions, train
from whittle_nas.train.specialise import repaired, slice_of, specialise, text_of, whole_teacher
from whittle_nas.train.teacher import Teacher, frozen, lesson_of, make_teacher, open_teacher
from whittle_nas.weights.axes import num_params
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint, write_checkpoint
from whittle_nas.weights.patch import Patch

OPTIONS = TrainerOptions(accelerator="cpu", enable_progress_bar=False, max_steps=4)


@pytest.fixture
def checkpoint(tmp_path):
    return saved(tmp_path / "checkpoint", CONFIG)


def saved(path, config, dtype=torch.float32):
    torch.manual_seed(3)
    path.mkdir()
    config = litgpt.Config(**config)
    tensors = litgpt.GPT(config).to(dtype).state_dict()
    write_checkpoint(path, tensors, config=config, source=path)
    return open_checkpoint(path)


def samples():
    torch.manual_seed(4)
    return from_blocks(torch.randint(31, (12, 9)))


def trained(checkpoint, **options):
    torch.manual_seed(5)
    arguments = {"trainer": OPTIONS, "optimizer": OptimizerOptions(lr=0.05), "batch_size": 3}
    full = SubNetwork.from_config(checkpoint.config)
    small = resized(full, n_layer=1)
    return train(
        TrainingOptions(**{**arguments, **options}),
        checkpoint,
        lambda _supernet, _trainer: Networks(small, Networks.only(small).sampler, {"full": full}),
        samples=samples(),
        valid=samples()[:3],
        out_dir=None,
        teacher=options.pop("teacher", None),
    )


def test_adapters_off_is_a_second_copy_bit_for_bit(checkpoint):
    """Also after training has moved the adapters, and without a byte of memory."""
    student = trained(checkpoint, lora=LoraOptions(r=4, dropout=0.1)).supernet
    batch, loss = collate(samples()[:3]), LossOptions()
    teacher = make_teacher(loss, student, checkpoint)
    copy = frozen(checkpoint, like=checkpoint.config)
    expected = labelled_hidden(copy, copy.full, batch)
    found = labelled_hidden(teacher.model, teacher.model.full, batch)
    assert torch.equal(found, expected)
    assert torch.equal(teacher.model.head(teacher.model.full)(found), copy.head(copy.full)(found))
    assert not torch.equal(labelled_hidden(student, student.full, batch), expected)
    own = {p.data_ptr() for p in student.model.parameters()}
    assert {p.data_ptr() for p in teacher.model.model.parameters()} <= own


def test_a_training_with_adapters_off_is_one_with_a_second_copy(checkpoint):
    lora_options = LoraOptions(r=4, dropout=0.0)
    shared = trained(checkpoint, lora=lora_options)
    torch.manual_seed(5)
    full = SubNetwork.from_config(checkpoint.config)
    small = resized(full, n_layer=1)
    copied = train(
        TrainingOptions(
            lora=lora_options, trainer=OPTIONS, optimizer=OptimizerOptions(lr=0.05), batch_size=3
        ),
        checkpoint,
        lambda _supernet, _trainer: Networks(small, Networks.only(small).sampler, {"full": full}),
        samples=samples(),
        valid=samples()[:3],
        out_dir=None,
        teacher=Teacher(frozen(checkpoint, like=checkpoint.config)),
    )
    ours, theirs = (t.supernet.model.state_dict() for t in (shared, copied))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_all_weights_learn_from_the_checkpoint_as_it_came_in(checkpoint):
    result = trained(checkpoint, lora=None)
    original = load_supernet(checkpoint.path)
    (teacher,) = result.module._teacher
    for name, tensor in original.model.state_dict().items():
        assert torch.equal(teacher.model.model.state_dict()[name], tensor)
    moved = result.supernet.model.state_dict()["lm_head.weight"]
    assert not torch.equal(moved, original.model.lm_head.weight)


def test_another_checkpoint_teaches(checkpoint, tmp_path):
    larger = saved(tmp_path / "larger", {**CONFIG, "n_embd": 48, "n_layer": 4})
    student = load_trainable(checkpoint, LoraOptions(r=2))
    loss = LossOptions(teacher=str(larger.path))
    teacher = make_teacher(loss, student, checkpoint)
    assert teacher.model.config.n_embd == 48
    lesson_of(teacher, collate(samples()[:2]), loss)
    with pytest.raises(ConfigError, match="n_layer 4 and the student 3"):
        make_teacher(
            LossOptions(teacher=str(larger.path), hidden=HiddenLoss.cosine), student, checkpoint
        )
    other = saved(tmp_path / "other", {**CONFIG, "padded_vocab_size": 40})
    with pytest.raises(ConfigError, match="padded_vocab_size is 40"):
        make_teacher(LossOptions(teacher=str(other.path)), student, checkpoint)
    wide = saved(tmp_path / "wide", {**CONFIG, "n_embd": 48})
    with pytest.raises(ConfigError, match="n_embd 48 and the student"):
        open_teacher(LossOptions(teacher=str(wide.path), hidden=HiddenLoss.cosine), checkpoint)


def altered(path, start, change):
    """The checkpoint with other weights."""
    path.mkdir()
    tensors = {name: change(name, tensor) for name, tensor in start.state_dict().items()}
    write_checkpoint(path, tensors, config=start.config, source=start.path)
    return open_checkpoint(path)


def along_the_stream(change):
    """Changes the residual stream of CONFIG's models by what is done to its channels, exactly."""
    reads = ("attn.qkv.weight", "fc_1.weight", "fc_2.weight", "wte.weight", "lm_head.weight")
    writes = ("attn.proj.weight", "mlp.proj.weight")

    def changed(name, tensor):
        if name.endswith(writes):
            return change(tensor.T).T.contiguous()
        return change(tensor).contiguous() if name.endswith(reads) else tensor

    return changed


def test_hidden_states_are_compared_in_one_basis(checkpoint, tmp_path):
    """Outputs that are the same say nothing about what single channels hold."""
    order, rotation = torch.randperm(24), torch.linalg.qr(torch.randn(24, 24)).Q
    full = SubNetwork.from_config(checkpoint.config)
    part = slice_of(checkpoint, resized(full, intermediate_size=20))
    folder = tmp_path / "part"
    folder.mkdir()
    write_checkpoint(folder, part.tensors, config=part.config, source=checkpoint.path)
    tokens = torch.randint(31, (2, 9))
    expected = load_supernet(checkpoint.path).standalone(full)(tokens)
    changes = {
        "sorted": along_the_stream(lambda tensor: tensor[:, order]),
        "rotated": along_the_stream(lambda tensor: tensor @ rotation),
    }
    others = {name: altered(tmp_path / name, checkpoint, f) for name, f in changes.items()}
    for other in others.values():
        logits = load_supernet(other.path).standalone(full)(tokens)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    others["unrelated"] = altered(
        tmp_path / "unrelated", checkpoint, lambda _, tensor: torch.randn_like(tensor)
    )
    trained = altered(
        tmp_path / "trained",
        checkpoint,
        lambda _, tensor: tensor + 0.1 * tensor.std(correction=0) * torch.randn_like(tensor),
    )

    def teacher_of(student, teacher, hidden=HiddenLoss.square_head):
        return open_teacher(LossOptions(teacher=str(teacher.path), hidden=hidden), student)

    for other in others.values():
        with pytest.raises(ConfigError, match=f"channels of {other.path} are not in the order"):
            teacher_of(checkpoint, other)
        with pytest.raises(ConfigError, match=f"channels of {checkpoint.path} are not in the"):
            teacher_of(other, checkpoint)
        assert teacher_of(checkpoint, other, HiddenLoss.none).path == other.path
    for student in (checkpoint, trained, open_checkpoint(folder)):  # cut from it, or trained on
        assert teacher_of(student, checkpoint).path == checkpoint.path


def test_a_teacher_has_the_same_tokens(checkpoint, tmp_path):
    """A chat model has more of them than its base; another family numbers them in another way."""
    teacher = saved(tmp_path / "teacher", CONFIG)
    loss = LossOptions(teacher=str(teacher.path))

    def write(path: Path, tokens: str) -> None:
        Tokenizer(WordLevel({token: at for at, token in enumerate(tokens)}, "a")).save(str(path))

    write(checkpoint.path / "tokenizer.json", "abcd")
    assert open_teacher(loss, checkpoint).path == teacher.path  # it has none: not known
    write(teacher.path / "tokenizer.json", "abcdefg")
    assert open_teacher(loss, checkpoint).path == teacher.path
    for tokens in ("abdc", "zyxw"):
        write(teacher.path / "tokenizer.json", tokens)
        with pytest.raises(ConfigError, match="gives other numbers to the tokens"):
            open_teacher(loss, checkpoint)


class Gradients(L.Callback):
    """Keeps those of the last step."""

    found: ClassVar[dict[str, torch.Tensor]] = {}

    def on_before_optimizer_step(self, _trainer, pl_module, _optimizer):
        named = pl_module.network.named_parameters()
        self.found.update({name: p.grad.clone() for name, p in named})


def plain(config, tensors, tokens):
    """litgpt's own model, its logits (B, T, V) and what its blocks put out, (B, T, D) each."""
    model, outputs = litgpt.GPT(config), []
    model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
    for block in model.transformer.h:
        block.register_forward_hook(lambda *found: outputs.append(found[-1]))
    return model, model(tokens), outputs


def square_head(student, teacher):
    """methods.md: MSE(a, b) / MSE(a, 0), a the teacher's; token by token, and their mean."""
    pairs = zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True)
    losses = [F.mse_loss(b, a) / F.mse_loss(torch.zeros_like(a), a) for b, a in pairs]
    return sum(losses) / len(losses)


def taught_gradients(start, original, blocks, *, layers, hidden_weight):
    """Of .3 CE + KL + SquareHead, whose blocks are compared with the teacher's `layers`."""
    tokens, labels = blocks[:, :-1], blocks[:, 1:].flatten()
    with torch.no_grad():
        _, teacher, theirs = plain(original.config, original.state_dict(), tokens)
    model, logits, ours = plain(start.config, start.tensors, tokens)
    p, log_q = teacher.softmax(-1), logits.log_softmax(-1)
    loss = 0.3 * F.cross_entropy(logits.flatten(0, 1), labels)
    loss = loss + (p * (p.log() - log_q)).sum(-1).mean()
    pairs = zip(ours, layers, strict=True)
    each = [square_head(out, theirs[at][..., : out.shape[-1]]) for out, at in pairs]
    (loss + hidden_weight * sum(each) / len(each)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("sub", "layers", "others"),
    [
        (uniform(20, 4, 2, 8, 33, 2, order=(1, 2, 0)), (1, 2), (0, 1)),
        (uniform(24, 4, 2, 8, 40, 2, order=(0, 2, 1)), (0, 2), (0, 1)),
    ],
    ids=["narrow", "shallow"],
)
def test_a_specialised_slice_compares_its_blocks_with_those_it_was_cut_from(
    checkpoint, sub, layers, others
):
    """The gradients are those of plain litgpt models; of other pairs they would be others."""
    start = slice_of(checkpoint, sub)
    assert start.layers == layers
    before = open_checkpoint(checkpoint.path).state_dict()
    expected, other = (
        taught_gradients(
            start,
            checkpoint,
            torch.stack([torch.cat([s.input_ids, s.labels[-1:]]) for s in samples()]),
            layers=pairs,
            hidden_weight=0.7,
        )
        for pairs in (layers, others)
    )
    Gradients.found.clear()
    step = {"max_steps": 1, "gradient_clip_val": None}
    options = TrainingOptions(
        loss=LossOptions(hidden=HiddenLoss.square_head, hidden_weight=0.7),
        trainer=replace(OPTIONS, **step, callbacks=[{"class_path": f"{__name__}.Gradients"}]),
        lora=None, optimizer=OptimizerOptions(lr=0.01), batch_size=len(samples()),
    )  # fmt: skip
    result = specialise(
        options, start, samples=samples(), valid=samples()[:3],
        teacher=whole_teacher(options, checkpoint),
    )  # fmt: skip
    assert result.supernet.config.n_layer == 2
    assert Gradients.found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(Gradients.found[name], gradient, atol=1e-6, rtol=1e-5)
    name = "transformer.h.1.mlp.proj.weight"
    assert (expected[name] - other[name]).norm() > 0.01 * expected[name].norm()
    after = open_checkpoint(checkpoint.path).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_repaired_start_is_what_is_trained(checkpoint):
    start = slice_of(checkpoint, SubNetwork.from_config(checkpoint.config))
    name = "transformer.ln_f.weight"
    patch = Patch(replaced={name: torch.full((24,), 0.5)})
    options = TrainingOptions(lora=None, trainer=OPTIONS, optimizer=OptimizerOptions(lr=1e-9),
                              batch_size=3)  # fmt: skip
    texts = {"samples": samples(), "valid": samples()[:3], "teacher": None}
    changed = specialise(options, repaired(start, patch), **texts)
    trained_norm = changed.supernet.model.state_dict()[name]
    torch.testing.assert_close(trained_norm, patch.replaced[name])
    assert changed.history[0] != specialise(options, start, **texts).history[0]
    assert torch.equal(start.tensors[name], torch.ones(24))


@pytest.mark.parametrize("adapters", [None, LoraOptions(r=2)])
def test_zeros_of_parts_with_2_of_4_weights_stay(checkpoint, adapters):
    full = SubNetwork.from_config(checkpoint.config)
    first, *others = full.blocks
    sub = SubNetwork(full.n_embd, (first._replace(mlp="2:4"), *others))
    stored, prefix = checkpoint.state_dict(), "transformer.h.0.mlp."
    names = [n for n in stored if n.startswith(prefix) and stored[n].ndim == 2]
    mask = torch.tensor([True, False, False, True])
    replaced = {n: (stored[n].unflatten(1, (-1, 4)) * mask).flatten(1) for n in names}
    start = slice_of(checkpoint, sub, Patch(replaced=replaced))
    options = TrainingOptions(
        lora=adapters, trainer=OPTIONS, optimizer=OptimizerOptions(lr=0.01), batch_size=3
    )
    texts = {"samples": samples(), "valid": samples()[:3], "teacher": None}
    trained = TrainedTensors(specialise(options, start, **texts).supernet, start.tensors)
    for name in names:
        assert not torch.equal(trained[name], replaced[name])
        assert torch.equal(trained[name] != 0, replaced[name] != 0)


def test_repair_reads_the_training_text_again():
    blocks = torch.randint(31, (12, 9))
    assert torch.equal(text_of(from_blocks(blocks)), blocks)
    masked = from_labelled(torch.arange(6), torch.tensor([-100, -100, 3, 4, 5, 6]))
    with pytest.raises(ConfigError, match="nas export --repair"):
        text_of([masked, *from_blocks(blocks)])


def test_frozen_float16_weights_are_converted_once(tmp_path):
    checkpoint = saved(tmp_path / "half", CONFIG, torch.float16)
    model = load_trainable(checkpoint, LoraOptions(r=2), precision="bf16-mixed").model
    formats = {name: p.dtype for name, p in model.named_parameters()}
    assert {t for n, t in formats.items() if lora.is_adapter(n)} == {torch.float32}
    assert {t for n, t in formats.items() if not lora.is_adapter(n)} == {torch.bfloat16}


def test_memory_counts_stored_formats_and_teachers():
    config = litgpt.Config(**CONFIG)

    def estimate(options=LoraOptions(r=2), precision="bf16-mixed", **more):  # noqa: B008
        stored, apart = more.pop("stored", torch.bfloat16), more.pop("apart", False)
        return estimate_memory(
            config, options, batch=2, tokens=16, precision=precision, loss=LossOptions(**more),
            stored=stored, apart=apart,
        )  # fmt: skip

    half, single = estimate(), estimate(stored=torch.float32)
    assert single.weights == 2 * half.weights
    assert half.teacher == 0  # the same weights, adapters off
    assert (
        estimate(apart=True).teacher == half.weights
    )  # a sub-network is taught by the whole model
    assert estimate(None).teacher == half.weights  # a frozen copy
    assert estimate(None, teacher="in_place").teacher == 0
    plain = estimate(distillation=Distillation.none)
    tokens, vocabulary = 2 * 16, CONFIG["padded_vocab_size"]
    chunk = tokens * vocabulary * 4 * 3
    assert half.logits - plain.logits == chunk + tokens * vocabulary * 2
    assert estimate(teacher_top_k=4).logits - plain.logits == chunk + tokens * (4 * 12 + 4)


def test_memory_counts_what_keeps_zeros():
    config = litgpt.Config(**CONFIG)

    def estimate(options, **more):
        how = {"batch": 2, "tokens": 16, "precision": "bf16-mixed", "loss": LossOptions()}
        return estimate_memory(config, options, **how, **more)

    assert estimate(None, keep_zeros=True).masks == num_params(config)  # a byte for each
    assert estimate(None).masks == 0
    options = LoraOptions(r=2, head=False, embedding=False)
    plain, kept = estimate(options), estimate(options, keep_zeros=True)
    assert kept.masks == 0
    # A layer's update stays for the backward pass as a matrix.
    matrices = sum(
        tensor.numel()
        for name, tensor in litgpt.GPT(config).state_dict().items()
        if tensor.ndim == 2 and ".h." in name
    )
    assert kept.activations - plain.activations > 2 * matrices


@pytest.mark.slow
def test_memory_is_that_of_the_file(checkpoint):
    """Under bf16-mixed, frozen weights stay as they are stored, here in float32."""
    memory = Memory.of(checkpoint.path, checkpoint.config, TextData(files="x", block_size=8))
    options = TrainingOptions(trainer=TrainerOptions(precision="bf16-mixed"))
    assert memory.needed(options).weights == 4 * num_params(checkpoint.config)


def test_sandwich_options_do_not_matter_to_one_network():
    options = TrainingOptions(
        sandwich=SandwichOptions(num_random=7), validation=ValidationOptions(max_full_loss=2.0)
    )
    assert options.alone().sandwich.strategy.value == "standard"
    assert options.alone().validation.max_full_loss is None  # that is about the whole model
    assert options.alone().alone().validation.max_full_loss is None
    whole = replace(options, sandwich=SandwichOptions(strategy=Strategy.standard))
    assert whole.alone().validation.max_full_loss == 2.0


def test_small_models_are_trained_whole_and_large_ones_through_adapters():
    small, large = litgpt.Config(**CONFIG), litgpt.Config.from_name("pythia-160m")
    plain, other = LoraOptions(), LoraOptions(r=4)

    def chosen(config, options=plain, weights=Weights.auto, needed=1):
        return choose_adapters(options, weights, lambda: needed, 4, config)

    assert chosen(small) is None
    assert chosen(large) == plain
    assert chosen(small, needed=3) == plain  # more than half of the memory
    assert chosen(small, other) == other
    assert chosen(small, weights=Weights.adapters) == plain
    assert chosen(large, weights=Weights.all) is None
    assert chosen(large, None) is None


def test_learning_rate_follows_from_the_size():
    def rate(num_params, full=True):
        return OptimizerOptions().resolved(full=full, num_params=num_params).lr

    assert rate(3_000_000) == pytest.approx(3e-5)
    assert rate(300_000_000) == 2e-5  # the papers'
    assert rate(1_000) == 1e-3
    assert rate(3_000_000, full=False) == 2e-4
    assert OptimizerOptions(lr=0.5).resolved(full=True, num_params=10**9).lr == 0.5


def test_steps_follow_from_the_data():
    def steps(num_samples, **options):
        return num_steps(
            TrainerOptions(**options), num_samples=num_samples, batch_size=8, world_size=1
        )

    assert steps(160) == 80  # four passes
    assert steps(400) == 100  # two
    assert steps(4000) == 500  # one
    assert steps(10**6) == 2000
    assert steps(160, max_epochs=1) == 20
    assert steps(160, max_steps=7) == 7
