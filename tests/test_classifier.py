"""model/classifier.py: what the network sees, what is learned, what is counted."""

from collections.abc import Iterator
from typing import Any

import lightning
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from loaders.pipeline import Batch
from model.classifier import Classifier, LossConfig, OptimConfig


class Probe(nn.Module):
    """A linear network that keeps its last input."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(3, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        logits: torch.Tensor = self.linear(images.mean(dim=(2, 3)))
        return logits


def classifier(**loss: float) -> Classifier:
    """A classifier of four classes around a Probe, with the rate 0.1 / (1 + step)."""
    return Classifier(
        Probe(),
        classes=4,
        optim=OptimConfig(momentum=0, weight_decay=0),
        loss=LossConfig(**loss),
        lr_of=lambda step: 0.1 / (1 + step),
    )


def batch(size: int, seed: int = 0) -> Batch:
    """A batch of random images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 5, 6, 3), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(size) % 4, torch.arange(size))


def run(module: Classifier, method: str, batches: list[Batch]) -> lightning.Trainer:
    """Fit or validate over some batches, quietly."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    if method == "fit":
        trainer.fit(module, Loader(batches), Loader(batches[:1]))
    else:
        trainer.validate(module, Loader(batches), verbose=False)
    return trainer


class Loader:
    """Batches as a loader."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def test_images_are_normalized_as_torchvision_does() -> None:
    """uint8 (N, H, W, 3) becomes what ToDtype(scale) and Normalize make of it, channels_last."""
    module, images = classifier(), batch(2).images
    module(images)
    reference = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )(images.permute(0, 3, 1, 2))
    seen = module.network.seen
    assert isinstance(seen, torch.Tensor)
    torch.testing.assert_close(seen, reference, rtol=0, atol=1e-5)
    assert seen.is_contiguous(memory_format=torch.channels_last)


def test_each_step_takes_the_scheduled_rate() -> None:
    """Plain SGD moves the weights by the rate of its own step times the gradient."""
    module = classifier(label_smoothing=0.1)
    reference = Probe()
    reference.load_state_dict(module.network.state_dict())
    batches = [batch(8, seed) for seed in range(3)]
    run(module, "fit", batches)
    for step, one in enumerate(batches):
        pixels = (one.images.float() - module.mean) / module.std
        logits = reference(pixels.permute(0, 3, 1, 2))
        loss = nn.functional.cross_entropy(logits, one.labels, label_smoothing=0.1)
        for parameter, gradient in zip(
            reference.parameters(),
            torch.autograd.grad(loss, list(reference.parameters())),
            strict=True,
        ):
            parameter.data -= 0.1 / (1 + step) * gradient
    for mine, theirs in zip(module.network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_uneven_validation_batches_weigh_what_they_hold() -> None:
    """Loss and accuracy are means over images, not over batches; every image is counted."""
    module, batches = classifier(), [batch(8, 1), batch(8, 2), batch(3, 3)]
    metrics = run(module, "validate", batches).callback_metrics
    with torch.no_grad():
        logits = torch.cat([module(one.images) for one in batches])
    labels = torch.cat([one.labels for one in batches])
    assert metrics["val/seen"] == 19
    assert metrics["val/acc1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert metrics["val/loss"] == pytest.approx(
        nn.functional.cross_entropy(logits, labels).item(), rel=1e-5
    )
    assert metrics["val/acc5"] == 1


@pytest.mark.parametrize(
    ("config", "batch_size", "expected"),
    [
        (OptimConfig(base_lr=0.1), 256, 0.1),
        (OptimConfig(base_lr=0.1), 1024, 0.4),
        (OptimConfig(base_lr=0.1, lr=0.3), 1024, 0.3),  # --lr is the effective rate
    ],
)
def test_the_rate_is_scaled_by_the_global_batch(
    config: OptimConfig, batch_size: int, expected: float
) -> None:
    """base_lr is for 256 images; lr stands as it is."""
    assert config.effective_lr(batch_size) == pytest.approx(expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: OptimConfig(lr=-1.0),
        lambda: OptimConfig(momentum=-0.5),
        lambda: LossConfig(label_smoothing=1.0),
    ],
)
def test_values_out_of_range_are_refused(make: Any) -> None:
    """A ValueError names field and value."""
    with pytest.raises(ValueError, match="got "):
        make()
