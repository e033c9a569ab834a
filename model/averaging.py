"""A moving average of the weights, validated and checkpointed beside them."""

from typing import Any, Protocol, cast

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Averaged(Protocol):
    """A module whose network is averaged; it validates what `averaged` gives."""

    network: nn.Module
    averaged: Any


class MovingAverage(WeightAveraging):
    """Lightning's weight averaging with an exponential moving average.

    Validation sees both networks, so nothing is swapped. A checkpoint holds the average under
    `state_dict` and the weights that were trained under `current_model_state`.
    """

    def __init__(self, *, decay: float, every_n_steps: int) -> None:
        """decay: what stays of the average each time, every so many optimizer steps."""
        super().__init__(use_buffers=True)
        self._every = every_n_steps
        self._blend = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @property
    def network(self) -> nn.Module:
        """The average, in evaluation mode."""
        assert self._average_model is not None
        network: nn.Module = cast(Averaged, self._average_model.module).network
        return network

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Follow the module to its device, and have it validate the average."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device).eval()
        cast(Averaged, pl_module).averaged = lambda: self.network

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Blend the weights in after each so-manieth step; the first time, take them as they are.

        Without AveragedModel.update_parameters, which waits for the device to count.
        """
        step = trainer.global_step
        if step == self._latest_update_step or step % self._every:
            return
        now = _tensors(cast(Averaged, pl_module).network)
        average = _tensors(self.network)
        with torch.no_grad():
            for ours, theirs in zip(average, now, strict=True):
                if self._latest_update_step == 0 or not ours.is_floating_point():
                    ours.copy_(theirs)
            if self._latest_update_step:
                floating = [tensor.is_floating_point() for tensor in average]
                self._blend(
                    [tensor for tensor, yes in zip(average, floating, strict=True) if yes],
                    [tensor for tensor, yes in zip(now, floating, strict=True) if yes],
                    0,
                )
        self._latest_update_step = step

    def on_validation_epoch_start(self, *_: Any) -> None:
        """Nothing: the module validates both."""

    def on_validation_epoch_end(self, *_: Any) -> None:
        """Nothing: see above."""

    def on_train_end(self, *_: Any) -> None:
        """Nothing: the module keeps the weights that were trained."""


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    return [*(p.detach() for p in network.parameters()), *network.buffers()]
