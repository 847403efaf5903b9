"""Progress of a training where its output is a file: Lightning's bars draw nothing there."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from whittle_nas.progress import bar


class LoggedProgress(ProgressBar):
    """A line of progress every ten seconds, with the loss of the last step."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._shown = True

    def disable(self) -> None:
        """Show nothing: what Lightning asks of all processes but the first."""
        self._shown = False

    def enable(self) -> None:
        """Show it again."""
        self._shown = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Begin, or go on."""
        total = int(self.total_train_batches)
        self._bar = bar("training, batches", total, show=self._shown)
        self._bar.__enter__()
        self._bar.update(trainer.fit_loop.epoch_loop.batch_progress.current.completed)

    def on_train_batch_end(self, trainer: L.Trainer, *_args: Any) -> None:  # type: ignore[override]
        """Count."""
        loss = trainer.callback_metrics.get("loss")
        if loss is not None:
            self._bar.set_postfix_str(f"loss {float(loss):.3f}")
        self._bar.update(1)

    def on_validation_start(self, *_args: Any) -> None:  # type: ignore[override]
        """Say so: no batch is counted meanwhile."""
        if self._bar is not None:
            self._bar.set_description_str("validating, batches of the training")

    def on_validation_end(self, *_args: Any) -> None:  # type: ignore[override]
        """Back to the training."""
        if self._bar is not None:
            self._bar.set_description_str("training, batches")

    def teardown(self, *_args: Any, **_kwargs: Any) -> None:
        """End, also after an exception."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
