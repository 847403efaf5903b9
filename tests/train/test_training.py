"""Whole trainings of a tiny super-network on a real Trainer."""

import re
from dataclasses import replace

import lightning as L
import litgpt
import matplotlib.image
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.conftest import first_of
from tests.train.conftest import CONFIG, MIDDLE, SMALL, Waits
from whittle_nas.errors import ConfigError
from whittle_nas.plots import plot_training
from whittle_nas.space import SubNetwork, load_space
from whittle_nas.space.pareto import ParetoSampler
from whittle_nas.space.samplers import GridSampler
from whittle_nas.train import lora
from whittle_nas.train.batches import IGNORE, from_blocks, pack
from whittle_nas.train.choices import SamplerKind, SamplerOptions, SandwichOptions, Strategy
from whittle_nas.train.fit import fit, make_trainer, newest_checkpoint
from whittle_nas.train.module import SupernetTraining
from whittle_nas.train.options import (
    Distillation,
    LoraOptions,
    LossOptions,
    OptimizerOptions,
    TrainerOptions,
    Weighting,
)
from whittle_nas.train.output import read_curves, write_losses
from whittle_nas.train.recipe import Recipe, learning_rate, validation_interval
from whittle_nas.train.sampling import choose_networks
from whittle_nas.train.teacher import Teacher, without_adapters
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.supernet import SuperNetwork


def make_module(
    *, adapters=True, seed=1, frozen=False, pareto=False, dropout=0.2, **recipe
) -> SupernetTraining:
    torch.manual_seed(seed)
    config = litgpt.Config(**CONFIG)
    model = litgpt.GPT(config)
    if adapters:
        model = lora.GPT(lora.lora_config(config, LoraOptions(r=4, dropout=dropout)))
        lora.freeze_base(model)
    supernet = SuperNetwork(model.train(), SupernetInfo(layer_order=(1, 2, 0)))
    tokens = torch.randint(31, (40, 13))
    tokens[:, 1::2] = tokens[:, 0::2][:, :6]  # every second token repeats the one before
    blocks = from_blocks(tokens)
    arguments = {
        "sandwich": SandwichOptions(),
        "loss": LossOptions(Distillation.none),
        "optimizer": OptimizerOptions(lr=0.02, warmup_steps=2),
        "total_steps": 12,
        "batch_size": 4,
        "seed": seed,
        "log_every_n_steps": 1,
        "validate_every": 4,
        **recipe,
    }
    sampler = GridSampler((MIDDLE, SMALL, supernet.full))
    if pareto:
        space = load_space("aligned", config)
        sampler = ParetoSampler.start(space, parameter_counter(config), 4)
    teacher = Teacher(without_adapters(supernet, config)) if frozen else None
    return SupernetTraining(
        supernet,
        Recipe(**arguments),
        teacher=teacher,
        smallest=SMALL,
        sampler=sampler,
        train=blocks[:32],
        valid=blocks[32:],
        valid_networks={"small": SMALL, "full": supernet.full},
    )


OPTIONS = {"accelerator": "cpu", "enable_progress_bar": False}


def train(module, out_dir, *, resume=False, every=3, callbacks=(), **options):
    trainer = make_trainer(TrainerOptions(**OPTIONS, **options), out_dir)
    trainer.callbacks.extend(callbacks)
    start = newest_checkpoint(out_dir) if resume else None
    fit(trainer, module, out_dir, checkpoint_every=every, resume_from=start)
    return module


def weights(module):
    return {name: p.detach().clone() for name, p in module.network.named_parameters()}


class Killed(BaseException):
    pass


