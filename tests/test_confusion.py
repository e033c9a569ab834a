"""model/confusion.py: counts agree with a plain loop, on any number of ranks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from model.confusion import ConfusionMatrix

CLASSES = 7


class Answers(nn.Module):
    """Gives the logits that it is called with."""

    device = torch.device("cpu")

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def confusion_of(
    batches: list[tuple[torch.Tensor, torch.Tensor]], world: int = 1
) -> ConfusionMatrix:
    """What rank 0 of `world` equal ranks counts."""

    def summed(counts: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "sum"
        return counts.mul_(world)

    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(reduce=summed))
    module: Any = Answers()
    matrix = ConfusionMatrix(CLASSES)
    for _ in range(2):  # the second validation begins at zero
        matrix.on_validation_epoch_start(trainer, module)
        for logits, labels in batches:
            module(logits)
            matrix.on_validation_batch_end(trainer, module, None, SimpleNamespace(labels=labels), 0)
        matrix.on_validation_epoch_end(trainer, module)
    assert not module._forward_hooks
    return matrix


@pytest.mark.parametrize("world", [1, 3])
def test_counts_are_those_of_a_loop(world: int) -> None:
    """Each image is in the cell of its class and its prediction; top-5 counts hits by class."""
    torch.manual_seed(0)
    batches = [(torch.randn(n, CLASSES), torch.randint(CLASSES, (n,))) for n in (9, 4)]
    confusion, top5 = torch.zeros(CLASSES, CLASSES), torch.zeros(CLASSES)
    for logits, labels in batches:
        for row, label in zip(logits, labels, strict=True):
            confusion[label, row.argmax()] += world
            top5[label] += world * int(label in row.argsort(descending=True)[:5])
    matrix = confusion_of(batches, world)
    assert torch.equal(matrix.counts, confusion.long())
    assert torch.equal(matrix.top5, top5.long())


def test_a_rank_without_batches_counts_nothing() -> None:
    """It takes part in the sum with zeros."""
    assert not confusion_of([]).counts.any()
