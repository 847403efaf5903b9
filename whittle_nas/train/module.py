"""The LightningModule around a super-network: manual optimisation, one reduction per step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from whittle_nas.errors import ConfigError
from whittle_nas.resuming import changes
from whittle_nas.space.pareto import ParetoSampler
from whittle_nas.space.samplers import GridSampler, RandomSampler, Sampler
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.train.batches import Sample, Stream, TrainLoader, collate, unlabelled
from whittle_nas.train.measured import Means, Validations, by_role, count, means_of, sums_of
from whittle_nas.train.options import Distillation
from whittle_nas.train.recipe import SCORED, Recipe, learning_rate
from whittle_nas.train.step import (
    Network,
    Role,
    accumulate,
    clip,
    finish_gradients,
    networks_of_step,
    total_over_processes,
)
from whittle_nas.train.teacher import Teacher, shard_teacher
from whittle_nas.weights.sharding import Prepare, Sharding, nothing
from whittle_nas.weights.supernet import SuperNetwork


class Diverged(ConfigError):
    """A loss or gradient that is not finite."""


class SupernetTraining(L.LightningModule):
    """Trains the parameters of a super-network that require a gradient.

    Manual optimisation, because a step has one backward pass per network. Nothing random keeps a
    state: data order, sub-networks and dropout follow from the seed and the step, so a resumed
    run goes on as the interrupted one would have.

    Attributes:
        validations: what was measured of the fixed set of networks.
    """

    # A process may have no validation sample of its own; sums are what is reduced.
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        supernet: SuperNetwork,
        recipe: Recipe,
        *,
        smallest: SubNetwork,
        sampler: Sampler,
        train: Sequence[Sample],
        valid: Sequence[Sample],
        valid_networks: Mapping[str, SubNetwork],
        teacher: Teacher | None = None,
        on_step: Callable[[], object] = lambda: None,
        prepare: Prepare = nothing,
    ) -> None:
        """Set up a training.

        Args:
            supernet: with the parameters to train marked by `requires_grad`.
            recipe: how to train.
            smallest: the sub-network that sandwich steps train in their share.
            sampler: of the other sub-networks.
            train: training samples.
            valid: validation samples.
            valid_networks: the fixed set of networks that is validated, by name.
            teacher: the frozen one; None where the full network or nobody teaches.
            on_step: called after every optimiser step.
            prepare: loads a part of the model before it is shared out; see `Sharding`.
        """
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold what is trained; the rest comes from disk
        self.supernet = supernet
        self.network = supernet.model  # registered, so that Lightning moves it
        self.recipe = recipe
        self.smallest, self.sampler = smallest, sampler
        self.train_samples, self.valid_samples = train, valid
        self.validations = Validations(valid_networks, recipe.max_full_loss)
        # In a tuple, so that its weights are neither saved nor reduced with those of the network.
        self._teacher = (teacher,)
        self._on_step, self._prepare = on_step, prepare
        self._masks: list[tuple[torch.nn.Parameter, Tensor]] = []
        self._step_sums = torch.zeros(0)
        self._valid_sums = torch.zeros(0)

    @property
    def history(self) -> dict[int, dict[str, float]]:
        """Mean validation loss of every network in nats per token, by optimiser step."""
        return self.validations.history

    @property
    def stopped(self) -> str | None:
        """Why the training ended before its last step, None if it did not."""
        return self.validations.stopped

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.network.parameters() if p.requires_grad]

    def configure_model(self) -> None:
        """Share the model out where the strategy says between whom; called by Lightning."""
        if self._device_mesh is None or self.supernet.sharding is not None:
            return
        mesh = self._device_mesh["data_parallel"]
        self.supernet.sharding = Sharding(self.network, mesh, prepare=self._prepare)
        if (teacher := self._teacher[0]) is not None:
            shard_teacher(teacher.model, self.supernet, mesh, str(self.trainer.precision))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the schedule is a function of the step and is applied in `training_step`."""
        options = self.recipe.optimizer
        assert options.lr is not None
        return torch.optim.AdamW(
            self.trained,
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
        )

    def train_dataloader(self) -> TrainLoader:
        """The batches of this process."""
        stream = Stream(
            len(self.train_samples),
            batch_size=self.recipe.batch_size,
            num_batches=self.recipe.total_steps * self.recipe.accumulate,
            seed=self.recipe.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        return TrainLoader(self.train_samples, stream, num_workers=self.recipe.num_workers)

    def val_dataloader(self) -> DataLoader[Sample]:
        """This process's share of the validation samples."""
        share: Any = self._share(self.valid_samples)
        return DataLoader(share, batch_size=self.recipe.batch_size, collate_fn=collate)

    def _share(self, samples: Sequence[Sample]) -> list[Sample]:
        """What this process looks at, the same number everywhere.

        Who has a sample less looks at one without labels: with sharding passes are common ones, and
        Lightning's loop leaves a process without samples out, also of the sums over all.
        """
        count = self.trainer.world_size
        share = list(samples[self.trainer.global_rank :: count])
        if samples and len(share) < -(-len(samples) // count):
            share.append(unlabelled(samples[0]))
        return share

    def networks(self, step: int) -> list[Network]:
        """The networks of an optimiser step."""
        return networks_of_step(
            step,
            full=self.supernet.full,
            smallest=self.smallest,
            sampler=self.sampler,
            options=self.recipe.sandwich,
            ranks=() if self.recipe.lora is None else self.recipe.lora.choices,
            total_steps=self.recipe.total_steps,
            seed=self.recipe.seed,
        )

    def on_fit_start(self) -> None:
        """All processes draw from the first one's grid; its scores may differ in a last bit."""
        if isinstance(self.sampler, GridSampler):
            self.sampler = self.trainer.strategy.broadcast(self.sampler)
        if (teacher := self._teacher[0]) is not None:
            teacher.model.model.to(self.device)

    def _remember_zeros(self) -> None:
        """What is zero stays so: without a gradient AdamW leaves a weight of zero as it is."""
        if self.recipe.keep_zeros:
            matrices = (p for p in self.trained if p.ndim == 2)
            self._masks = [(p, p.detach() != 0) for p in matrices]

    def on_train_start(self) -> None:
        """Validate the untrained super-network, or what a run was interrupted before."""
        self._remember_zeros()
        step = self.global_step
        if step % self.recipe.validate_every == 0 and step not in self.history:
            self.validate_now()

    def on_train_end(self) -> None:
        """Validate what came out."""
        if self.global_step not in self.history:
            self.validate_now()

    def training_step(self, batch: Sample, batch_idx: int) -> None:
        """Add the gradients of one micro-batch; on the last one of a step, update the weights."""
        step = self.global_step
        rank = self.trainer.global_rank
        if batch_idx % self.recipe.accumulate == 0 and step % self.recipe.score_every == 0:
            self._score(step)
        torch.manual_seed(hash((self.recipe.seed, batch_idx, rank)) % 2**63)  # for dropout
        networks = self.networks(step)
        sums = accumulate(
            self.supernet,
            batch,
            networks,
            self.recipe.loss,
            teacher=self._teacher[0],
            checkpoint_blocks=self.recipe.checkpoint_blocks,
            total=total_over_processes,
        )
        step_sums = torch.cat([sums.flatten(), count(batch, sums)])
        first = batch_idx % self.recipe.accumulate == 0
        self._step_sums = step_sums if first else self._step_sums + step_sums
        if (batch_idx + 1) % self.recipe.accumulate == 0:
            self._update(step, networks)

    def _score(self, step: int) -> None:
        """Give a Pareto sampler the losses of its candidates, the same on every process."""
        sampler = self.sampler
        if not isinstance(sampler, ParetoSampler):
            return
        subs = sampler.candidates(random.Random(f"{self.recipe.seed}/scores/{step}"), SCORED)
        samples = self.valid_samples[: self.recipe.score_samples]
        share = self._share(samples)
        training = self.network.training
        self.network.eval()
        sums = torch.zeros(len(subs) + 1, device=self.device)
        for start in range(0, len(share), self.recipe.batch_size):
            batch = collate(share[start : start + self.recipe.batch_size]).to(self.device)
            sums = sums + self._sums_of(subs, batch)
        self.network.train(training)
        losses = means_of(total_over_processes(sums).tolist())
        self.sampler = sampler.updated(list(zip(subs, losses, strict=True)))

    def _update(self, step: int, networks: list[Network]) -> None:
        totals = total_over_processes(self._step_sums)
        for parameter, mask in self._masks:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        norm = finish_gradients(self.trained, totals[-1])
        # Here alone the program waits for the device.
        *sums, num_labels, length = torch.cat([totals, norm.to(totals)[None]]).tolist()
        each = [value / max(num_labels, 1.0) for value in sums]
        means = list(zip(each[::2], each[1::2], strict=True))  # ce and kd of every network
        self._check_finite(step, networks, means, length)
        if self.recipe.clip is not None:
            clip(self.trained, self.recipe.clip, norm)
        optimizer: Any = self.optimizers()
        rate = learning_rate(step, self.recipe.optimizer, self.recipe.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        self._log_step(networks, means, {"lr": rate, "grad_norm": length})
        self._on_step()

    def _check_finite(self, step: int, networks: list[Network], means: Means, norm: float) -> None:
        """Stop before a broken gradient reaches the weights."""
        if math.isfinite(sum(map(sum, means)) + norm):
            return
        pairs = zip(networks, means, strict=True)
        broken = [network for network, pair in pairs if not math.isfinite(sum(pair))]
        culprit = "the gradient"
        if broken:
            culprit = f"the loss of the {broken[0].role.value} network ({broken[0].sub})"
        raise Diverged(
            f"step {step + 1}: {culprit} is not finite; weights and "
            "earlier checkpoints are as they were: resume with a lower optimizer.lr or a "
            "gradient_clip_val"
        )

    def _taught(self) -> set[Role]:
        """The roles whose networks have a teacher: in place, the full network is it."""
        if self.recipe.loss.distillation is Distillation.none:
            return set()
        return {*Role} - ({Role.full} if self._teacher[0] is None else set())

    def _log_step(self, networks: list[Network], means: Means, others: dict[str, float]) -> None:
        found = {f"train/{name}": value for name, value in others.items()}
        found |= by_role(networks, means, taught=self._taught())
        self.log("loss", fmean(ce for ce, _ in means), prog_bar=True, logger=False)
        if self.global_step % self.recipe.log_every_n_steps == 0:
            self._send(found)

    def _send(self, metrics: dict[str, float]) -> None:
        """To the loggers, by optimiser step; Lightning itself would count micro-batches."""
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.global_step)

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        """Add up the losses of the fixed set of networks."""
        sums = self._batch_sums(batch)
        self._valid_sums = sums if batch_idx == 0 else self._valid_sums + sums

    def on_validation_epoch_end(self) -> None:
        """Losses over all processes, logged as `val/<network>` and `val/mean`."""
        found = self._record(self._valid_sums)
        self._send(found)
        self.log_dict(found, logger=False)  # for callbacks such as EarlyStopping
        self.log("val", found["val/mean"], prog_bar=True, logger=False)

    @torch.no_grad()
    def validate_now(self) -> dict[str, float]:
        """Validate outside of Lightning's loop: before the first step and after the last."""
        training = self.network.training
        self.network.eval()
        sums = torch.zeros(0)
        limit = self.trainer.limit_val_batches
        for number, batch in enumerate(self.val_dataloader()):
            if isinstance(limit, int) and number >= limit:
                break
            with self.trainer.precision_plugin.val_step_context():
                found = self._batch_sums(batch.to(self.device))
                sums = sums + found if len(sums) else found
        self.network.train(training)
        found = self._record(sums)
        self._send(found)
        return found

    def _batch_sums(self, batch: Sample) -> Tensor:
        return self._sums_of(self.validations.networks.values(), batch)

    def _sums_of(self, subs: Iterable[SubNetwork], batch: Sample) -> Tensor:
        chunk = self.recipe.loss.chunk_elements
        return sums_of(self.supernet, subs, batch, chunk_elements=chunk)

    def _record(self, sums: Tensor) -> dict[str, float]:
        if not len(sums):  # no sample of this process
            sums = torch.zeros(len(self.validations.networks) + 1, device=self.device)
        found = self.validations.record(self.global_step, total_over_processes(sums).tolist())
        if self.stopped is not None:
            self.trainer.should_stop = True
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was trained; frozen weights are in the checkpoint directory already."""
        trained = {f"network.{n}" for n, p in self.network.named_parameters() if p.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: t for n, t in state.items() if n in trained}
        checkpoint["history"] = self.history
        checkpoint["settings"] = self._settings()
        if isinstance(self.sampler, ParetoSampler):
            checkpoint["front"] = self.sampler.state()
        for logger in self.trainer.loggers:
            logger.save()  # rows up to this step must outlive a process that is killed

    def _settings(self) -> dict[str, Any]:
        """What has to be the same when this training is resumed: plain values."""
        samples = [self.train_samples[at] for at in (0, len(self.train_samples) // 2, -1)]
        sampler = self.sampler
        space = sampler.space if isinstance(sampler, ParetoSampler | RandomSampler) else None
        return {
            "trained parameters": len(self.trained),
            **self.recipe.settings(),
            "sampler": type(sampler).__name__,
            **({} if space is None else {"search space": space.to_dict()}),
            "validated networks": {n: str(s) for n, s in self.validations.networks.items()},
            "training samples": len(self.train_samples),
            "their tokens": [int(sample.input_ids.sum()) for sample in samples],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the validation losses of the interrupted run.

        Raises:
            ConfigError: if that was another training.
        """
        now = self._settings()
        before = checkpoint.get("settings", now)  # a training of an earlier release has none
        unknown = {name for name in now if name.startswith(("sampler.", "search space"))}
        before = {**{name: now[name] for name in unknown}, **before}  # once these were left out
        if differing := changes(before, now):
            raise ConfigError(
                f"--resume true: {differing} (go on with the options of the interrupted training, "
                "or begin anew with --overwrite true)"
            )
        self.validations.history = dict(checkpoint["history"])
        if isinstance(self.sampler, ParetoSampler):
            self.sampler = self.sampler.restored(checkpoint["front"])
