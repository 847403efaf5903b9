"""FSDP, DDP and one process are the same training: two gloo processes on the CPU."""

import socket

import litgpt
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from tests.train.conftest import CONFIG, MIDDLE, SMALL
from whittle_nas.train import lora
from whittle_nas.train.batches import IGNORE, Sample
from whittle_nas.train.options import Distillation, LoraOptions, LossOptions
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


@pytest.mark.slow
def test_fsdp_ddp_and_one_process_have_the_same_gradients_and_weights(tmp_path):
    """Where networks skip layers, one process has no label, and tables are tied."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, tmp_path), nprocs=2)
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


def test_rows_of_a_process_are_those_of_torch_chunk():
    for rows in (1, 2, 5, 8, 9):
        for count in (1, 2, 3, 4):
            parts = torch.arange(rows).chunk(count)
            for rank in range(count):
                begin, end = rows_of(rank, count, rows)
                expected = parts[rank].tolist() if rank < len(parts) else []
                assert list(range(begin, end)) == expected
