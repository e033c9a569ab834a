"""model/resnet9.py: its size, its shapes, and that it learns."""

import pytest
import torch
from torch import nn

from model.resnet9 import build_resnet9


@pytest.mark.parametrize(("width", "millions"), [(32, 1.7), (64, 6.6)])
def test_it_has_as_many_weights_as_the_original(width: int, millions: float) -> None:
    """6.6 million at width 64, about a quarter at half of it."""
    weights = sum(p.numel() for p in build_resnet9(10, width).parameters())
    assert weights / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("width", [32, 64])
def test_multiply_adds_are_those_that_are_stated(width: int) -> None:
    """94 and 377 million an image of 32 pixels."""
    network = build_resnet9(10, width).eval()
    total = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d)
        total += output[0].numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    network(torch.zeros(1, 3, 32, 32))
    assert round(total / 1e6) == {32: 95, 64: 379}[width]


@pytest.mark.parametrize("size", [8, 32, 64])
def test_any_size_of_image_gives_logits(size: int) -> None:
    """(N, 3, H, W) -> (N, classes)."""
    assert build_resnet9(7, 4)(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_it_learns_a_batch_by_heart() -> None:
    """Gradients reach every weight, and the loss of four images falls to nearly nothing."""
    torch.manual_seed(0)
    network = build_resnet9(4, 8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    for _ in range(40):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
        optimizer.step()
    assert float(loss.detach()) < 0.1
