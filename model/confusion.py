"""Which class was taken for which, over a whole validation and all its processes."""

from typing import Any

import lightning
import torch

from model.classifier import ImageBatch


class ConfusionMatrix(lightning.Callback):
    """Counts a validation's predictions; sums of integers, so exact over any number of ranks."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._logits = torch.empty(0)
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)
        """(classes, classes): images of the row's class that were taken for the column's."""
        self.top5 = torch.zeros(classes, dtype=torch.int64)
        """(classes,): images whose class was among the five most likely ones."""

    def on_validation_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Begin at zero, on the module's device, and listen to what the module answers."""
        self.counts = torch.zeros_like(self.counts, device=pl_module.device)
        self.top5 = torch.zeros_like(self.top5, device=pl_module.device)
        self._hook = pl_module.register_forward_hook(self._keep)

    def on_validation_batch_end(  # noqa: PLR0917  (Lightning passes so many)
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        best = self._logits.topk(min(5, self._classes)).indices
        cells = batch.labels * self._classes + best[:, 0]
        self.counts += torch.bincount(cells, minlength=self._classes**2).view_as(self.counts)
        hits = batch.labels[(best == batch.labels[:, None]).any(dim=1)]
        self.top5 += torch.bincount(hits, minlength=self._classes)

    def on_validation_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Sum over ranks; all take part, also one that had no batch."""
        self._hook.remove()
        for counts in (self.counts, self.top5):
            trainer.strategy.reduce(counts, reduce_op="sum")  # in place

    def _keep(self, module: torch.nn.Module, inputs: Any, logits: torch.Tensor) -> None:
        self._logits = logits
