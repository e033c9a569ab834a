"""The LightningModule: uint8 images in, normalized on the device, SGD, top-1 and top-5 out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

# Of ImageNet's training images, in 0..255 (torchvision's numbers).
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD. The learning rate is base_lr * global batch / 256, unless lr states it."""

    base_lr: float = 0.1
    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        for field in ("base_lr", "lr", "momentum", "weight_decay"):
            value = getattr(self, field)
            if value is not None and value < 0:
                raise ValueError(f"{field} must be at least 0, got {value}")

    def effective_lr(self, global_batch: int) -> float:
        """The learning rate at the schedule's peak (linear scaling, arXiv:1706.02677)."""
        return self.base_lr * global_batch / 256 if self.lr is None else self.lr


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Cross-entropy."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")


class ImageBatch(Protocol):
    """What a loader delivers: images (N, H, W, 3) uint8, labels (N,) int64."""

    images: torch.Tensor
    labels: torch.Tensor


class Classifier(lightning.LightningModule):
    """Trains and validates a network on batches of uint8 images."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        classes: int,
        optim: OptimConfig,
        loss: LossConfig,
        lr_of: Callable[[int], float],
    ) -> None:
        """network: (N, 3, H, W) float -> (N, classes). lr_of: optimizer step -> learning rate."""
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self._optim = optim
        self._loss = loss
        self._lr_of = lr_of
        top5 = min(5, classes)
        self.train_acc1, self.train_acc5 = _accuracy(classes, 1), _accuracy(classes, top5)
        self.val_acc1, self.val_acc5 = _accuracy(classes, 1), _accuracy(classes, top5)
        self.val_loss = MeanMetric()
        self.val_seen = SumMetric()
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, H, W, 3) uint8 -> (N, classes) logits.

        The permuted view already lies in memory as channels_last wants it, so nothing is copied.
        """
        pixels = (images.float() - self.mean) / self.std
        logits: torch.Tensor = self.network(pixels.permute(0, 3, 1, 2))
        return logits

    def training_step(self, batch: ImageBatch, batch_idx: int) -> torch.Tensor:
        """Cross-entropy of a batch, with its accuracy and the learning rate as metrics."""
        logits = self(batch.images)
        loss = cross_entropy(logits, batch.labels, label_smoothing=self._loss.label_smoothing)
        self.train_acc1(logits, batch.labels)
        self.train_acc5(logits, batch.labels)
        metrics: dict[str, torch.Tensor | Metric | float] = {
            "train/loss": loss.detach(),
            "train/acc1": self.train_acc1,
            "train/acc5": self.train_acc5,
            "lr": self._lr_of(self.global_step),
        }
        self.log_dict(metrics, on_step=True, on_epoch=False, batch_size=len(batch.labels))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Give every rank rank 0's normalization statistics.

        DDP is told not to broadcast them in each forward pass: ranks with different numbers of
        validation batches would wait for each other for ever.
        """
        if torch.distributed.is_initialized():
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Add a batch to the sums from which the split's loss and accuracy are computed."""
        logits = self(batch.images)
        self.val_acc1.update(logits, batch.labels)
        self.val_acc5.update(logits, batch.labels)
        self.val_loss.update(cross_entropy(logits, batch.labels, reduction="none"))
        self.val_seen.update(len(batch.labels))

    def on_validation_epoch_end(self) -> None:
        """Log sums over all samples of all ranks, so that uneven batches weigh what they hold.

        Here and not in validation_step, because a rank without a single batch has to take part.
        """
        metrics: dict[str, torch.Tensor | Metric | float] = {
            "val/loss": self.val_loss,
            "val/acc1": self.val_acc1,
            "val/acc5": self.val_acc5,
            "val/seen": self.val_seen,
        }
        self.log_dict(metrics)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD, its rate set before each optimizer step by the schedule."""
        optim = self._optim
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=1.0,  # the schedule gives the rate itself, not a factor
            momentum=optim.momentum,
            nesterov=optim.nesterov,
            weight_decay=optim.weight_decay,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_of)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def _accuracy(classes: int, top: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(classes, top_k=top, average="micro")
