"""A `lightning.Trainer` for a super-network: lengths, loggers, checkpoints, resuming."""

from __future__ import annotations

import importlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from whittle_nas.errors import ConfigError, Terminated
from whittle_nas.train.batches import batches_per_epoch
from whittle_nas.train.module import SupernetTraining
from whittle_nas.train.options import TrainerOptions
from whittle_nas.train.sharded import ShardedStrategy, read_shares
from whittle_nas.train.shown import LoggedProgress
from whittle_nas.weights.checkpoint import load_torch
from whittle_nas.weights.files import atomic_file

LEAST_STEPS, MOST_STEPS = 100, 2000  # of a training whose length nobody said
CHECKPOINTS, LOGS = "checkpoints", "logs"


def make_trainer(options: TrainerOptions, out_dir: Path | None) -> L.Trainer:
    """The Trainer; intervals that depend on the length of the training follow in `fit`.

    Without a directory nothing is written: no logs and no checkpoints.

    Raises:
        ConfigError: if a device, strategy, logger or callback is not there.
    """
    by_default = [] if out_dir is None else _default_loggers(out_dir)
    loggers = by_default if options.logger is None else _build(options.logger)
    callbacks = _build(options.callbacks or [])
    if options.enable_progress_bar and not sys.stderr.isatty():
        callbacks.append(LoggedProgress())
    try:
        with _quiet():
            return _trainer(options, out_dir, loggers, callbacks)
    except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error


def _trainer(
    options: TrainerOptions, out_dir: Path | None, loggers: list[Any], callbacks: list[Any]
) -> L.Trainer:
    return L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=ShardedStrategy() if options.is_sharded else options.strategy,
        precision=options.precision,  # type: ignore[arg-type]
        # All epochs are one stream of batches (see `batches.Stream`): it can be resumed at any
        # step, while Lightning's epochs resume exactly only at their ends.
        max_epochs=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        fast_dev_run=options.accumulate_grad_batches if options.fast_dev_run else False,
        enable_progress_bar=options.enable_progress_bar,
        enable_model_summary=False,
        # `fit` adds the one to resume from; a user may have one of the best loss beside it
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        callbacks=callbacks,
        plugins=[_WholeFiles()],
        logger=loggers,
        default_root_dir=out_dir,
    )


def fitting_device(options: TrainerOptions) -> torch.device:
    """Where least squares are solved before a training: this process's GPU, if one trains.

    The host where the weights are shared out over processes, and where a device (Apple's) has no
    double precision.
    """
    if options.is_sharded:
        return torch.device("cpu")
    trainer = make_trainer(replace(options, logger=[], callbacks=[]), None)
    device = trainer.strategy.root_device
    return device if device.type == "cuda" else torch.device("cpu")


def num_devices(options: TrainerOptions) -> int:
    """Processes that train, as far as the options and this machine say."""
    given = options.devices
    if isinstance(given, str) and given not in ("auto", "-1"):
        given = int(given) if given.isdigit() else len(given.strip("[], ").split(","))
    if not isinstance(given, int) or given < 0:
        given = 1 if options.accelerator == "cpu" else max(1, torch.cuda.device_count())
    return given * options.num_nodes


