"""model/classifier.py: what the network sees, what is learned, what is counted."""

from typing import Any

import lightning
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from loaders.pipeline import Batch
from model.classifier import Classifier
from model.loss import LossConfig
from model.mixup import MixConfig
from model.optim import OptimConfig
from model.plateau import Plateau
from model.schedule import ScheduleConfig
from tests.probes import Loader, Probe, batch


def classifier(network: nn.Module | None = None, **options: Any) -> Classifier:
    """A classifier of four classes around a Probe, with the rate 0.1 / (1 + step)."""
    values: dict[str, Any] = {
        "classes": 4,
        "optim": OptimConfig(momentum=0, weight_decay=0),
        "loss": LossConfig(),
        "lr_of": lambda step: 0.1 / (1 + step),
    }
    return Classifier(Probe() if network is None else network, **(values | options))


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
    module = classifier(loss=LossConfig(label_smoothing=0.1))
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


class Noted(Classifier):
    """Keeps what its loss is made of, and the rate of each step."""

    def answer(self, batch: Any, network: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, loss = super().answer(batch, network)
        assert isinstance(self.network, Probe)
        self.noted = [*getattr(self, "noted", []), (self.network.seen, loss.item())]
        self.rates = [
            *getattr(self, "rates", []),
            self.trainer.optimizers[0].param_groups[0]["lr"],
        ]
        return logits, loss


def noted(**options: Any) -> Noted:
    """A classifier that mixes."""
    torch.manual_seed(0)
    mix = MixConfig(mixup_alpha=1.0, cutmix_alpha=1.0)
    values: dict[str, Any] = {
        "classes": 4,
        "optim": OptimConfig(),
        "loss": LossConfig(),
        "lr_of": lambda step: 0.0,
        "mix": mix,
    }
    return Noted(Probe(), **(values | options))


def test_only_training_batches_are_mixed() -> None:
    """And then no training accuracy is logged, for no class is the right one."""
    module, one = noted(), batch(8)
    metrics = run(module, "fit", [one]).callback_metrics
    plain = classifier()
    plain(one.images)
    assert isinstance(plain.network, Probe)
    assert not torch.equal(module.noted[0][0], plain.network.seen)
    assert isinstance(module.network, Probe)
    torch.testing.assert_close(module.network.seen, plain.network.seen)  # the validation's
    assert "train/loss" in metrics
    assert "train/acc1" not in metrics


def test_what_is_drawn_depends_on_the_step_alone() -> None:
    """Not on what was drawn before; another step or seed draws something else."""
    first, second, other = noted(), noted(), noted(seed=1)
    for module in (first, second, other):
        run(module, "fit", [batch(8)] * 3)
        torch.rand(17)
    assert [loss for _, loss in first.noted] == [loss for _, loss in second.noted]
    assert len({loss for _, loss in first.noted + other.noted}) == 6


def test_the_plateaus_factor_multiplies_the_rate_from_the_next_step_on() -> None:
    """Each validation of a fit counts, one of evaluation does not."""
    plateau = Plateau(ScheduleConfig(name="plateau", plateau_patience=0, plateau_gamma=0.5))
    module = noted(plateau=plateau, lr_of=lambda step: 0.0 if step else 1e-9)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module._lr_of = lambda step: 1e-9
    trainer.fit(module, Loader([batch(8)]), Loader([batch(8, 1)]))
    # The first validation is the best so far; the weights hardly move, so the others are no better.
    assert module.rates == [1e-9, 1e-9, 0.5e-9]
    assert plateau.factor == 0.25
    trainer.validate(module, Loader([batch(8, 1)]), verbose=False)
    assert plateau.factor == 0.25


def test_a_moving_average_is_validated_beside_the_weights() -> None:
    """val/* and val_ema/* of one pass; the average sees the same pixels."""
    module, average, one = classifier(), Probe(), batch(8)
    module.averaged = lambda: average
    metrics = run(module, "validate", [one]).callback_metrics
    assert isinstance(module.network, Probe)
    assert torch.equal(average.seen, module.network.seen)
    for name, network in (("val", module.network), ("val_ema", average)):
        loss = nn.functional.cross_entropy(network(average.seen), one.labels)
        assert metrics[f"{name}/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["val/loss"] != metrics["val_ema/loss"]
    assert "val_ema/acc1" in metrics
    assert "val_ema/loss" not in run(classifier(), "validate", [one]).callback_metrics


def test_a_rate_that_was_found_is_kept_in_the_checkpoint() -> None:
    """Where the recipe states one, the checkpoint's does not matter."""
    found = classifier(optim=OptimConfig(lr="auto"))
    assert found.lr_scale is None
    found.lr_scale = 0.3
    checkpoint: dict[str, Any] = {"state_dict": found.state_dict()}
    found.on_save_checkpoint(checkpoint)
    resumed, stated = classifier(optim=OptimConfig(lr="auto")), classifier()
    for module in (resumed, stated):
        module.on_load_checkpoint(checkpoint)
    assert (resumed.lr_scale, stated.lr_scale) == (0.3, 1.0)
