"""The LightningModule: uint8 images in, normalized on the device, top-1 and top-5 out."""

from collections.abc import Callable
from typing import Any, Protocol

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from model.loss import LossConfig, training_loss
from model.mixup import MixConfig, Mixer
from model.networks import misfit
from model.optim import OptimConfig, build_optimizer
from model.plateau import Plateau
from model.seeding import step_seed

# Of ImageNet's training images, in 0..255 (torchvision's numbers).
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


class ImageBatch(Protocol):
    """What a loader delivers."""

    @property
    def images(self) -> torch.Tensor:
        """(N, H, W, 3) uint8."""
        ...

    @property
    def labels(self) -> torch.Tensor:
        """(N,) int64."""
        ...

    @property
    def numbers(self) -> torch.Tensor:
        """(N,) int64: which samples of the data set they are."""
        ...


class OtherNetworkError(ValueError):
    """A checkpoint's weights do not fit the network."""


class Score(nn.Module):
    """Loss and accuracy as sums over all samples of all ranks."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.acc1 = MulticlassAccuracy(classes, top_k=1, average="micro")
        self.acc5 = MulticlassAccuracy(classes, top_k=min(5, classes), average="micro")
        self.loss = MeanMetric()

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: (N, C) and (N,)."""
        self.acc1.update(logits, labels)
        self.acc5.update(logits, labels)
        self.loss.update(cross_entropy(logits, labels, reduction="none"))

    def named(self, split: str) -> dict[str, Metric]:
        """The metrics as a log names them."""
        names = ("loss", "acc1", "acc5")
        return {f"{split}/{name}": self.get_submodule(name) for name in names}  # type: ignore[misc]


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
        mix: MixConfig | None = None,
        plateau: Plateau | None = None,
        seed: int = 0,
    ) -> None:
        """network: (N, 3, H, W) float -> (N, classes). lr_of: optimizer step -> learning rate.

        plateau: multiplies the rate. seed: of what training draws on the device.
        """
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.averaged: Callable[[], nn.Module] | None = None
        """Gives the network's moving average where there is one: it is validated too."""
        self.lr_scale: float | None = None if optim.finds_lr else 1.0
        """Multiplies the rate; None: it has still to be found."""
        self._optim = optim
        self._loss = loss
        self._lr_of = lr_of
        self._mixer = Mixer(mix, classes) if mix is not None and mix.mixes else None
        self._plateau = plateau
        self._seed = seed
        top5 = min(5, classes)
        self.train_acc1 = MulticlassAccuracy(classes, top_k=1, average="micro")
        self.train_acc5 = MulticlassAccuracy(classes, top_k=top5, average="micro")
        self.val, self.val_ema = Score(classes), Score(classes)
        self.val_seen = SumMetric()
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)

    @property
    def lr(self) -> float:
        """The rate of the optimizer step that comes next."""
        factor = 1.0 if self._plateau is None else self._plateau.factor
        assert self.lr_scale is not None
        return self._lr_of(self.global_step) * self.lr_scale * factor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, H, W, 3) uint8 -> (N, classes) logits."""
        logits: torch.Tensor = self.network(self._pixels(images))
        return logits

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        """(N, H, W, 3) in 0..255 -> (N, 3, H, W), normalized.

        The permuted view already lies in memory as channels_last wants it, so nothing is copied.
        """
        return ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)

    def on_train_batch_start(self, batch: ImageBatch, batch_idx: int) -> None:
        """Set the rate of the step that the batch is of: a function of where the run is."""
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.lr

    def training_step(self, batch: ImageBatch, batch_idx: int) -> torch.Tensor:
        """The loss of a batch; logged with the accuracy and the learning rate."""
        seed = step_seed(
            seed=self._seed,
            step=self.global_step,
            micro=batch_idx % self.trainer.accumulate_grad_batches,
            rank=self.global_rank,
        )
        torch.manual_seed(seed)
        logits, loss = self.answer(batch, self)
        metrics: dict[str, torch.Tensor | Metric | float] = {
            "train/loss": loss.detach(),
            "lr": self.lr,
        }
        if self._mixer is None:  # of an image that is two, no class is the right one
            self.train_acc1(logits, batch.labels)
            self.train_acc5(logits, batch.labels)
            metrics |= {"train/acc1": self.train_acc1, "train/acc5": self.train_acc5}
        self.log_dict(metrics, on_step=True, on_epoch=False, batch_size=len(batch.labels))
        return loss

    def answer(
        self, batch: ImageBatch, network: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, C) and the training loss of a batch, mixed if the recipe says so.

        network: (N, H, W, 3) -> (N, C). What is random is drawn from torch's global generators.
        """
        images, targets = batch.images, batch.labels
        if self._mixer is not None:
            images, targets = self._mixer(images, targets)
        logits = network(images)
        return logits, training_loss(logits, targets, self._loss)

    def on_validation_epoch_start(self) -> None:
        """Give every rank rank 0's normalization statistics.

        DDP is told not to broadcast them in each forward pass: ranks with different numbers of
        validation batches would wait for each other for ever.
        """
        if torch.distributed.is_initialized():
            networks = [self.network] if self.averaged is None else [self.network, self.averaged()]
            for buffer in (buffer for network in networks for buffer in network.buffers()):
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Add a batch to the sums from which the split's loss and accuracy are computed."""
        self.val.update(self(batch.images), batch.labels)
        if self.averaged is not None:
            self.val_ema.update(self.averaged()(self._pixels(batch.images)), batch.labels)
        self.val_seen.update(len(batch.labels))

    def on_validation_epoch_end(self) -> None:
        """Log sums over all samples of all ranks, so that uneven batches weigh what they hold.

        Here and not in validation_step, because a rank without a single batch has to take part.
        """
        metrics = self.val.named("val")
        if self.averaged is not None:
            metrics |= self.val_ema.named("val_ema")
        training = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if self._plateau is not None and training:
            self._plateau.step(float(metrics[self._plateau.monitor].compute()))
        self.log_dict({**metrics, "val/seen": self.val_seen})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's optimizer; on_train_batch_start sets its rate."""
        return build_optimizer(self._optim, self.network)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the rate depends on beside the step."""
        plateau = None if self._plateau is None else self._plateau.state_dict()
        checkpoint["rate"] = {"scale": self.lr_scale, "plateau": plateau}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the rate that was found, and with what validations had shown.

        Raises OtherNetworkError if the weights are of another network or number of classes.
        """
        if reason := misfit(checkpoint["state_dict"], self.state_dict()):
            raise OtherNetworkError(f"cannot resume: the checkpoint is of another model, {reason}")
        rate = checkpoint.get("rate", {})
        if self._optim.finds_lr:
            self.lr_scale = rate.get("scale", self.lr_scale)
        if self._plateau is not None and rate.get("plateau") is not None:
            self._plateau.load_state_dict(rate["plateau"])