class KillAt(L.Callback):
    """Ends the process, as far as Lightning can see, in the middle of a step."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, *arguments):
        if arguments[-1] == self.batch:
            raise Killed


@pytest.mark.parametrize("adapters", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_training_lowers_the_loss_of_every_network(tmp_path, adapters):
    module = train(make_module(adapters=adapters, total_steps=40), tmp_path)
    before, after = module.history[0], module.history[40]
    for name in ("small", "full"):
        assert after[name] < 0.95 * before[name]
    frozen = {n for n, p in module.network.named_parameters() if not p.requires_grad}
    assert bool(frozen) == adapters


@pytest.mark.parametrize("strategy", first_of(Strategy))
@pytest.mark.parametrize("distillation", [Distillation.none, Distillation.cosine])
def test_every_strategy_runs(tmp_path, strategy, distillation):
    module = make_module(
        sandwich=SandwichOptions(strategy=strategy),
        loss=LossOptions(distillation=distillation),
        total_steps=4,
    )
    before = weights(module)
    train(module, tmp_path)
    changed = [n for n, p in weights(module).items() if not torch.equal(p, before[n])]
    assert changed
    assert all(lora.is_adapter(name) for name in changed)


def test_training_stops_where_the_whole_model_has_lost_more_than_allowed(tmp_path):
    harmful = {"optimizer": OptimizerOptions(lr=1.0, warmup_steps=0), "validate_every": 2}
    module = make_module(total_steps=20, max_full_loss=4.0, **harmful)
    train(module, tmp_path)
    assert module.global_step == 2
    assert "max_full_loss=4.0" in str(module.stopped)
    assert module.history[0]["full"] < 4.0 < module.history[2]["full"]
    with pytest.raises(ConfigError, match="below the untouched model's loss"):
        train(make_module(max_full_loss=1.0), tmp_path / "again")


def test_zeros_of_a_pruned_model_stay(tmp_path):
    module = make_module(adapters=False, total_steps=6, keep_zeros=True)
    matrices = [p for p in module.trained if p.ndim == 2]
    with torch.no_grad():
        for matrix in matrices:
            matrix[torch.rand_like(matrix) < 0.5] = 0.0
    before = [matrix.detach().clone() for matrix in matrices]
    train(module, tmp_path)
    for matrix, old in zip(matrices, before, strict=True):
        assert torch.equal(matrix == 0, old == 0)
        assert not torch.equal(matrix, old)


@pytest.mark.slow
def test_the_same_seed_is_the_same_curve(tmp_path):
    first = train(make_module(total_steps=6), tmp_path / "a")
    again = train(make_module(total_steps=6), tmp_path / "b")
    other = train(make_module(total_steps=6, seed=2), tmp_path / "c")
    assert read_curves(tmp_path / "a") == read_curves(tmp_path / "b")
    assert first.history == again.history != other.history


@pytest.mark.parametrize(
    ("killed_at", "accumulate"),
    [
        (8, 1),
        pytest.param(5, 2, marks=pytest.mark.slow),
        pytest.param(5, 1, marks=pytest.mark.slow),
        pytest.param(8, 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, killed_at, accumulate):
    recipe = {"accumulate": accumulate, "total_steps": 12 // accumulate, "validate_every": 2}
    recipe |= {"frozen": True, "loss": LossOptions(), "pareto": killed_at == 5, "score_every": 4}
    whole = train(make_module(**recipe), tmp_path / "whole", every=2)
    out_dir = tmp_path / "parts"
    with pytest.raises(Killed):
        train(make_module(**recipe), out_dir, every=2, callbacks=[KillAt(killed_at)])
    resumed = train(make_module(**recipe), out_dir, every=2, resume=True)
    for name, parameter in weights(whole).items():
        assert torch.equal(parameter, weights(resumed)[name]), name
    assert resumed.history == whole.history
    assert read_curves(out_dir) == read_curves(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    module = train(make_module(total_steps=4, validate_every=2), tmp_path, every=2)
    again = train(make_module(total_steps=4, validate_every=2), tmp_path, every=2, resume=True)
    for name, parameter in weights(module).items():
        assert torch.equal(parameter, weights(again)[name])
    assert again.history == module.history


def test_two_micro_batches_are_one_batch(tmp_path):
    """Also where they have different numbers of labels."""
    modules = {}
    for accumulate in (1, 2):
        module = make_module(
            accumulate=accumulate, batch_size=8 // accumulate, total_steps=3, adapters=False
        )
        for number, sample in enumerate(module.train_samples):
            labels = sample.labels.clone()
            labels[: number % 9] = IGNORE
            module.train_samples[number] = sample._replace(labels=labels)
        modules[accumulate] = train(module, tmp_path / str(accumulate))
    for name, parameter in weights(modules[1]).items():
        torch.testing.assert_close(parameter, weights(modules[2])[name], atol=1e-6, rtol=1e-5)


def test_checkpoints_hold_what_is_trained(tmp_path):
    module = train(make_module(total_steps=2), tmp_path, every=1)
    path = newest_checkpoint(tmp_path)
    saved = torch.load(path, weights_only=False)["state_dict"]
    expected = {f"network.{n}" for n, p in module.network.named_parameters() if p.requires_grad}
    assert set(saved) == expected
    assert len(list(path.parent.iterdir())) == 1


def test_a_loss_that_is_not_finite_stops_before_the_weights(tmp_path):
    module = make_module(
        optimizer=OptimizerOptions(lr=0.02, warmup_steps=0),
        total_steps=8,
        sandwich=SandwichOptions(full_share=1.0),
    )
    before = {}

    class Break(L.Callback):
        def on_train_batch_start(self, _trainer, pl_module, _batch, batch_idx):
            if batch_idx == 4:
                before.update(weights(pl_module))
                pl_module.network.transformer.wte.weight.data[:, 0] = float("nan")

    with pytest.raises(ConfigError, match=r"step 5: the loss of the full network \(n_embd=24"):
        train(module, tmp_path, every=2, callbacks=[Break()])
    for name, parameter in weights(module).items():
        if lora.is_adapter(name):
            assert torch.equal(parameter, before[name])
    assert newest_checkpoint(tmp_path).name == "step=00000004.ckpt"


def test_clipping_bounds_the_gradient(tmp_path):
    module = make_module(clip=0.01, total_steps=3)
    norms = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, _trainer, pl_module, _optimizer):
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.trained]))

    train(module, tmp_path, callbacks=[Watch()])
    assert len(norms) == 3
    assert max(norms) <= 0.01 * 1.001


def test_sub_networks_are_scored_on_the_device_of_the_training():
    """The meta device shows it on a machine without another one: nothing can be read from it."""
    module = make_module()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        choose_networks(
            SamplerOptions(SamplerKind.calibrate_ppl, num_bins=2, calibration_samples=2),
            load_space("aligned", module.supernet.config),
            module.supernet,
            strategy=Strategy.sandwich,
            num_validated=2,
            chosen={},
            samples=module.train_samples,
            seed=0,
            device=torch.device("meta"),
        )


def test_validation_takes_a_small_part_of_the_training():
    """Not after each of six steps, as 100 of its samples are many beside two of a step."""
    assert validation_interval(6, step_passes=4, validation_passes=7 * 50) >= 6
    for total in (6, 100, 5000):
        for step, validation in ((4, 7), (4, 70), (16, 8)):
            every = validation_interval(total, step_passes=step, validation_passes=validation)
            assert total / every <= 10
            assert validation <= 0.11 * every * 3 * step


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_the_untouched_model_is_a_dashed_line_in_the_curves(tmp_path):
    log = tmp_path / "logs" / "csv" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("step,val/full,train/ce_full\n0,3.0,\n1,,3.0\n4,2.5,\n")
    config = litgpt.Config(**CONFIG)
    full = SubNetwork.from_config(config)
    history = {0: {"full": 3.0}, 4: {"full": 2.5}}
    write_losses(tmp_path, config, history=history, networks={"full": full})
    plain = tmp_path / "plain.png"
    sizes = {"full": parameter_counter(config)(full)}
    plot_training(plain, read_curves(tmp_path), num_params=sizes)
    pixels = [matplotlib.image.imread(p)[..., :3] for p in (tmp_path / "curves.png", plain)]
    black, without = ((p.max(axis=2) < 0.3) for p in pixels)  # (H, W)
    row = int((black.sum(axis=1) - without.sum(axis=1)).argmax())
    line = black[row] & ~without[row]
    found = line.nonzero()[0]
    assert found[-1] - found[0] > 300  # from one side of the panel to the other
    assert 0.4 < line[found[0] : found[-1]].mean() < 0.9  # with gaps


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    options = OptimizerOptions(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(step, options, 24) for step in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[14] == pytest.approx(0.55)
    assert rates[24] == pytest.approx(0.1)
    assert sorted(rates[4:], reverse=True) == rates[4:]
    assert learning_rate(0, OptimizerOptions(lr=1.0, warmup_steps=10), 2) == 0.5


def test_a_users_callbacks_see_the_validation(tmp_path):
    callbacks = [
        {
            "class_path": "lightning.pytorch.callbacks.EarlyStopping",
            "init_args": {"monitor": "val/mean", "patience": 1, "mode": "max"},  # stops at once
        },
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(tmp_path / "best"), "monitor": "val/mean"},
        },
    ]
    trainer = make_trainer(TrainerOptions(**OPTIONS, callbacks=callbacks), tmp_path)
    module = make_module(total_steps=20, validate_every=2)
    fit(trainer, module, tmp_path, checkpoint_every=2)
    assert module.global_step == 4
    assert len(list((tmp_path / "best").iterdir())) == 1
    assert newest_checkpoint(tmp_path) is not None


def test_resuming_from_another_training_is_refused(tmp_path):
    train(make_module(total_steps=2), tmp_path, every=1)
    other = make_module(total_steps=2)
    other.network.lm_head.lora_A = torch.nn.Parameter(torch.zeros(5, 24))
    with pytest.raises(ConfigError, match="not a checkpoint of this training"):
        train(other, tmp_path, resume=True)


def test_a_resumed_front_has_the_bins_that_its_members_were_counted_in(tmp_path):
    def module(**sampler):
        options = SamplerOptions(kind=SamplerKind.pareto, **sampler)
        return make_module(total_steps=2, score_every=1, pareto=True, sampler=options)

    train(module(num_bins=4), tmp_path, every=1)
    for changed, words in (
        ({"num_bins": 5}, "sampler.num_bins was 4 and is 5"),
        (
            {"num_bins": 4, "num_params": "..0.9x"},
            'sampler.num_params was not given and is "..0.9x"',
        ),
        ({"num_bins": 4, "calibration_samples": 3}, "sampler.calibration_samples was 16 and is 3"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)) as raised:
            train(module(**changed), tmp_path, resume=True, every=1)
        assert ";" not in str(raised.value)  # nothing else is said to differ
    other = module(num_bins=4)
    other.sampler = replace(
        other.sampler,
        space=load_space({"n_embd": {"min": "half", "max": "full"}}, litgpt.Config(**CONFIG)),
    )
    with pytest.raises(ConfigError, match="search space was"):
        train(other, tmp_path, resume=True, every=1)
    # How often it scores, and what other kinds read, say nothing about the bins.
    train(module(num_bins=4, every_n_steps=7, trials_per_bin=3), tmp_path, resume=True, every=1)


@pytest.mark.parametrize(
    ("kind", "changed", "told"),
    [
        ("random", {"num_bins": 3}, False),
        ("random", {"num_params": "..0.9x"}, True),
        ("grid_params", {"num_bins": 3}, True),
        ("grid_params", {"candidates_per_bin": 3}, False),
        ("calibrate_mag", {"candidates_per_bin": 3}, True),
        ("calibrate_mag", {"calibration_samples": 3}, False),
        ("calibrate_ppl", {"calibration_samples": 3}, True),
        ("pareto", {"every_n_steps": 3}, False),
    ],
)
def test_what_a_sampler_does_not_read_may_change(kind, changed, told):
    one = SamplerOptions(kind=SamplerKind(kind))
    assert (one.settings() != replace(one, **changed).settings()) == told


def test_unknown_logger_and_device(tmp_path):
    with pytest.raises(ConfigError, match="no_such_package"):
        make_trainer(
            TrainerOptions(**OPTIONS, logger=[{"class_path": "no_such_package.Logger"}]), tmp_path
        )
    with pytest.raises(ConfigError, match="trainer"):
        make_trainer(TrainerOptions(accelerator="cuda_of_tomorrow"), tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"strategy": "deepspeed"},
        {"precision": "16-mixed"},
        {"precision": "bnb.nf4"},
        {"max_steps": 0},
        {"gradient_clip_val": 0},
    ],
)
def test_trainer_options_out_of_range(wrong):
    with pytest.raises(ConfigError, match=f"trainer.{next(iter(wrong))}"):
        TrainerOptions(**wrong)


@pytest.mark.parametrize(
    ("loss", "packing"),
    [
        (LossOptions(), False),
        (LossOptions(Distillation.none), True),
        (LossOptions(weighting=Weighting.balanced), True),
        (LossOptions(Distillation.cosine, Weighting.balanced, teacher="in_place"), False),
    ],
    ids=["frozen", "labels", "balanced", "in_place_balanced"],
)
def test_a_step_waits_for_its_device_once(tmp_path, monkeypatch, loss, packing):
    """And then for the losses and the norm together, where shapes were seen before."""
    module = make_module(total_steps=4, frozen=loss.has_frozen_teacher, loss=loss)
    if packing:
        module.train_samples = pack(module.train_samples, 32)  # two samples a row
    step, update, tolist = module.training_step, torch.optim.AdamW.step, torch.Tensor.tolist
    counts, lists = [], []

    def counted(batch, batch_idx):
        lists.clear()
        with Waits() as waits:
            step(batch, batch_idx)
        counts.append((waits.found, len(lists)))

    def uncounted(*arguments, **more):
        with _disable_current_modes():  # on a CPU torch's own loop reads the step
            return update(*arguments, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", uncounted)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(1) or tolist(self))
    monkeypatch.setattr(module, "training_step", counted)
    train(module, tmp_path)
    assert counts[1:] == [([], 1)] * 3