def num_steps(
    options: TrainerOptions, *, num_samples: int, batch_size: int, world_size: int
) -> int:
    """Optimiser steps of the whole training."""
    if options.max_steps is not None:
        return options.max_steps
    per_epoch = batches_per_epoch(num_samples, batch_size * world_size)
    passes = options.max_epochs or 1
    steps = max(1, passes * per_epoch // options.accumulate_grad_batches)
    if options.max_epochs is not None:
        return steps
    four_passes = max(1, 4 * per_epoch // options.accumulate_grad_batches)
    return min(max(steps, min(LEAST_STEPS, four_passes)), MOST_STEPS)


def fit(
    trainer: L.Trainer,
    module: SupernetTraining,
    out_dir: Path | None,
    *,
    checkpoint_every: int,
    resume_from: Path | None = None,
) -> None:
    """Train, and validate what came out.

    Args:
        trainer: from `make_trainer`.
        module: the training.
        out_dir: gets `checkpoints/`; None keeps none.
        checkpoint_every: optimiser steps between checkpoints.
        resume_from: checkpoint of an interrupted run.

    Raises:
        ConfigError: if the loss is not finite, or if the checkpoint is not of this training.
        KeyboardInterrupt: if the process was asked to stop.
    """
    recipe = module.recipe
    if resume_from is not None:
        _check(resume_from, sharded=isinstance(trainer.strategy, ShardedStrategy))
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        trainer.val_check_interval = recipe.validate_every * recipe.accumulate
    if out_dir is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        trainer.callbacks.append(  # type: ignore[attr-defined]
            ModelCheckpoint(
                dirpath=out_dir / CHECKPOINTS,
                filename="{step:08d}",
                every_n_train_steps=checkpoint_every,
                save_top_k=1,  # the newest; the one before goes once it is written
                enable_version_counter=False,
            )
        )
    with _quiet(), _stoppable():
        try:
            trainer.fit(module, ckpt_path=None if resume_from is None else str(resume_from))
        except RuntimeError as error:
            if resume_from is None or "state_dict" not in str(error):
                raise
            raise ConfigError(
                f"{resume_from} is not a checkpoint of this training: {str(error).splitlines()[0]}"
            ) from error


def _check(resume_from: Path, *, sharded: bool) -> None:
    """For the sentences of our own readers; Lightning's are tracebacks."""
    if sharded:
        read_shares(resume_from)
    elif resume_from.is_dir():
        raise ConfigError(f"{resume_from} was written with trainer.strategy=fsdp: go on with that")
    else:
        load_torch(resume_from)


class _WholeFiles(TorchCheckpointIO):
    """Checkpoints that are there or not.

    Lightning's own go through a temporary directory, which may lie on a smaller disk and from
    which they are copied, so that an interruption leaves half a file under the final name.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write beside the final name, and rename."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(path)) as unfinished:
            torch.save(checkpoint, unfinished)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Signals stop a training as they stop everything else; Lightning makes exits of them.

    Its SIGTERM has no exit status: a script would take half a training for a whole one.
    """
    main = threading.current_thread() is threading.main_thread()
    # Without a handler of ours Lightning's ends a step before it stops, also under SLURM.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL) if main else None
    try:
        yield
    except SIGTERMException:
        raise Terminated from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def newest_checkpoint(out_dir: Path) -> Path | None:
    """The checkpoint to resume from, None if there is none."""
    found = sorted((out_dir / CHECKPOINTS).glob("*.ckpt"))
    return found[-1] if found else None


def _default_loggers(out_dir: Path) -> list[Any]:
    return [
        CSVLogger(out_dir / LOGS, name="csv"),
        TensorBoardLogger(out_dir / LOGS, name="tensorboard", default_hp_metric=False),
    ]


def _build(specs: Sequence[dict[str, Any]]) -> list[Any]:
    """Objects from `{class_path, init_args}`."""
    built = []
    for spec in specs:
        path = spec.get("class_path", "") if isinstance(spec, dict) else spec
        module, _, name = str(path).rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), name)
            built.append(cls(**spec.get("init_args", {})))
        except (ImportError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"trainer: {path!r} can't be made ({error}); give "
                "{class_path: package.Class, init_args: {...}}"
            ) from error
    return built


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's hints that do not apply here, and its advertisement."""
    log = logging.getLogger("lightning.pytorch")
    level, told = log.level, threading.excepthook
    log.setLevel(logging.WARNING)
    threading.excepthook = partial(_tell_thread, told)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",
                ".*treespec, LeafSpec.*",
                ".*Checkpoint directory .* exists and is not empty.*",
                "It is recommended to use .*sync_dist=True.*",  # they are sums over processes
                "Using ModelCheckpoint with manual optimization.*",  # after the step is right
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        log.setLevel(level)
        threading.excepthook = told


def _tell_thread(told: Callable[..., Any], thread_error: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread keeps its error, which the next call raises, and prints it as well."""
    if not type(thread_error.thread).__module__.startswith("tensorboard."):
        told(thread_error)
