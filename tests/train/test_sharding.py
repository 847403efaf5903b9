"""FSDP, DDP and one process are the same training: two gloo processes on the CPU."""

import os
import socket

import lightning as L
import litgpt
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from tests.train.conftest import CONFIG, MIDDLE, SMALL
from tests.train.test_training import make_module
from whittle_nas.space.samplers import GridSampler
from whittle_nas.train import lora
from whittle_nas.train.batches import IGNORE, Sample
from whittle_nas.train.choices import SandwichOptions, Strategy
from whittle_nas.train.fit import fit, make_trainer
from whittle_nas.train.options import Distillation, LoraOptions, LossOptions, TrainerOptions
from whittle_nas.train.prepare import TrainedTensors, adapters, follow
from whittle_nas.train.step import Network, Role, accumulate, clip, finish_gradients, loss_sums
from whittle_nas.train.teacher import Teacher, shard_teacher, without_adapters
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.sharding import Sharding, is_shared_out, rows_of
from whittle_nas.weights.supernet import SuperNetwork

CASES = [(adapted, tied) for adapted in (True, False) for tied in (True, False)]


def make(adapted, tied):
    torch.manual_seed(0)
    config = litgpt.Config(**CONFIG)
    model = litgpt.GPT(config)
    if adapted:
        model = lora.GPT(lora.lora_config(config, LoraOptions(r=4, dropout=0.0)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.2)
    if tied:
        ends = model.transformer.wte, model.lm_head
        getattr(ends[1], "linear", ends[1]).weight = ends[0].weight
        if adapted:
            ends[1].lora_A, ends[1].lora_B = ends[0].lora_A, ends[0].lora_B
    if adapted:
        lora.freeze_base(model)
    return SuperNetwork(model, SupernetInfo(layer_order=(1, 2, 0)))


def batch_of(step):
    """Four rows; in the first step those of the second process have no label."""
    torch.manual_seed(step)
    ids, labels = torch.randint(31, (4, 9)), torch.randint(31, (4, 9))
    labels[step % 4, :5] = IGNORE
    labels[2 if step == 0 else 4 :] = IGNORE
    return Sample(ids, labels)


def five_steps(supernet, share, *, mesh=None):
    """Gradients of the first step, and weights after the last one."""
    teacher, loss = None, LossOptions(Distillation.none)
    if any(lora.is_adapter(name) for name, _ in supernet.model.named_parameters()):
        teacher = Teacher(without_adapters(supernet, litgpt.Config(**CONFIG)))
        loss = LossOptions()
    if mesh is not None:
        supernet.sharding = Sharding(supernet.model, mesh)
        if teacher is not None:
            shard_teacher(teacher.model, supernet, mesh, "32-true")
    trained = [p for p in supernet.model.parameters() if p.requires_grad]
    # a larger epsilon: where a gradient is all rounding, Adam makes a whole step of it
    optimizer = torch.optim.AdamW(trained, lr=0.01, eps=1e-4)
    networks = [Network(supernet.full, Role.full), Network(MIDDLE, Role.sampled)]
    found = []
    for step in range(5):
        batch = batch_of(step)
        part = Sample(batch.input_ids[share], batch.labels[share])
        # sometimes no network has layers 2 and 0; blocks are recomputed in every other step
        chosen = networks if step % 2 else [Network(SMALL, Role.smallest)]
        accumulate(supernet, part, chosen, loss, teacher=teacher, checkpoint_blocks=step % 2 == 1)
        norm = finish_gradients(trained, float((batch.labels != IGNORE).sum()))
        clip(trained, 0.5, norm)
        if step < 2:
            found += [norm, *(whole(p.grad) for p in trained)]
        optimizer.step()
        optimizer.zero_grad()
        loss_sums(supernet, part, [MIDDLE])
    return [*found, *(whole(p.detach()) for p in trained)]


def whole(tensor):
    return tensor.full_tensor() if is_shared_out(tensor) else tensor.clone()


def work(rank, port, folder):
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    mesh, share = init_device_mesh("cpu", (2,)), slice(2 * rank, 2 * rank + 2)
    like = litgpt.GPT(litgpt.Config(**CONFIG)).state_dict()
    for case in CASES:
        supernet = make(*case)
        shared = five_steps(supernet, share, mesh=mesh)
        held = sum(p.to_local().numel() for p in supernet.model.parameters())
        assert held < 0.55 * sum(p.numel() for p in supernet.model.parameters())
        if rank == 0:
            written = dict(TrainedTensors(supernet, like))
            dict(adapters(supernet))
            supernet.rest()
        else:
            follow(supernet, like)
        two = five_steps(make(*case), share)
        if rank == 0:
            torch.save((two, shared, written), folder / f"{case}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_fsdp_ddp_and_one_process_have_the_same_gradients_and_weights(tmp_path):
    """Where networks skip layers, one process has no label, and tables are tied."""
    mp.spawn(work, (free_port(), tmp_path), nprocs=2)
    for case in CASES:
        supernet = make(*case)
        one = five_steps(supernet, slice(None))
        two, shared, written = torch.load(tmp_path / f"{case}.pt")
        for found in (two, shared):
            for expected, tensor in zip(one, found, strict=True):
                torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=1e-5)
        merged = TrainedTensors(supernet, written)
        for name, tensor in merged.items():
            torch.testing.assert_close(written[name], tensor, atol=1e-5, rtol=1e-5)


class Gradients(L.Callback):
    """Those of every step, summed over processes, and what Lightning runs a step through."""

    def __init__(self):
        self.found, self.through = [], None

    def on_before_optimizer_step(self, trainer, pl_module, _optimizer):
        named = pl_module.network.named_parameters()
        self.found.append({name: p.grad.clone() for name, p in named if p.requires_grad})
        self.through = trainer.strategy.model


NETWORKS = {"skipped": Strategy.random, "sandwich": Strategy.sandwich}


def one_step(adapted, networks, **trainer):
    """A training of one step, of rows with different numbers of labels."""
    module = make_module(
        adapters=adapted, dropout=0.0, total_steps=1, batch_size=4 // trainer.get("devices", 1),
        sandwich=SandwichOptions(NETWORKS[networks], full_share=1.0, smallest_share=1.0),
    )  # fmt: skip
    module.sampler = GridSampler((SMALL,))  # without layers 0 and 2
    for parameter in module.trained:  # adapters begin with a B of zeros, and A has no gradient then
        torch.nn.init.normal_(parameter.data, std=0.2)
    for number, sample in enumerate(module.train_samples):
        labels = sample.labels.clone()
        labels[: number % 9] = IGNORE
        module.train_samples[number] = sample._replace(labels=labels)
    watch = Gradients()
    options = {"accelerator": "cpu", "enable_progress_bar": False, "gradient_clip_val": None}
    runner = make_trainer(TrainerOptions(**options, **trainer), None)
    runner.callbacks.append(watch)
    fit(runner, module, None, checkpoint_every=1)
    return watch


def work_wrapped(rank, port, folder):
    """As torchrun starts processes: Lightning's own launcher would start this file again."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE="2",
        TORCHELASTIC_RUN_ID="test", MASTER_ADDR="localhost", MASTER_PORT=str(port),
    )  # fmt: skip
    for adapted, networks in WRAPPED:
        watch = one_step(adapted, networks, devices=2, strategy="ddp")
        assert isinstance(watch.through, DistributedDataParallel)
        assert watch.through.reducer is not None
        torch.save(watch.found, folder / f"{adapted}-{networks}-{rank}.pt")


WRAPPED = [(adapted, networks) for adapted in (True, False) for networks in NETWORKS]


@pytest.mark.slow
def test_gradients_through_torchs_ddp_are_those_of_one_process(tmp_path):
    """As Lightning wraps the training, where whole layers have no gradient, or several passes."""
    mp.spawn(work_wrapped, (free_port(), tmp_path), nprocs=2)
    for adapted, networks in WRAPPED:
        (expected,) = one_step(adapted, networks).found
        unused = {name for name, gradient in expected.items() if not gradient.any()}
        layers = {name.split(".")[2] for name in expected if ".h." in name}
        assert layers == {"0", "1", "2"}
        assert all(name in unused for name in expected if ".h.0." in name) == (
            networks == "skipped"
        )
        for rank in range(2):
            (found,) = torch.load(tmp_path / f"{adapted}-{networks}-{rank}.pt")
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)


def test_rows_of_a_process_are_those_of_torch_chunk():
    for rows in (1, 2, 5, 8, 9):
        for count in (1, 2, 3, 4):
            parts = torch.arange(rows).chunk(count)
            for rank in range(count):
                begin, end = rows_of(rank, count, rows)
                expected = parts[rank].tolist() if rank < len(parts) else []
                assert list(range(begin, end)) == expected
