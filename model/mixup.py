"""Mixup and cutmix of whole batches, on the device they are on."""

from dataclasses import dataclass

import torch
from torchvision.transforms import v2


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Each batch is mixed with itself, rolled by one sample; alpha 0 switches a way off."""

    mixup_alpha: float = 0.0
    """Of the Beta distribution that a batch's share of the other images is drawn from."""
    cutmix_alpha: float = 0.0
    """The same, of the area that is pasted from the other images."""
    probability: float = 1.0
    """How many batches are mixed at all."""
    cutmix_share: float = 0.5
    """Of the batches that are mixed, how many by cutmix, where both are on."""

    def __post_init__(self) -> None:
        for field in ("mixup_alpha", "cutmix_alpha"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be at least 0, got {getattr(self, field)}")
        for field in ("probability", "cutmix_share"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must be in 0..1, got {getattr(self, field)}")

    @property
    def mixes(self) -> bool:
        """Whether any batch is mixed."""
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


class Mixer:
    """torchvision's MixUp and CutMix, one of them for each batch.

    All is drawn on the CPU, from torch's global generator: nothing waits for the device.
    """

    def __init__(self, config: MixConfig, classes: int) -> None:
        self._config = config
        self._share = config.cutmix_share
        if not (config.mixup_alpha and config.cutmix_alpha):
            self._share = float(config.cutmix_alpha > 0)
        # An alpha of 0 is one that is never used.
        self._mixup = v2.MixUp(alpha=config.mixup_alpha or 1.0, num_classes=classes)
        self._cutmix = v2.CutMix(alpha=config.cutmix_alpha or 1.0, num_classes=classes)

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, H, W, 3) images, (N,) labels -> images, and (N, C) soft labels.

        Images that were mixed are float, in 0..255; a batch that is not comes back as it is.
        """
        mixed, cut = (
            torch.rand(2) < torch.tensor([self._config.probability, self._share])
        ).tolist()
        if not mixed:
            return images, labels
        if cut:
            # Permuted for its sake; what it makes lies in memory as before.
            pasted, soft = self._cutmix(images.permute(0, 3, 1, 2), labels)
            return pasted.permute(0, 2, 3, 1), soft
        blended, soft = self._mixup(images.float(), labels)
        return blended, soft
