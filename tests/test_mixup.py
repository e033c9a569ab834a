"""model/mixup.py: against the definitions, and its choice for each batch."""

from typing import Any

import pytest
import torch

from model.mixup import MixConfig, Mixer

CLASSES = 6
IMAGES = torch.randint(
    0, 256, (6, 10, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
LABELS = torch.arange(6)


def mix(seed: int = 0, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch with the generator at a seed."""
    torch.manual_seed(seed)
    images, targets = Mixer(MixConfig(**options), CLASSES)(IMAGES, LABELS)
    return images, targets


def own_shares(targets: torch.Tensor) -> torch.Tensor:
    """What each sample keeps of its own label; checks that the rest is its neighbour's."""
    own = targets[LABELS, LABELS]
    torch.testing.assert_close(own + targets[LABELS, LABELS - 1], torch.ones(6))
    return own


def test_mixup_blends_each_image_with_its_neighbour() -> None:
    """One share for the batch, the same for pixels and labels."""
    for seed in range(5):
        images, targets = mix(seed, mixup_alpha=1.0)
        share = own_shares(targets)[0]
        expected = share * IMAGES.float() + (1 - share) * IMAGES.roll(1, 0).float()
        torch.testing.assert_close(images, expected)


def test_cutmix_pastes_a_rectangle_of_the_neighbour() -> None:
    """The labels' shares are the areas; the bytes stay bytes, in the order they were in."""
    for seed in range(5):
        images, targets = mix(seed, cutmix_alpha=1.0)
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        own = (images == IMAGES).all(3)
        pasted = (images == IMAGES.roll(1, 0)).all(3)
        assert (own | pasted).all()
        area = 1 - own_shares(targets)[0]
        assert pasted.float().mean().item() == pytest.approx(area.item(), abs=0.02)
        rows, columns = pasted[0].any(1).sum(), pasted[0].any(0).sum()
        assert rows * columns == pasted[0].sum()


def test_each_batch_is_mixed_in_one_way_or_not_at_all() -> None:
    """As often as the recipe says."""
    kinds = {"none": 0, "cutmix": 0, "mixup": 0}
    for seed in range(400):
        images, targets = mix(
            seed, mixup_alpha=0.2, cutmix_alpha=1.0, probability=0.75, cutmix_share=2 / 3
        )
        if targets is LABELS:
            assert images is IMAGES
            kinds["none"] += 1
        else:
            kinds["cutmix" if images.dtype == torch.uint8 else "mixup"] += 1
    assert kinds == pytest.approx({"none": 100, "cutmix": 200, "mixup": 100}, abs=30)


def test_only_the_way_that_is_on_is_taken() -> None:
    """Whatever the share of the two."""
    for seed in range(20):
        assert mix(seed, mixup_alpha=0.2)[0].dtype == torch.float32
        assert mix(seed, cutmix_alpha=0.2)[0].dtype == torch.uint8


@pytest.mark.parametrize(
    ("options", "mixes"),
    [
        ({}, False),
        ({"mixup_alpha": 0.2}, True),
        ({"cutmix_alpha": 1.0}, True),
        ({"cutmix_alpha": 1.0, "probability": 0.0}, False),
    ],
)
def test_without_an_alpha_nothing_is_mixed(options: dict[str, float], mixes: bool) -> None:
    """The classifier then asks no mixer at all."""
    assert MixConfig(**options).mixes == mixes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup_alpha": -1.0}, "mixup_alpha must be at least 0, got -1"),
        ({"probability": 1.5}, "probability must be in 0..1, got 1.5"),
        ({"cutmix_share": -0.1}, "cutmix_share must be in 0..1, got -0.1"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """A ValueError names field and value."""
    with pytest.raises(ValueError, match=message):
        MixConfig(**options)
